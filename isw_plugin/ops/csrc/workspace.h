// Memory of calls. Threads share none, so calls on many of them never meet.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "api.h"

namespace isw {
namespace {

// What a thread keeps from one call to the next: malloc takes about half a microsecond for an aligned block, often one
// that no cache holds. Buffers end in reverse order, so it is a stack; it grows when it is empty, to what was wanted.
class Scratch {
 public:
  static Scratch& own() {
    static thread_local Scratch scratch;
    return scratch;
  }
  ~Scratch() { free(block_); }

  // Null: there is no room.
  void* take(size_t bytes) {
    if (used_ + bytes <= most) wanted_ = std::max(wanted_, used_ + bytes);
    if (used_ == 0 && wanted_ > size_) grow();
    if (used_ + bytes > size_) return nullptr;
    used_ += bytes;
    return static_cast<char*>(block_) + used_ - bytes;
  }
  void give_back(size_t bytes) { used_ -= bytes; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t most = 0;  // each buffer is to have an end that is watched
#else
  static constexpr size_t most = size_t(8) << 20;
#endif

  void grow() {
    free(block_);
    size_ = posix_memalign(&block_, 64, wanted_) ? 0 : wanted_;
    if (!size_) block_ = nullptr;
  }

  void* block_ = nullptr;
  size_t size_ = 0, used_ = 0, wanted_ = 0;
};

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_((static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64) {
    if (count < 0 || count > most) throw std::bad_alloc();
    data_ = Scratch::own().take(bytes_);
    if (data_) return;
    if (posix_memalign(&data_, 64, bytes_ ? bytes_ : 64)) throw std::bad_alloc();
    is_of_heap_ = true;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (is_of_heap_)
      free(data_);
    else
      Scratch::own().give_back(bytes_);
  }
  T* get() const { return static_cast<T*>(data_); }

 private:
  static constexpr int64_t most = int64_t(1) << 48;  // elements; more are an overflow's

  const size_t bytes_;
  void* data_ = nullptr;
  bool is_of_heap_ = false;
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
