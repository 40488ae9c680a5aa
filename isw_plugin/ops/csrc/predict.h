// Norms of a map before its layer runs: a matrix, or two, times statistics of the maps that the layer reads. Rows of features
// that are zero, those of dropped channels, are not read. A worker has some of the outputs, so that each weight is read once;
// a step's rows stay in the L2 cache while every instance passes over them.
#pragma once
#include <algorithm>
#include <cmath>

#include "api.h"
#include "decide.h"
#include "element.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

// out[n] = bias + x[n] * weight, x without its zeros.
template <typename T>
class Product {
 public:
  Product(int64_t n, int64_t features, int64_t outputs, const T* weight, const float* bias, float* out,
          const Runner& runner)
      : n_(n),
        features_(features),
        outputs_(outputs),
        weight_(weight),
        bias_(bias),
        out_(out),
        runner_(runner),
        vectors_(outputs / lanes),
        parts_(larger(1, smaller(runner.workers, ceil_div(vectors_, least_vectors)))),
        groups_(smaller(n, ceil_div(runner.workers, parts_))),
        step_(larger(1, n > groups_ ? step_bytes * parts_ / (outputs * int64_t(sizeof(T))) : features)),
        stride_(features + list_tail),
        lists_(n * stride_),
        values_(n * features),
        counts_(n) {}

  // To be filled with x[n], [features] of one instance after the other.
  float* values() const { return values_.get(); }

  void run() {
    parallel(runner_, n_, [&](int64_t n, int64_t) { list_features(n); });
    parallel(runner_, parts_ * groups_, [&](int64_t task, int64_t) {
      const int64_t part = task / groups_, group = task % groups_;
      const Task outputs{vectors_ * part / parts_, vectors_ * (part + 1) / parts_, part == parts_ - 1};
      for (int64_t feature = 0; feature < larger(1, features_); feature += step_)
        for (int64_t n = n_ * group / groups_; n < n_ * (group + 1) / groups_; ++n)
          add_step(outputs, n, feature, smaller(features_, feature + step_));
    });
  }

 private:
  static constexpr int most_vectors = lanes == 16 ? 16 : 8;  // of outputs, in registers
  static constexpr int64_t least_vectors = 8;  // of a worker, or it would wait for every sum
  static constexpr int64_t step_bytes = 256 * 1024;
  static constexpr int64_t rows_ahead = 8;
  struct Task {
    int64_t begin, end;  // vectors of outputs
    bool last;  // and those that fill none
  };

  int32_t* list_of(int64_t n) const { return lists_.get() + n * stride_; }
  float* values_of(int64_t n) const { return values_.get() + n * features_; }

  void list_features(int64_t n) const {
    int32_t* list = list_of(n);
    float* values = values_of(n);
    int64_t count = 0;
    for (int64_t f = 0; f < features_; ++f) {
      const float value = values[f];
      list[count] = static_cast<int32_t>(f);
      values[count] = value;
      count += value != 0;
    }
    std::fill_n(list + count, list_tail, count ? list[count - 1] : 0);
    counts_.get()[n] = count;
  }

  void add_step(const Task& task, int64_t n, int64_t begin, int64_t end) const {
    const int32_t* list = list_of(n);
    const int32_t *first = std::lower_bound(list, list + counts_.get()[n], static_cast<int32_t>(begin));
    const int32_t* last = std::lower_bound(first, list + counts_.get()[n], static_cast<int32_t>(end));
    const float* values = values_of(n) + (first - list);
    int64_t vector = task.begin;
    add_vectors<most_vectors>(task, n, first, last, values, begin == 0, vector);
    const int64_t rest = task.last ? outputs_ - vectors_ * lanes : 0;
    if (rest) add_rows<1>(n, first, last, values, begin == 0, vectors_ * lanes, rest);
  }

  // As many at once as there are left.
  template <int vectors>
  void add_vectors(const Task& task, int64_t n, const int32_t* first, const int32_t* last, const float* values,
                   bool cold, int64_t& vector) const {
    for (; vector + vectors <= task.end; vector += vectors)
      add_rows<vectors>(n, first, last, values, cold, vector * lanes, lanes);
    if constexpr (vectors > 1) add_vectors<vectors / 2>(task, n, first, last, values, cold, vector);
  }

  // `lanes_used` of the last vector.
  template <int vectors>
  void add_rows(int64_t n, const int32_t* first, const int32_t* last, const float* values, bool cold, int64_t output,
                int64_t lanes_used) const {
    float* out = out_ + n * outputs_ + output;
    const float* start = cold ? bias_ + output : out;
    const T* weight = weight_ + output;
    const auto read = [&](const auto* in, int v) {
      return vectors > 1 ? load(in + v * lanes) : load_first(in + v * lanes, lanes_used);
    };
    Vec sum[vectors];
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[v] = read(start, v);
    for (; first < last; ++first) {
      const Vec value = broadcast(*values++);
      const T *row = weight + *first * outputs_, *ahead = weight + first[rows_ahead] * outputs_;
      ISW_UNROLL
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(ahead + v * lanes);
        sum[v] += value * read(row, v);
      }
    }
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) store_first(out + v * lanes, sum[v], lanes_used);
  }

  const int64_t n_, features_, outputs_;
  const T* weight_;  // [features][outputs]
  const float* bias_;
  float* out_;  // [n][outputs]
  const Runner& runner_;
  const int64_t vectors_;  // full ones
  const int64_t parts_, groups_;  // of outputs, of instances
  const int64_t step_;  // features
  const int64_t stride_;
  Buffer<int32_t> lists_;  // features that are not zero, of every instance
  Buffer<float> values_;  // theirs
  Buffer<int64_t> counts_;
};

static float* features_of(const Source& source, int64_t n, float* phi) {
  const int64_t channels = source.channels;
  const float inverse = 1 / source.positions;
  const auto add_up = [&](const float* partial, float* out) {
    partial += n * source.slots * channels;
    std::copy_n(partial, channels, out);
    for (int64_t s = 1; s < source.slots; ++s)
      for (int64_t c = 0; c < channels; ++c) out[c] += partial[s * channels + c];
  };
  float* means = phi + channels;
  add_up(source.squares, phi);
  add_up(source.sums, means);
  for (int64_t c = 0; c < channels; ++c) phi[c] = std::sqrt(phi[c] * inverse), means[c] *= inverse;
  for (int64_t c = 0; source.keep && c < channels; ++c)
    if (!source.keep[n * channels + c]) phi[c] = means[c] = 0;
  return means + channels;
}

template <typename T>
static void predict(const PredictArgs<T>& args, const Runner& runner) {
  const bool reduced = args.basis != nullptr;
  const int64_t inner = reduced ? args.rank : args.features;
  Product<T> last(args.n, inner, args.outputs, args.weight, args.bias, args.norms, runner);
  const auto fill = [&](float* values) {
    parallel(runner, args.n, [&](int64_t n, int64_t) {
      float* phi = values + n * args.features;
      for (int64_t i = 0; i < args.count; ++i) phi = features_of(args.sources[i], n, phi);
    });
  };
  if (reduced) {
    Buffer<float> zeros(inner);
    std::fill_n(zeros.get(), inner, 0.0f);
    Product<T> first(args.n, args.features, inner, args.basis, zeros.get(), last.values(), runner);
    fill(first.values());
    first.run();
  } else {
    fill(last.values());
  }
  last.run();
  parallel(runner, args.n, [&](int64_t n, int64_t) {
    float* norms = args.norms + n * args.outputs;
    for (int64_t c = 0; c < args.outputs; ++c) norms[c] = (norms[c] < 0 ? 0 : norms[c]) * args.scale;
    keep_large({nullptr, 0, args.alpha, args.beta, nullptr}, norms, args.outputs, args.keep + n * args.outputs);
  });
}

}  // namespace
}  // namespace isw
