// Depthwise convolution, plane by plane. A dropped plane is zero, borders included, so its output is act(bias).
//
// Where the output is as large as the input, a plane is read in place as one line of pixels, tap by tap through masks
// that leave out what lies beyond a border; with stride 2 row by row, in the same way. Other planes are packed first,
// bfloat16 ones at least widened.
#pragma once
#include "activate.h"
#include "api.h"
#include "decide.h"
#include "element.h"
#include "pack.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int span_vectors = 4;
constexpr int64_t plane_pixels = 16384;  // of a task, or its turn would cost more than its work

template <Act act, int vectors, typename T>
ISW_INLINE void run_span_part(Act actual, const float* in, const int64_t* taps, const float* weights, int64_t count,
                              float bias, int64_t pixels, T* y, Vec& squares) {
  Vec sum[vectors];
  ISW_UNROLL
  for (int v = 0; v < vectors; ++v) sum[v] = broadcast(bias);
  for (int64_t tap = 0; tap < count; ++tap) {
    const Vec weight = broadcast(weights[tap]);
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[v] += weight * load(in + taps[tap] + v * lanes);
  }
  ISW_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = larger(0, smaller(lanes, pixels - v * lanes));
    const Vec value = rounded<T>(activate<act>(actual, only_first(sum[v], left)));
    store_first(y + v * lanes, value, left);
    squares += value * value;
  }
}

// Rows that a vector holds, several at once.
template <Act act, int rows, typename T>
ISW_INLINE void run_narrow_rows(Act actual, const float* in, int64_t pitch, const int64_t* taps, const float* weights,
                                int64_t count, float bias, int64_t width, T* y, Vec& squares) {
  Vec sum[rows];
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = broadcast(bias);
  for (int64_t tap = 0; tap < count; ++tap) {
    const Vec weight = broadcast(weights[tap]);
    ISW_UNROLL
    for (int r = 0; r < rows; ++r) sum[r] += weight * load(in + taps[tap] + r * pitch);
  }
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) {
    const Vec value = rounded<T>(activate<act>(actual, only_first(sum[r], width)));
    store_first(y + r * width, value, width);
    squares += value * value;
  }
}

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

template <Act act, int vectors, typename T>
ISW_INLINE void run_masked_part(Act actual, const float* in, const Mask* masks, const int64_t* taps,
                                const float* weights, int64_t count, float bias, int64_t pixels, T* y, Vec& squares) {
  Vec sum[vectors];
  ISW_UNROLL
  for (int v = 0; v < vectors; ++v) sum[v] = broadcast(bias);
  for (int64_t tap = 0; tap < count; ++tap) {
    const Vec weight = broadcast(weights[tap]);
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[v] += weight * load_where(in + taps[tap] + v * lanes, masks[v * count + tap]);
  }
  ISW_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = v < vectors - 1 ? lanes : smaller(lanes, pixels - v * lanes);
    const Vec value = rounded<T>(activate<act>(actual, only_first(sum[v], left)));
    store_first(y + v * lanes, value, left);
    squares += value * value;
  }
}

// The same where outputs are two columns apart: a tap reads every second pixel of two vectors. Wide rows are faster
// packed.
class HalvedMasks {
 public:
  explicit HalvedMasks(const Window& w)
      : fits_(w.sw == 2 && w.ow <= 2 * lanes), taps_(w.kw), masks_(ceil_div(w.ow, lanes) * w.kw * 2) {
    for (int64_t i = 0; i < ceil_div(w.ow, lanes) * taps_; ++i)
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t column = (2 * (i / taps_) + v) * lanes + i % taps_ - w.pw;
        Mask& mask = masks_.get()[2 * i + v] = 0;
        for (int64_t lane = 0; lane < lanes; lane += 2) mask |= (column + lane >= 0 && column + lane < w.w) << lane;
      }
  }
  bool fits() const { return fits_; }
  const Mask* at(int64_t column) const { return masks_.get() + column / lanes * taps_ * 2; }

 private:
  bool fits_;
  int64_t taps_;
  Buffer<Mask> masks_;
};

// A vector of outputs of several rows; x and y are planes. `vectors`: those that the masks leave anything of.
template <Act act, int rows, int vectors, typename T>
ISW_INLINE void run_halved_rows(Act actual, const Window& w, const float* x, int64_t row, int64_t column,
                                const Mask* masks, const float* weights, float bias, T* y, Vec& squares) {
  Vec sum[rows];
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = broadcast(bias);
  for (int64_t ky = 0; ky < w.kh; ++ky) {
    const float* in[rows];
    Mask inside[rows];
    ISW_UNROLL
    for (int r = 0; r < rows; ++r) {
      const int64_t from = (row + r) * w.sh + ky - w.ph;
      inside[r] = from >= 0 && from < w.h ? Mask(-1) : 0;
      in[r] = x + from * w.w + 2 * column - w.pw;
    }
    for (int64_t kx = 0; kx < w.kw; ++kx) {
      const Vec weight = broadcast(*weights++);
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Vec first = load_where(in[r] + kx, masks[2 * kx] & inside[r]);
        const Vec second = vectors > 1 ? load_where(in[r] + kx + lanes, masks[2 * kx + 1] & inside[r]) : Vec{};
        sum[r] += weight * even_lanes(first, second, std::make_integer_sequence<int, lanes>());
      }
    }
  }
  const int64_t pixels = smaller(lanes, w.ow - column);
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) {
    const Vec value = rounded<T>(activate<act>(actual, only_first(sum[r], pixels)));
    store_first(y + (row + r) * w.ow + column, value, pixels);
    squares += value * value;
  }
}

// Numbers as floats: where they lie, or in a copy.
template <typename T>
class Floats {
 public:
  Floats(const T* values, int64_t count) : copy_(count) { copy_row(values, count, copy_.get()); }
  const float* get() const { return copy_.get(); }

 private:
  Buffer<float> copy_;
};
template <>
class Floats<float> {
 public:
  Floats(const float* values, int64_t) : values_(values) {}
  const float* get() const { return values_; }

 private:
  const float* values_;
};

template <typename T>
class Depthwise {
 public:
  Depthwise(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        packing_(args.window),
        taps_(args.window.kh * args.window.kw),
        weights_(args.weight, args.c_in * taps_),
        masks_(args.window),
        halved_(args.window),
        offsets_(taps_),
        kept_(args.gate, args.n, args.c_in, runner),
        packed_(runner.workers * packed_size()) {
    for (int64_t tap = 0; tap < taps_; ++tap)
      offsets_.get()[tap] = packing_.tap(tap / args.window.kw, tap % args.window.kw);
    std::fill(packed_.get(), packed_.get() + runner.workers * packed_size(), 0.0f);
  }

  void run() {
    const int64_t all = a_.n * a_.c_in, pixels = larger(1, a_.window.oh * a_.window.ow);
    const int64_t planes = larger(1, smaller(plane_pixels / pixels, all / (8 * runner_.workers)));
    with_act(a_.act, [&](auto act) {
      parallel(runner_, ceil_div(all, planes), [&](int64_t task, int64_t worker) {
        int64_t c = task * planes % a_.c_in;
        for (int64_t plane = task * planes; plane < smaller(all, (task + 1) * planes); ++plane) {
          a_.squares[plane] =
              kept_.keep()[plane] ? compute_plane<act.value>(plane, c, worker) : fill<act.value>(plane, c);
          if (++c == a_.c_in) c = 0;
        }
      });
    });
  }

 private:
  // A packed plane, of which whole vectors are read past the last pixel, or a widened one.
  int64_t packed_size() const {
    return larger(packing_.plane + span_vectors * lanes, a_.window.h * a_.window.w);
  }

  template <Act act>
  float compute_plane(int64_t plane, int64_t c, int64_t worker) const {
    const T* x = a_.x + plane * a_.window.h * a_.window.w;
    float* packed = packed_.get() + worker * packed_size();
    if (masks_.fits()) return compute_line<act>(plane, c, line_of(x, packed));
    if (halved_.fits()) return compute_halved<act>(plane, c, line_of(x, packed));
    pack_plane(packing_, x, packed);
    return compute_rows<act>(plane, c, packed);
  }

  const float* line_of(const float* x, float*) const { return x; }
  const float* line_of(const BFloat16* x, float* line) const {
    copy_row(x, a_.window.h * a_.window.w, line);
    return line;
  }

  template <Act act>
  float compute_line(int64_t plane, int64_t c, const float* x) const {
    const int64_t pixels = a_.window.oh * a_.window.ow;
    const float* weights = weights_.get() + c * taps_;
    T* y = a_.y + plane * pixels;
    Vec squares = {};
    int64_t p = 0;
    for (; pixels - p > (span_vectors - 1) * lanes; p += span_vectors * lanes)
      run_masked_part<act, span_vectors>(a_.act, x + p, masks_.at(p), masks_.offsets(), weights, taps_, a_.bias[c],
                                         pixels - p, y + p, squares);
    for (; p < pixels; p += lanes)
      run_masked_part<act, 1>(a_.act, x + p, masks_.at(p), masks_.offsets(), weights, taps_, a_.bias[c], pixels - p,
                              y + p, squares);
    return reduce_add(squares);
  }

  template <Act act>
  float compute_halved(int64_t plane, int64_t c, const float* x) const {
    const Window& w = a_.window;
    const float* weights = weights_.get() + c * taps_;
    T* y = a_.y + plane * w.oh * w.ow;
    Vec squares = {};
    for (int64_t column = 0; column < w.ow; column += lanes) {
      const bool one = 2 * (w.ow - column - 1) + w.kw - w.pw <= lanes;
      int64_t row = 0;
      for (; row + span_vectors <= w.oh; row += span_vectors)
        (one ? run_halved_rows<act, span_vectors, 1, T> : run_halved_rows<act, span_vectors, 2, T>)(
            a_.act, w, x, row, column, halved_.at(column), weights, a_.bias[c], y, squares);
      for (; row < w.oh; ++row)
        run_halved_rows<act, 1, 2>(a_.act, w, x, row, column, halved_.at(column), weights, a_.bias[c], y, squares);
    }
    return reduce_add(squares);
  }

  template <Act act>
  float fill(int64_t plane, int64_t c) const {
    const int64_t pixels = a_.window.oh * a_.window.ow;
    const Vec value = rounded<T>(activate<act>(a_.act, broadcast(a_.bias[c])));
    T* y = a_.y + plane * pixels;
    int64_t p = 0;
    for (; p + lanes <= pixels; p += lanes) store(y + p, value);
    store_first(y + p, value, pixels - p);
    return value[0] * value[0] * static_cast<float>(pixels);
  }

  template <Act act>
  float compute_rows(int64_t plane, int64_t c, const float* packed) const {
    const Window& w = a_.window;
    const float* weights = weights_.get() + c * taps_;
    T* y = a_.y + plane * w.oh * w.ow;
    Vec squares = {};
    int64_t row = 0;
    for (; w.ow <= lanes && row + span_vectors <= w.oh; row += span_vectors)
      run_narrow_rows<act, span_vectors>(a_.act, packed + row * packing_.pitch, packing_.pitch, offsets_.get(), weights,
                                         taps_, a_.bias[c], w.ow, y + row * w.ow, squares);
    for (; row < w.oh; ++row) run_span<act>(c, packed + row * packing_.pitch, w.ow, y + row * w.ow, squares);
    return reduce_add(squares);
  }

  template <Act act>
  void run_span(int64_t c, const float* in, int64_t pixels, T* y, Vec& squares) const {
    const float* weights = weights_.get() + c * taps_;
    int64_t p = 0;
    for (; pixels - p > 2 * lanes; p += span_vectors * lanes)
      run_span_part<act, span_vectors>(a_.act, in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p,
                                       squares);
    for (; p < pixels; p += lanes)
      run_span_part<act, 1>(a_.act, in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p, squares);
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const Packing packing_;
  const int64_t taps_;
  const Floats<T> weights_;
  const TapMasks masks_;
  const HalvedMasks halved_;
  Buffer<int64_t> offsets_;
  const Kept kept_;
  Buffer<float> packed_;
};

}  // namespace
}  // namespace isw
