// What threads that help must do, and quotas of control groups; test_helpers.py compiles and runs it.
#include "helpers.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "processors.h"

namespace {

using isw::Helpers;

// body(task) for every task, as the kernels ask for it.
template <typename Body>
void run(int64_t workers, int64_t tasks, Body body) {
  Helpers::instance().run(
      workers, tasks, [](void* state, int64_t task, int64_t) { (*static_cast<Body*>(state))(task); }, &body);
}

bool each_once(int64_t workers, int64_t tasks) {
  std::vector<std::atomic<int>> done(tasks);
  run(workers, tasks, [&](int64_t task) { ++done[task]; });
  return std::all_of(done.begin(), done.end(), [](const std::atomic<int>& times) { return times == 1; });
}

bool many_callers() {
  std::atomic<bool> right{true};
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 8; ++caller)
    callers.emplace_back([&, caller] {
      for (int64_t i = 0; i < 200; ++i) right = right && each_once(1 + caller % 4, i % 37);
    });
  for (auto& thread : callers) thread.join();
  return right;
}

// The only helper is held up within another's task.
bool alone() {
  std::atomic<int> held{0};
  std::atomic<bool> released{false};
  std::thread other([&] {
    run(2, 2, [&](int64_t) {
      ++held;
      while (!released) std::this_thread::yield();
    });
  });
  while (held < 2) std::this_thread::yield();
  const bool right = each_once(2, 100);
  released = true;
  other.join();
  return right;
}

bool raises() {
  try {
    run(3, 50, [](int64_t task) {
      if (task == 7) throw std::runtime_error("seven");
    });
  } catch (const std::runtime_error& error) {
    return !strcmp(error.what(), "seven") && each_once(3, 50);
  }
  return false;
}

bool forks() {
  const pid_t child = fork();
  if (child == 0) _exit(each_once(2, 100) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

// No argument: all of the above; "sanitized": what ThreadSanitizer can follow; two folders: quotas in them.
int main(int count, char** words) {
  if (count == 4) {
    const int64_t quota = strcmp(words[1], "2") ? isw::least_quota(words[2], words[3], isw::old_quota_of)
                                               : isw::least_quota(words[2], words[3], isw::quota_of);
    printf("%lld\n", quota == isw::unlimited ? -1LL : static_cast<long long>(quota));
    return 0;
  }
  printf("many %d alone %d raises %d forks %d\n", many_callers(), alone(), raises(), count == 2 || forks());
}
