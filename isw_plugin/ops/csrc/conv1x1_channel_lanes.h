// 1x1 convolution with output channels on the lanes: a weight that is loaded serves a tile of pixels, and maps of few
// pixels fill their tiles. A panel (some kept channels) is packed to stay near while every group of output channels of
// the task passes over it; sums wait in L2 meanwhile and are transposed at the end. Groups are of an instance's kept outputs,
// whose weights are gathered for a panel where they do not lie together.
#pragma once
#include <array>
#include <utility>

#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "gather.h"
#include "conv1x1_pixel_lanes.h"
#include "tile.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int group_channels = 2 * lanes;  // output channels in registers
constexpr int64_t group_panel = 128;  // input channels
static_assert(block % group_channels == 0, "a block is whole groups");

// Weights of the group that comes next. Each tile of this one asks for some of them: they come from afar while it
// multiplies.
template <typename T>
struct Ahead {
  const int32_t* channels = nullptr;  // kept inputs
  int64_t count = 0;  // of them
  int64_t lines = 0;  // of an input's weights
  const T* line[block];  // where they are for input 0

  Ahead share(int64_t part, int64_t parts) const {
    Ahead some{channels, count};
    for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) some.line[some.lines++] = line[i];
    return some;
  }
  void ask(int64_t k) const {
    for (int64_t i = 0; k < count && i < lines; ++i) __builtin_prefetch(line[i] + channels[k] * block, 0, 2);
  }
};

// A panel, a tile of pixels and a group of output channels.
template <typename T>
struct GroupTile {
  const float* input;  // first pixel of the first packed channel, or pair
  int64_t plane;
  const T* weights;  // of the group
  const int32_t* channels;  // kept
  int64_t count;
  const float* start;  // what the sums start from, start_stride floats from pixel to pixel
  int64_t start_stride;
  float* sums;  // [pixel][group_channels]
  Ahead<T> ahead;
};

template <int pixels, typename T>
ISW_INLINE void add_input(const GroupTile<T>& t, int64_t k, Vec (&sum)[pixels][2]) {
  const T *weights = t.weights + t.channels[k] * block, *others = t.weights + t.channels[k + together<T> - 1] * block;
  ISW_UNROLL
  for (int i = 0; i < together<T>; ++i) t.ahead.ask(k + i);
  asm volatile("" ::: "memory");  // as in accumulate_bordered
  add_tap<1, pixels, 2>(t.input + k / together<T> * t.plane, 0, weights, others, sum);
}

template <typename T, int pixels>
static void accumulate_group(const GroupTile<T>& t) {
  Vec sum[pixels][2];
  ISW_UNROLL
  for (int i = 0; i < pixels; ++i)
    ISW_UNROLL
    for (int v = 0; v < 2; ++v) sum[i][v] = load(t.start + i * t.start_stride + v * lanes);
  constexpr int64_t step = together<T>;
  int64_t k = 0;
  for (; k + 4 * step <= t.count; k += 4 * step)
    ISW_UNROLL
    for (int i = 0; i < 4; ++i) add_input(t, k + i * step, sum);
  for (; k < t.count; k += step) add_input(t, k, sum);
  store_sums(t.sums, sum);
}

template <typename T, int... less>
constexpr auto group_kernels(std::integer_sequence<int, less...>) {
  return std::array<void (*)(const GroupTile<T>&), sizeof...(less)>{accumulate_group<T, less + 1>...};
}

template <typename T>
class PointwiseBlocks {
 public:
  PointwiseBlocks(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        pixels_(args.window.oh * args.window.ow),
        tiles_(ceil_div(pixels_, max_pixels)),
        groups_(ceil_div(args.c_out, group_channels)),
        part_(units_per_part(groups_, args.n, runner.workers)),
        kept_(args.gate, args.n, args.c_in, runner),
        residual_kept_(args.residual_gate, args.residual ? args.n : 0, args.c_out, runner),
        out_(args.out_keep, args.n, args.c_out, larger(args.c_in, args.c_out), runner),
        gathered_(args.out_keep ? runner.workers * gathered_size : 0),
        packed_(runner.workers * group_panel * pixels_),
        sums_(runner.workers * part_ * group_channels * pixels_) {
    if (out_.given()) std::fill(gathered_.get(), gathered_.get() + runner.workers * gathered_size, T{});
  }

  void run() {
    const int64_t parts = ceil_div(groups_, part_);
    parallel(runner_, a_.n * parts, [&](int64_t index, int64_t worker) {
      const int64_t n = index / parts, part = index % parts, groups = ceil_div(out_.count(n), group_channels);
      compute_task({n, worker, groups * part / parts, groups * (part + 1) / parts});
      out_.for_dropped(n, a_.c_out * part / parts, a_.c_out * (part + 1) / parts, [&](int64_t channel) {
        T* y = a_.y + (n * a_.c_out + channel) * pixels_;
        if (a_.zeros) std::fill(y, y + pixels_, T{});
        a_.squares[n * a_.c_out + channel] = 0;
        if (a_.sums) a_.sums[n * a_.c_out + channel] = 0;
      });
    });
  }

 private:
  struct Task {
    int64_t n, worker;
    int64_t first, last;  // groups of output channels
  };
  static constexpr int64_t gathered_size = (group_panel + 2) * block;  // a row may be read, and one written, behind it

  void compute_task(const Task& task) const {
    if (task.first == task.last) return;
    const int64_t kept = kept_.count(task.n);
    int64_t begin = 0, end;
    do {
      end = smaller(kept, begin + group_panel);
      pack(task, begin, end);
      for (int64_t group = task.first; group < task.last; ++group) {
        add_panel(task, group, begin, end, ahead_of(task, group, begin, end));
        if (end == kept) finish_group(task, group);
      }
      begin = end;
    } while (begin < kept);
  }

  float* packed(const Task& task) const { return packed_.get() + task.worker * group_panel * pixels_; }
  float* sums(const Task& task, int64_t group) const {
    return sums_.get() + (task.worker * part_ + group - task.first) * group_channels * pixels_;
  }

  void pack(const Task& task, int64_t begin, int64_t end) const {
    const T* x = a_.x + task.n * a_.c_in * pixels_;
    float* out = packed(task);
    for (int64_t k = begin; k < end; k += together<T>, out += pixels_)
      copy_row(packed_from(x, pixels_, kept_.channels(task.n), k, end), pixels_, out);
  }

  // What follows on this group and panel.
  Ahead<T> ahead_of(const Task& task, int64_t group, int64_t begin, int64_t end) const {
    if (++group == task.last) group = task.first, begin = end, end = smaller(kept_.count(task.n), end + group_panel);
    Ahead<T> ahead{kept_.channels(task.n) + begin, end - begin};
    const int32_t *outputs = outputs_of(task, group), *last = outputs + count_of(task, group);
    for (; begin < end && outputs < last; ++outputs) {
      const T* line = a_.weight + *outputs / block * block * a_.c_in + *outputs % block / line_size<T> * line_size<T>;
      if (ahead.lines == 0 || line != ahead.line[ahead.lines - 1]) ahead.line[ahead.lines++] = line;
    }
    return ahead;
  }

  void add_panel(const Task& task, int64_t group, int64_t begin, int64_t end, const Ahead<T>& ahead) const {
    static constexpr auto kernels = group_kernels<T>(std::make_integer_sequence<int, max_pixels>());
    const int32_t* outputs = outputs_of(task, group);
    const int64_t count = count_of(task, group), channel = outputs[0];
    float bias[group_channels] = {};
    for (int64_t i = 0; i < count; ++i) bias[i] = a_.bias[outputs[i]];
    GroupTile<T> tile;
    tile.plane = pixels_;
    tile.count = end - begin;
    if (outputs[count - 1] - channel == count - 1 && channel % block + group_channels <= block) {
      tile.weights = a_.weight + channel / block * block * a_.c_in + channel % block;
      tile.channels = kept_.channels(task.n) + begin;
    } else {
      tile.weights = gather(task, outputs, count, begin, end);
      tile.channels = out_.in_order();
    }
    for (int64_t i = 0; i < tiles_; ++i) {
      const int64_t pixel = pixels_ * i / tiles_;
      tile.input = packed(task) + pixel;
      tile.sums = sums(task, group) + pixel * group_channels;
      tile.start = begin ? tile.sums : bias;
      tile.start_stride = begin ? group_channels : 0;
      tile.ahead = ahead.share(i, tiles_);
      kernels[pixels_ * (i + 1) / tiles_ - pixel - 1](tile);
    }
  }

  const int32_t* outputs_of(const Task& task, int64_t group) const {
    return out_.channels(task.n) + group * group_channels;
  }
  int64_t count_of(const Task& task, int64_t group) const {
    return smaller(group_channels, out_.count(task.n) - group * group_channels);
  }

  const T* gather(const Task& task, const int32_t* outputs, int64_t count, int64_t begin, int64_t end) const {
    const Gather<T> gather(outputs, count, 0, a_.c_in, 1);
    const int32_t* channels = kept_.channels(task.n);
    T* rows = gathered_.get() + task.worker * gathered_size;
    for (int64_t k = begin; k < end; ++k)
      gather.copy(a_.weight + channels[k] * block, (channels[k + 8] - channels[k]) * block, rows + (k - begin) * block);
    return rows;
  }

  void finish_group(const Task& task, int64_t group) const {
    const int32_t* outputs = outputs_of(task, group);
    const int64_t count = count_of(task, group);
    for (int64_t c = 0; c < count; c += lanes) {
      float squares[lanes * lanes] = {}, values[lanes * lanes] = {};
      Output<T> out;
      out.y = a_.y + task.n * a_.c_out * pixels_;
      out.plane = pixels_;
      out.at = outputs + c;
      out.channels = smaller(lanes, count - c);
      out.residual = a_.residual ? a_.residual + task.n * a_.c_out * pixels_ : nullptr;
      out.residual_keep = residual_kept_.keep() + task.n * a_.c_out;
      out.squares = squares;
      out.sums = a_.sums ? values : nullptr;
      out.act = a_.act;
      finish(out, sums(task, group) + c, group_channels, pixels_);
      finish_statistic(task, out, squares, a_.squares);
      if (a_.sums) finish_statistic(task, out, values, a_.sums);
    }
  }

  void finish_statistic(const Task& task, const Output<T>& out, const float* partial, float* to) const {
    float totals[lanes];
    reduce_squares(partial, lanes, totals);
    for (int64_t i = 0; i < out.channels; ++i) to[task.n * a_.c_out + out.at[i]] = totals[i];
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const int64_t pixels_, tiles_, groups_;
  const int64_t part_;  // groups of a task
  const Kept kept_, residual_kept_;
  const Outputs out_;
  Buffer<T> gathered_;
  Buffer<float> packed_, sums_;
};

}  // namespace
}  // namespace isw
