// 1x1 convolution: pixels on the lanes, so outputs need no transpose. A panel (some strips of pixels of some kept
// channels) is packed to stay in the L1 cache while every output channel of the task passes over it. A strip's outputs
// may be any, so those that an instance drops are left out.
#pragma once
#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int strip_vectors = 3;
constexpr int strip_pixels = strip_vectors * lanes;
// Output channels in registers, with strip_vectors accumulators each.
constexpr int strip_channels = lanes == 16 ? 8 : 4;
constexpr int64_t panel_channels = 128;  // times strip_pixels: 24 KB with AVX-512
constexpr int64_t panel_strips = 8;
static_assert(block % strip_channels == 0, "a block is whole strips");

// Where a strip's weights are: those of one input for one output, or of a pair of inputs, as a broadcast takes them.
template <typename T>
struct StripWeights {
  // A broadcast cannot widen or pair on the way: such weights are made, [inputs / together][strip_channels].
  static constexpr bool made = !std::is_same_v<T, float>;
  const float* of[strip_channels];  // every output, for input 0
  const int32_t* channels;  // kept input channels

  int64_t row(int64_t k) const { return made ? k * strip_channels : channels[k] * block; }
};

template <typename T>
struct Strip {
  const float* input;  // [count][vectors * lanes]
  StripWeights<T> weights;
  float bias[strip_channels];
  int64_t count;  // of kept input channels, or of pairs
  int64_t outputs, pixels;
  bool first, last;  // part of the input channels: start from the bias, finish the outputs
  float* sums;  // between parts, [strip_channels][vectors * lanes]
  Output<T> out;
};

template <typename T, int vectors>
ISW_INLINE void add_channel(const Vec (&pixels)[vectors], const float* const (&weights)[strip_channels], int64_t row,
                            Vec (&sum)[strip_channels][vectors]) {
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c) {
    const Vec weight = broadcast<T>(weights[c][row]);
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[c][v] = multiply_add<T>(weight, pixels[v], sum[c][v]);
  }
}

// Some outputs of a layer, at most strip_channels, in order.
struct StripOutputs {
  const int32_t* list;
  int64_t count;
  bool lie_together() const { return list[count - 1] - list[0] == count - 1 && list[0] % strip_channels == 0; }
};

// Weights of a strip for these inputs, of a layer of so many inputs, side by side, once for all strips of a panel.
static void make_weights(const BFloat16* weights, int64_t inputs, StripOutputs outputs, const int32_t* channels,
                         int64_t count, float* out) {
  const auto place_of = [&](int64_t i) { return outputs.list[i] / block * block * inputs + outputs.list[i] % block; };
  const bool side_by_side = outputs.lie_together();
  for (int64_t k = 0; k < count; k += together<BFloat16>, out += strip_channels) {
    const BFloat16* first = weights + place_of(0);
    for (int i = 0; i < together<BFloat16>; ++i) __builtin_prefetch(first + channels[k + 8 + i] * block);
    if (side_by_side)
      store_first(out, load_first(packed_from(first, block, channels, k, count), strip_channels), strip_channels);
    else
      for (int64_t c = 0; c < outputs.count; ++c)
        out[c] = broadcastable(packed_from(weights, block, channels, k, count), place_of(c));
  }
}

// The weights of a strip, made in `made` where they must be. There are strip_channels of them: the last of fewer again.
template <typename T>
static StripWeights<T> weights_of(const T* weights, int64_t inputs, StripOutputs outputs, const int32_t* channels,
                                  [[maybe_unused]] int64_t count, [[maybe_unused]] float* made) {
  StripWeights<T> result;
  result.channels = channels;
  if constexpr (StripWeights<T>::made) make_weights(weights, inputs, outputs, channels, count, made);
  for (int64_t c = 0; c < strip_channels; ++c) {
    const int64_t output = outputs.list[smaller(c, outputs.count - 1)];
    if constexpr (StripWeights<T>::made)
      result.of[c] = made + c;
    else
      result.of[c] = weights + output / block * block * inputs + output % block;
  }
  return result;
}

template <int vectors, typename T>
ISW_INLINE void start(const Strip<T>& s, Vec (&sum)[strip_channels][vectors]) {
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c)
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v)
      sum[c][v] = s.first ? broadcast(s.bias[c]) : load(s.sums + (c * vectors + v) * lanes);
}

template <int vectors, typename T>
ISW_INLINE void multiply(const Strip<T>& s, Vec (&sum)[strip_channels][vectors]) {
  const float* in = s.input;
  const float* weights[strip_channels];
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c) weights[c] = s.weights.of[c];
  for (int64_t k = 0; k < s.count; ++k, in += vectors * lanes) {
    const int64_t row = s.weights.row(k);
    asm volatile("" ::: "memory");
    if constexpr (!StripWeights<T>::made) {
      const int64_t ahead = s.weights.row(k + 8);
      __builtin_prefetch(weights[0] + ahead);
      __builtin_prefetch(weights[strip_channels - 1] + ahead);
    }
    Vec pixels[vectors];
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) pixels[v] = load(in + v * lanes);
    add_channel<T>(pixels, weights, row, sum);
  }
}

template <Act act, int vectors, typename T>
ISW_INLINE void finish_strip(const Strip<T>& s, int c, Vec (&sum)[vectors]) {
  const Output<T>& out = s.out;
  const int64_t plane = out.at[c] * out.plane;
  const T* residual = out.residual && out.residual_keep[out.at[c]] ? out.residual + plane : nullptr;
  float* squares = out.squares + c * lanes;
  Vec total = load(squares), values = {};
  ISW_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const int64_t pixels = v < vectors - 1 ? lanes : s.pixels - v * lanes;
    Vec value = only_first(sum[v], pixels);
    if (residual) value += load_first(residual + v * lanes, pixels);
    value = rounded<T>(activate<act>(out.act, value));
    store_first(out.y + plane + v * lanes, value, pixels);
    total += value * value;
    values += value;
  }
  store(squares, total);
  if (out.sums) store(out.sums + c * lanes, load(out.sums + c * lanes) + values);
}

template <Act act, int vectors, typename T>
static void run_strip(const Strip<T>& s) {
  for (int64_t c = 0; s.last && c < s.outputs; ++c)
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(s.out.y + s.out.at[c] * s.out.plane + v * lanes, 1);
  Vec sum[strip_channels][vectors];
  start(s, sum);
  multiply(s, sum);
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c) {
    if (!s.last)
      for (int v = 0; v < vectors; ++v) store(s.sums + (c * vectors + v) * lanes, sum[c][v]);
    else if (c < s.outputs)
      finish_strip<act>(s, c, sum[c]);
  }
}

template <Act act, typename T>
static void run_strip(const Strip<T>& s, int64_t vectors) {
  if (vectors == 3) return run_strip<act, 3>(s);
  if (vectors == 2) return run_strip<act, 2>(s);
  run_strip<act, 1>(s);
}


template <int vectors, typename T>
static void pack_pixels(const T* x, int64_t plane, const int32_t* channels, int64_t count, int64_t pixels,
                        float* out) {
  const int64_t rest = pixels - (vectors - 1) * lanes;
  for (int64_t k = 0; k < count; k += together<T>, out += vectors * lanes) {
    const auto in = packed_from(x, plane, channels, k, count);
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) {
      for (int i = 0; i < together<T>; ++i) __builtin_prefetch(x + channels[k + 8 + i] * plane + v * lanes);
      store(out + v * lanes, v < vectors - 1 ? load(in + v * lanes) : load_first(in + v * lanes, rest));
    }
  }
}

template <typename T>
static void pack_strided(const Window& w, const T* x, const int32_t* channels, int64_t count, int64_t first,
                         int64_t pixels, float* out) {
  for (int64_t k = 0; k < count; k += together<T>) {
    const auto in = packed_from(x, w.h * w.w, channels, k, count);
    for (int64_t i = 0, y = first / w.ow, column = first % w.ow; i < pixels; ++i) {
      *out++ = widen(in[y * w.sh * w.w + column * w.sw]);
      if (++column == w.ow) column = 0, ++y;
    }
    for (int64_t i = pixels; i % lanes; ++i) *out++ = 0;
  }
}

// Output channels of a task, in strips or blocks: as few parts as keep the workers about equally long busy. Every part
// packs the panels anew, for half a strip's time.
inline int64_t units_per_part(int64_t units, int64_t others, int64_t workers) {
  const auto half_units = [&](int64_t part) {
    return ceil_div(others * ceil_div(units, part), workers) * (2 * part + 1);
  };
  int64_t best = units;
  for (int64_t part = units; part > 0 && others * ceil_div(units, part) <= 8 * workers; --part)
    if (half_units(part) < half_units(best)) best = part;
  return best;
}

template <typename T>
class Pointwise {
 public:
  Pointwise(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        by_channels_(args.n < runner.workers && args.c_out > args.c_in &&
                     args.c_out >= least_strips * strip_channels * runner.workers),
        part_channels_(strip_channels * strips_per_part()),
        parts_(ceil_div(args.c_out, part_channels_)),
        kept_(args.gate, args.n, args.c_in, runner),
        residual_kept_(args.residual_gate, args.residual ? args.n : 0, args.c_out, runner),
        out_(args.out_keep, args.n, args.c_out, args.c_out, runner),
        packed_(runner.workers * packed_size),
        made_(StripWeights<T>::made ? runner.workers * made_size : 0),
        sums_(runner.workers * sums_size()),
        squares_(runner.workers * (args.sums ? 2 : 1) * squares_size()) {
    std::fill(made_.get(), made_.get() + (StripWeights<T>::made ? runner.workers * made_size : 0), 0.0f);
  }

  void run() {
    parallel(runner_, a_.n * a_.slots * parts_, [&](int64_t index, int64_t worker) {
      Task task;
      task.worker = worker;
      task.part = by_channels_ ? index / a_.slots % parts_ : index % parts_;
      task.slot = by_channels_ ? index % a_.slots : index / parts_ % a_.slots;
      task.n = index / parts_ / a_.slots;
      const int64_t first = first_of(task.part, out_.count(task.n));
      task.outputs = out_.channels(task.n) + first;
      task.channels = first_of(task.part + 1, out_.count(task.n)) - first;
      compute_task(task);
    });
  }

 private:
  struct Task {
    int64_t n, slot, worker, part, channels;
    const int32_t* outputs;
  };
  struct Panel {
    int64_t begin, end;  // of the kept channels
    int64_t strips;
    int64_t pixel[panel_strips + 1];  // where strips begin, and the last ends
  };
  static constexpr int64_t packed_size = panel_channels * strip_pixels;
  static constexpr int64_t made_size = panel_channels * strip_channels;
  static constexpr int64_t least_strips = 4;  // of a worker that shares channels: it packs every panel, for half of one

  int64_t strips_per_part() const {
    const int64_t strips = ceil_div(a_.c_out, strip_channels);
    return by_channels_ ? ceil_div(strips, runner_.workers)
                        : units_per_part(strips, a_.n * a_.slots, runner_.workers);
  }
  // Of these outputs, where a part begins; parts are whole strips of about the same number.
  int64_t first_of(int64_t part, int64_t outputs) const {
    return smaller(outputs, ceil_div(ceil_div(outputs * part, parts_), strip_channels) * strip_channels);
  }
  int64_t pixels() const { return a_.window.oh * a_.window.ow; }
  int64_t sums_size() const { return a_.c_in > panel_channels ? part_channels_ * strip_pixels : 0; }
  int64_t squares_size() const { return ceil_div(part_channels_, lanes) * lanes * lanes; }

  void compute_task(const Task& task) {
    const Window& w = a_.window;
    float* squares = squares_of(task);
    for (int64_t statistic = 0; statistic < (a_.sums ? 2 : 1); ++statistic)
      std::fill_n(squares + statistic * sums_behind(), squares_size(), 0.0f);
    const int64_t first = w.oh * task.slot / a_.slots * w.ow, last = w.oh * (task.slot + 1) / a_.slots * w.ow;
    const int64_t kept = kept_.count(task.n);
    const int64_t slot = (task.n * a_.slots + task.slot) * a_.c_out;
    out_.for_dropped(task.n, a_.c_out * task.part / parts_, a_.c_out * (task.part + 1) / parts_, [&](int64_t channel) {
      T* y = a_.y + (task.n * a_.c_out + channel) * pixels();
      if (a_.zeros) std::fill(y + first, y + last, T{});
      a_.squares[slot + channel] = 0;
      if (a_.sums) a_.sums[slot + channel] = 0;
    });
    for (int64_t p = first; task.channels && p < last;) {
      Panel panel = panel_at(p, last, smaller(kept, panel_channels));
      panel.begin = 0;
      do {
        panel.end = smaller(kept, panel.begin + panel_channels);
        compute_panel(task, panel);
        panel.begin = panel.end;
      } while (panel.begin < kept);
      p = panel.pixel[panel.strips];
    }
    for (int64_t c = 0; c < task.channels; c += lanes) {
      finish_statistic(task, c, squares + c * lanes, a_.squares + slot);
      if (a_.sums) finish_statistic(task, c, squares + sums_behind() + c * lanes, a_.sums + slot);
    }
  }
  void finish_statistic(const Task& task, int64_t c, const float* partial, float* slot) const {
    float totals[lanes];
    reduce_squares(partial, lanes, totals);
    for (int64_t i = 0; i < smaller(lanes, task.channels - c); ++i) slot[task.outputs[c + i]] = totals[i];
  }
  float* squares_of(const Task& task) const { return squares_.get() + task.worker * squares_size(); }
  int64_t sums_behind() const { return runner_.workers * squares_size(); }

  // As many strips as the panel holds next to this many channels.
  static Panel panel_at(int64_t pixel, int64_t last, int64_t channels) {
    const int64_t most = smaller(panel_strips, panel_channels / larger(1, channels));
    Panel panel;
    panel.pixel[0] = pixel;
    for (panel.strips = 0; panel.strips < most && pixel < last; ++panel.strips) {
      pixel = smaller(last, pixel + vectors_for(last - pixel) * lanes);
      panel.pixel[panel.strips + 1] = pixel;
    }
    return panel;
  }
  // Two and two vectors beat three and one.
  static int64_t vectors_for(int64_t pixels) {
    const int64_t vectors = ceil_div(pixels, lanes);
    return vectors == 4 ? 2 : smaller(vectors, strip_vectors);
  }

  void compute_panel(const Task& task, const Panel& panel) {
    float* packed = packed_.get() + task.worker * packed_size;
    const int64_t count = panel.end - panel.begin;
    for (int64_t i = 0; i < panel.strips; ++i) pack_strip(task, panel, i, packed + i * count * strip_pixels);
    for (int64_t c = 0; c < task.channels; c += strip_channels) {
      Strip<T> strip = strip_of(task, c);
      strip.weights = weights_of(a_.weight, a_.c_in, {task.outputs + c, strip.outputs},
                                 kept_.channels(task.n) + panel.begin, count, made_.get() + task.worker * made_size);
      for (int64_t i = 0; i < panel.strips; ++i) {
        strip.out.y = a_.y + task.n * a_.c_out * pixels() + panel.pixel[i];
        strip.out.residual = a_.residual ? a_.residual + task.n * a_.c_out * pixels() + panel.pixel[i] : nullptr;
        strip.input = packed + i * count * strip_pixels;
        strip.count = ceil_div(count, together<T>);
        strip.first = panel.begin == 0;
        strip.last = panel.end == kept_.count(task.n);
        strip.pixels = panel.pixel[i + 1] - panel.pixel[i];
        with_act(a_.act, [&](auto act) { run_strip<act.value>(strip, ceil_div(strip.pixels, lanes)); });
      }
    }
  }

  void pack_strip(const Task& task, const Panel& panel, int64_t i, float* out) const {
    const Window& w = a_.window;
    const int32_t* channels = kept_.channels(task.n) + panel.begin;
    const int64_t count = panel.end - panel.begin, first = panel.pixel[i], pixels = panel.pixel[i + 1] - first;
    const T* x = a_.x + task.n * a_.c_in * w.h * w.w;
    const int64_t vectors = ceil_div(pixels, lanes);
    if (w.sh > 1 || w.sw > 1) return pack_strided(w, x, channels, count, first, pixels, out);
    if (vectors == 3) return pack_pixels<3>(x + first, w.h * w.w, channels, count, pixels, out);
    if (vectors == 2) return pack_pixels<2>(x + first, w.h * w.w, channels, count, pixels, out);
    pack_pixels<1>(x + first, w.h * w.w, channels, count, pixels, out);
  }

  // Of outputs from number c of the task's on.
  Strip<T> strip_of(const Task& task, int64_t c) const {
    Strip<T> strip;
    strip.outputs = smaller(strip_channels, task.channels - c);
    for (int64_t i = 0; i < strip_channels; ++i) strip.bias[i] = i < strip.outputs ? a_.bias[task.outputs[c + i]] : 0;
    strip.sums = sums_.get() + task.worker * sums_size() + c * strip_pixels;
    strip.out.plane = pixels();
    strip.out.at = task.outputs + c;
    strip.out.residual_keep = residual_kept_.keep() + task.n * a_.c_out;
    strip.out.squares = squares_of(task) + c * lanes;
    strip.out.sums = a_.sums ? strip.out.squares + sums_behind() : nullptr;
    strip.out.act = a_.act;
    return strip;
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const bool by_channels_;  // whether workers share out the channels of an instance, as a depthwise layer does its planes
  const int64_t part_channels_;  // of the output channels, so that few pixels still make tasks
  const int64_t parts_;
  const Kept kept_, residual_kept_;
  const Outputs out_;
  Buffer<float> packed_, made_, sums_, squares_;
};

}  // namespace
}  // namespace isw
