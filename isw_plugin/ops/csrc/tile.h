// The inner loop of the direct convolution: rows x columns output pixels times V vectors of output channels in
// registers, summed over kept input channels and taps.
#pragma once
#include "api.h"
#include "element.h"
#include "vec.h"

namespace isw {
namespace {

// Registers: pixels x 2 accumulators, 2 weights, 1 input.
constexpr int max_pixels = lanes == 16 ? 14 : 6;

// A packed plane holds one input channel, or as many as are multiplied together; `begin` is a multiple of that.
template <typename T>
struct Tile {
  const float* input;  // first pixel of the tile in the first packed plane
  int64_t plane, pitch;
  const T* weights;  // first output channel of the tile in this block
  int64_t weight_plane;  // elements from input channel to input channel
  const int32_t* channels;  // kept input channels
  int64_t begin, end;  // part of that list
  const int64_t* taps;  // offsets into a plane
  int64_t first_tap, last_tap;
  int64_t prefetch_end;  // list length that may be prefetched; 0: none
  int64_t prefetch_first, prefetch_last;  // cache lines of a channel's weights
  const float* start;  // what the sums start from, start_stride floats from pixel to pixel
  int64_t start_stride;  // 0: the bias, else earlier sums
  float* sums;  // [pixel][V * lanes]
};

template <typename T>
ISW_INLINE void prefetch_weights(const Tile<T>& t, int64_t k) {
  const int64_t next = k + (t.end - t.begin);
  if (next >= t.prefetch_end) return;
  const T* line = t.weights + t.channels[next] * t.weight_plane;
  for (int64_t i = t.prefetch_first; i < t.prefetch_last; ++i) __builtin_prefetch(line + line_size<T> * i, 0, 2);
}
template <typename T>
ISW_INLINE void prefetch_together(const Tile<T>& t, int64_t k) {
  for (int64_t i = 0; i < together<T>; ++i) prefetch_weights(t, k + i);
}

template <int pixels, int V, typename T>
ISW_INLINE void load_sums(const Tile<T>& t, Vec (&sum)[pixels][V]) {
  ISW_UNROLL
  for (int i = 0; i < pixels; ++i)
    ISW_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v] = load(t.start + i * t.start_stride + v * lanes);
}

template <int pixels, int V>
ISW_INLINE void store_sums(float* sums, const Vec (&sum)[pixels][V]) {
  ISW_UNROLL
  for (int i = 0; i < pixels; ++i)
    ISW_UNROLL
    for (int v = 0; v < V; ++v) store(sums + (i * V + v) * lanes, sum[i][v]);
}

// One tap: every pixel of the tile times the tap's weights.
template <int rows, int columns, int V, typename T>
ISW_INLINE void add_tap(const float* in, int64_t pitch, const T* weights, const T* others,
                        Vec (&sum)[rows * columns][V]) {
  Vec weight[V];
  ISW_UNROLL
  for (int v = 0; v < V; ++v) weight[v] = load_weights(weights + v * lanes, others + v * lanes);
  ISW_UNROLL
  for (int i = 0; i < rows * columns; ++i) {
    const Vec pixel = broadcast<T>(in[i / columns * pitch + i % columns]);
    ISW_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v] = multiply_add<T>(pixel, weight[v], sum[i][v]);
  }
}

// The weights of list entry k, and of the one behind it, which is valid at the end too.
template <typename T>
ISW_INLINE const T* weights_of(const Tile<T>& t, int64_t k) { return t.weights + t.channels[k] * t.weight_plane; }

template <typename T, int rows, int columns, int V>
static void accumulate(const Tile<T>& t) {
  Vec sum[rows * columns][V];
  load_sums(t, sum);
  const int64_t taps = t.last_tap - t.first_tap;
  const int64_t* offsets = t.taps + t.first_tap;
  for (int64_t k = t.begin; k < t.end; k += together<T>) {
    const float* plane = t.input + k / together<T> * t.plane;
    const T* weights = weights_of(t, k) + t.first_tap * block;
    const T* others = weights_of(t, k + together<T> - 1) + t.first_tap * block;
    prefetch_together(t, k);
    int64_t tap = 0;
    for (; tap + 3 <= taps; tap += 3, weights += 3 * block, others += 3 * block) {
      __builtin_prefetch(plane + offsets[tap] + t.plane + columns - 1);
      ISW_UNROLL
      for (int i = 0; i < 3; ++i) {
        asm volatile("" ::: "memory");
        add_tap<rows, columns, V>(plane + offsets[tap + i], t.pitch, weights + i * block, others + i * block, sum);
      }
    }
    for (; tap < taps; ++tap, weights += block, others += block)
      add_tap<rows, columns, V>(plane + offsets[tap], t.pitch, weights, others, sum);
  }
  store_sums(t.sums, sum);
}

// 3x3, stride 1, padding 1, tile as wide as the map: taps that fall on the border are left out at compile time
// (100 of 144 remain on a 4x4 map, 16 of 36 on a 2x2 map).
template <typename T, int rows, int columns, int V, bool top, bool bottom>
static void accumulate_bordered(const Tile<T>& t) {
  Vec sum[rows * columns][V];
  load_sums(t, sum);
  for (int64_t k = t.begin; k < t.end; k += together<T>) {
    const float* plane = t.input + k / together<T> * t.plane;
    const T *weights = weights_of(t, k), *others = weights_of(t, k + together<T> - 1);
    prefetch_together(t, k);
    ISW_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int ky = tap / 3, kx = tap % 3;
      asm volatile("" ::: "memory");  // else GCC keeps every broadcast of a channel alive and spills
      Vec weight[V];
      ISW_UNROLL
      for (int v = 0; v < V; ++v)
        weight[v] = load_weights(weights + tap * block + v * lanes, others + tap * block + v * lanes);
      ISW_UNROLL
      for (int i = 0; i < rows * columns; ++i) {
        const int row = i / columns, column = i % columns;
        if ((top && row == 0 && ky == 0) || (bottom && row == rows - 1 && ky == 2)) continue;
        if ((column == 0 && kx == 0) || (column == columns - 1 && kx == 2)) continue;
        const Vec pixel = broadcast<T>(plane[(row + ky) * t.pitch + column + kx]);
        ISW_UNROLL
        for (int v = 0; v < V; ++v) sum[i][v] = multiply_add<T>(pixel, weight[v], sum[i][v]);
      }
    }
  }
  store_sums(t.sums, sum);
}

template <typename T>
using Accumulate = void (*)(const Tile<T>&);

// Shape of one tile; the kernel for V = 1 and V = 2.
template <typename T>
struct TileKernel {
  int64_t rows, columns;
  Accumulate<T> run[2];
};

template <typename T, int rows, int columns>
constexpr TileKernel<T> plain() {
  return {rows, columns, {accumulate<T, rows, columns, 1>, accumulate<T, rows, columns, 2>}};
}

template <typename T, int rows, int columns, bool top, bool bottom>
constexpr TileKernel<T> bordered() {
  return {
      rows,
      columns,
      {accumulate_bordered<T, rows, columns, 1, top, bottom>, accumulate_bordered<T, rows, columns, 2, top, bottom>}};
}

#if defined(__AVX512F__)
template <typename T>
constexpr TileKernel<T> row_tiles[] = {
    plain<T, 1, 1>(), plain<T, 1, 2>(), plain<T, 1, 3>(),  plain<T, 1, 4>(),  plain<T, 1, 5>(),
    plain<T, 1, 6>(), plain<T, 1, 7>(), plain<T, 1, 8>(),  plain<T, 1, 9>(),  plain<T, 1, 10>(),
    plain<T, 1, 11>(), plain<T, 1, 12>(), plain<T, 1, 13>(), plain<T, 1, 14>()};
// By map width, for maps narrower than half a tile.
template <typename T>
constexpr TileKernel<T> narrow_tiles[] = {plain<T, 8, 1>(), plain<T, 4, 2>(), plain<T, 4, 3>(), plain<T, 3, 4>(),
                                          plain<T, 2, 5>(), plain<T, 2, 6>(), plain<T, 2, 7>()};
#else
template <typename T>
constexpr TileKernel<T> row_tiles[] = {plain<T, 1, 1>(), plain<T, 1, 2>(), plain<T, 1, 3>(),
                                       plain<T, 1, 4>(), plain<T, 1, 5>(), plain<T, 1, 6>()};
template <typename T>
constexpr TileKernel<T> narrow_tiles[] = {plain<T, 6, 1>(), plain<T, 3, 2>(), plain<T, 2, 3>()};
#endif
constexpr int64_t narrow_widths = sizeof(narrow_tiles<float>) / sizeof(TileKernel<float>);

inline bool is_same_3x3(const Window& w) {
  const bool same = w.oh == w.h && w.ow == w.w;  // as many zeros behind as before
  return w.kh == 3 && w.kw == 3 && w.sh == 1 && w.sw == 1 && w.ph == 1 && w.pw == 1 && same;
}

// A tile that leaves border taps out at compile time, or null.
template <typename T>
const TileKernel<T>* bordered_tile(const Window& w, [[maybe_unused]] int64_t row, int64_t rows) {
  static constexpr TileKernel<T> map_2x2 = bordered<T, 2, 2, true, true>();
#if defined(__AVX512F__)
  static constexpr TileKernel<T> top_2x4 = bordered<T, 2, 4, true, false>();
  static constexpr TileKernel<T> bottom_2x4 = bordered<T, 2, 4, false, true>();
  static constexpr TileKernel<T> row_8 = bordered<T, 1, 8, false, false>(), two_7 = bordered<T, 2, 7, false, false>();
  static constexpr TileKernel<T> top_8 = bordered<T, 1, 8, true, false>(), bottom_8 = bordered<T, 1, 8, false, true>();
#endif
  if (!is_same_3x3(w)) return nullptr;
  if (w.ow == 2 && w.oh == 2 && rows == 2) return &map_2x2;
#if defined(__AVX512F__)
  if (w.ow == 4 && row == 0 && rows >= 2 && w.oh > 2) return &top_2x4;
  if (w.ow == 4 && row == w.oh - 2 && row > 0 && rows == 2) return &bottom_2x4;
  if (w.ow == 7 && rows >= 2) return &two_7;
  if (w.ow == 8 && w.oh > 1) return row == 0 ? &top_8 : row == w.oh - 1 ? &bottom_8 : &row_8;
#endif
  return nullptr;
}

// The tile for the outputs at (row, column) when `rows` rows are left.
template <typename T>
const TileKernel<T>& tile_for(const Window& w, int64_t row, int64_t rows, int64_t column) {
  if (const TileKernel<T>* tile = bordered_tile<T>(w, row, rows)) return *tile;
  if (w.ow <= narrow_widths && narrow_tiles<T>[w.ow - 1].rows <= rows) return narrow_tiles<T>[w.ow - 1];
  const int64_t left = w.ow - column;
  return row_tiles<T>[ceil_div(left, ceil_div(left, max_pixels)) - 1];
}

}  // namespace
}  // namespace isw
