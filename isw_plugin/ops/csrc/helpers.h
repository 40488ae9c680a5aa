// Threads that help whoever runs tasks. A caller never waits for a helper that has not begun: it does what nobody took,
// so a core that another program took away costs its part of the work, not its time. Needs no torch header.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "processors.h"

namespace isw {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Whether ready() came true within this time.
template <typename Ready>
bool spin(std::chrono::microseconds time, Ready ready) {
  const auto until = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; ++i, pause_briefly())
      if (ready()) return true;
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

// One call's tasks. Every worker begins with the same part of them in every layer, so that it finds the instances that
// it wrote in its own cache; between cores without a common one a map travels for longer than it takes to compute. When
// done it takes over what others have not begun: instances keep different numbers of channels.
class Job {
 public:
  using Body = void (*)(void*, int64_t, int64_t);

  Job(int64_t workers, int64_t tasks, Body body, void* state) : workers(workers), shares_(workers), body_(body), state_(state) {
    for (int64_t i = 0; i < workers; ++i) {
      shares_[i].next = tasks * i / workers;
      shares_[i].end = tasks * (i + 1) / workers;
    }
  }

  void work(int64_t worker) {
    try {
      for (int64_t i = 0; i < workers; ++i) {
        Share& share = shares_[(worker + i) % workers];
        for (int64_t task = share.next++; task < share.end; task = share.next++) body_(state_, task, worker);
      }
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (failed_) std::rethrow_exception(failure_);
  }
  bool has_work() const {
    return std::any_of(shares_.begin(), shares_.end(), [](const Share& share) { return share.next < share.end; });
  }

  const int64_t workers;
  const Affinity& affinity = Affinity::own();  // of the caller
  std::atomic<int64_t> inside{0};              // helpers; changed under the lock

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  std::vector<Share> shares_;
  const Body body_;
  void* const state_;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

class Helpers {
 public:
  // Of the whole process, and never destroyed: threads may run when it ends. A forked child has none and makes its own.
  static Helpers& instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current() = new Helpers(); });
    (void)registered;
    return *current();
  }

  // body(state, task, worker) for every task, on this thread and up to workers - 1 others.
  void run(int64_t workers, int64_t tasks, Job::Body body, void* state) {
    Job job(std::min(workers, tasks), tasks, body, state);
    if (job.workers > 1) open(job);
    job.work(0);
    if (job.workers > 1) close(job);
    job.rethrow();
  }

 private:
  static constexpr std::chrono::microseconds patience{100};  // of a helper, until the next layer
  static constexpr std::chrono::microseconds haste{20};  // of a caller, while helpers finish their last task

  // The same worker in every job.
  struct alignas(64) Helper {
    std::atomic<uint64_t> calls{0};
    bool asleep = false;
    std::condition_variable called;
  };

  using Guard = std::unique_lock<std::mutex>;

  // It is held for a fraction of a microsecond, mostly when a layer begins and ends, by all at once.
  Guard locked() {
    if (!spin(haste, [this] { return lock_.try_lock(); })) lock_.lock();
    return Guard(lock_, std::adopt_lock);
  }

  static Helpers*& current() {
    static Helpers* helpers = new Helpers();
    return helpers;
  }

  void open(Job& job) {
    const Guard guard = locked();
    jobs_.push_back(&job);
    while (static_cast<int64_t>(helpers_.size()) < job.workers - 1 && start()) {}
    const int64_t count = std::min<int64_t>(job.workers - 1, helpers_.size());
    for (int64_t i = 0; i < count; ++i) {
      ++helpers_[i].calls;
      if (helpers_[i].asleep) helpers_[i].called.notify_one();
    }
  }

  void close(Job& job) {
    {
      const Guard guard = locked();
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    const auto is_done = [&] { return job.inside.load(std::memory_order_acquire) == 0; };
    if (spin(haste, is_done)) return;
    Guard guard = locked();
    left_.wait(guard, is_done);
  }

  // False: the system has no thread or memory left; whoever calls works alone. Signals are for the program's own threads.
  bool start() {
    sigset_t all, held;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &held);
    const size_t before = helpers_.size();
    bool started = true;
    try {
      helpers_.emplace_back();
      std::thread([this, worker = static_cast<int64_t>(helpers_.size())] { help(worker); }).detach();
    } catch (...) {  // no memory is as good a reason; open() must not fail once it listed its job
      if (helpers_.size() > before) helpers_.pop_back();
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &held, nullptr);
    return started;
  }

  // Wherever the caller of its job may run. Else one that is bound to a processor would bind whom it makes, for good.
  [[noreturn]] void help(int64_t worker) {
    Affinity affinity = Affinity::own();
    Guard guard = locked();
    Helper& self = helpers_[worker - 1];
    for (;;) {
      if (Job* job = job_for(worker)) {
        ++job->inside;
        guard.unlock();
        if (affinity != job->affinity) (affinity = job->affinity).apply();
        job->work(worker);
        guard = locked();
        if (--job->inside == 0) left_.notify_all();
      } else {
        wait(self, guard);
      }
    }
  }

  Job* job_for(int64_t worker) const {
    const auto found = std::find_if(jobs_.begin(), jobs_.end(), [&](const Job* job) {
      return worker < job->workers && job->has_work();
    });
    return found == jobs_.end() ? nullptr : *found;
  }

  // Until it is called again.
  void wait(Helper& self, Guard& guard) {
    const auto is_called = [&, seen = self.calls.load()] { return self.calls != seen; };
    guard.unlock();
    const bool called = spin(patience, is_called);
    guard = locked();
    if (called) return;
    self.asleep = true;
    self.called.wait(guard, is_called);
    self.asleep = false;
  }

  std::mutex lock_;
  std::condition_variable left_;
  std::vector<Job*> jobs_;  // open ones, the oldest first
  std::deque<Helper> helpers_;
};

}  // namespace
}  // namespace isw
