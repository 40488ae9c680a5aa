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

ISW_INLINE Halves load_halves(const BFloat16* p) { return *reinterpret_cast<const UnalignedHalves*>(p); }
ISW_INLINE Vec load(const BFloat16* p) { return widen(load_halves(p)); }

// Input channels that one multiply-add takes: AVX512_BF16 multiplies pairs of bfloat16 and adds both to a float. Pairs
// lie in the lanes of a Vec, the first channel in the lower half; no arithmetic but multiply_add knows them.
#if defined(__AVX512BF16__)
template <typename T>
constexpr int together = std::is_same_v<T, BFloat16> ? 2 : 1;
#else
template <typename T>
constexpr int together = 1;
#endif

ISW_INLINE Vec paired(Halves a, Halves b) {
  return (Vec)(__builtin_convertvector(a, Bits) | __builtin_convertvector(b, Bits) << 16);
}
ISW_INLINE float paired(BFloat16 a, BFloat16 b) {
  const uint32_t bits = a.bits | static_cast<uint32_t>(b.bits) << 16;
  float pair;
  memcpy(&pair, &bits, sizeof pair);
  return pair;
}

// Two channels of a map, read as one array; b is null behind the last of an odd number.
struct Pair {
  const BFloat16 *a, *b;
  Pair operator+(int64_t i) const { return {a + i, b ? b + i : nullptr}; }
  float operator[](int64_t i) const { return paired(a[i], b ? b[i] : BFloat16{0}); }
};
ISW_INLINE Vec load(Pair p) { return paired(load_halves(p.a), p.b ? load_halves(p.b) : Halves{}); }

// One number or pair as the lane of a Vec that holds it.
ISW_INLINE float broadcastable(const BFloat16* in, int64_t i) { return widen(in[i]); }
ISW_INLINE float broadcastable(Pair in, int64_t i) { return in[i]; }

// What is packed for entry k of a list of channels: that channel, or it and the one behind it.
template <typename T>
ISW_INLINE auto packed_from(const T* x, int64_t plane, const int32_t* channels, int64_t k, [[maybe_unused]] int64_t end) {
  const T* first = x + channels[k] * plane;
  if constexpr (together<T> == 2)
    return Pair{first, k + 1 < end ? x + channels[k + 1] * plane : nullptr};
  else
    return first;
}

// The weights that channel a, or channels a and b together, are multiplied by.
template <typename T>
ISW_INLINE Vec load_weights(const T* a, [[maybe_unused]] const T* b) {
  if constexpr (together<T> == 2) return load(Pair{a, b});
  return load(a);
}
template <typename T>
ISW_INLINE Vec broadcast(float x) {
#if defined(__AVX512BF16__)
  if constexpr (together<T> == 2) return (Vec)_mm512_set1_ps(x);  // arithmetic could change a pair
#endif
  return broadcast(x);
}
template <typename T>
ISW_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512BF16__)
  if constexpr (together<T> == 2) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}

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
ISW_INLINE Vec load_first(Pair p, int64_t count) {
  const auto half = [count](const BFloat16* in) { return (Halves)_mm256_maskz_loadu_epi16(first(count), in); };
  return paired(half(p.a), p.b ? half(p.b) : Halves{});
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
template <typename In>  // BFloat16 numbers, or pairs as they are
ISW_INLINE void copy_row(In in, int64_t count, float* out) {
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
