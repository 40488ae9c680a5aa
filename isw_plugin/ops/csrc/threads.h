// The threads that kernels run on: OpenMP's, as PyTorch's layers; for a stretch of layers a team of the engine's own.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>

#include "api.h"
#include "helpers.h"
#include "processors.h"

extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int);  // in PyTorch's library where it has MKL

namespace isw {

inline thread_local Team* led = nullptr;  // by this thread

inline void run_by_team(int64_t, int64_t tasks, Shares::Body body, void* state) { led->run(tasks, body, state); }

inline void run_in_region(int64_t workers, int64_t tasks, Shares::Body body, void* state) {
  const int64_t count = std::min(workers, tasks);
  Shares shares(count);
  shares.begin(tasks, body, state);
  at::parallel_for(0, count, 1, [&](int64_t worker, int64_t) { shares.work(worker); });
}

inline Runner runner() {
  if (led) return {led->workers, run_by_team};
  return {std::max(1, at::get_num_threads()), run_in_region};
}

// While it exists, this thread leads a team and PyTorch's own operators run on it alone: OpenMP's threads go on looking
// for work for milliseconds, on the cores that the team needs.
class Leading {
 public:
  explicit Leading(Team& team) : threads_(omp_get_max_threads()), of_mkl_(set_mkl(1)) {
    omp_set_num_threads(1);
    led = &team;
  }
  ~Leading() {
    led = nullptr;
    omp_set_num_threads(threads_);
    set_mkl(of_mkl_);
  }

 private:
  static int set_mkl(int threads) { return MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(threads) : 0; }

  const int threads_, of_mkl_;
};

// body(), whose layers run on one team.
template <typename Body>
void with_team(Body body) {
  const int64_t threads = at::get_num_threads();
  if (threads < 2 || at::in_parallel_region()) return body();
  Helpers::instance().with_team(std::min(threads, usable_processors()), [&](Team& team) {
    const Leading leading(team);
    body();
  });
}

}  // namespace isw
