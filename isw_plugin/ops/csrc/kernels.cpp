// Built once per instruction set, each into a library of its own: code for a newer processor cannot leak into
// functions that an older one runs. Needs no torch header.
#include "api.h"
#include "conv.h"
#include "decide.h"
#include "depthwise.h"
#include "expand_depthwise.h"
#include "conv1x1_pixel_lanes.h"
#include "conv1x1_channel_lanes.h"
#include "pool.h"
#include "predict.h"

namespace {

bool is_pointwise(const isw::Window& w) {
  const bool inside = (w.oh - 1) * w.sh < w.h && (w.ow - 1) * w.sw < w.w;  // no output is of zeros behind the map
  return w.kh == 1 && w.kw == 1 && w.ph == 0 && w.pw == 0 && inside && w.oh * w.ow >= 16;
}

// Outputs that must be transposed pay where vectors of pixels would not be full, and on small maps of many channels.
template <typename T>
bool is_for_blocks(const isw::ConvArgs<T>& args) {
  const isw::Window& w = args.window;
  const int64_t vectors = w.oh * w.ow / isw::lanes;
  return w.sh == 1 && w.sw == 1 && args.slots == 1 && (vectors < 4 || (vectors < 9 && args.c_in >= 384));
}

template <typename T>
void conv(const isw::ConvArgs<T>& args, const isw::Runner& runner) {
  if (!is_pointwise(args.window) || args.pooled || args.groups > 1) return isw::DirectConv<T>(args, runner).run();
  if (is_for_blocks(args)) return isw::PointwiseBlocks<T>(args, runner).run();
  isw::Pointwise<T>(args, runner).run();
}

template <typename T>
void depthwise(const isw::ConvArgs<T>& args, const isw::Runner& runner) {
  isw::Depthwise<T>(args, runner).run();
}

template <typename T>
void expand_depthwise(const isw::Expansion<T>& expansion, const isw::ConvArgs<T>& args, const isw::Runner& runner) {
  isw::ExpandDepthwise<T>(expansion, args, runner).run();
}

template <typename T>
constexpr isw::KernelsFor<T> kernels_for = {conv<T>, depthwise<T>, expand_depthwise<T>, isw::max_pool<T>, isw::sum_squares<T>,
                                            isw::predict<T>};

constexpr isw::Kernels kernels = {kernels_for<float>, kernels_for<isw::BFloat16>, isw::keep_mask};

}  // namespace

#ifndef ISW_SOURCE
#define ISW_SOURCE ""
#endif

// What it was built from: only libraries of one source understand each other.
extern "C" __attribute__((visibility("default"))) const char* isw_source() { return ISW_SOURCE; }

extern "C" __attribute__((visibility("default"))) const isw::Kernels* isw_kernels() { return &kernels; }
