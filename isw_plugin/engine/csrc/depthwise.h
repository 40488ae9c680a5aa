// Depthwise convolution, one plane a task. A dropped plane is zero, borders included, so its output is act(bias).
#pragma once
#include "api.h"
#include "decide.h"
#include "pack.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int span_vectors = 4;

template <Act act, int vectors>
ISW_INLINE void run_span_part(const float* in, const int64_t* taps, const float* weights, int64_t count, float bias,
                              int64_t pixels, float* y, Vec& squares) {
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
    const Vec value = activate<act>(only_first(sum[v], left));
    store_first(y + v * lanes, value, left);
    squares += value * value;
  }
}

class Depthwise {
 public:
  Depthwise(const ConvArgs& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        packing_(args.window),
        taps_(args.window.kh * args.window.kw),
        flat_(args.window.ow < lanes),
        offsets_(taps_),
        kept_(args.gate, args.n, args.c_in, runner),
        packed_(runner.workers * packed_size()),
        flat_y_(flat_ ? runner.workers * packed_size() : 0) {
    for (int64_t tap = 0; tap < taps_; ++tap)
      offsets_.get()[tap] = packing_.tap(tap / args.window.kw, tap % args.window.kw);
    std::fill(packed_.get(), packed_.get() + runner.workers * packed_size(), 0.0f);
  }

  void run() {
    constexpr int64_t planes = 8;
    const int64_t all = a_.n * a_.c_in;
    parallel(runner_, ceil_div(all, planes), [&](int64_t task, int64_t worker) {
      for (int64_t plane = task * planes; plane < smaller(all, (task + 1) * planes); ++plane)
        a_.squares[plane] = compute_plane(plane, worker);
    });
  }

 private:
  // Whole vectors are read past the last pixel.
  int64_t packed_size() const { return packing_.plane + span_vectors * lanes; }

  float compute_plane(int64_t plane, int64_t worker) {
    if (!kept_.keep()[plane]) return fill(plane);
    float* packed = packed_.get() + worker * packed_size();
    pack_plane(packing_, a_.x + plane * a_.window.h * a_.window.w, packed);
    if (a_.act == Act::relu) return compute_rows<Act::relu>(plane, packed, worker);
    if (a_.act == Act::relu6) return compute_rows<Act::relu6>(plane, packed, worker);
    return compute_rows<Act::none>(plane, packed, worker);
  }

  float fill(int64_t plane) const {
    const int64_t pixels = a_.window.oh * a_.window.ow;
    Vec value = broadcast(a_.bias[plane % a_.c_in]);
    if (a_.act == Act::relu) value = activate<Act::relu>(value);
    if (a_.act == Act::relu6) value = activate<Act::relu6>(value);
    std::fill(a_.y + plane * pixels, a_.y + (plane + 1) * pixels, value[0]);
    return value[0] * value[0] * static_cast<float>(pixels);
  }

  template <Act act>
  float compute_rows(int64_t plane, const float* packed, int64_t worker) const {
    const Window& w = a_.window;
    float* y = a_.y + plane * w.oh * w.ow;
    Vec squares = {};
    if (!flat_) {
      for (int64_t row = 0; row < w.oh; ++row)
        run_span<act>(plane % a_.c_in, packed + row * packing_.pitch, w.ow, y + row * w.ow, squares);
      return reduce_add(squares);
    }
    Vec unused = {};
    float* rows = flat_y_.get() + worker * packed_size();
    run_span<act>(plane % a_.c_in, packed, (w.oh - 1) * packing_.pitch + w.ow, rows, unused);
    for (int64_t row = 0; row < w.oh; ++row) {
      const Vec value = load_first(rows + row * packing_.pitch, w.ow);
      store_first(y + row * w.ow, value, w.ow);
      squares += value * value;
    }
    return reduce_add(squares);
  }

  template <Act act>
  void run_span(int64_t c, const float* in, int64_t pixels, float* y, Vec& squares) const {
    const float* weights = a_.weight + c * taps_;
    int64_t p = 0;
    for (; pixels - p > 2 * lanes; p += span_vectors * lanes)
      run_span_part<act, span_vectors>(in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p, squares);
    for (; p < pixels; p += lanes)
      run_span_part<act, 1>(in + p, offsets_.get(), weights, taps_, a_.bias[c], pixels - p, y + p, squares);
  }

  const ConvArgs& a_;
  const Runner& runner_;
  const Packing packing_;
  const int64_t taps_;
  const bool flat_;  // narrow maps: all rows as one line, border columns computed too and then left out
  Buffer<int64_t> offsets_;
  const Kept kept_;
  Buffer<float> packed_, flat_y_;
};

}  // namespace
}  // namespace isw
