// Kept planes, copied once per call into zero-bordered planes that the tiles read without any border test.
//
// A strided window splits a plane into one sub-plane per stride phase: rows y % sh, columns x % sw. In them every
// tap of neighbouring outputs is a neighbouring input again, so one stride-1 kernel serves every stride.
#pragma once
#include <algorithm>

#include "api.h"
#include "element.h"
#include "vec.h"

namespace isw {
namespace {

struct Packing {
  explicit Packing(const Window& w)
      : window(w),
        phases_y(smaller(w.sh, w.kh)),
        phases_x(smaller(w.sw, w.kw)),
        rows(w.oh + (w.kh - 1) / w.sh),
        pitch(w.ow + (w.kw - 1) / w.sw),
        plane(plane_stride(phases_y * phases_x * rows * pitch)) {}

  int64_t tap(int64_t ky, int64_t kx) const {
    const int64_t phase = (ky % window.sh) * phases_x + kx % window.sw;
    return (phase * rows + ky / window.sh) * pitch + kx / window.sw;
  }

  Window window;
  int64_t phases_y, phases_x;
  int64_t rows, pitch;  // of one sub-plane
  int64_t plane;  // floats from plane to plane

 private:
  // An odd number of cache lines: planes a power of two apart would share one cache set.
  static int64_t plane_stride(int64_t size) {
    if (size < 16) return size;
    return (ceil_div(size, 16) | 1) * 16;
  }
};

// out[i] = in[2 * i]; the last odd column may lie beyond the map.
template <typename In>
ISW_INLINE void copy_even(In in, int64_t begin, int64_t end, float* out) {
  constexpr auto all = std::make_integer_sequence<int, lanes>();
  int64_t i = begin;
  for (; i + lanes < end; i += lanes) store(out + i, even_lanes(load(in + 2 * i), load(in + (2 * i + lanes)), all));
  for (; i < end; i += lanes) {
    const int64_t count = smaller(lanes, end - i), inputs = 2 * count - 1;
    const Vec near = load_first(in + 2 * i, smaller(lanes, inputs));
    const Vec far = load_first(in + (2 * i + lanes), larger(0, inputs - lanes));
    store_first(out + i, even_lanes(near, far, all), count);
  }
}

// Columns phase, phase + sw, ... of padded rows, and which of them lie in the map.
struct Columns {
  Columns(const Window& w, int64_t phase, int64_t pitch)
      : shift(phase - w.pw),
        stride(w.sw),
        begin(smaller(pitch, larger(0, ceil_div(w.pw - phase, w.sw)))),
        end(larger(begin, smaller(pitch, ceil_div(w.w + w.pw - phase, w.sw)))) {}
  int64_t shift, stride, begin, end;
};

template <typename In>
ISW_INLINE void pack_row(const Columns& columns, int64_t pitch, In row, float* out) {
  std::fill(out, out + columns.begin, 0.0f);
  const In in = row + columns.shift;
  if (columns.stride == 1)
    copy_row(in + columns.begin, columns.end - columns.begin, out + columns.begin);
  else if (columns.stride == 2)
    copy_even(in, columns.begin, columns.end, out);
  else
    for (int64_t i = columns.begin; i < columns.end; ++i) out[i] = widen(in[i * columns.stride]);
  std::fill(out + columns.end, out + pitch, 0.0f);
}

// x: a pointer, or a Pair.
template <typename In>
static void pack_plane(const Packing& p, In x, float* out) {
  const Window& w = p.window;
  for (int64_t py = 0; py < p.phases_y; ++py)
    for (int64_t px = 0; px < p.phases_x; ++px) {
      const Columns columns(w, px, p.pitch);
      for (int64_t r = 0; r < p.rows; ++r, out += p.pitch) {
        const int64_t y = r * w.sh + py - w.ph;
        if (y < 0 || y >= w.h)
          std::fill(out, out + p.pitch, 0.0f);
        else
          pack_row(columns, p.pitch, x + y * w.w, out);
      }
    }
}

}  // namespace
}  // namespace isw
