// Masks of a depthwise layer's taps, so that a plane is read in place: lanes beyond a border read as zero.
#pragma once
#include <algorithm>

#include "api.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

// Which lanes of a vector of outputs a tap reaches inside the plane; the same for all planes.
class TapMasks {
 public:
  explicit TapMasks(const Window& w)
      : taps_(w.kh * w.kw),
        fits_(w.sh == 1 && w.sw == 1 && w.oh == w.h && w.ow == w.w &&
              ceil_div(w.oh * w.ow, lanes) * taps_ <= most_masks),
        masks_(fits_ ? ceil_div(w.oh * w.ow, lanes) * taps_ : 0),
        offsets_(taps_) {
    for (int64_t tap = 0; tap < taps_; ++tap)
      offsets_.get()[tap] = (tap / w.kw - w.ph) * w.w + tap % w.kw - w.pw;
    if (!fits_) return;
    std::fill(masks_.get(), masks_.get() + ceil_div(w.oh * w.ow, lanes) * taps_, Mask(0));
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t dy = tap / w.kw - w.ph, dx = tap % w.kw - w.pw;
      const int64_t left = larger(0, -dx), right = smaller(w.w, w.w - dx);
      for (int64_t y = larger(0, -dy); y < smaller(w.h, w.h - dy); ++y)
        add_pixels(tap, y * w.w + left, y * w.w + right);
    }
  }
  bool fits() const { return fits_; }
  const Mask* at(int64_t pixel) const { return masks_.get() + pixel / lanes * taps_; }
  const int64_t* offsets() const { return offsets_.get(); }

 private:
  void add_pixels(int64_t tap, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t lane = begin % lanes, count = smaller(lanes - lane, end - begin);
      masks_.get()[begin / lanes * taps_ + tap] |= static_cast<Mask>(((1u << count) - 1) << lane);
      begin += count;
    }
  }

  static constexpr int64_t most_masks = 8192;  // 16 KB, beside a plane in the L1 cache

  int64_t taps_;
  bool fits_;
  Buffer<Mask> masks_;
  Buffer<int64_t> offsets_;
};

// Which columns of the plane a tap finds for a vector of outputs that lie `stride` apart, 1 or 2: a bit for each lane of the
// one or two vectors in between; other strides: for each output.
class ReachedColumns {
 public:
  explicit ReachedColumns(const Window& w) : taps_(w.kw), masks_(ceil_div(w.ow, lanes) * w.kw) {
    const int64_t bits = w.sw == 2 ? 2 * lanes : lanes, apart = w.sw == 2 ? 1 : w.sw;
    for (int64_t i = 0; i < ceil_div(w.ow, lanes) * taps_; ++i) {
      const int64_t first = i / taps_ * lanes * w.sw + i % taps_ - w.pw;
      uint32_t& mask = masks_.get()[i] = 0;
      for (int64_t bit = 0; bit < bits; ++bit)
        mask |= uint32_t{first + bit * apart >= 0 && first + bit * apart < w.w} << bit;
    }
  }
  const uint32_t* at(int64_t column) const { return masks_.get() + column / lanes * taps_; }

 private:
  int64_t taps_;
  Buffer<uint32_t> masks_;
};

// A row's columns, `apart` from each other; `stride` is that where it is 1 or 2, else 0.
template <int stride>
ISW_INLINE Vec load_reached(const float* in, [[maybe_unused]] int64_t apart, uint32_t reached) {
  if constexpr (stride == 1) {
    return load_where(in, static_cast<Mask>(reached));
  } else if constexpr (stride == 2) {
    const Vec first = load_where(in, static_cast<Mask>(reached & ((1u << lanes) - 1)));
    const Vec second = load_where(in + lanes, static_cast<Mask>(reached >> lanes));
    return even_lanes(first, second, std::make_integer_sequence<int, lanes>());
  } else {
    Vec values = {};
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (reached >> lane & 1) values[lane] = in[lane * apart];
    return values;
  }
}

}  // namespace
}  // namespace isw
