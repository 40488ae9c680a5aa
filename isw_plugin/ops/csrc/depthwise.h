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
static void add_taps(const Bordered& plane, const float* in, const float* weights, Vec (&sums)[rows]) {
  Vec sum[rows];
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = sums[r];
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
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = sum[r];
}

template <int rows, int stride, int taps>
ISW_INLINE void add_taps(int64_t count, const Bordered& plane, const float* in, const float* weights, Vec (&sum)[rows]) {
  if (count == taps) return add_taps<rows, taps, stride>(plane, in, weights, sum);
  if constexpr (taps > 1) add_taps<rows, stride, taps - 1>(count, plane, in, weights, sum);
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

// A layer's filters. `act` of the calls is that of the layer.
template <typename T>
class Filters {
 public:
  Filters(const Window& window, Act act, const T* weights, const float* bias, int64_t channels)
      : bordered(window),
        act_(act),
        taps_(window.kh * window.kw),
        weights_(weights, channels * taps_),
        bias_(bias) {}

  const Bordered bordered;  // what `filter` reads

  template <Act act>
  Total filter(const float* plane, int64_t channel, T* y) const {
    if (bordered.w.sw == 1) return filter_with<act, 1>(plane, channel, y);
    if (bordered.w.sw == 2) return filter_with<act, 2>(plane, channel, y);
    return filter_with<act, 0>(plane, channel, y);
  }

  // Which channel is next no hardware can know.
  void prefetch(int64_t channel) const {
    for (int64_t i = 0; i < taps_; i += line_size<float>) __builtin_prefetch(weights_.get() + channel * taps_ + i);
    __builtin_prefetch(weights_.get() + channel * taps_ + taps_ - 1);
  }

  // What a plane of zeros becomes, pixel by pixel.
  template <Act act>
  Vec of_zeros(int64_t channel) const {
    return rounded<T>(activate<act>(act_, broadcast(bias_[channel])));
  }

 private:
  template <Act act, int stride>
  Total filter_with(const float* plane, int64_t channel, T* y) const {
    const int64_t rows = bordered.w.oh;
    Total total = {};
    for (int64_t row = 0; row < rows;)
      row += 2 * (rows - row) > column_rows ? filter_rows<act, stride, column_rows>(plane, channel, y, row, total)
                                            : filter_rows<act, stride, column_rows / 2>(plane, channel, y, row, total);
    return total;
  }

  // Returns how many rows it has computed, or would have, were they not beyond the last.
  template <Act act, int stride, int rows>
  int64_t filter_rows(const float* plane, int64_t channel, T* y, int64_t row, Total& total) const {
    constexpr int most = stride ? column_taps : 1;
    const Window& w = bordered.w;
    y += row * w.ow;
    for (int64_t column = 0; column < w.ow; column += lanes) {
      Vec sum[rows];
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = broadcast(bias_[channel]);
      for (int64_t phase = 0; phase < smaller(w.sh, w.kh); ++phase)
        for (int64_t ky = phase; ky < w.kh; ky += most * w.sh)
          add_taps<rows, stride, most>(smaller(most, ceil_div(w.kh - ky, w.sh)), bordered,
                                       plane + (row * w.sh + ky) * bordered.pitch + bordered.first + column * w.sw,
                                       weights_.get() + channel * taps_ + ky * w.kw, sum);
      const int64_t pixels = smaller(lanes, w.ow - column);
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) {
        if (row + r >= w.oh) break;
        const Vec value = rounded<T>(activate<act>(act_, only_first(sum[r], pixels)));
        store_first(y + r * w.ow + column, value, pixels);
        total.add(value);
      }
    }
    return rows;
  }

  const Act act_;
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
    with_act(a_.act, [&](auto act) {
      parallel(runner_, a_.n * parts, [&](int64_t task, int64_t worker) {
        const int64_t begin = task % parts * channels;
        compute_channels<act.value>({task / parts, worker}, begin, smaller(a_.c_in, begin + channels));
      });
    });
  }

 private:
  struct Task {
    int64_t n, worker;
  };

  // Kept channels, then dropped ones: turn by turn, every other branch would be guessed wrong.
  template <Act act>
  void compute_channels(Task task, int64_t begin, int64_t end) const {
    const int32_t *kept = kept_.channels(task.n), *last = kept + kept_.count(task.n);
    kept = std::lower_bound(kept, last, begin);
    last = std::lower_bound(kept, last, end);
    float* bordered = planes_.of(task.worker);
    for (; kept < last; ++kept) {
      prefetch_plane(task, kept[1]);
      const int64_t plane = task.n * a_.c_in + *kept;
      filters_.bordered.copy(a_.x + plane * a_.window.h * a_.window.w, bordered);
      y_.keep_total(plane, filters_.template filter<act>(bordered, *kept, y_.at(plane)));
    }
    int32_t* dropped = dropped_.get() + task.worker * a_.c_in;
    const int64_t count = list_where(kept_.keep() + task.n * a_.c_in, false, begin, end, dropped);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t plane = task.n * a_.c_in + dropped[k];
      const bool made = !a_.out_keep || a_.out_keep[plane];
      y_.fill(plane, made ? filters_.template of_zeros<act>(dropped[k]) : Vec{}, made || a_.zeros);
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
