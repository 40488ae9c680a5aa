// The process's threads that help teams. Needs no torch header.
#pragma once
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "team.h"

namespace isw {

class Helpers {
 public:
  // Never destroyed: threads may run when the process ends. A forked child has none and makes its own.
  static Helpers& instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current() = new Helpers(); });
    (void)registered;
    return *current();
  }

  // body(team): a team of the calling thread and whoever is free, then or later.
  template <typename Body>
  void with_team(int64_t workers, Body body) {
    const auto call = std::make_shared<Call>(workers);
    open(call);
    struct Closing {
      Helpers& helpers;
      const std::shared_ptr<Call>& call;
      ~Closing() { helpers.close(call); }
    } closing{*this, call};
    body(call->team);
  }

 private:
  // Held by whoever helps: its leader does not wait for them to leave.
  struct Call {
    explicit Call(int64_t workers) : team(workers), vacancies(workers - 1) {}
    Team team;
    int64_t vacancies;  // under the lock
  };
  struct Helper {
    pid_t thread;
    Affinity affinity;  // under the lock

    void go_to(const Affinity& wanted) {
      if (!(affinity == wanted)) wanted.apply_to(thread);
      affinity = wanted;
    }
  };
  using Guard = std::unique_lock<std::mutex>;

  static Helpers*& current() {
    static Helpers* helpers = new Helpers();
    return helpers;
  }

  void open(const std::shared_ptr<Call>& call) {
    const Guard guard(lock_);
    calls_.push_back(call);
    vacancies_ += call->vacancies;
    while (count_ < call->vacancies && start()) {}
    for (Helper* helper : idle_) helper->go_to(call->team.affinity);  // before they wake
    for (int64_t i = 0; i < call->vacancies; ++i) called_.notify_one();
  }

  void close(const std::shared_ptr<Call>& call) {
    call->team.dismiss();
    const Guard guard(lock_);
    calls_.erase(std::find(calls_.begin(), calls_.end(), call));
    vacancies_ -= call->vacancies;
  }

  // False: the system has no thread or memory left; whoever calls works alone. Signals are for the program's own threads.
  bool start() {
    sigset_t all, held;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &held);
    bool started = true;
    try {
      idle_.reserve(count_ + 1);
      std::thread helper([this] { help(); });
#if defined(__linux__)
      pthread_setname_np(helper.native_handle(), "isw helper");
#endif
      helper.detach();
      ++count_;
    } catch (...) {  // no memory is as good a reason
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &held, nullptr);
    return started;
  }

  [[noreturn]] void help() {
    const auto is_called = [this] { return vacancies_ > 0; };
    Helper self{own_thread(), Affinity::own()};
    for (;;) {
      spin(patience(), is_called);
      Guard guard(lock_);
      idle_.push_back(&self);
      called_.wait(guard, is_called);
      idle_.erase(std::find(idle_.begin(), idle_.end(), &self));
      const auto place = std::find_if(calls_.begin(), calls_.end(), [](const auto& each) { return each->vacancies > 0; });
      const std::shared_ptr<Call> call = *place;
      const int64_t worker = call->team.workers - call->vacancies--;
      --vacancies_;
      self.go_to(call->team.affinity);
      guard.unlock();
      call->team.help(worker);
    }
  }

  std::mutex lock_;
  std::condition_variable called_;
  std::vector<std::shared_ptr<Call>> calls_;  // open ones, the oldest first
  std::vector<Helper*> idle_;
  std::atomic<int64_t> vacancies_{0};  // of all; changed under the lock
  int64_t count_ = 0;
};

}  // namespace isw
