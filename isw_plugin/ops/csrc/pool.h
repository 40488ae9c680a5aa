// Max-pooling, and sums of squares of maps that no operator of ours produced.
#pragma once
#include <algorithm>
#include <limits>
#include <utility>

#include "api.h"
#include "element.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

// The outputs of one row whose first lane is `in`.
ISW_INLINE Vec every(int64_t stride, const float* in) {
  if (stride == 1) return load(in);
  if (stride == 2) return even_lanes(load(in), load(in + lanes), std::make_integer_sequence<int, lanes>());
  Vec v = {};
  for (int i = 0; i < lanes; ++i) v[i] = in[i * stride];
  return v;
}

// Down the columns first, into a line whose borders stay at the lowest value, then along it.
template <typename T>
static void max_pool_row(const Window& w, const T* x, int64_t row, float* line, T* y) {
  const int64_t first = row * w.sh - w.ph, top = larger(0, first), bottom = smaller(w.h, first + w.kh);
  for (int64_t i = 0; i < w.w; i += lanes) {
    const int64_t pixels = smaller(lanes, w.w - i);
    Vec most = broadcast(lowest);
    for (int64_t r = top; r < bottom; ++r) {
      __builtin_prefetch(x + (r + 4 * w.sh) * w.w + i);
      most = larger_or_nan(most, load_first(x + r * w.w + i, pixels));
    }
    store_first(line + w.pw + i, most, pixels);
  }
  for (int64_t i = 0; i < w.ow; i += lanes) {
    Vec most = broadcast(lowest);
    for (int64_t kx = 0; kx < w.kw; ++kx) most = larger_or_nan(most, every(w.sw, line + i * w.sw + kx));
    store_first(y + i, most, smaller(lanes, w.ow - i));
  }
}

template <typename T>
static void max_pool(const PoolArgs<T>& a, const Runner& runner) {
  const Window& w = a.window;
  const int64_t width = w.w + 2 * w.pw + w.sw * lanes;  // whole vectors are read past the last output
  Buffer<float> lines(runner.workers * width);
  std::fill(lines.get(), lines.get() + runner.workers * width, lowest);
  parallel(runner, a.planes, [&](int64_t plane, int64_t worker) {
    float* line = lines.get() + worker * width;
    for (int64_t row = 0; row < w.oh; ++row)
      max_pool_row(w, a.x + plane * w.h * w.w, row, line, a.y + (plane * w.oh + row) * w.ow);
  });
}

template <bool squared, typename T>
static float sum_of(const T* x, int64_t size) {
  const auto term = [](Vec value) { return squared ? value * value : value; };
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes)
    for (int v = 0; v < 4; ++v) sums[v] += term(load(x + i + v * lanes));
  for (; i < size; i += lanes) sums[0] += term(load_first(x + i, smaller(lanes, size - i)));
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
static void sum_squares(const T* x, float* squares, float* sums, int64_t planes, int64_t size, const Runner& runner) {
  constexpr int64_t together = 8;
  parallel(runner, ceil_div(planes, together), [&](int64_t task, int64_t) {
    for (int64_t p = task * together; p < smaller(planes, (task + 1) * together); ++p) {
      squares[p] = sum_of<true>(x + p * size, size);
      if (sums) sums[p] = sum_of<false>(x + p * size, size);  // from the cache
    }
  });
}

}  // namespace
}  // namespace isw
