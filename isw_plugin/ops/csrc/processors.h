// What a thread may use: how many processors, by its affinity mask and the quotas of its control groups, and for how long
// it may keep one that it does not need. Needs no torch header.
#pragma once
#include <sys/types.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace isw {

constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();

// Whole processors of time within a period, at least one; a quota that is spent stops every thread.
inline int64_t whole_processors(double quota, double period) {
  return quota > 0 && period > 0 ? std::max<int64_t>(1, static_cast<int64_t>(quota / period)) : unlimited;
}

// "max 100000" or "150000 100000" (version 2 of control groups).
inline int64_t quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  std::ifstream(folder + "/cpu.max") >> quota >> period;
  return quota.empty() || quota == "max" ? unlimited : whole_processors(std::atof(quota.c_str()), period);
}

// The same of version 1, where -1 is no quota.
inline int64_t old_quota_of(const std::string& folder) {
  double quota = 0, period = 0;
  std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
  std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  return whole_processors(quota, period);
}

// The least of a group and those that hold it. A container may see its group as the root.
template <typename Quota>
int64_t least_quota(const std::string& root, std::string group, Quota quota) {
  int64_t least = quota(root);
  for (; group.size() > 1; group.erase(group.rfind('/'))) least = std::min(least, quota(root + group));
  return least;
}

inline int64_t quota_of_groups() {
  int64_t least = unlimited;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/group" or "4:cpu,cpuacct:/group"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string kinds = "," + line.substr(first + 1, second - first - 1) + ",", group = line.substr(second + 1);
    if (kinds == ",,") least = std::min(least, least_quota("/sys/fs/cgroup", group, quota_of));
    if (kinds.find(",cpu,") != std::string::npos)
      least = std::min(least, least_quota("/sys/fs/cgroup/cpu", group, old_quota_of));
  }
  return least;
}

inline int64_t milliseconds() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::milliseconds(1); }

// The processors that a thread may use.
class Affinity {
 public:
  // Of the calling thread; looked up again after a second, as masks and quotas change while a process runs.
  static const Affinity& own() {
    thread_local Affinity own;
    thread_local int64_t until = 0;
    const int64_t now = milliseconds();
    if (now >= until) {
      own.read();
      until = now + 1000;
    }
    return own;
  }

#if defined(__linux__)
  int64_t count() const { return known_ ? CPU_COUNT(&mask_) : unlimited; }
  bool operator==(const Affinity& other) const {
    return known_ == other.known_ && (!known_ || CPU_EQUAL(&mask_, &other.mask_));
  }
  // Without the processor that this thread is on, if others are left.
  Affinity elsewhere() const {
    Affinity others = *this;
    const int here = sched_getcpu();
    if (known_ && here >= 0 && here < CPU_SETSIZE) CPU_CLR(here, &others.mask_);
    return others.count() > 0 ? others : *this;
  }
  void apply_to(pid_t thread) const {
    if (known_) sched_setaffinity(thread, sizeof mask_, &mask_);
  }

 private:
  void read() { known_ = sched_getaffinity(0, sizeof mask_, &mask_) == 0; }  // fails above 1024 processors

  cpu_set_t mask_{};
  bool known_ = false;
#else
  int64_t count() const { return unlimited; }
  bool operator==(const Affinity&) const { return true; }
  Affinity elsewhere() const { return *this; }
  void apply_to(pid_t) const {}

 private:
  void read() {}
#endif
};

inline pid_t own_thread() {
#if defined(__linux__)
  return static_cast<pid_t>(syscall(SYS_gettid));
#else
  return 0;
#endif
}

inline int64_t usable_processors() {
  static std::atomic<int64_t> quota{0}, until{0};
  const int64_t now = milliseconds();
  if (now >= until) {
    quota = quota_of_groups();
    until = now + 1000;
  }
  return std::min(Affinity::own().count(), quota.load());
}

// How long a thread that waits for another keeps its processor. One that was taken away again and again lately is wanted by
// others, maybe by whom it waits for; where nobody wants it, sleep costs more than it gives.
inline std::chrono::microseconds patience() {
  constexpr std::chrono::microseconds alone{300}, crowded{20};
#if defined(__linux__)
  constexpr int64_t window = 100;  // milliseconds; the system's own work takes it some 3 times in these
  constexpr long often = 8;
  thread_local long before = 0, lately = 0;  // times that it was taken, until this window began and in the last one
  thread_local int64_t begun = 0;
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  const int64_t now = milliseconds();
  const long taken = usage.ru_nivcsw - before;
  if (now - begun >= window) lately = now - begun < 2 * window ? taken : 0, before = usage.ru_nivcsw, begun = now;
  return std::max(taken, lately) > often ? crowded : alone;
#else
  return alone;
#endif
}

}  // namespace isw
