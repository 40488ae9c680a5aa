// Norms of a map before its layer runs: a matrix times statistics of the maps that the layer reads. Rows of features that
// are zero, those of dropped channels, are not read. A worker has some of the outputs, so that each weight is read once;
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

template <typename T>
class Predict {
 public:
  Predict(const PredictArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        vectors_(args.outputs / lanes),
        parts_(larger(1, smaller(runner.workers, ceil_div(vectors_, least_vectors)))),
        groups_(smaller(args.n, ceil_div(runner.workers, parts_))),
        step_(larger(1, args.n > groups_ ? step_bytes * parts_ / (args.outputs * int64_t(sizeof(T))) : args.features)),
        stride_(args.features + list_tail),
        lists_(args.n * stride_),
        values_(args.n * args.features),
        counts_(args.n) {}

  void run() {
    parallel(runner_, a_.n, [&](int64_t n, int64_t) { list_features(n); });
    parallel(runner_, parts_ * groups_, [&](int64_t task, int64_t) {
      const int64_t part = task / groups_, group = task % groups_;
      const Task outputs{vectors_ * part / parts_, vectors_ * (part + 1) / parts_, part == parts_ - 1};
      for (int64_t feature = 0; feature < larger(1, a_.features); feature += step_)
        for (int64_t n = a_.n * group / groups_; n < a_.n * (group + 1) / groups_; ++n)
          add_step(outputs, n, feature, smaller(a_.features, feature + step_));
    });
    parallel(runner_, a_.n, [&](int64_t n, int64_t) { finish_instance(n); });
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
  float* values_of(int64_t n) const { return values_.get() + n * a_.features; }

  void list_features(int64_t n) const {
    float* phi = values_of(n);
    for (int64_t i = 0; i < a_.count; ++i) phi = features_of(a_.sources[i], n, phi);
    int32_t* list = list_of(n);
    float* values = values_of(n);
    int64_t count = 0;
    for (int64_t f = 0; f < a_.features; ++f) {
      const float value = values[f];
      list[count] = static_cast<int32_t>(f);
      values[count] = value;
      count += value != 0;
    }
    std::fill_n(list + count, list_tail, count ? list[count - 1] : 0);
    counts_.get()[n] = count;
  }

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

  void add_step(const Task& task, int64_t n, int64_t begin, int64_t end) const {
    const int32_t* list = list_of(n);
    const int32_t *first = std::lower_bound(list, list + counts_.get()[n], static_cast<int32_t>(begin));
    const int32_t* last = std::lower_bound(first, list + counts_.get()[n], static_cast<int32_t>(end));
    const float* values = values_of(n) + (first - list);
    int64_t vector = task.begin;
    add_vectors<most_vectors>(task, n, first, last, values, begin == 0, vector);
    const int64_t rest = task.last ? a_.outputs - vectors_ * lanes : 0;
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
    float* norms = a_.norms + n * a_.outputs + output;
    const float* start = cold ? a_.bias + output : norms;
    const T* weight = a_.weight + output;
    const auto read = [&](const auto* in, int v) {
      return vectors > 1 ? load(in + v * lanes) : load_first(in + v * lanes, lanes_used);
    };
    Vec sum[vectors];
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) sum[v] = read(start, v);
    for (; first < last; ++first) {
      const Vec value = broadcast(*values++);
      const T *row = weight + *first * a_.outputs, *ahead = weight + first[rows_ahead] * a_.outputs;
      ISW_UNROLL
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(ahead + v * lanes);
        sum[v] += value * read(row, v);
      }
    }
    ISW_UNROLL
    for (int v = 0; v < vectors; ++v) store_first(norms + v * lanes, sum[v], lanes_used);
  }

  void finish_instance(int64_t n) const {
    float* norms = a_.norms + n * a_.outputs;
    for (int64_t c = 0; c < a_.outputs; ++c) norms[c] = (norms[c] < 0 ? 0 : norms[c]) * a_.scale;
    keep_large({nullptr, 0, a_.alpha, a_.beta, nullptr}, norms, a_.outputs, a_.keep + n * a_.outputs);
  }

  const PredictArgs<T>& a_;
  const Runner& runner_;
  const int64_t vectors_;  // full ones
  const int64_t parts_, groups_;  // of outputs, of instances
  const int64_t step_;  // features
  const int64_t stride_;
  Buffer<int32_t> lists_;  // features that are not zero, of every instance
  Buffer<float> values_;  // theirs
  Buffer<int64_t> counts_;
};

template <typename T>
static void predict(const PredictArgs<T>& args, const Runner& runner) {
  Predict<T>(args, runner).run();
}

}  // namespace
}  // namespace isw
