// Memory of large maps. malloc gives blocks of this size back to the system and gets them again page by page, which
// can cost more than the layer that fills them; so blocks that were freed wait here for the next map of their size.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/safe_numerics.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace isw {
namespace {

class MapMemory {
 public:
  static constexpr size_t least = 1 << 20;  // bytes; smaller maps come from malloc
  static constexpr size_t most = 256 << 20;  // bytes that wait for a next map, in all
  static constexpr size_t page = 2 << 20;  // bytes of a huge page, of which a large map needs few

  // Of the whole process, and never destroyed: tensors may outlive any static object.
  static MapMemory& instance() {
    static auto* memory = new MapMemory();
    return *memory;
  }

  at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
    uint64_t bytes = 0;
    const bool overflows =
        c10::safe_multiplies_u64(sizes, &bytes) || c10::mul_overflows(bytes, uint64_t(like.element_size()), &bytes);
    if (overflows || bytes < least) return at::empty(sizes, like.options());  // which refuses what overflows
    const size_t block = (bytes + page - 1) / page * page;
    return at::from_blob(take(block), sizes, [this, block](void* data) { give(data, block); }, like.options());
  }

  void release() {
    const std::lock_guard<std::mutex> guard(lock_);
    clear();
  }

 private:
  void* take(size_t size) {
    {
      const std::lock_guard<std::mutex> guard(lock_);
      // The block that was freed last is the likeliest to be in the cache.
      if (auto found = waiting_.upper_bound(size); found != waiting_.begin() && (--found)->first == size) {
        void* data = found->second;
        waiting_.erase(found);
        held_ -= size;
        return data;
      }
    }
    void* data = nullptr;
    if (posix_memalign(&data, page, size)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);  // advice: it may not be taken
#endif
    return data;
  }

  void give(void* data, size_t size) {
    if (size > most) return free(data);
    const std::lock_guard<std::mutex> guard(lock_);
    if (held_ + size > most) clear();  // sizes of an earlier batch, as likely as not
    waiting_.emplace(size, data);
    held_ += size;
  }

  void clear() {
    for (const auto& [size, data] : waiting_) free(data);
    waiting_.clear();
    held_ = 0;
  }

  std::mutex lock_;
  std::multimap<size_t, void*> waiting_;
  size_t held_ = 0;
};

}  // namespace
}  // namespace isw
