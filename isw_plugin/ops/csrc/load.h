// Which kernels run: those that Python chose, or the best beside this library, for programs without Python.
#pragma once
#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "api.h"

namespace isw {

struct Loaded {
  std::string path;
  const Kernels* table;
  std::string problem;  // why there is no table
};

inline std::atomic<const Loaded*> in_use{nullptr};

// They stay loaded: other threads may run them.
inline Loaded load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return {path, nullptr, dlerror()};
  const auto source = reinterpret_cast<const char* (*)()>(dlsym(library, "isw_source"));
  const auto table = reinterpret_cast<const Kernels* (*)()>(dlsym(library, "isw_kernels"));
  if (source && table && !std::strcmp(source(), ISW_SOURCE)) return {path, table(), ""};
  return {path, nullptr, path + ": was not built together with this library"};
}

// Of this processor, best first, as cpu.available() has them.
inline std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#ifdef __x86_64__
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
  if (capability == "AVX512") names.push_back("avx512");
  if (capability == "AVX512" || capability == "AVX2") names.push_back("avx2");
#endif
  names.push_back("generic");
  return names;
}

// Asked first while the library loads: its name may hang on the working folder.
inline const std::filesystem::path& own_path() {
  static const std::filesystem::path path = [] {
    Dl_info info{};
    dladdr(&in_use, &info);
    return std::filesystem::absolute(info.dli_fname);
  }();
  return path;
}

inline const Loaded& best_beside() {
  std::string problems;
  for (const std::string& name : instruction_sets()) {
    Loaded found = load(own_path().parent_path() / ("kernels_" + name + ".so"));
    if (found.table) return *new Loaded(std::move(found));  // for good, as what it tells of
    problems += "\n" + found.problem;
  }
  TORCH_CHECK(false, "no kernels for this processor lie beside ", own_path().string(), ": `python -m isw_plugin.ops build` makes them",
              problems);
}

inline const Kernels& kernels() {
  if (const Loaded* chosen = in_use.load()) return *chosen->table;
  static const Loaded& found = best_beside();
  const Loaded* none = nullptr;
  in_use.compare_exchange_strong(none, &found);  // Python may have chosen meanwhile
  return *in_use.load()->table;
}

}  // namespace isw
