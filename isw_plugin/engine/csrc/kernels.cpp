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

void conv(const isw::ConvArgs& args, const isw::Runner& runner) {
  if (is_pointwise(args.window)) return isw::Pointwise(args, runner).run();
  isw::DirectConv(args, runner).run();
}

void depthwise(const isw::ConvArgs& args, const isw::Runner& runner) { isw::Depthwise(args, runner).run(); }

constexpr isw::Kernels kernels = {conv, depthwise, isw::max_pool, isw::sum_squares, isw::keep_mask};

}  // namespace

extern "C" __attribute__((visibility("default"))) const isw::Kernels* isw_kernels() { return &kernels; }
