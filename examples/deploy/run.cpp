// Runs a package of a fast model, without Python: run PACKAGE OPERATORS IMAGES OUTPUT N C H W [CALLS]
//
// OPERATORS is isw_plugin's operators.so, with its kernels beside it. IMAGES and OUTPUT hold float32 numbers, nothing else.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <vector>

int main(int count, char** arguments) try {
  if (count < 9) {
    std::fprintf(stderr, "usage: %s PACKAGE OPERATORS IMAGES OUTPUT N C H W [CALLS]\n", arguments[0]);
    return 2;
  }
  if (!dlopen(arguments[2], RTLD_NOW)) {  // torch.ops.isw is there from now on
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode inference;
  std::vector<int64_t> shape;
  for (int i = 5; i < 9; ++i) shape.push_back(std::atoll(arguments[i]));
  const at::Tensor images = at::from_file(arguments[3], false, c10::multiply_integers(shape), at::kFloat).view(shape);

  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const at::Tensor output = model.run({images})[0].contiguous();
  std::ofstream(arguments[4], std::ios::binary).write(static_cast<const char*>(output.const_data_ptr()), output.nbytes());

  std::vector<double> times;
  for (int i = 0; count > 9 && i < std::atoi(arguments[9]); ++i) {
    const auto start = std::chrono::steady_clock::now();
    model.run({images});
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  if (!times.empty()) std::printf("%.3f ms, the middle of %zu calls\n", times[times.size() / 2], times.size());
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
