// How maps and weights are kept: float, or bfloat16, which loads widen to float and stores take rounded.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "api.h"
#include "vec.h"

namespace isw {
namespace {

template <typename T>
constexpr int64_t line_size = 64 / sizeof(T);  // elements of a cache line

// bfloat16 is the upper half of a float.
typedef uint32_t Bits __attribute__((vector_size(lanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(lanes * 2), aligned(2), may_alias));

ISW_INLINE Vec widen(Halves halves) { return (Vec)(__builtin_convertvector(halves, Bits) << 16); }
ISW_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
ISW_INLINE float widen(float x) { return x; }

ISW_INLINE Vec load(const BFloat16* p) { return widen(*reinterpret_cast<const UnalignedHalves*>(p)); }

// The nearest value that T keeps, ties to even; NaN stays NaN. Only such values may be stored as T.
template <typename T>
ISW_INLINE Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    const Bits bits = (Bits)v;
    const Bits nearest = v == v ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x00400000u;
    return (Vec)(nearest & 0xffff0000u);
  }
}
ISW_INLINE Halves upper_halves(Vec v) { return __builtin_convertvector((Bits)v >> 16, Halves); }
ISW_INLINE void store(BFloat16* p, Vec v) { *reinterpret_cast<UnalignedHalves*>(p) = upper_halves(v); }

#if defined(__AVX512F__)
ISW_INLINE Vec load_first(const BFloat16* p, int64_t count) {
  return widen((Halves)_mm256_maskz_loadu_epi16(first(count), p));
}
ISW_INLINE void store_first(BFloat16* p, Vec v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first(count), (__m256i)upper_halves(v));
}
#else
// Copies of 4, 2 and 1: there is no masked access to 16 bits.
template <int most>
ISW_INLINE void copy_first(const BFloat16* from, BFloat16* to, int64_t count) {
  if constexpr (most > 0) {
    if (count & most) {
      memcpy(to, from, most * sizeof(BFloat16));
      from += most, to += most;
    }
    copy_first<most / 2>(from, to, count);
  }
}
ISW_INLINE Vec load_first(const BFloat16* p, int64_t count) {
  BFloat16 held[lanes] = {};
  copy_first<lanes>(p, held, count);
  return load(held);
}
ISW_INLINE void store_first(BFloat16* p, Vec v, int64_t count) {
  BFloat16 held[lanes];
  store(held, v);
  copy_first<lanes>(held, p, count);
}
#endif

// out[i] = in[i]; bfloat16 must be able to keep it.
ISW_INLINE void copy_row(const float* in, int64_t count, float* out) { std::copy(in, in + count, out); }
ISW_INLINE void copy_row(const BFloat16* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, load(in + i));
  for (; i < count; ++i) out[i] = widen(in[i]);
}
ISW_INLINE void copy_row(const float* in, int64_t count, BFloat16* out) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(out + i, load(in + i));
  store_first(out + i, load_first(in + i, count - i), count - i);
}

}  // namespace
}  // namespace isw
