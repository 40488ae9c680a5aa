// What teams and the threads that help them must do, and quotas of control groups; test_team.py compiles and runs it.
#include "helpers.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "processors.h"

static thread_local bool starved = false;  // no memory for this thread

void* operator new(size_t size) {
  void* memory = starved ? nullptr : malloc(size);
  return memory ? memory : throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }

namespace {

using isw::Helpers;

// body(task) for every task of one layer, as the kernels ask for it.
template <typename Body>
void layer(isw::Team& team, int64_t tasks, Body body) {
  team.run(tasks, [](void* state, int64_t task, int64_t) { (*static_cast<Body*>(state))(task); }, &body);
}

template <typename Body>
void run(int64_t workers, int64_t tasks, Body body) {
  Helpers::instance().with_team(workers, [&](isw::Team& team) { layer(team, tasks, body); });
}

// Layer after layer of one team; plain numbers, as a layer reads what the one before it wrote.
bool each_once(int64_t workers, int64_t tasks) {
  constexpr int layers = 9;
  std::vector<int> done(tasks);
  Helpers::instance().with_team(workers, [&](isw::Team& team) {
    for (int i = 0; i < layers; ++i) layer(team, tasks, [&](int64_t task) { ++done[(task + i) % tasks]; });
  });
  return std::all_of(done.begin(), done.end(), [](int times) { return times == layers; });
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

// Helpers that cannot be made are done without.
bool starves() {
  std::atomic<int> done{0};
  starved = true;
  run(20, 100, [&](int64_t) { ++done; });
  starved = false;
  sigset_t held;
  pthread_sigmask(SIG_SETMASK, nullptr, &held);
  return done == 100 && !sigismember(&held, SIGTERM) && each_once(20, 100);
}

// Whether all tasks run on processors that this thread may use, and helpers on others than it, if there are others.
bool within_own() {
  cpu_set_t own;
  sched_getaffinity(0, sizeof own, &own);
  const std::thread::id leader = std::this_thread::get_id();
  std::atomic<bool> right{true};
  const int before = sched_getcpu();
  Helpers::instance().with_team(30, [&](isw::Team& team) {
    const bool stayed = sched_getcpu() == before;
    layer(team, 60, [&](int64_t) {
      cpu_set_t mask, both;
      sched_getaffinity(0, sizeof mask, &mask);
      CPU_AND(&both, &mask, &own);
      if (!CPU_EQUAL(&both, &mask)) right = false;
      const bool helps = std::this_thread::get_id() != leader;
      if (helps && stayed && CPU_COUNT(&own) > 1 && CPU_ISSET(before, &mask)) right = false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  });
  return right;
}

// Whether all tasks round as this thread does, which is how it treats denormal numbers, too.
bool arithmetic() {
  std::atomic<bool> right{true};
  std::fesetround(FE_UPWARD);
  run(4, 40, [&](int64_t) {
    if (std::fegetround() != FE_UPWARD) right = false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  });
  std::fesetround(FE_TONEAREST);
  return right;
}

// A caller that is bound to one processor makes helpers, which others use later.
bool bound() {
  bool right = false;
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    right = sched_setaffinity(0, sizeof one, &one) == 0 && isw::usable_processors() == 1 && within_own();
  }).join();
  return right && within_own();
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
  const bool many = many_callers(), own = alone(), error = raises(), memory = starves(), processors = bound(),
             rounding = arithmetic();
  printf("many %d alone %d raises %d starves %d bound %d rounds %d forks %d\n", many, own, error, memory, processors,
         rounding, count == 2 || forks());
}
