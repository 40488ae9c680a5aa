// Depthwise convolution, plane by plane. A dropped plane is zero, borders included, so its output is act(bias), or zero
// where the output is dropped.
//
// A plane is copied into one with zeros around, which vectors of outputs read without looking for a border: some rows at
// once, a column of taps at a time.
#pragma once
#include <new>

#include "activate.h"
#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int column_rows = lanes == 16 ? 8 : 4;  // of outputs in registers
constexpr int column_taps = 7;  // of weights beside them
constexpr int64_t most_prefetched = 1024;  // pixels
constexpr int64_t plane_pixels = 16384;  // of a task, or its turn would cost more than its work

// A plane with zeros around, as far as vectors of outputs read.
struct Bordered {
  explicit Bordered(const Window& window) : w(window) {
    const auto whole = [](int64_t count, int64_t unit) { return ceil_div(count, unit) * unit; };
    const int64_t left = whole(w.pw, lanes), rows = whole(w.oh, column_rows / 2);
    first = left - w.pw;
    pitch = whole(larger(left + whole(w.w, lanes), first + whole(w.ow, lanes) * w.sw + w.kw), lanes);
    size = larger(w.ph + w.h, (rows - 1) * w.sh + w.kh) * pitch;
    if (size > most) throw std::bad_alloc();
  }

  // x: of a plane, into one whose border is zero.
  template <typename T>
  void copy(const T* x, float* plane) const {
    plane += w.ph * pitch + first + w.pw;
    for (int64_t y = 0; y < w.h; ++y, x += w.w, plane += pitch) {
      int64_t i = 0;
      for (; i + lanes <= w.w; i += lanes) store(plane + i, load(x + i));
      if (i < w.w) store(plane + i, load_first(x + i, w.w - i));
    }
  }

  Window w;
  int64_t first;  // column that the first tap reads; copied rows begin where vectors are aligned
  int64_t pitch, size;

 private:
  static constexpr int64_t most = int64_t(1) << 28;  // floats: every worker has one
};

// One for every worker, made clean by its own.
class BorderedPlanes {
 public:
  BorderedPlanes(const Bordered& plane, int64_t workers)
      : size_(plane.size), planes_(workers * plane.size), clean_(workers) {
    std::fill(clean_.get(), clean_.get() + workers, false);
  }
  float* of(int64_t worker) const {
    float* plane = planes_.get() + worker * size_;
    if (!clean_.get()[worker]) std::fill(plane, plane + size_, 0.0f);
    clean_.get()[worker] = true;
    return plane;
  }

 private:
  int64_t size_;
  Buffer<float> planes_;
  Buffer<bool> clean_;
};

// A row's pixels, `apart` from each other; `stride` is that where it is 1 or 2, else 0.
template <int stride>
ISW_INLINE Vec load_apart(const float* in, [[maybe_unused]] int64_t apart) {
  if constexpr (stride == 1) return load(in);
  if constexpr (stride == 2)
    return even_lanes(load(in), load(in + lanes), std::make_integer_sequence<int, lanes>());
  Vec values = {};
  for (int64_t lane = 0; lane < lanes; ++lane) values[lane] = in[lane * apart];
  return values;
}

// A vector of outputs of some rows, from taps below each other in each column of a filter: what is loaded serves all of
// them. `in` is what the first tap reads for the first output.
template <int rows, int taps, int stride>
ISW_INLINE void add_taps(const Bordered& plane, const float* in, const float* weights, Vec (&sum)[rows]) {
  const Window& w = plane.w;
  const int64_t columns = w.kw, next_weight = w.sh * w.kw, next_row = w.sh * plane.pitch, apart = w.sw;
  for (int64_t kx = 0; kx < columns; ++kx, ++in, ++weights) {
    Vec weight[taps];
    ISW_UNROLL
    for (int tap = 0; tap < taps; ++tap) weight[tap] = broadcast(weights[tap * next_weight]);
    const float* row = in;
    ISW_UNROLL
    for (int r = 0; r < rows + taps - 1; ++r, row += next_row) {
      const Vec pixels = in_register(load_apart<stride>(row, apart));
      ISW_UNROLL
      for (int tap = 0; tap < taps; ++tap)
        if (r >= tap && r - tap < rows) sum[r - tap] += weight[tap] * pixels;
    }
  }
}

// The same, so many taps, by way of memory.
template <int rows, int taps, int stride>
static void add_some(int64_t count, const Bordered& plane, const float* in, const float* weights, Vec (&sums)[rows]) {
  if constexpr (taps > 1)
    if (count < taps) return add_some<rows, taps - 1, stride>(count, plane, in, weights, sums);
  Vec sum[rows];
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = sums[r];
  add_taps<rows, taps, stride>(plane, in, weights, sum);
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = sum[r];
}

// A whole filter. `side` is its width and height where they are one of those that networks have, and its strides alike;
// else 0.
template <int rows, int side, int stride>
ISW_INLINE void add_filter(const Bordered& plane, const float* in, const float* weights, Vec (&sum)[rows]) {
  const Window& w = plane.w;
  if constexpr (side > 0) {
    add_taps<rows, (side + stride - 1) / stride, stride>(plane, in, weights, sum);
    if constexpr (stride > 1) add_taps<rows, side / stride, stride>(plane, in + plane.pitch, weights + w.kw, sum);
  } else {
    constexpr int most = stride ? column_taps : 1;
    for (int64_t phase = 0; phase < smaller(w.sh, w.kh); ++phase)
      for (int64_t ky = phase; ky < w.kh; ky += most * w.sh)
        add_some<rows, most, stride>(smaller(most, ceil_div(w.kh - ky, w.sh)), plane, in + ky * plane.pitch,
                                     weights + ky * w.kw, sum);
  }
}

// Where they lie, or in a copy.
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

// A layer's filters.
template <typename T>
class Filters {
 public:
  Filters(const Window& window, Act act, const T* weights, const float* bias, int64_t channels)
      : bordered(window),
        act_(act),
        low_(broadcast(act == Act::none ? -__builtin_inff() : 0)),
        high_(broadcast(act == Act::relu6 ? 6 : __builtin_inff())),
        taps_(window.kh * window.kw),
        weights_(weights, channels * taps_),
        bias_(bias) {}

  const Bordered bordered;  // what `filter` reads

  Total filter(const float* plane, int64_t channel, T* y) const {
    return is_plain() ? filter_with<true>(plane, channel, y) : filter_with<false>(plane, channel, y);
  }

  // Which channel is next no hardware can know.
  void prefetch(int64_t channel) const {
    for (int64_t i = 0; i < taps_; i += line_size<float>) __builtin_prefetch(weights_.get() + channel * taps_ + i);
    __builtin_prefetch(weights_.get() + channel * taps_ + taps_ - 1);
  }

  // What a plane of zeros becomes, pixel by pixel.
  Vec of_zeros(int64_t channel) const {
    const Vec bias = broadcast(bias_[channel]);
    return is_plain() ? finished<true>(bias) : finished<false>(bias);
  }

 private:
  bool is_plain() const { return act_ == Act::none || act_ == Act::relu || act_ == Act::relu6; }

  // Plain activations are bounds, so that one kernel has them all.
  template <bool plain>
  Vec finished(Vec v) const {
    return rounded<T>(plain ? at_most(high_, at_least(low_, v)) : activate_other(act_, v));
  }

  template <bool plain>
  Total filter_with(const float* plane, int64_t channel, T* y) const {
    const Window& w = bordered.w;
    const int64_t side = w.kh == w.kw && w.sh == w.sw ? w.kh : 0;
    if (w.sw == 1) {
      if (side == 3) return filter_plane<plain, 3, 1>(plane, channel, y);
      if (side == 5) return filter_plane<plain, 5, 1>(plane, channel, y);
      if (side == 7) return filter_plane<plain, 7, 1>(plane, channel, y);
      return filter_plane<plain, 0, 1>(plane, channel, y);
    }
    if (w.sw == 2) {
      if (side == 3) return filter_plane<plain, 3, 2>(plane, channel, y);
      if (side == 5) return filter_plane<plain, 5, 2>(plane, channel, y);
      return filter_plane<plain, 0, 2>(plane, channel, y);
    }
    return filter_plane<plain, 0, 0>(plane, channel, y);
  }

  template <bool plain, int side, int stride>
  Total filter_plane(const float* plane, int64_t channel, T* y) const {
    const int64_t rows = bordered.w.oh;
    Total total = {};
    for (int64_t row = 0; row < rows;)
      row += 2 * (rows - row) > column_rows
                 ? filter_rows<plain, side, stride, column_rows>(plane, channel, y, row, total)
                 : filter_rows<plain, side, stride, column_rows / 2>(plane, channel, y, row, total);
    return total;
  }

  // Returns how many rows it has computed, or would have, were they not beyond the last.
  template <bool plain, int side, int stride, int rows>
  int64_t filter_rows(const float* plane, int64_t channel, T* y, int64_t row, Total& total) const {
    const Window& w = bordered.w;
    const int64_t ow = w.ow, last = smaller(rows, w.oh - row);
    const float *in = plane + row * w.sh * bordered.pitch + bordered.first, *weights = weights_.get() + channel * taps_;
    const Vec bias = broadcast(bias_[channel]);
    Total own = total;  // in registers: what is written to y might be a part of `total`
    y += row * ow;
    for (int64_t column = 0; column < ow; column += lanes) {
      Vec sum[rows];
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = bias;
      add_filter<rows, side, stride>(bordered, in + column * w.sw, weights, sum);
      const int64_t pixels = smaller(lanes, ow - column);
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) {
        if (r >= last) break;
        const Vec value = only_first(finished<plain>(sum[r]), pixels);
        store_first(y + r * ow + column, value, pixels);
        own.add(value);
      }
    }
    total = own;
    return rows;
  }

  const Act act_;
  const Vec low_, high_;
  const int64_t taps_;
  const Floats<T> weights_;
  const float* bias_;
};

// What all depthwise layers leave of a plane.
template <typename T>
class FilteredPlanes {
 public:
  explicit FilteredPlanes(const ConvArgs<T>& args) : a_(args) {}

  T* at(int64_t plane) const { return a_.y + plane * a_.window.oh * a_.window.ow; }
  void keep_total(int64_t plane, const Total& total) const {
    a_.squares[plane] = reduce_add(total.squares);
    if (a_.sums) a_.sums[plane] = reduce_add(total.sums);
  }
  // Every pixel the same; `written` tells whether anybody reads them.
  void fill(int64_t plane, Vec value, bool written) const {
    const int64_t pixels = a_.window.oh * a_.window.ow;
    for (int64_t p = 0; written && p < pixels; p += lanes) store_first(at(plane) + p, value, smaller(lanes, pixels - p));
    a_.squares[plane] = value[0] * value[0] * static_cast<float>(pixels);
    if (a_.sums) a_.sums[plane] = value[0] * static_cast<float>(pixels);
  }

 private:
  const ConvArgs<T>& a_;
};

template <typename T>
class Depthwise {
 public:
  Depthwise(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        filters_(args.window, args.act, args.weight, args.bias, args.c_in),
        y_(args),
        kept_(args.gate, args.n, args.c_in, runner, args.out_keep),
        planes_(filters_.bordered, runner.workers),
        dropped_(runner.workers * args.c_in) {}

  void run() {
    const int64_t pixels = larger(1, a_.window.oh * a_.window.ow), all = a_.n * a_.c_in;
    const int64_t channels =
        larger(1, smaller(a_.c_in, smaller(plane_pixels / pixels, all / (8 * runner_.workers))));
    const int64_t parts = ceil_div(a_.c_in, channels);
    parallel(runner_, a_.n * parts, [&](int64_t task, int64_t worker) {
      const int64_t begin = task % parts * channels;
      compute_channels({task / parts, worker}, begin, smaller(a_.c_in, begin + channels));
    });
  }

 private:
  struct Task {
    int64_t n, worker;
  };

  // Kept channels, then dropped ones: turn by turn, every other branch would be guessed wrong.
  void compute_channels(Task task, int64_t begin, int64_t end) const {
    const int32_t *kept = kept_.channels(task.n), *last = kept + kept_.count(task.n);
    kept = std::lower_bound(kept, last, begin);
    last = std::lower_bound(kept, last, end);
    float* bordered = planes_.of(task.worker);
    for (; kept < last; ++kept) {
      prefetch_plane(task, kept[1]);
      const int64_t plane = task.n * a_.c_in + *kept;
      filters_.bordered.copy(a_.x + plane * a_.window.h * a_.window.w, bordered);
      y_.keep_total(plane, filters_.filter(bordered, *kept, y_.at(plane)));
    }
    int32_t* dropped = dropped_.get() + task.worker * a_.c_in;
    const int64_t count = list_where(kept_.keep() + task.n * a_.c_in, false, begin, end, dropped);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t plane = task.n * a_.c_in + dropped[k];
      const bool made = !a_.out_keep || a_.out_keep[plane];
      y_.fill(plane, made ? filters_.of_zeros(dropped[k]) : Vec{}, made || a_.zeros);
    }
  }

  void prefetch_plane(Task task, int64_t channel) const {
    filters_.prefetch(channel);
    const int64_t size = a_.window.h * a_.window.w;
    const T* x = a_.x + (task.n * a_.c_in + channel) * size;
    for (int64_t i = 0; i < smaller(size, most_prefetched); i += line_size<T>) __builtin_prefetch(x + i);
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const Filters<T> filters_;
  const FilteredPlanes<T> y_;
  const Kept kept_;
  const BorderedPlanes planes_;
  Buffer<int32_t> dropped_;
};

}  // namespace
}  // namespace isw
