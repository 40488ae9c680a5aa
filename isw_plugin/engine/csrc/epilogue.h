// Sums of a tile row -> planes: residual, activation, store, statistics.
#pragma once
#include "api.h"
#include "element.h"
#include "vec.h"

namespace isw {
namespace {

template <typename T>
struct Output {
  T* y;  // first output channel and pixel
  int64_t plane;  // elements from channel to channel
  int64_t channels;  // that exist, at most lanes
  const T* residual;  // like y, or null
  const bool* residual_keep;
  float* squares;  // [channels][lanes], added to
};

template <Act act, typename T>
ISW_INLINE void finish_channel(const Output<T>& out, int64_t c, Vec value, int64_t pixels) {
  T* y = out.y + c * out.plane;
  if (out.residual && out.residual_keep[c]) value += load_first(out.residual + c * out.plane, pixels);
  value = rounded<T>(activate<act>(value));
  store_first(y, value, pixels);
  float* squares = out.squares + c * lanes;
  store(squares, load(squares) + value * value);
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
static void finish(Act act, const Output<T>& out, const float* sums, int64_t stride, int64_t pixels) {
  if (act == Act::relu) return finish_with<Act::relu>(out, sums, stride, pixels);
  if (act == Act::relu6) return finish_with<Act::relu6>(out, sums, stride, pixels);
  finish_with<Act::none>(out, sums, stride, pixels);
}

// [lanes][lanes] partial squares -> one sum per channel.
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
