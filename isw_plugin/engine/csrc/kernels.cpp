// Built once per instruction set, each into a library of its own: code for a newer processor cannot leak into
// functions that an older one runs. Needs no torch header.
#include "api.h"
#include "conv.h"
#include "decide.h"
#include "depthwise.h"
#include "pointwise.h"
#include "pool.h"

namespace {

bool is_pointwise(const isw::Window& w) {
  return w.kh == 1 && w.kw == 1 && w.ph == 0 && w.pw == 0 && w.oh * w.ow >= 16;
}

template <typename T>
void conv(const isw::ConvArgs<T>& args, const isw::Runner& runner) {
  if (is_pointwise(args.window) && !args.pooled) return isw::Pointwise<T>(args, runner).run();
  isw::DirectConv<T>(args, runner).run();
}

template <typename T>
void depthwise(const isw::ConvArgs<T>& args, const isw::Runner& runner) {
  isw::Depthwise<T>(args, runner).run();
}

template <typename T>
constexpr isw::KernelsFor<T> kernels_for = {conv<T>, depthwise<T>, isw::max_pool<T>, isw::sum_squares<T>};

constexpr isw::Kernels kernels = {kernels_for<float>, kernels_for<isw::BFloat16>, isw::keep_mask};

}  // namespace

extern "C" __attribute__((visibility("default"))) const isw::Kernels* isw_kernels() { return &kernels; }
