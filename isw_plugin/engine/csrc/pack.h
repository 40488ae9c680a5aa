// Kept planes, copied once per call into zero-bordered planes that the tiles read without any border test.
//
// A strided window splits a plane into one sub-plane per stride phase: rows y % sh, columns x % sw. In them every
// tap of neighbouring outputs is a neighbouring input again, so one stride-1 kernel serves every stride.
#pragma once
#include <algorithm>

#include "api.h"
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

// Columns phase, phase + sw, ... of one padded row.
ISW_INLINE void pack_row(const Window& w, int64_t phase, int64_t pitch, const float* row, float* out) {
  const int64_t before = larger(0, ceil_div(w.pw - phase, w.sw));
  const int64_t begin = smaller(pitch, before);
  const int64_t end = larger(begin, smaller(pitch, ceil_div(w.w + w.pw - phase, w.sw)));
  std::fill(out, out + begin, 0.0f);
  const float* in = row + phase - w.pw;
  if (w.sw == 1)
    std::copy(in + begin, in + end, out + begin);
  else if (w.sw == 2)
    for (int64_t i = begin; i < end; ++i) out[i] = in[i * 2];
  else
    for (int64_t i = begin; i < end; ++i) out[i] = in[i * w.sw];
  std::fill(out + end, out + pitch, 0.0f);
}

static void pack_plane(const Packing& p, const float* x, float* out) {
  const Window& w = p.window;
  for (int64_t py = 0; py < p.phases_y; ++py)
    for (int64_t px = 0; px < p.phases_x; ++px)
      for (int64_t r = 0; r < p.rows; ++r, out += p.pitch) {
        const int64_t y = r * w.sh + py - w.ph;
        if (y < 0 || y >= w.h)
          std::fill(out, out + p.pitch, 0.0f);
        else
          pack_row(w, px, p.pitch, x + y * w.w, out);
      }
}

}  // namespace
}  // namespace isw
