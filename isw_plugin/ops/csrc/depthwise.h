// Depthwise convolution, plane by plane. A dropped plane is zero, borders included, so its output is act(bias), or zero
// where the output is dropped.
//
// A plane whose output is as large is read as one line of pixels, tap by tap through masks that leave out what lies beyond
// a border. In others a vector of a row's outputs is computed for several rows at once, a column of taps at a time, through
// masks again. All are read in place; bfloat16 ones are widened first.
#pragma once
#include "activate.h"
#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "masks.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int span_vectors = 4;
constexpr int column_rows = lanes == 16 ? 8 : 4;  // of outputs in registers
constexpr int column_taps = 7;  // of weights beside them
constexpr int64_t most_prefetched = 1024;  // pixels
constexpr int64_t plane_pixels = 16384;  // of a task, or its turn would cost more than its work

// A vector of outputs of some rows, from taps below each other in each column of a filter: what is loaded serves all of
// them. `in` is what the first tap reads for the first output; bit r of `inside` tells whether row r of those that are read
// lies in the plane.
template <int rows, int taps, int stride>
static void add_taps(const Window& w, const float* in, uint32_t inside, const uint32_t* reached, const float* weights,
                     Vec (&sums)[rows]) {
  Vec sum[rows];
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = sums[r];
  const int64_t columns = w.kw, next_weight = w.sh * w.kw, next_row = w.sh * w.w, apart = w.sw;
  for (int64_t kx = 0; kx < columns; ++kx, ++in, ++weights) {
    Vec weight[taps];
    ISW_UNROLL
    for (int tap = 0; tap < taps; ++tap) weight[tap] = broadcast(weights[tap * next_weight]);
    const float* row = in;
    const uint32_t found = reached[kx];
    ISW_UNROLL
    for (int r = 0; r < rows + taps - 1; ++r, row += next_row) {
      const Vec pixels = load_reached<stride>(row, apart, found & -(inside >> r & 1));
      ISW_UNROLL
      for (int tap = 0; tap < taps; ++tap)
        if (r >= tap && r - tap < rows) sum[r - tap] += weight[tap] * pixels;
    }
  }
  ISW_UNROLL
  for (int r = 0; r < rows; ++r) sums[r] = sum[r];
}

template <int rows, int stride, int taps>
ISW_INLINE void add_taps(int64_t count, const Window& w, const float* in, uint32_t inside, const uint32_t* reached,
                         const float* weights, Vec (&sum)[rows]) {
  if (count == taps) return add_taps<rows, taps, stride>(w, in, inside, reached, weights, sum);
  if constexpr (taps > 1) add_taps<rows, stride, taps - 1>(count, w, in, inside, reached, weights, sum);
}

// Which of the rows y, y + stride, ... lie in the plane, of 32.
inline uint32_t inside(const Window& w, int64_t y) {
  const uint64_t above = smaller(32, y < 0 ? ceil_div(-y, w.sh) : 0);
  const uint64_t end = y < w.h ? smaller(32, ceil_div(w.h - y, w.sh)) : 0;
  return static_cast<uint32_t>((uint64_t{1} << end) - 1) & ~static_cast<uint32_t>((uint64_t{1} << above) - 1);
}

// A vector of outputs of some rows.
template <int rows, int stride>
ISW_INLINE void filter_rows(const Window& w, const float* plane, int64_t row, int64_t column, const uint32_t* reached,
                            const float* weights, Vec (&sum)[rows]) {
  constexpr int most = stride ? column_taps : 1;
  const float* in = plane + column * w.sw - w.pw;
  for (int64_t phase = 0; phase < smaller(w.sh, w.kh); ++phase)
    for (int64_t ky = phase; ky < w.kh; ky += most * w.sh) {
      const int64_t y = row * w.sh + ky - w.ph;
      add_taps<rows, stride, most>(smaller(most, ceil_div(w.kh - ky, w.sh)), w, in + y * w.w, inside(w, y), reached,
                                   weights + ky * w.kw, sum);
    }
}

// Planes whose sums are in registers at once: taps of small ones would wait for each other.
template <typename T, int planes>
struct Lines {
  const float* in[planes];
  const float* weights[planes];
  float bias[planes];
  T* y[planes];
  Total total[planes];
};

template <Act act, int vectors, typename T, int planes>
ISW_INLINE void run_masked_part(Act actual, Lines<T, planes>& lines, const TapMasks& masks, int64_t taps, int64_t pixel,
                                int64_t pixels) {
  const int64_t* offsets = masks.offsets();
  const Mask* inside = masks.at(pixel);
  Vec sum[planes][vectors];
  ISW_UNROLL
  for (int i = 0; i < planes; ++i)
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[i][v] = broadcast(lines.bias[i]);
  for (int64_t tap = 0; tap < taps; ++tap)
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v)
      ISW_UNROLL
      for (int i = 0; i < planes; ++i) {
        const float* in = lines.in[i] + pixel + offsets[tap] + v * lanes;
        sum[i][v] += broadcast(lines.weights[i][tap]) * load_where(in, inside[v * taps + tap]);
      }
  ISW_UNROLL
  for (int i = 0; i < planes; ++i)
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = v < vectors - 1 ? lanes : smaller(lanes, pixels - pixel - v * lanes);
      const Vec value = rounded<T>(activate<act>(actual, only_first(sum[i][v], left)));
      store_first(lines.y[i] + pixel + v * lanes, value, left);
      lines.total[i].add(value);
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

template <typename T>
class Depthwise {
 public:
  Depthwise(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        taps_(args.window.kh * args.window.kw),
        weights_(args.weight, args.c_in * taps_),
        masks_(args.window),
        reached_(args.window),
        kept_(args.gate, args.n, args.c_in, runner, args.out_keep),
        widened_(runner.workers * widened_size()),
        dropped_(runner.workers * args.c_in) {
  }

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
  static constexpr int planes_at_once = span_vectors;

  // Widened planes.
  int64_t widened_size() const { return std::is_same_v<T, float> ? 0 : planes_at_once * a_.window.h * a_.window.w; }

  // Kept channels, then dropped ones: turn by turn, every other branch would be guessed wrong.
  template <Act act>
  void compute_channels(Task task, int64_t begin, int64_t end) const {
    const int32_t *kept = kept_.channels(task.n), *last = kept + kept_.count(task.n);
    kept = std::lower_bound(kept, last, begin);
    last = std::lower_bound(kept, last, end);
    if (masks_.fits() && a_.window.oh * a_.window.ow <= lanes)
      for (; last - kept >= planes_at_once; kept += planes_at_once) compute_lines<act, planes_at_once>(task, kept);
    for (; kept < last; ++kept) {
      prefetch_plane(task, kept[1]);
      compute_plane<act>(task, kept);
    }
    int32_t* dropped = dropped_.get() + task.worker * a_.c_in;
    const int64_t count = list_where(kept_.keep() + task.n * a_.c_in, false, begin, end, dropped);
    for (int64_t k = 0; k < count; ++k) fill<act>(task.n * a_.c_in + dropped[k], dropped[k]);
  }

  // Which plane is next no hardware can know.
  void prefetch_plane(Task task, int64_t channel) const {
    const int64_t size = a_.window.h * a_.window.w;
    const T* x = a_.x + (task.n * a_.c_in + channel) * size;
    for (int64_t i = 0; i < smaller(size, most_prefetched); i += line_size<T>) __builtin_prefetch(x + i);
  }

  template <Act act>
  void compute_plane(Task task, const int32_t* channel) const {
    if (masks_.fits()) return compute_lines<act, 1>(task, channel);
    const int64_t plane = task.n * a_.c_in + *channel;
    const float* x = widened(a_.x + plane * a_.window.h * a_.window.w, task, 0);
    if (a_.window.sw == 1) return compute_rows<act, 1>(plane, *channel, x);
    if (a_.window.sw == 2) return compute_rows<act, 2>(plane, *channel, x);
    compute_rows<act, 0>(plane, *channel, x);
  }

  const float* widened(const float* x, Task, int64_t) const { return x; }
  const float* widened(const BFloat16* x, Task task, int64_t place) const {
    const int64_t size = a_.window.h * a_.window.w;
    float* out = widened_.get() + task.worker * widened_size() + place * size;
    copy_row(x, size, out);
    return out;
  }

  template <Act act, int planes>
  void compute_lines(Task task, const int32_t* channels) const {
    const int64_t pixels = a_.window.oh * a_.window.ow, size = a_.window.h * a_.window.w;
    Lines<T, planes> lines;
    ISW_UNROLL
    for (int i = 0; i < planes; ++i) {
      const int64_t plane = task.n * a_.c_in + channels[i];
      lines.in[i] = widened(a_.x + plane * size, task, i);
      lines.weights[i] = weights_.get() + channels[i] * taps_;
      lines.bias[i] = a_.bias[channels[i]];
      lines.y[i] = a_.y + plane * pixels;
      lines.total[i] = Total{};
    }
    constexpr int vectors = span_vectors / planes;
    int64_t p = 0;
    for (; pixels - p > (vectors - 1) * lanes; p += vectors * lanes)
      run_masked_part<act, vectors>(a_.act, lines, masks_, taps_, p, pixels);
    for (; p < pixels; p += lanes) run_masked_part<act, 1>(a_.act, lines, masks_, taps_, p, pixels);
    ISW_UNROLL
    for (int i = 0; i < planes; ++i)
      keep_total(task.n * a_.c_in + channels[i], lines.total[i]);
  }

  template <Act act>
  void fill(int64_t plane, int64_t c) const {
    const int64_t pixels = a_.window.oh * a_.window.ow;
    const bool made = !a_.out_keep || a_.out_keep[plane];
    const Vec value = made ? rounded<T>(activate<act>(a_.act, broadcast(a_.bias[c]))) : Vec{};
    T* y = a_.y + plane * pixels;
    for (int64_t p = 0; (made || a_.zeros) && p < pixels; p += lanes) store_first(y + p, value, smaller(lanes, pixels - p));
    a_.squares[plane] = value[0] * value[0] * static_cast<float>(pixels);
    if (a_.sums) a_.sums[plane] = value[0] * static_cast<float>(pixels);
  }
  void keep_total(int64_t plane, const Total& total) const {
    a_.squares[plane] = reduce_add(total.squares);
    if (a_.sums) a_.sums[plane] = reduce_add(total.sums);
  }

  template <Act act, int stride>
  void compute_rows(int64_t plane, int64_t c, const float* x) const {
    const Window& w = a_.window;
    Total total = {};
    for (int64_t row = 0; row < w.oh;)
      row += 2 * (w.oh - row) > column_rows ? compute_group<act, stride, column_rows>(plane, c, x, row, total)
                                            : compute_group<act, stride, column_rows / 2>(plane, c, x, row, total);
    keep_total(plane, total);
  }

  // Returns how many rows it has computed, or would have, were they not beyond the last.
  template <Act act, int stride, int rows>
  int64_t compute_group(int64_t plane, int64_t c, const float* x, int64_t row, Total& total) const {
    const Window& w = a_.window;
    T* y = a_.y + (plane * w.oh + row) * w.ow;
    for (int64_t column = 0; column < w.ow; column += lanes) {
      Vec sum[rows];
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = broadcast(a_.bias[c]);
      filter_rows<rows, stride>(w, x, row, column, reached_.at(column), weights_.get() + c * taps_, sum);
      const int64_t pixels = smaller(lanes, w.ow - column);
      ISW_UNROLL
      for (int r = 0; r < rows; ++r) {
        if (row + r >= w.oh) break;
        const Vec value = rounded<T>(activate<act>(a_.act, only_first(sum[r], pixels)));
        store_first(y + r * w.ow + column, value, pixels);
        total.add(value);
      }
    }
    return rows;
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const int64_t taps_;
  const Floats<T> weights_;
  const TapMasks masks_;
  const ReachedColumns reached_;
  const Kept kept_;
  Buffer<float> widened_;
  Buffer<int32_t> dropped_;
};

}  // namespace
}  // namespace isw
