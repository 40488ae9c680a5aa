// A 1x1 convolution and the depthwise one that reads it: an instance's kept channels of the map between are made a few at
// a time, filtered while they are in the cache, and never reach memory.
#pragma once
#include "api.h"
#include "conv1x1_pixel_lanes.h"
#include "decide.h"
#include "depthwise.h"
#include "element.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

// A strip of pixels of one task's channels.
template <typename T>
struct ExpandedStrip {
  const T* input;  // first pixel of channel 0
  int64_t plane;
  StripWeights<T> weights;
  int64_t count;  // of kept input channels
  const T *next, *last_of_next;  // weights that are multiplied after these: of outputs, for input 0
  float bias[strip_channels];
  int64_t pixels;
  float* y;  // [strip_channels][y_plane]
  int64_t y_plane;
};

template <Act act, int vectors, typename T>
static void expand_strip(Act actual, const ExpandedStrip<T>& s) {
  const float* weights[strip_channels];
  Vec sum[strip_channels][vectors];
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c) {
    weights[c] = s.weights.of[c];
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[c][v] = broadcast(s.bias[c]);
  }
  const int32_t* channels = s.weights.channels;
  const int64_t rest = s.pixels - (vectors - 1) * lanes;
  for (int64_t k = 0; k < s.count; k += together<T>) {
    const auto in = packed_from(s.input, s.plane, channels, k, s.count);
    Vec pixels[vectors];
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v)
      pixels[v] = v < vectors - 1 ? load(in + v * lanes) : load_first(in + v * lanes, rest);
    for (int i = 0; i < together<T>; ++i) {
      __builtin_prefetch(s.next + channels[k + i] * block, 0, 2);
      __builtin_prefetch(s.last_of_next + channels[k + i] * block, 0, 2);
    }
    asm volatile("" ::: "memory");  // as in accumulate_bordered
    add_channel<T>(pixels, weights, s.weights.row(k / together<T>), sum);
  }
  ISW_UNROLL
  for (int c = 0; c < strip_channels; ++c)
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v)
      store(s.y + c * s.y_plane + v * lanes, rounded<T>(activate<act>(actual, sum[c][v])));
}

template <typename T>
class ExpandDepthwise {
 public:
  ExpandDepthwise(const Expansion<T>& expansion, const ConvArgs<T>& args, const Runner& runner)
      : e_(expansion),
        a_(args),
        runner_(runner),
        filters_(args.window, args.act, args.weight, args.bias, args.c_in),
        y_(args),
        kept_(expansion.gate, args.n, expansion.channels, runner),
        out_(args.out_keep, args.n, args.c_in, args.c_in, runner),
        plane_(ceil_div(args.window.h * args.window.w, lanes) * lanes + lanes),
        made_(runner.workers * made_size()),
        planes_(runner.workers * strip_channels * plane_),
        bordered_(filters_.bordered, runner.workers) {
    std::fill(made_.get(), made_.get() + runner.workers * made_size(), 0.0f);
  }

  void run() {
    const int64_t parts = ceil_div(a_.c_in, strip_channels);
    parallel(runner_, a_.n * parts, [&](int64_t task, int64_t worker) {
      const int64_t n = task / parts, begin = task % parts * strip_channels, end = begin + strip_channels;
      const int64_t count = smaller(out_.count(n) - begin, strip_channels);
      if (count > 0) compute({n, worker}, {out_.channels(n) + begin, count});
      out_.for_dropped(n, begin, smaller(a_.c_in, end),
                       [&](int64_t channel) { y_.fill(n * a_.c_in + channel, Vec{}, a_.zeros); });
    });
  }

 private:
  struct Task {
    int64_t n, worker;
  };
  int64_t made_size() const { return StripWeights<T>::made ? (e_.channels + 1) * strip_channels : 0; }
  const T* weights_for(int64_t output) const {
    return e_.weight + output / block * block * e_.channels + output % block;
  }
  float* plane(Task task, int64_t c) const { return planes_.get() + (task.worker * strip_channels + c) * plane_; }

  void compute(Task task, StripOutputs outputs) const {
    for (int64_t c = 0; c < strip_channels; ++c) filters_.prefetch(outputs.list[c]);
    with_act(e_.act, [&](auto act) { expand<act.value>(task, outputs); });
    filter(task, outputs);
  }

  void filter(Task task, StripOutputs outputs) const {
    const int64_t first = task.n * a_.c_in;
    float* bordered = bordered_.of(task.worker);
    for (int64_t c = 0; c < outputs.count; ++c) {
      const int64_t channel = outputs.list[c];
      filters_.bordered.copy(plane(task, c), bordered);
      y_.keep_total(first + channel, filters_.filter(bordered, channel, y_.at(first + channel)));
    }
  }

  template <Act act>
  void expand(Task task, StripOutputs outputs) const {
    const int64_t size = a_.window.h * a_.window.w, count = kept_.count(task.n);
    ExpandedStrip<T> strip;
    for (int64_t c = 0; c < strip_channels; ++c) strip.bias[c] = e_.bias[outputs.list[smaller(c, outputs.count - 1)]];
    strip.weights = weights_of(e_.weight, e_.channels, outputs, kept_.channels(task.n), count,
                               made_.get() + task.worker * made_size());
    strip.next = weights_for(outputs.list[strip_channels]);
    strip.last_of_next = weights_for(outputs.list[2 * strip_channels - 1]);
    strip.plane = size;
    strip.count = count;
    strip.y_plane = plane_;
    for (int64_t p = 0; p < size; p += strip.pixels) {
      const int64_t vectors = smaller(ceil_div(size - p, lanes) == 4 ? 2 : strip_vectors, ceil_div(size - p, lanes));
      strip.pixels = smaller(vectors * lanes, size - p);
      strip.input = e_.x + task.n * e_.channels * size + p;
      strip.y = plane(task, 0) + p;
      if (vectors == 3)
        expand_strip<act, 3>(e_.act, strip);
      else if (vectors == 2)
        expand_strip<act, 2>(e_.act, strip);
      else
        expand_strip<act, 1>(e_.act, strip);
    }
  }

  const Expansion<T>& e_;
  const ConvArgs<T>& a_;
  const Runner& runner_;
  const Filters<T> filters_;
  const FilteredPlanes<T> y_;
  const Kept kept_;
  const Outputs out_;
  const int64_t plane_;  // floats of one of the map between
  Buffer<float> made_, planes_;
  const BorderedPlanes bordered_;
};

}  // namespace
}  // namespace isw
