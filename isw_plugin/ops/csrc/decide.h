// Decisions: statistics of the producer -> which channels of this instance are kept.
#pragma once
#include <cmath>

#include "api.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

// Weights of the channel this far down the list are prefetched, so lists carry a tail of valid channels.
constexpr int64_t list_tail = 16;

ISW_INLINE void norms_of(const Gate& gate, int64_t n, int64_t channels, float* norms) {
  const float* partial = gate.squares + n * gate.slots * channels;
  for (int64_t c = 0; c < channels; ++c) norms[c] = partial[c];
  for (int64_t s = 1; s < gate.slots; ++s)
    for (int64_t c = 0; c < channels; ++c) norms[c] += partial[s * channels + c];
  for (int64_t c = 0; c < channels; ++c) norms[c] = std::sqrt(norms[c]);
}

ISW_INLINE float mean_of(const float* values, int64_t count) {
  Vec sum = {};
  for (int64_t c = 0; c < count; c += lanes) sum += load_first(values + c, smaller(lanes, count - c));
  return reduce_add(sum) / static_cast<float>(count);
}

// Below this norm a channel is dropped; -1 (never) where the variation does not exceed alpha or is NaN, as of a zero map.
// Relative to the mean first: the squares of large norms overflow, those of small ones vanish.
static float threshold_of(const Gate& gate, const float* norms, float* deviations, int64_t channels) {
  const float mean = mean_of(norms, channels);
  for (int64_t c = 0; c < channels; ++c) {
    const float relative = norms[c] / mean - 1;
    deviations[c] = relative * relative;
  }
  const float variation = std::sqrt(mean_of(deviations, channels));
  return variation > gate.alpha ? gate.beta * mean : -1.0f;
}

// Those of norms whose threshold is not above them.
static void keep_large(const Gate& gate, const float* norms, int64_t channels, bool* keep) {
  Buffer<float> deviations(channels);
  const float threshold = threshold_of(gate, norms, deviations.get(), channels);
  for (int64_t c = 0; c < channels; ++c) keep[c] = !(norms[c] < threshold);
}

static void decide(const Gate& gate, int64_t n, int64_t channels, bool* keep) {
  if (gate.keep) {
    const uint8_t* given = gate.keep + n * channels;
    for (int64_t c = 0; c < channels; ++c) keep[c] = given[c] != 0;
  } else if (!gate.squares) {
    memset(keep, 1, channels);
  } else {
    Buffer<float> norms(channels);
    norms_of(gate, n, channels, norms.get());
    keep_large(gate, norms.get(), channels, keep);
  }
}

static void keep_mask(const Gate& gate, int64_t n, int64_t channels, bool* keep) {
  for (int64_t i = 0; i < n; ++i) decide(gate, i, channels, keep + i * channels);
}

// The channels in [begin, end) with this mark, in order; returns how many.
static int64_t list_where(const bool* keep, bool mark, int64_t begin, int64_t end, int32_t* out) {
  int64_t count = 0;
  for (int64_t c = begin; c < end; ++c) {
    out[count] = static_cast<int32_t>(c);
    count += keep[c] == mark;
  }
  return count;
}

// The kept channels of every instance, in order.
class Kept {
 public:
  // also: keep only these, [N][C]; null: all.
  Kept(const Gate& gate, int64_t n, int64_t channels, const Runner& runner, const uint8_t* also = nullptr)
      : stride_(channels + list_tail), keep_(n * channels), lists_(n * stride_), counts_(n) {
    parallel(runner, n, [&](int64_t i, int64_t) {
      bool* keep = keep_.get() + i * channels;
      decide(gate, i, channels, keep);
      for (int64_t c = 0; also && c < channels; ++c) keep[c] = keep[c] && also[i * channels + c];
      counts_.get()[i] = list(keep, channels, lists_.get() + i * stride_);
    });
  }
  const int32_t* channels(int64_t n) const { return lists_.get() + n * stride_; }
  int64_t count(int64_t n) const { return counts_.get()[n]; }
  const bool* keep() const { return keep_.get(); }

 private:
  static int64_t list(const bool* keep, int64_t channels, int32_t* kept) {
    const int64_t count = list_where(keep, true, 0, channels, kept);
    const int32_t last = count ? kept[count - 1] : 0;
    for (int64_t i = 0; i < list_tail; ++i) kept[count + i] = last;
    return count;
  }

  int64_t stride_;
  Buffer<bool> keep_;
  Buffer<int32_t> lists_;
  Buffer<int64_t> counts_;
};

// The outputs that each instance keeps: all of them where nothing says which.
class Outputs {
 public:
  // most: of the list of numbers in their order, at least the channels.
  Outputs(const uint8_t* keep, int64_t n, int64_t channels, int64_t most, const Runner& runner)
      : given_(keep != nullptr),
        channels_(channels),
        kept_(Gate{nullptr, 0, 0, 0, keep}, keep ? n : 0, channels, runner),
        in_order_(most + list_tail) {
    for (int64_t i = 0; i < most + list_tail; ++i) in_order_.get()[i] = static_cast<int32_t>(i);
  }
  bool given() const { return given_; }
  const int32_t* in_order() const { return in_order_.get(); }
  const int32_t* channels(int64_t n) const { return given_ ? kept_.channels(n) : in_order(); }
  int64_t count(int64_t n) const { return given_ ? kept_.count(n) : channels_; }
  // body(channel) for the dropped ones in [begin, end)
  template <typename Body>
  void for_dropped(int64_t n, int64_t begin, int64_t end, Body body) const {
    for (int64_t c = begin; given_ && c < end; ++c)
      if (!kept_.keep()[n * channels_ + c]) body(c);
  }

 private:
  bool given_;
  int64_t channels_;
  Kept kept_;
  Buffer<int32_t> in_order_;
};

}  // namespace
}  // namespace isw
