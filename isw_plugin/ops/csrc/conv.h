// Direct convolution over kept channels: pack, then one parallel loop over (output block, instances, rows).
//
// Input channels are taken a step at a time so that a step's weights stay in the L1 cache while every tile of the
// task passes over them; the sums wait in L2 meanwhile. Instances of small maps share a step's weights. Where an instance
// keeps some outputs, a step's weights of these are gathered first, but for maps so small that this would cost more
// than it saves: their dropped outputs are computed and made zero.
#pragma once
#include "api.h"
#include "decide.h"
#include "element.h"
#include "epilogue.h"
#include "gather.h"
#include "pack.h"
#include "tile.h"
#include "vec.h"
#include "workspace.h"

namespace isw {
namespace {

constexpr int64_t step_bytes = 32 * 1024;  // weights of a step when nothing is dropped
constexpr int64_t task_pixels = 1024;  // partial sums of a task: 128 KB
constexpr int64_t row_pixels = 64;  // the same when one step holds all weights
constexpr int64_t packed_bytes = 8 << 20;  // planes packed between two barriers
constexpr int64_t small_map = 64;
constexpr int64_t gather_pixels = 32;  // of a map, at least
constexpr int64_t most_instances = 32;

template <typename T>
class DirectConv {
 public:
  DirectConv(const ConvArgs<T>& args, const Runner& runner)
      : a_(args),
        runner_(runner),
        packing_(args.window),
        taps_(args.window.kh * args.window.kw),
        gathers_(args.out_keep && pixels() >= gather_pixels),
        inputs_(args.c_in / args.groups),
        outputs_(args.c_out / args.groups),
        blocks_(ceil_div(outputs_, block)),
        step_(larger(8, step_bytes / (taps_ * block * static_cast<int64_t>(sizeof(T))))),
        part_(smaller(args.n, larger(1, packed_bytes / (packing_.plane * larger(1, args.c_in) * 4)))),
        batch_(instances_per_task()),
        rows_(rows_per_pass()),
        offsets_(taps_),
        kept_(args.gate, args.n, args.c_in, runner),
        residual_kept_(args.residual_gate, args.residual ? args.n : 0, args.c_out, runner),
        out_(args.out_keep, args.n, args.c_out, larger(args.c_in, args.c_out), runner),
        gathered_(gathers_ ? runner.workers * gathered_size() : 0),
        packed_(part_ * args.c_in * packing_.plane),
        sums_(runner.workers * sums_size()),
        squares_(runner.workers * (args.sums ? 2 : 1) * squares_size()),
        cursors_(runner.workers * batch_) {
    for (int64_t tap = 0; tap < taps_; ++tap)
      offsets_.get()[tap] = packing_.tap(tap / args.window.kw, tap % args.window.kw);
    std::fill(gathered_.get(), gathered_.get() + (gathers_ ? runner.workers * gathered_size() : 0), T{});
  }

  void run() {
    for (int64_t first = 0; first < a_.n; first += part_) {
      const int64_t count = smaller(part_, a_.n - first);
      pack(first, count);
      compute(first, count);
    }
  }

 private:
  struct Task {
    int64_t block_index, slot, worker;
    int64_t first, count;  // instances
    int64_t part_first;  // first of the instances that are packed
    int64_t input;  // first input channel that the outputs read
    const int32_t* outputs;
    int64_t channels, width;  // how many, and the lanes that hold them
    bool gathers;  // or their weights lie side by side
    float bias[2 * lanes];
  };
  struct Pass {
    int64_t row, rows, pixels;
    int64_t first, stored;  // part of an output plane
  };

  int64_t all_blocks() const { return a_.groups * blocks_; }
  int64_t pixels() const { return a_.window.oh * a_.window.ow; }
  int64_t unit() const { return a_.pooled ? 2 : 1; }  // rows and columns that make one of the output
  int64_t plane() const { return a_.window.oh / unit() * (a_.window.ow / unit()); }
  int64_t slot_row(int64_t slot) const {
    return slot == a_.slots ? a_.window.oh : a_.window.oh / unit() * slot / a_.slots * unit();
  }
  Pass pass_of(int64_t row, int64_t rows) const {
    const int64_t width = a_.window.ow / unit();
    return {row, rows, rows * a_.window.ow, row / unit() * width, rows / unit() * width};
  }

  int64_t instances_per_task() const {
    if (pixels() > small_map || gathers_) return 1;
    const int64_t spread = larger(1, part_ * all_blocks() / (2 * runner_.workers));
    return smaller(smaller(spread, most_instances), task_pixels / pixels());
  }
  int64_t rows_per_pass() const {
    if (pixels() <= small_map) return a_.window.oh;
    const int64_t target = inputs_ <= step_ ? row_pixels : task_pixels;
    return smaller(a_.window.oh, larger(1, target / a_.window.ow / unit()) * unit());
  }
  int64_t sums_size() const { return batch_ * rows_ * a_.window.ow * block; }
  int64_t squares_size() const { return batch_ * 2 * lanes * lanes; }  // sums take as much again, behind all of these
  // A step's weights, a row that may be read behind it, and what gathering writes behind a row.
  int64_t gathered_size() const { return ((smaller(step_, inputs_) + 1) * taps_ + 1) * block; }

  void pack(int64_t first, int64_t count) {
    constexpr int64_t planes = 4;
    const int64_t parts = ceil_div(a_.c_in, planes), size = a_.window.h * a_.window.w;
    parallel(runner_, count * parts, [&](int64_t task, int64_t) {
      const int64_t n = first + task / parts, begin = task % parts * planes;
      const int64_t end = smaller(begin + planes, kept_.count(n));
      const T* x = a_.x + n * a_.c_in * size;
      for (int64_t k = begin; k < end; k += together<T>)
        pack_plane(packing_, packed_from(x, size, kept_.channels(n), k, end), packed_plane(n - first, k));
    });
  }
  float* packed_plane(int64_t instance, int64_t k) const {
    return packed_.get() + (instance * a_.c_in + k / together<T>) * packing_.plane;
  }

  // Weights as large as planes are read once, by one worker where there are as many blocks. Else a worker stays with its
  // instances, or with its output channels where instances are fewer than workers, as the next layer's workers do.
  void compute(int64_t first, int64_t count) {
    const int64_t batches = ceil_div(count, batch_), slots = a_.slots, blocks = all_blocks();
    const bool large_weights = a_.groups == 1 && taps_ * block * slots > packing_.plane;  // groups share no planes
    const bool by_channels = batches < runner_.workers;
    parallel(runner_, batches * blocks * slots, [&](int64_t index, int64_t worker) {
      const int64_t rest = large_weights ? index % (batches * slots) : index % (blocks * slots);
      Task task;
      task.worker = worker;
      task.part_first = first;
      task.slot = large_weights || by_channels ? rest % slots : rest / blocks;
      task.block_index = large_weights ? index / (batches * slots) : by_channels ? rest / slots : rest % blocks;
      task.first = first + (large_weights ? rest / slots : index / (blocks * slots)) * batch_;
      task.count = smaller(batch_, first + count - task.first);
      compute_block(task);
    });
  }

  // A block is `block` output channels wide, registers hold one or two vectors of them.
  void compute_block(Task& task) {
    const int64_t group = task.block_index / blocks_, first = task.block_index % blocks_ * block;
    const int32_t* all = gathers_ ? out_.channels(task.first) : out_.in_order();
    const int64_t count = gathers_ ? out_.count(task.first) : a_.c_out;
    const int32_t* outputs = std::lower_bound(all, all + count, group * outputs_) + first;
    const int32_t* last = std::lower_bound(all, all + count, (group + 1) * outputs_);
    task.input = group * inputs_;
    for (last = std::min(last, outputs + block); outputs < last; outputs += task.width) {
      task.outputs = outputs;
      task.width = last - outputs > lanes ? 2 * lanes : lanes;
      task.channels = smaller(task.width, last - outputs);
      task.gathers = !lie_together(outputs, task.channels, task.width, group * outputs_);
      for (int64_t c = 0; c < 2 * lanes; ++c) task.bias[c] = c < task.channels ? a_.bias[outputs[c]] : 0.0f;
      compute_task(task);
    }
    for (int64_t i = 0; i < task.count; ++i)
      out_.for_dropped(task.first + i, group * outputs_ + first, group * outputs_ + smaller(outputs_, first + block),
                       [&](int64_t channel) { make_zero(task, task.first + i, channel); });
  }
  static bool lie_together(const int32_t* outputs, int64_t count, int64_t width, int64_t group_first) {
    return outputs[count - 1] - outputs[0] == count - 1 && (outputs[0] - group_first) % block + width <= block;
  }

  void make_zero(const Task& task, int64_t n, int64_t channel) const {
    const int64_t first = slot_row(task.slot);
    const Pass part = pass_of(first, slot_row(task.slot + 1) - first);
    T* y = a_.y + (n * a_.c_out + channel) * plane() + part.first;
    if (a_.zeros) std::fill(y, y + part.stored, T{});
    const int64_t at = (n * a_.slots + task.slot) * a_.c_out + channel;
    a_.squares[at] = 0;
    if (a_.sums) a_.sums[at] = 0;
  }

  void compute_task(const Task& task) {
    const int64_t first = slot_row(task.slot), last = slot_row(task.slot + 1);
    for (int64_t statistic = 0; statistic < (a_.sums ? 2 : 1); ++statistic)
      std::fill_n(squares_of(task, 0) + statistic * sums_behind(), squares_size(), 0.0f);
    for (int64_t row = first; row < last; row += rows_)
      compute_pass(task, pass_of(row, smaller(rows_, last - row)), row == first);
    for (int64_t i = 0; i < task.count; ++i)
      for (int64_t c = 0; c < task.channels; c += lanes) {
        const float* squares = squares_of(task, i) + c * lanes;
        finish_statistic(task, i, c, squares, a_.squares);
        if (a_.sums) finish_statistic(task, i, c, squares + sums_behind(), a_.sums);
      }
  }
  void finish_statistic(const Task& task, int64_t i, int64_t c, const float* partial, float* out) const {
    float totals[lanes];
    if (!a_.pooled) reduce_squares(partial, lanes, totals), partial = totals;
    float* slot = out + ((task.first + i) * a_.slots + task.slot) * a_.c_out;
    for (int64_t k = 0; k < smaller(lanes, task.channels - c); ++k) slot[task.outputs[c + k]] = partial[k];
  }
  int64_t sums_behind() const { return runner_.workers * squares_size(); }
  float* squares_of(const Task& task, int64_t i) const {
    return squares_.get() + task.worker * squares_size() + i * 2 * lanes * lanes;
  }
  float* sums_of(const Task& task, const Pass& pass, int64_t i) const {
    return sums_.get() + task.worker * sums_size() + i * pass.pixels * task.width;
  }

  void compute_pass(const Task& task, const Pass& pass, bool cold) {
    int64_t* cursors = cursors_.get() + task.worker * batch_;
    for (int64_t i = 0; i < task.count; ++i) cursors[i] = first_kept(task.first + i, task.input);
    for (int64_t c = 0; c < larger(1, inputs_); c += step_) {
      if (c + step_ >= inputs_) prefetch_output(task, pass);
      for (int64_t i = 0; i < task.count; ++i) {
        const int64_t begin = cursors[i];
        cursors[i] = kept_before(task.first + i, begin, task.input + smaller(c + step_, inputs_));
        if (task.gathers && begin < cursors[i] && (cold || inputs_ > step_)) gather(task, begin, cursors[i]);
        if (c == 0 || begin < cursors[i]) add_step(task, pass, i, begin, cursors[i], c == 0, cold && i == 0);
      }
    }
    for (int64_t i = 0; i < task.count; ++i) finish_pass(task, pass, i);
  }

  T* gathered(const Task& task) const { return gathered_.get() + task.worker * gathered_size(); }
  // The weights of the task's outputs for these kept inputs; those of an input further down are on their way.
  void gather(const Task& task, int64_t begin, int64_t end) const {
    const int64_t group = task.block_index / blocks_, size = taps_ * block;
    const Gather<T> gather(task.outputs, task.channels, group * outputs_, inputs_, taps_);
    const int32_t* channels = kept_.channels(task.first);
    const T* weights = a_.weight + (group * blocks_ * inputs_ - task.input) * size;
    T* out = gathered(task);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t ahead = (channels[k + 2] - channels[k]) * size;
      const T* in = weights + channels[k] * size;
      for (int64_t tap = 0; tap < taps_; ++tap, out += block) gather.copy(in + tap * block, ahead, out);
    }
  }

  // Where in the list the channels from this one on begin.
  int64_t first_kept(int64_t n, int64_t channel) const {
    const int32_t* channels = kept_.channels(n);
    return std::lower_bound(channels, channels + kept_.count(n), channel) - channels;
  }
  int64_t kept_before(int64_t n, int64_t k, int64_t channel) const {
    const int32_t* channels = kept_.channels(n);
    const int64_t count = kept_.count(n);
    while (k < count && channels[k] < channel) k += together<T>;
    return smaller(k, count);
  }

  // Stores that miss the cache would stall the epilogue.
  void prefetch_output(const Task& task, const Pass& pass) const {
    if (pass.pixels < 8 || task.count > 1) return;
    const T* y = a_.y + task.first * a_.c_out * plane() + pass.first;
    for (int64_t c = 0; c < task.channels; ++c)
      for (int64_t p = 0; p < pass.stored; p += line_size<T>) __builtin_prefetch(y + task.outputs[c] * plane() + p, 1, 3);
  }

  void add_step(const Task& task, const Pass& pass, int64_t i, int64_t begin, int64_t end, bool first, bool cold) {
    const Window& w = a_.window;
    const int64_t n = task.first + i, lines = taps_ * block / line_size<T>;
    Tile<T> tile;
    tile.plane = packing_.plane;
    tile.pitch = packing_.pitch;
    tile.weight_plane = taps_ * block;
    tile.weights = task.gathers ? gathered(task) - begin * tile.weight_plane : weights_of_block(task);
    tile.channels = task.gathers ? out_.in_order() : kept_.channels(n);
    tile.begin = begin;
    tile.end = end;
    tile.taps = offsets_.get();
    tile.prefetch_end = cold && !task.gathers ? kept_.count(n) : 0;
    int64_t done = 0;
    for (int64_t row = 0; row < pass.rows;) {
      const int64_t y = pass.row + row;
      int64_t height = 1;
      for (int64_t x = 0; x < w.ow;) {
        const TileKernel<T>& kernel = tile_for<T>(w, y, pass.rows - row, x);
        const int64_t count = kernel.rows * kernel.columns;
        height = kernel.rows;
        tile.input = packed_plane(n - task.part_first, 0) + y * packing_.pitch + x;
        tile.first_tap = larger(0, w.ph - (y + height - 1) * w.sh) * w.kw;
        tile.last_tap = smaller(w.kh, w.h + w.ph - y * w.sh) * w.kw;
        tile.prefetch_first = lines * done / pass.pixels;
        tile.prefetch_last = lines * (done + count) / pass.pixels;
        tile.sums = sums_of(task, pass, i) + done * task.width;
        tile.start = first ? task.bias : tile.sums;
        tile.start_stride = first ? 0 : task.width;
        kernel.run[task.width > lanes](tile);
        done += count;
        x += kernel.columns;
      }
      row += height;
    }
  }

  const T* weights_of_block(const Task& task) const {
    const int64_t group = task.block_index / blocks_, output = task.outputs[0] - group * outputs_;
    const int64_t row = (group * blocks_ + output / block) * inputs_ - task.input;
    return a_.weight + row * taps_ * block + output % block;
  }

  void finish_pass(const Task& task, const Pass& pass, int64_t i) {
    const int64_t n = task.first + i;
    for (int64_t c = 0; c < task.channels; c += lanes) {
      Output<T> out;
      out.y = a_.y + n * a_.c_out * plane() + pass.first;
      out.plane = plane();
      out.at = task.outputs + c;
      out.channels = smaller(lanes, task.channels - c);
      out.residual = a_.residual ? a_.residual + n * a_.c_out * plane() + pass.first : nullptr;
      out.residual_keep = residual_kept_.keep() + n * a_.c_out;
      out.squares = squares_of(task, i) + c * lanes;
      out.sums = a_.sums ? out.squares + sums_behind() : nullptr;
      out.act = a_.act;
      const float* sums = sums_of(task, pass, i) + c;
      if (a_.pooled)
        finish_pooled(out, sums, task.width, pass.rows, a_.window.ow);
      else
        finish(out, sums, task.width, pass.pixels);
    }
  }

  const ConvArgs<T>& a_;
  const Runner& runner_;
  const Packing packing_;
  const int64_t taps_;
  const bool gathers_;
  const int64_t inputs_, outputs_, blocks_;  // of a group
  const int64_t step_;  // input channels
  const int64_t part_;  // instances packed at once
  const int64_t batch_;  // instances per task
  const int64_t rows_;  // per pass of a task
  Buffer<int64_t> offsets_;
  const Kept kept_, residual_kept_;
  const Outputs out_;
  Buffer<T> gathered_;
  Buffer<float> packed_, sums_, squares_;
  Buffer<int64_t> cursors_;
};

}  // namespace
}  // namespace isw
