// Memory of one call: nothing is static, so calls on many threads never meet.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "api.h"

namespace isw {
namespace {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (count < 0 || count > most || posix_memalign(&data_, 64, bytes ? bytes : 64)) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  T* get() const { return static_cast<T*>(data_); }

 private:
  static constexpr int64_t most = int64_t(1) << 48;  // elements; more are an overflow's

  void* data_ = nullptr;
};

// body(task, worker) for every task.
template <typename Body>
void parallel(const Runner& runner, int64_t tasks, Body body) {
  runner.run(
      runner.workers, tasks,
      [](void* state, int64_t task, int64_t worker) { (*static_cast<Body*>(state))(task, worker); }, &body);
}

}  // namespace
}  // namespace isw
