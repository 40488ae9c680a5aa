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

// The same where outputs are two columns apart: a tap reads every second pixel of two vectors. Wide rows are faster
// packed.
class HalvedMasks {
 public:
  explicit HalvedMasks(const Window& w)
      : fits_(w.sw == 2 && w.ow <= 2 * lanes), taps_(w.kw), masks_(fits_ ? ceil_div(w.ow, lanes) * w.kw * 2 : 0) {
    for (int64_t i = 0; fits_ && i < ceil_div(w.ow, lanes) * taps_; ++i)
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t first = (2 * (i / taps_) + v) * lanes, column = first + i % taps_ - w.pw;
        const int64_t begin = larger(0, -column), end = smaller(w.w - column, 2 * w.ow - first);
        Mask& mask = masks_.get()[2 * i + v] = 0;
        for (int64_t lane = 0; lane < lanes; lane += 2) mask |= (lane >= begin && lane < end) << lane;
        reads_second_[i / taps_] |= v == 1 && mask != 0;
      }
  }
  bool fits() const { return fits_; }
  const Mask* at(int64_t column) const { return masks_.get() + column / lanes * taps_ * 2; }
  // Whether any tap of the outputs from this column on finds a pixel in the second vector.
  bool reads_second(int64_t column) const { return reads_second_[column / lanes]; }

 private:
  bool fits_;
  int64_t taps_;
  bool reads_second_[2] = {};
  Buffer<Mask> masks_;
};

}  // namespace
}  // namespace isw
