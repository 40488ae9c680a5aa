// The torch side of the kernels: checks, outputs, threads, registration. Schemas come from schemas.py, by ISW_SCHEMAS.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "api.h"
#include "gating.h"
#include "load.h"
#include "maps.h"
#include "threads.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

Tensor checked(const Tensor& t, int64_t dim, const char* name, at::ScalarType type = at::kFloat) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == type && t.dim() == dim, name, ": expected a ", type,
                    " CPU tensor with ", dim, " dimensions, got ", t.scalar_type(), " on ", t.device(), " with shape ",
                    t.sizes());
  return t.contiguous();
}

at::ScalarType kept_as(const Tensor& t) { return t.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat; }

Tensor checked_map(const Tensor& t) { return checked(t, 4, "x", kept_as(t)); }

// In float: kernels start their sums from it.
Tensor checked_bias(const Tensor& bias, const Tensor& x) {
  const bool narrow = x.scalar_type() == at::kBFloat16 && bias.scalar_type() == at::kBFloat16;
  return checked(narrow ? bias.to(at::kFloat) : bias, 1, "bias");
}

template <typename T>
const T* data(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* data_of_new(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// body(a T), T being how the map is kept.
template <typename Body>
void with_type_of(const Tensor& x, Body body) {
  if (x.scalar_type() == at::kBFloat16) return body(isw::BFloat16());
  body(float());
}
template <typename T>
const isw::KernelsFor<T>& kernels_for() {
  return isw::kernels();
}

// Of a map: sums of squares (N, S, C), or (2, N, S, C) of these and plain sums.
struct Statistics {
  Statistics(int64_t n, int64_t slots, int64_t channels, bool with_sums, const Tensor& like)
      : tensor(with_sums ? at::empty({2, n, slots, channels}, like.options().dtype(at::kFloat))
                         : at::empty({n, slots, channels}, like.options().dtype(at::kFloat))),
        squares(tensor.mutable_data_ptr<float>()),
        sums(with_sums ? squares + tensor.numel() / 2 : nullptr) {}
  Tensor tensor;
  float *squares, *sums;
};

template <typename T>
isw::ConvArgs<T> args_of(const isw::ConvShape& shape, const Tensor& x, const Tensor& weight, const Tensor& bias,
                         const Tensor& residual, const Tensor& y, const Statistics& statistics) {
  return {shape,
          data<T>(x),
          data<T>(weight),
          data<float>(bias),
          data<T>(residual),
          data_of_new<T>(y),
          statistics.squares,
          statistics.sums};
}

isw::Act act_of(std::string_view name) {
  static constexpr std::string_view names[] = {"none", "relu", "relu6", "silu", "hardswish", "gelu"};
  const auto* found = std::find(std::begin(names), std::end(names), name);
  TORCH_CHECK_VALUE(found != std::end(names), "act: expected none, relu, relu6, silu, hardswish or gelu, got ", name);
  return static_cast<isw::Act>(found - names);
}

// A gate's tensor is a keep mask (bool) or statistics; it must outlive the kernel, so the caller holds it.
isw::Gate gate_of(const Tensor& gate, double alpha, double beta, int64_t n, int64_t channels) {
  isw::Gate result;
  if (!gate.defined()) return result;
  TORCH_CHECK_VALUE(gate.size(0) == n && gate.size(-1) == channels, "gate: shape ", gate.sizes(),
                    " does not fit a feature of ", n, " instances and ", channels, " channels");
  if (gate.scalar_type() == at::kBool) {
    result.keep = data<uint8_t>(gate);
    return result;
  }
  TORCH_CHECK_VALUE(!std::isnan(alpha) && !std::isnan(beta), "thresholds: expected numbers, got alpha ", alpha,
                    " and beta ", beta);
  result.squares = gate.const_data_ptr<float>();
  result.slots = gate.size(1);
  result.alpha = static_cast<float>(alpha);
  result.beta = static_cast<float>(beta);
  return result;
}

Tensor checked_gate(const MaybeTensor& gate) {
  if (!gate) return {};
  if (gate->scalar_type() != at::kBool) {
    TORCH_CHECK_VALUE(gate->dim() == 3 && gate->size(1) > 0, "gate: expected statistics (N, slots, C), got shape ",
                      gate->sizes());
    return checked(*gate, 3, "gate");
  }
  TORCH_CHECK_VALUE(gate->device().is_cpu() && gate->dim() == 2, "gate: expected a CPU keep mask (N, C), got shape ",
                    gate->sizes(), " on ", gate->device());
  return gate->contiguous();
}

Tensor checked_keep(const MaybeTensor& keep, int64_t n, int64_t channels, const char* name = "out_keep") {
  if (!keep) return {};
  TORCH_CHECK_VALUE(keep->device().is_cpu() && keep->scalar_type() == at::kBool && keep->dim() == 2 &&
                        keep->size(0) == n && keep->size(1) == channels,
                    name, ": expected a bool CPU tensor of shape (", n, ", ", channels, "), got ",
                    keep->scalar_type(), " on ", keep->device(), " with shape ", keep->sizes());
  return keep->contiguous();
}

isw::Window window_of(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  constexpr int64_t most = 1 << 24;  // so that no size overflows
  const auto within = [](IntArrayRef values, int64_t least) {
    return std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least && value <= most; });
  };
  const bool fit = kernel.size() == 2 && stride.size() == 2 && (padding.size() == 2 || padding.size() == 4);
  TORCH_CHECK_VALUE(fit && within(kernel, 1) && within(stride, 1) && within(padding, 0),
                    "kernel and stride must be positive and padding not negative, two numbers up to ", most,
                    ", or four of padding, got ", kernel, ", ", stride, ", ", padding);
  const IntArrayRef behind = padding.slice(padding.size() - 2);
  isw::Window w{x.size(2), x.size(3), 0, 0, kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  const int64_t height = w.h + w.ph + behind[0], width = w.w + w.pw + behind[1];
  TORCH_CHECK_VALUE(w.h > 0 && w.w > 0 && height >= w.kh && width >= w.kw, "a map of ", w.h, "x", w.w,
                    " with padding ", padding, " is empty or smaller than the kernel ", kernel);
  w.sh = std::min(w.sh, height);  // larger ones find the same pixel and take more memory
  w.sw = std::min(w.sw, width);
  w.oh = (height - w.kh) / w.sh + 1;
  w.ow = (width - w.kw) / w.sw + 1;
  return w;
}

// The residual of a layer and its gate, or nothing.
struct Residual {
  MaybeTensor x, gate;
  double alpha = 0, beta = 0;
};

void check_packed(const Tensor& weight, int64_t c_in, int64_t c_out, int64_t groups) {
  TORCH_CHECK_VALUE(groups > 0 && c_in % groups == 0 && c_out % groups == 0, "groups: expected a divisor of ", c_in,
                    " input and ", c_out, " output channels, got ", groups);
  const int64_t blocks = groups * ((c_out / groups + isw::block - 1) / isw::block);
  TORCH_CHECK_VALUE(weight.size(0) == blocks && weight.size(1) == c_in / groups && weight.size(4) == isw::block,
                    "weight: packed shape ", weight.sizes(), " does not fit ", c_in, " input and ", c_out,
                    " output channels in ", groups, " groups; pack it with pack_weight");
}

void check_filters(const Tensor& weight, const Tensor& bias, int64_t channels) {
  TORCH_CHECK_VALUE(weight.size(0) == channels && weight.size(1) == 1 && bias.size(0) == channels, "weight ",
                    weight.sizes(), " and bias ", bias.sizes(), " do not fit ", channels, " channels");
}

Tensor new_map(IntArrayRef sizes, const Tensor& like) { return isw::MapMemory::instance().empty(sizes, like); }

std::tuple<Tensor, Tensor> convolve(const Tensor& x_, const Tensor& weight_, const Tensor& bias_, IntArrayRef stride,
                                    IntArrayRef padding, std::string_view act, const MaybeTensor& gate_, double alpha,
                                    double beta, const MaybeTensor& out_keep_, const Residual& residual_,
                                    int64_t groups, bool pooled, bool sums, bool zeros) {
  const Tensor x = checked_map(x_), weight = checked(weight_, 5, "weight", x.scalar_type());
  const Tensor bias = checked_bias(bias_, x);
  const Tensor gate = checked_gate(gate_), residual_gate = checked_gate(residual_.gate);
  isw::ConvShape args{};
  args.window = window_of(x, weight.sizes().slice(2, 2), stride, padding);
  args.n = x.size(0);
  args.c_in = x.size(1);
  args.c_out = bias.size(0);
  args.groups = groups;
  args.pooled = pooled;
  check_packed(weight, args.c_in, args.c_out, groups);
  args.slots = isw::slots_of(args.window.oh, args.window.ow);
  const int64_t unit = pooled ? 2 : 1, height = args.window.oh / unit, width = args.window.ow / unit;
  TORCH_CHECK_VALUE(height > 0 && width > 0, "a map of ", args.window.oh, "x", args.window.ow, " is too small to pool");
  Tensor y = new_map({args.n, args.c_out, height, width}, x);
  const Statistics statistics(args.n, args.slots, args.c_out, sums, x);
  const Tensor residual = residual_.x ? checked(*residual_.x, 4, "residual", x.scalar_type()) : Tensor();
  TORCH_CHECK_VALUE(!residual.defined() || residual.sizes() == y.sizes(), "residual: expected shape ", y.sizes(),
                    ", got ", residual.sizes());
  args.gate = gate_of(gate, alpha, beta, args.n, args.c_in);
  args.residual_gate = gate_of(residual_gate, residual_.alpha, residual_.beta, args.n, args.c_out);
  const Tensor out_keep = checked_keep(out_keep_, args.n, args.c_out);
  args.out_keep = data<uint8_t>(out_keep);
  args.zeros = zeros;
  args.act = act_of(act);
  if (y.numel() == 0) return {y, statistics.tensor};
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    kernels_for<T>().conv(args_of<T>(args, x, weight, bias, residual, y, statistics), isw::runner());
  });
  return {y, statistics.tensor};
}

std::tuple<Tensor, Tensor> conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, IntArrayRef stride,
                                  IntArrayRef padding, std::string_view act, const MaybeTensor& gate, double alpha,
                                  double beta, const MaybeTensor& residual, const MaybeTensor& residual_gate,
                                  double residual_alpha, double residual_beta, const MaybeTensor& out_keep, bool sums, bool zeros) {
  const Residual added{residual, residual_gate, residual_alpha, residual_beta};
  return convolve(x, weight, bias, stride, padding, act, gate, alpha, beta, out_keep, added, 1, false, sums, zeros);
}

std::tuple<Tensor, Tensor> grouped_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                                          IntArrayRef stride, IntArrayRef padding, std::string_view act,
                                          const MaybeTensor& gate, double alpha, double beta,
                                          const MaybeTensor& out_keep, bool sums, bool zeros) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "x: expected Float for a grouped layer, got ", x.scalar_type());
  return convolve(x, weight, bias, stride, padding, act, gate, alpha, beta, out_keep, {}, groups, false, sums, zeros);
}

std::tuple<Tensor, Tensor> pooled_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, IntArrayRef stride,
                                         IntArrayRef padding, std::string_view act, const MaybeTensor& gate,
                                         double alpha, double beta, const MaybeTensor& out_keep, bool sums, bool zeros) {
  return convolve(x, weight, bias, stride, padding, act, gate, alpha, beta, out_keep, {}, 1, true, sums, zeros);
}

std::tuple<Tensor, Tensor> depthwise_conv2d(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                            IntArrayRef stride, IntArrayRef padding, std::string_view act,
                                            const MaybeTensor& gate_, double alpha, double beta,
                                            const MaybeTensor& out_keep_, bool sums, bool zeros) {
  const Tensor x = checked_map(x_), weight = checked(weight_, 4, "weight", x.scalar_type());
  const Tensor bias = checked_bias(bias_, x), gate = checked_gate(gate_);
  isw::ConvShape args{};
  args.window = window_of(x, weight.sizes().slice(2, 2), stride, padding);
  args.n = x.size(0);
  args.c_in = args.c_out = args.groups = x.size(1);
  args.slots = 1;
  check_filters(weight, bias, args.c_in);
  args.gate = gate_of(gate, alpha, beta, args.n, args.c_in);
  const Tensor out_keep = checked_keep(out_keep_, args.n, args.c_out);
  args.out_keep = data<uint8_t>(out_keep);
  args.zeros = zeros;
  args.act = act_of(act);
  Tensor y = new_map({args.n, args.c_out, args.window.oh, args.window.ow}, x);
  const Statistics statistics(args.n, 1, args.c_out, sums, x);
  if (y.numel() == 0) return {y, statistics.tensor};
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    kernels_for<T>().depthwise(args_of<T>(args, x, weight, bias, Tensor(), y, statistics), isw::runner());
  });
  return {y, statistics.tensor};
}

std::tuple<Tensor, Tensor> expand_depthwise_conv2d(const Tensor& x_, const Tensor& weight_, const Tensor& bias_,
                                                   const Tensor& filters_, const Tensor& filter_bias_,
                                                   IntArrayRef stride, IntArrayRef padding, std::string_view act,
                                                   std::string_view filter_act, const MaybeTensor& gate_, double alpha,
                                                   double beta, const MaybeTensor& out_keep_, bool sums, bool zeros) {
  const Tensor x = checked_map(x_), weight = checked(weight_, 5, "weight", x.scalar_type());
  const Tensor filters = checked(filters_, 4, "filters", x.scalar_type());
  const Tensor bias = checked_bias(bias_, x), filter_bias = checked_bias(filter_bias_, x), gate = checked_gate(gate_);
  const int64_t channels = bias.size(0);
  check_packed(weight, x.size(1), channels, 1);
  TORCH_CHECK_VALUE(weight.size(2) == 1 && weight.size(3) == 1, "weight: packed from a ", weight.size(2), "x",
                    weight.size(3), " kernel, expected 1x1");
  isw::ConvShape args{};
  args.window = window_of(x, filters.sizes().slice(2, 2), stride, padding);
  args.n = x.size(0);
  args.c_in = args.c_out = args.groups = channels;
  args.slots = 1;
  check_filters(filters, filter_bias, channels);
  const Tensor out_keep = checked_keep(out_keep_, args.n, channels);
  args.out_keep = data<uint8_t>(out_keep);
  args.zeros = zeros;
  args.act = act_of(filter_act);
  const isw::Gate of_x = gate_of(gate, alpha, beta, args.n, x.size(1));
  Tensor y = new_map({args.n, channels, args.window.oh, args.window.ow}, x);
  const Statistics statistics(args.n, 1, channels, sums, x);
  if (y.numel() == 0) return {y, statistics.tensor};
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    const isw::Expansion<T> expansion{data<T>(x), x.size(1), of_x, data<T>(weight), data<float>(bias), act_of(act)};
    kernels_for<T>().expand_depthwise(
        expansion, args_of<T>(args, Tensor(), filters, filter_bias, Tensor(), y, statistics), isw::runner());
  });
  return {y, statistics.tensor};
}

Tensor max_pool2d(const Tensor& x_, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding) {
  const Tensor x = checked_map(x_);
  const isw::Window w = window_of(x, kernel, stride, padding);
  TORCH_CHECK_VALUE(padding.size() == 2 && 2 * w.ph <= w.kh && 2 * w.pw <= w.kw, "padding ", padding,
                    " is not two numbers of at most half the kernel ", kernel);
  Tensor y = new_map({x.size(0), x.size(1), w.oh, w.ow}, x);
  if (y.numel() == 0) return y;
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    kernels_for<T>().max_pool({data<T>(x), data_of_new<T>(y), x.size(0) * x.size(1), w}, isw::runner());
  });
  return y;
}

Tensor sum_squares(const Tensor& x_, bool sums) {
  const Tensor x = checked_map(x_);
  const Statistics statistics(x.size(0), 1, x.size(1), sums, x);
  if (statistics.tensor.numel() == 0) return statistics.tensor;
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    kernels_for<T>().sum_squares(data<T>(x), statistics.squares, statistics.sums, x.size(0) * x.size(1),
                                 x.size(2) * x.size(3), isw::runner());
  });
  return statistics.tensor;
}

Tensor keep_mask(const Tensor& squares_, double alpha, double beta) {
  const Tensor squares = checked_gate(squares_);
  TORCH_CHECK_VALUE(squares.scalar_type() == at::kFloat, "squares: expected statistics, got a bool mask");
  Tensor keep = at::empty({squares.size(0), squares.size(2)}, squares.options().dtype(at::kBool));
  const isw::Gate gate = gate_of(squares, alpha, beta, squares.size(0), squares.size(2));
  if (keep.numel()) isw::kernels().keep_mask(gate, keep.size(0), keep.size(1), keep.mutable_data_ptr<bool>());
  return keep;
}

// What is known of a map that a head reads; the tensors of `held` outlive the kernel.
isw::Source source_of(const Tensor& statistics_, const MaybeTensor& keep_, int64_t positions, int64_t n,
                      std::vector<Tensor>& held) {
  const Tensor statistics = checked(statistics_, 4, "statistics");
  TORCH_CHECK_VALUE(statistics.size(0) == 2 && statistics.size(1) == n && statistics.size(2) > 0,
                    "statistics: expected squares and sums (2, ", n, ", slots, C), got shape ", statistics.sizes());
  TORCH_CHECK_VALUE(positions > 0, "positions: expected the pixels of a map, got ", positions);
  const Tensor keep = checked_keep(keep_, n, statistics.size(3), "keeps");
  held.insert(held.end(), {statistics, keep});
  const float* squares = data<float>(statistics);
  return {squares, squares + statistics.numel() / 2, statistics.size(2), statistics.size(3),
          static_cast<float>(positions), data<uint8_t>(keep)};
}

std::tuple<Tensor, Tensor> predict(const Tensor& weight_, const Tensor& bias_, at::TensorList statistics,
                                   const c10::List<MaybeTensor>& keeps, IntArrayRef positions, int64_t size,
                                   double alpha, double beta, const MaybeTensor& basis_) {
  const Tensor weight = checked(weight_, 2, "weight", kept_as(weight_));
  const Tensor basis = basis_ ? checked(*basis_, 2, "basis", weight.scalar_type()) : Tensor();
  const Tensor bias = checked(bias_, 1, "bias");
  TORCH_CHECK_VALUE(!statistics.empty() && keeps.size() == statistics.size() && positions.size() == statistics.size(),
                    "expected as many keeps and positions as statistics, and one at least, got ", keeps.size(), ", ",
                    positions.size(), " and ", statistics.size());
  TORCH_CHECK_VALUE(size > 0 && !std::isnan(alpha) && !std::isnan(beta),
                    "expected a positive size and thresholds that are numbers, got ", size, ", ", alpha, ", ", beta);
  const int64_t n = statistics[0].dim() == 4 ? statistics[0].size(1) : 0;
  std::vector<Tensor> held;
  std::vector<isw::Source> sources;
  int64_t features = 0;
  for (size_t i = 0; i < statistics.size(); ++i) {
    sources.push_back(source_of(statistics[i], keeps[i], positions[i], n, held));
    features += 2 * sources.back().channels;
  }
  TORCH_CHECK_VALUE(!basis.defined() || (basis.size(0) == features && basis.size(1) > 0), "basis: expected ", features,
                    " rows and some columns, got ", basis.defined() ? basis.sizes() : IntArrayRef());
  const int64_t rank = basis.defined() ? basis.size(1) : features;
  TORCH_CHECK_VALUE(weight.size(0) == rank && weight.size(1) == bias.size(0), "weight: expected shape (", rank, ", ",
                    bias.size(0), "), got ", weight.sizes());
  Tensor norms = at::empty({n, bias.size(0)}, bias.options());
  Tensor keep = at::empty(norms.sizes(), bias.options().dtype(at::kBool));
  if (norms.numel() == 0) return {norms, keep};
  with_type_of(weight, [&](auto zero) {
    using T = decltype(zero);
    kernels_for<T>().predict({sources.data(), static_cast<int64_t>(sources.size()), n, features, bias.size(0), rank,
                              basis.defined() ? data<T>(basis) : nullptr, data<T>(weight), data<float>(bias), std::sqrt(static_cast<float>(size)),
                              static_cast<float>(alpha), static_cast<float>(beta), data_of_new<float>(norms),
                              keep.mutable_data_ptr<bool>()},
                             isw::runner());
  });
  return {norms, keep};
}

// The library that serves the operators, and the kernels in use, if any yet.
std::tuple<std::string, std::string> loaded() {
  const isw::Loaded* used = isw::in_use.load();
  return {isw::own_path().string(), used ? used->path : ""};
}

bool is_defined(const std::string& name) {
  return c10::Dispatcher::singleton().findSchema({"isw::" + name, ""}).has_value();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(isw, library) {
  if (is_defined("_loaded")) return;  // another copy of this library serves them
  isw::own_path();
  library.def("_loaded", loaded);
  for (const std::string schema : {ISW_SCHEMAS})  // Python may have defined them
    if (!is_defined(schema.substr(0, schema.find('(')))) library.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  const auto on_cpu = [&](const char* name, auto* function) {
    library.impl(name, torch::dispatch(c10::DispatchKey::CPU, function));
  };
  on_cpu("conv2d", conv2d);
  on_cpu("grouped_conv2d", grouped_conv2d);
  on_cpu("pooled_conv2d", pooled_conv2d);
  on_cpu("depthwise_conv2d", depthwise_conv2d);
  on_cpu("expand_depthwise_conv2d", expand_depthwise_conv2d);
  on_cpu("max_pool2d", max_pool2d);
  on_cpu("sum_squares", sum_squares);
  on_cpu("keep_mask", keep_mask);
  on_cpu("predict", predict);
  on_cpu("channel_norm", isw::channel_norm);
  on_cpu("decide", isw::decide);
  on_cpu("mask", isw::mask);
}

extern "C" __attribute__((visibility("default"))) void isw_release() { isw::MapMemory::instance().release(); }

// Changes the kernels to those of this library; says why it cannot, or null.
extern "C" __attribute__((visibility("default"))) const char* isw_use(const char* path) {
  const auto* chosen = new isw::Loaded(isw::load(path));  // for good, as the library
  if (chosen->table) isw::in_use = chosen;
  return chosen->table ? nullptr : chosen->problem.c_str();
}
