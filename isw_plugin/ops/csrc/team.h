// Threads that stay together for a stretch of layers, helping the one that leads. The leader waits for tasks that were
// begun, never for a thread that has not: a core that another program took costs its part of the work, not its time.
#pragma once
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "processors.h"

namespace isw {

// Whether ready() came true within this time.
template <typename Ready>
bool spin(std::chrono::microseconds time, Ready ready) {
  const auto until = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

template <typename Ready>
void wait_until(Ready ready, std::chrono::microseconds patience) {
  constexpr std::chrono::microseconds nap{20};
  if (spin(patience, ready)) return;
  while (!ready()) std::this_thread::sleep_for(nap);
}

// The tasks of one layer. Every worker begins with the same part of them in every layer, so that it finds the instances
// that it wrote in its own cache; between cores without a common one a map travels for longer than it takes to compute.
// When done it helps the others, task by task: instances keep different numbers of channels.
class Shares {
 public:
  using Body = void (*)(void* state, int64_t task, int64_t worker);

  explicit Shares(int64_t workers) : shares_(workers) {}

  void begin(int64_t tasks, Body body, void* state) {
    body_ = body;
    state_ = state;
    for (int64_t i = 0, count = shares_.size(); i < count; ++i) {
      shares_[i].next = tasks * i / count;
      shares_[i].end = tasks * (i + 1) / count;
    }
  }

  void work(int64_t worker) {
    for (int64_t i = 0, count = shares_.size(); i < count; ++i) {
      Share& share = shares_[(worker + i) % count];
      for (int64_t task = share.next++; task < share.end; task = share.next++) body_(state_, task, worker);
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  std::vector<Share> shares_;
  Body body_ = nullptr;
  void* state_ = nullptr;
};

// The leader, who made it, is worker 0; others help() until they are dismissed.
class Team {
 public:
  explicit Team(int64_t workers) : workers(workers), shares_(workers) { std::fegetenv(&arithmetic_); }

  // body(state, task, worker) for every task.
  void run(int64_t tasks, Shares::Body body, void* state) {
    if (tasks == 1) return body(state, 0, 0);
    shares_.begin(tasks, body, state);
    ++layer_;  // odd: open
    work(0);
    ++layer_;
    wait_until([this] { return inside_ == 0; }, patience_);
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));  // it ends in this thread
  }

  void help(int64_t worker) {
    std::fesetenv(&arithmetic_);  // so that results do not depend on who computed what
    for (int64_t seen = 0;;) {
      wait_until([&] { return layer_ != seen; }, patience_);
      seen = layer_;
      if (seen == dismissed) return;
      if (seen % 2 == 0) continue;
      ++inside_;  // before the second look: who opens the next layer waits for those inside
      if (layer_ == seen) work(worker);
      --inside_;
    }
  }

  void dismiss() { layer_ = dismissed; }

  const int64_t workers;
  // Of helpers: where the leader may go, but where it is. Linux wakes a thread on the processor of who wakes it when both
  // were busy lately, though another idles.
  const Affinity affinity = Affinity::own().elsewhere();

 private:
  static constexpr int64_t dismissed = -1;

  void work(int64_t worker) {
    try {
      shares_.work(worker);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }

  const std::chrono::microseconds patience_ = patience();
  std::fenv_t arithmetic_;
  Shares shares_;
  alignas(64) std::atomic<int64_t> layer_{0};
  alignas(64) std::atomic<int64_t> inside_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace isw
