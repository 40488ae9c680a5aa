// One vector type for every instruction set; intrinsics only for partial loads and stores.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ISW_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define ISW_UNROLL _Pragma("unroll")
#else
#define ISW_UNROLL _Pragma("GCC unroll 32")
#endif

namespace isw {
namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(lanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(lanes * 4), aligned(4), may_alias));

ISW_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
ISW_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// x - 0 is exact for every x, so compilers fold it into a plain broadcast; x + 0 they may not fold.
ISW_INLINE Vec broadcast(float x) { return x - Vec{}; }

// v, and bound where v is beyond it; NaN stays NaN.
#if defined(__AVX512F__)
ISW_INLINE Vec at_least(Vec bound, Vec v) { return (Vec)_mm512_max_ps((__m512)bound, (__m512)v); }
ISW_INLINE Vec at_most(Vec bound, Vec v) { return (Vec)_mm512_min_ps((__m512)bound, (__m512)v); }
#elif defined(__AVX2__)
ISW_INLINE Vec at_least(Vec bound, Vec v) { return (Vec)_mm256_max_ps((__m256)bound, (__m256)v); }
ISW_INLINE Vec at_most(Vec bound, Vec v) { return (Vec)_mm256_min_ps((__m256)bound, (__m256)v); }
#else
ISW_INLINE Vec at_least(Vec bound, Vec v) { return v < bound ? bound : v; }
ISW_INLINE Vec at_most(Vec bound, Vec v) { return v > bound ? bound : v; }
#endif

// Loaded once: compilers would rather load again for every multiply-add.
ISW_INLINE Vec in_register(Vec v) {
#if defined(__AVX2__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Partial access, 0 <= count <= lanes; lanes beyond count read as zero and are not written.
#if defined(__AVX512F__)
ISW_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
ISW_INLINE Vec load_first(const float* p, int64_t count) { return (Vec)_mm512_maskz_loadu_ps(first(count), p); }
ISW_INLINE void store_first(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, first(count), (__m512)v); }
ISW_INLINE Vec only_first(Vec v, int64_t count) { return (Vec)_mm512_maskz_mov_ps(first(count), (__m512)v); }
#elif defined(__AVX2__)
ISW_INLINE __m256i first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
ISW_INLINE Vec load_first(const float* p, int64_t count) { return (Vec)_mm256_maskload_ps(p, first(count)); }
ISW_INLINE void store_first(float* p, Vec v, int64_t count) { _mm256_maskstore_ps(p, first(count), (__m256)v); }
ISW_INLINE Vec only_first(Vec v, int64_t count) {
  return (Vec)_mm256_and_ps(_mm256_castsi256_ps(first(count)), (__m256)v);
}
#else
ISW_INLINE Vec load_first(const float* p, int64_t count) {
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
ISW_INLINE void store_first(float* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
ISW_INLINE Vec only_first(Vec v, int64_t count) {
  for (int64_t i = count; i < lanes; ++i) v[i] = 0;
  return v;
}
#endif

// NaN wins, as in torch.
ISW_INLINE Vec larger_or_nan(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

#if defined(__AVX512F__)
ISW_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
ISW_INLINE float reduce_add(Vec v) {
  float sum[lanes];
  store(sum, v);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}
#endif

// One step of a transpose: swaps the off-diagonal step x step blocks of rows a (upper) and b (lower).
template <int step, int... lane>
ISW_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  const Vec upper = __builtin_shufflevector(a, b, ((lane & step) ? lanes + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, ((lane & step) ? lanes + lane : lane + step)...);
#else
  typedef int Index __attribute__((vector_size(lanes * 4)));
  const Vec upper = __builtin_shuffle(a, b, Index{((lane & step) ? lanes + lane - step : lane)...});
  b = __builtin_shuffle(a, b, Index{((lane & step) ? lanes + lane : lane + step)...});
#endif
  a = upper;
}

// Lanes 0, 2, 4, ... of a and then of b.
template <int... lane>
ISW_INLINE Vec even_lanes(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * lane)...);
#else
  typedef int Index __attribute__((vector_size(lanes * 4)));
  return __builtin_shuffle(a, b, Index{(2 * lane)...});
#endif
}

template <int step>
ISW_INLINE void transpose_step(Vec (&rows)[lanes]) {
  ISW_UNROLL
  for (int i = 0; i < lanes; ++i)
    if (!(i & step)) exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, lanes>());
}

ISW_INLINE void transpose(Vec (&rows)[lanes]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (lanes > 4) transpose_step<(lanes > 4 ? 4 : 1)>(rows);
  if constexpr (lanes > 8) transpose_step<(lanes > 8 ? 8 : 1)>(rows);
}

ISW_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
ISW_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
ISW_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace isw
