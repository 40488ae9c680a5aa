// Weights of kept outputs, side by side as in a block of their own, so that a tile of pixels reads them as any others.
#pragma once
#include <algorithm>

#include "api.h"
#include "element.h"
#include "vec.h"

namespace isw {
namespace {

#if defined(__AVX512F__)
// Vectors of which some lanes are kept.
template <typename T>
class Gather {
 public:
  // outputs: some of those of a group, in order; `inputs` rows of weights, of so many taps, are in a block.
  Gather(const int32_t* outputs, int64_t count, int64_t group_first, int64_t inputs, int64_t taps) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t output = outputs[i] - group_first, vector = output % block / lanes * lanes;
      const int64_t from = output / block * block * inputs * taps + vector;
      if (i == 0 || from != from_[pieces_ - 1]) {
        from_[pieces_] = from;
        to_[pieces_] = i;
        lanes_[pieces_++] = 0;
      }
      lanes_[pieces_ - 1] |= static_cast<uint16_t>(1u << output % lanes);
    }
  }
  // A row; up to a vector of zeros is written behind it.
  void copy(const T* in, int64_t ahead, T* out) const {
    asm volatile("" ::: "memory");  // else GCC 12 takes what is written for a part of this object, and leaves callers out
    for (int64_t i = 0; i < pieces_; ++i) {
      __builtin_prefetch(in + ahead + from_[i], 0, 2);
      store(out + to_[i], (Vec)_mm512_maskz_compress_ps(lanes_[i], (__m512)load(in + from_[i])));
    }
  }

 private:
  int64_t pieces_ = 0;
  int64_t from_[block], to_[block];
  uint16_t lanes_[block];
};
#else
template <typename T>
class Gather {
 public:
  Gather(const int32_t* outputs, int64_t count, int64_t group_first, int64_t inputs, int64_t taps) : count_(count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t output = outputs[i] - group_first;
      from_[i] = output / block * block * inputs * taps + output % block;
    }
  }
  void copy(const T* in, int64_t, T* out) const {
    for (int64_t i = 0; i < count_; ++i) out[i] = in[from_[i]];
  }

 private:
  int64_t count_;
  int64_t from_[block];
};
#endif

}  // namespace
}  // namespace isw
