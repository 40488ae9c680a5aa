// Max-pooling, and sums of squares of maps that no operator of ours produced.
#pragma once
#include <limits>
#include <type_traits>

#include "api.h"
#include "element.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr float lowest = -std::numeric_limits<float>::infinity();

// NaN wins, as in torch.
ISW_INLINE float nan_or_larger(float a, float b) { return b > a || b != b ? b : a; }

template <int step>
ISW_INLINE void max_taps(const Window& w, const float* line, float* y) {
  const int64_t stride = step ? step : w.sw;
  std::fill(y, y + w.ow, lowest);
  for (int64_t kx = 0; kx < w.kw; ++kx)
    for (int64_t x = 0; x < w.ow; ++x) y[x] = nan_or_larger(y[x], line[x * stride + kx]);
}

// One output row; line is the padded width, its borders stay at the lowest value.
template <typename T>
static void max_pool_row(const Window& w, const T* x, int64_t row, float* line, float* y) {
  float* inside = line + w.pw;
  std::fill(inside, inside + w.w, lowest);
  const int64_t top = row * w.sh - w.ph;
  for (int64_t r = larger(0, top); r < smaller(w.h, top + w.kh); ++r)
    for (int64_t i = 0; i < w.w; ++i) inside[i] = nan_or_larger(inside[i], widen(x[r * w.w + i]));
  if (w.sw == 1) return max_taps<1>(w, line, y);
  if (w.sw == 2) return max_taps<2>(w, line, y);
  max_taps<0>(w, line, y);
}

template <typename T>
static void max_pool(const PoolArgs<T>& a, const Runner& runner) {
  const Window& w = a.window;
  const int64_t width = w.w + 2 * w.pw;
  Buffer<float> lines(runner.workers * width), rows(runner.workers * w.ow);
  std::fill(lines.get(), lines.get() + runner.workers * width, lowest);
  parallel(runner, a.planes, [&](int64_t plane, int64_t worker) {
    for (int64_t row = 0; row < w.oh; ++row) {
      const T* x = a.x + plane * w.h * w.w;
      T* y = a.y + (plane * w.oh + row) * w.ow;
      float* line = lines.get() + worker * width;
      if constexpr (std::is_same_v<T, float>) {
        max_pool_row(w, x, row, line, y);
      } else {
        float* held = rows.get() + worker * w.ow;
        max_pool_row(w, x, row, line, held);
        copy_row(held, w.ow, y);
      }
    }
  });
}

template <typename T>
static float sum_of_squares(const T* x, int64_t size) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes)
    for (int v = 0; v < 4; ++v) sums[v] += load(x + i + v * lanes) * load(x + i + v * lanes);
  for (; i < size; i += lanes) {
    const Vec value = load_first(x + i, smaller(lanes, size - i));
    sums[0] += value * value;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
static void sum_squares(const T* x, float* squares, int64_t planes, int64_t size, const Runner& runner) {
  constexpr int64_t together = 8;
  parallel(runner, ceil_div(planes, together), [&](int64_t task, int64_t) {
    for (int64_t p = task * together; p < smaller(planes, (task + 1) * together); ++p)
      squares[p] = sum_of_squares(x + p * size, size);
  });
}

}  // namespace
}  // namespace isw
