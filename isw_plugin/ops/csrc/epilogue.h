// Sums of a tile row -> planes: residual, activation, store, statistics.
#pragma once
#include "activate.h"
#include "api.h"
#include "element.h"
#include "vec.h"

namespace isw {
namespace {

template <typename T>
struct Output {
  T* y;  // first pixel of the first plane
  int64_t plane;  // elements from channel to channel
  const int32_t* at;  // planes of the channels
  int64_t channels;  // that exist, at most lanes
  const T* residual;  // like y, or null
  const bool* residual_keep;
  float* squares;  // [channels][lanes], added to
  float* sums;  // the same, not squared, or null
  Act act;
};

template <Act act, typename T>
ISW_INLINE void finish_channel(const Output<T>& out, int64_t c, Vec value, int64_t pixels) {
  const int64_t plane = out.at[c] * out.plane;
  if (out.residual && out.residual_keep[out.at[c]]) value += load_first(out.residual + plane, pixels);
  value = rounded<T>(activate<act>(out.act, value));
  store_first(out.y + plane, value, pixels);
  float* squares = out.squares + c * lanes;
  store(squares, load(squares) + value * value);
  if (out.sums) store(out.sums + c * lanes, load(out.sums + c * lanes) + value);
}

// At most `lanes` pixels; sums are `stride` floats apart.
template <Act act, typename T>
ISW_INLINE void finish_pixels(const Output<T>& out, const float* sums, int64_t stride, int64_t pixels) {
  Vec rows[lanes];
  ISW_UNROLL
  for (int i = 0; i < lanes; ++i) rows[i] = i < pixels ? load(sums + i * stride) : Vec{};
  transpose(rows);
  ISW_UNROLL
  for (int c = 0; c < lanes; ++c)
    if (c < out.channels) finish_channel<act>(out, c, rows[c], pixels);
}

template <Act act, typename T>
static void finish_with(Output<T> out, const float* sums, int64_t stride, int64_t pixels) {
  for (int64_t i = 0; i < pixels; i += lanes, out.y += lanes) {
    finish_pixels<act>(out, sums + i * stride, stride, smaller(lanes, pixels - i));
    if (out.residual) out.residual += lanes;
  }
}

template <typename T>
static void finish(const Output<T>& out, const float* sums, int64_t stride, int64_t pixels) {
  with_act(out.act, [&](auto act) { finish_with<act.value>(out, sums, stride, pixels); });
}

// Of values that went by.
struct Total {
  Vec squares, sums;
  void add(Vec value) { squares += value * value, sums += value; }
};

// The value of one pixel, channels on the lanes; it is added to the total.
template <Act act, typename T>
ISW_INLINE Vec finished(Act actual, const float* sums, Total& total) {
  const Vec value = rounded<T>(activate<act>(actual, load(sums)));
  total.add(value);
  return value;
}

template <Act act, typename T>
ISW_INLINE void pool_row(const Output<T>& out, const float* top, const float* bottom, int64_t stride, int64_t pairs,
                         T* y, Total (&total)[4]) {
  Vec rows[lanes];
  ISW_UNROLL
  for (int i = 0; i < lanes; ++i) {
    rows[i] = Vec{};
    if (i >= pairs) continue;
    const float *a = top + 2 * i * stride, *b = bottom + 2 * i * stride;
    const auto value = [&](const float* sums, int k) { return finished<act, T>(out.act, sums, total[k]); };
    const Vec above = larger_or_nan(value(a, 0), value(a + stride, 1));
    rows[i] = larger_or_nan(above, larger_or_nan(value(b, 2), value(b + stride, 3)));
  }
  transpose(rows);
  ISW_UNROLL
  for (int c = 0; c < lanes; ++c)
    if (c < out.channels) store_first(y + out.at[c] * out.plane, rows[c], pairs);
}

// Rows of a map -> 2x2 maxima, before the transpose; out.squares and out.sums are [lanes], channels on the lanes. What a
// last odd row or column holds counts for these alone.
template <Act act, typename T>
static void finish_pooled_with(const Output<T>& out, const float* sums, int64_t stride, int64_t rows, int64_t width) {
  Total total[4] = {};
  const int64_t pitch = width * stride, pairs = width / 2;
  T* y = out.y;
  for (int64_t row = 0; row + 2 <= rows; row += 2, sums += 2 * pitch, y += pairs) {
    for (int64_t x = 0; x < pairs; x += lanes)
      pool_row<act>(out, sums + 2 * x * stride, sums + pitch + 2 * x * stride, stride, smaller(lanes, pairs - x),
                    y + x, total);
    for (int64_t i = 0; i < 2 && width % 2; ++i) finished<act, T>(out.act, sums + (i + 1) * pitch - stride, total[i]);
  }
  for (int64_t x = 0; x < width && rows % 2; ++x) finished<act, T>(out.act, sums + x * stride, total[x % 4]);
  const auto add = [&](float* held, Vec Total::*part) {
    store(held, load(held) + ((total[0].*part + total[1].*part) + (total[2].*part + total[3].*part)));
  };
  add(out.squares, &Total::squares);
  if (out.sums) add(out.sums, &Total::sums);
}

template <typename T>
static void finish_pooled(const Output<T>& out, const float* sums, int64_t stride, int64_t rows, int64_t width) {
  with_act(out.act, [&](auto act) { finish_pooled_with<act.value>(out, sums, stride, rows, width); });
}

// [lanes][lanes] partial squares, or sums -> one per channel.
static void reduce_squares(const float* squares, int64_t channels, float* out) {
  Vec rows[lanes];
  ISW_UNROLL
  for (int i = 0; i < lanes; ++i) rows[i] = load(squares + i * lanes);
  transpose(rows);
  Vec sum = rows[0];
  ISW_UNROLL
  for (int i = 1; i < lanes; ++i) sum += rows[i];
  store_first(out, sum, channels);
}

}  // namespace
}  // namespace isw
