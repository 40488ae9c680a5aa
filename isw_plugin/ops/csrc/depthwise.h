// Depthwise convolution, plane by plane. A dropped plane is zero, borders included, so its output is act(bias), or zero
// where the output is dropped.
//
// Where the output is as large as the input, a plane is read in place as one line of pixels, tap by tap through masks
// that leave out what lies beyond a border; with stride 2 row by row, in the same way. Other planes are packed first,
// bfloat16 ones at least widened.
#pragma once
#include "activate.h"
#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "masks.h"
#include "pack.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int span_vectors = 4;
constexpr int64_t most_prefetched = 1024;  // pixels
constexpr int64_t plane_pixels = 16384;  // of a task, or its turn would cost more than its work

template <Act act, int vectors, typename T>
ISW_INLINE void run_span_part(Act actual, const float* in, const int64_t* taps, const float* weights, int64_t count,
                              float bias, int64_t pixels, T* y, Total& total) {
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
    total.add(value);
  }
}

// Rows that a vector holds, several at once.
template <Act act, int rows, typename T>
ISW_INLINE void run_narrow_rows(Act actual, const float* in, int64_t pitch, const int64_t* taps, const float* weights,
                                int64_t count, float bias, int64_t width, T* y, Total& total) {
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
    total.add(value);
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

// A vector of outputs of several rows; x and y are planes. `vectors`: those that the masks leave anything of.
template <Act act, int rows, int vectors, typename T>
ISW_INLINE void run_halved_rows(Act actual, const Window& w, const float* x, int64_t row, int64_t column,
                                const Mask* masks, const float* weights, float bias, T* y, Total& total) {
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
    total.add(value);
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
        packing_(args.window),
        taps_(args.window.kh * args.window.kw),
        weights_(args.weight, args.c_in * taps_),
        masks_(args.window),
        halved_(args.window),
        offsets_(taps_),
        kept_(args.gate, args.n, args.c_in, runner, args.out_keep),
        packed_(runner.workers * packed_size()),
        dropped_(runner.workers * args.c_in) {
    for (int64_t tap = 0; tap < taps_; ++tap)
      offsets_.get()[tap] = packing_.tap(tap / args.window.kw, tap % args.window.kw);
    std::fill(packed_.get(), packed_.get() + runner.workers * packed_size(), 0.0f);
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

  // A packed plane, of which whole vectors are read past the last pixel, or widened ones.
  int64_t packed_size() const {
    const int64_t size = a_.window.h * a_.window.w;
    return larger(packing_.plane + span_vectors * lanes, size <= lanes ? planes_at_once * size : size);
  }

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
    const T* x = a_.x + plane * a_.window.h * a_.window.w;
    float* packed = packed_.get() + task.worker * packed_size();
    if (halved_.fits()) return compute_halved<act>(plane, *channel, line_of(x, packed));
    pack_plane(packing_, x, packed);
    compute_rows<act>(plane, *channel, packed);
  }

  const float* line_of(const float* x, float*) const { return x; }
  const float* line_of(const BFloat16* x, float* line) const {
    copy_row(x, a_.window.h * a_.window.w, line);
    return line;
  }

  template <Act act, int planes>
  void compute_lines(Task task, const int32_t* channels) const {
    const int64_t pixels = a_.window.oh * a_.window.ow, size = a_.window.h * a_.window.w;
    Lines<T, planes> lines;
    ISW_UNROLL
    for (int i = 0; i < planes; ++i) {
      const int64_t plane = task.n * a_.c_in + channels[i];
      lines.in[i] = line_of(a_.x + plane * size, packed_.get() + task.worker * packed_size() + i * size);
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
  void compute_halved(int64_t plane, int64_t c, const float* x) const {
    const Window& w = a_.window;
    const float* weights = weights_.get() + c * taps_;
    T* y = a_.y + plane * w.oh * w.ow;
    Total total = {};
    for (int64_t column = 0; column < w.ow; column += lanes) {
      const bool two = halved_.reads_second(column);
      int64_t row = 0;
      for (; row + span_vectors <= w.oh; row += span_vectors)
        (two ? run_halved_rows<act, span_vectors, 2, T> : run_halved_rows<act, span_vectors, 1, T>)(
            a_.act, w, x, row, column, halved_.at(column), weights, a_.bias[c], y, total);
      for (; row < w.oh; ++row)
        run_halved_rows<act, 1, 2>(a_.act, w, x, row, column, halved_.at(column), weights, a_.bias[c], y, total);
    }
    keep_total(plane, total);
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

  template <Act act>
  void compute_rows(int64_t plane, int64_t c, const float* packed) const {
    const Window& w = a_.window;
    const float* weights = weights_.get() + c * taps_;
    T* y = a_.y + plane * w.oh * w.ow;
    Total total = {};
    int64_t row = 0;
    for (; w.ow <= lanes && row + span_vectors <= w.oh; row += span_vectors)
      run_narrow_rows<act, span_vectors>(a_.act, packed + row * packing_.pitch, packing_.pitch, offsets_.get(), weights,
                                         taps_, a_.bias[c], w.ow, y + row * w.ow, total);
    for (; row < w.oh; ++row) run_span<act>(c, packed + row * packing_.pitch, w.ow, y + row * w.ow, total);
    keep_total(plane, total);
  }

  template <Act act>
  void run_span(int64_t c, const float* in, int64_t pixels, T* y, Total& total) const {
    const float* weights = weights_.get() + c * taps_;
    int64_t p = 0;
    for (; pixels - p > 2 * lanes; p += span_vectors * lanes)
      run_span_part<act, span_vectors>(a_.act, in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p,
                                       total);
    for (; p < pixels; p += lanes)
      run_span_part<act, 1>(a_.act, in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p, total);
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
  Buffer<int32_t> dropped_;
};

}  // namespace
}  // namespace isw
