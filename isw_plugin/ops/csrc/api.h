// What the operator file and the kernels share: plain structs, one table of functions per instruction set.
#pragma once
#include <cstdint>

namespace isw {

// Output channels of one weight block; weights are packed [ceil(C_out / block)][C_in][kh][kw][block], those of grouped
// layers group by group, [groups][ceil(C_out / groups / block)][C_in / groups][kh][kw][block].
constexpr int64_t block = 32;

enum class Act { none, relu, relu6, silu, hardswish, gelu };

// How bfloat16 numbers are kept; arithmetic is always float.
struct BFloat16 {
  uint16_t bits;
};

// Which channels of an (N, C, ...) feature are kept: statistics, or a ready mask, or (both null) all of them.
struct Gate {
  const float* squares = nullptr;  // [N][slots][C] partial sums of squares
  int64_t slots = 0;
  float alpha = 0, beta = 0;
  const uint8_t* keep = nullptr;  // [N][C]; any byte but 0 keeps
};

struct Window {
  int64_t h, w;  // input map
  int64_t oh, ow;  // output map
  int64_t kh, kw, sh, sw;
  int64_t ph, pw;  // zeros above and to the left; those behind follow from the output map
};

struct ConvShape {
  int64_t n, c_in, c_out, slots;
  int64_t groups;  // above 1: not of bfloat16, whose channels are multiplied in pairs
  bool pooled;  // y is the 2x2 max-pooled map; squares are of the map before
  Window window;
  Act act;
  Gate gate, residual_gate;
  const uint8_t* out_keep;  // [N][C_out], outputs that are made, others are zero; null: all
  bool zeros;  // whether those are written: else they hold anything, since nobody reads them
};

// T: how maps and weights are kept, float or BFloat16.
template <typename T>
struct ConvArgs : ConvShape {
  const T *x, *weight;
  const float* bias;
  const T* residual;  // like y, or null
  T* y;
  float* squares;  // [N][slots][C_out], of y as it is kept
  float* sums;  // the same, not squared; null: nobody asks
};

// A 1x1 layer whose map a depthwise layer alone reads; both make the same channels.
template <typename T>
struct Expansion {
  const T* x;
  int64_t channels;
  Gate gate;  // of x
  const T* weight;
  const float* bias;
  Act act;
};

template <typename T>
struct PoolArgs {
  const T* x;
  T* y;
  int64_t planes;
  Window window;
};

// What is known of a map before the layer that reads it runs; dropped channels count as zero.
struct Source {
  const float *squares, *sums;  // [N][slots][channels]
  int64_t slots, channels;
  float positions;  // pixels of the map
  const uint8_t* keep;  // [N][channels]; null: all
};

// Norms of a map from those that its layer reads: scale * relu(weight^T phi + bias), and whom the gate keeps.
template <typename T>
struct PredictArgs {
  const Source* sources;  // phi: root mean squares and means of one source after the other
  int64_t count, n, features, outputs;
  int64_t rank;
  const T* basis;  // [features][rank], or null: there is none, and rank is that of the features
  const T* weight;  // [rank][outputs]
  const float* bias;
  float scale, alpha, beta;
  float* norms;  // [N][outputs]
  bool* keep;
};

// Runs body(state, task, worker) for every task; a worker runs one task at a time, workers are 0 .. workers - 1.
struct Runner {
  int64_t workers;
  void (*run)(int64_t workers, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* state);
};

template <typename T>
struct KernelsFor {
  void (*conv)(const ConvArgs<T>&, const Runner&);
  void (*depthwise)(const ConvArgs<T>&, const Runner&);
  void (*expand_depthwise)(const Expansion<T>&, const ConvArgs<T>&, const Runner&);
  void (*max_pool)(const PoolArgs<T>&, const Runner&);
  // sums: null, or also those of the map itself
  void (*sum_squares)(const T* x, float* squares, float* sums, int64_t planes, int64_t size, const Runner&);
  void (*predict)(const PredictArgs<T>&, const Runner&);
};

struct Kernels : KernelsFor<float>, KernelsFor<BFloat16> {
  void (*keep_mask)(const Gate&, int64_t n, int64_t channels, bool* keep);
};

// Partial sums per instance and channel: a function of the output map only, so results never depend on threads.
inline int64_t slots_of(int64_t oh, int64_t ow) {
  int64_t slots = 1;
  while (slots < 16 && oh >= 8 * slots && oh * ow >= 392 * slots) slots *= 2;
  return slots;
}

}  // namespace isw
