// Runs every kernel on many shapes, by the threads that help, several calls at once. Buffers have their exact
// size, so a sanitizer sees every access outside. test_sanitize.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "api.h"
#include "helpers.h"

extern "C" const isw::Kernels* isw_kernels();

namespace {

void run_tasks(int64_t workers, int64_t tasks, void (*body)(void*, int64_t, int64_t), void* state) {
  isw::Helpers::instance().with_team(workers, [&](isw::Team& team) { team.run(tasks, body, state); });
}

template <typename T>
using Array = std::unique_ptr<T[]>;

template <typename T>
struct Case {
  isw::ConvArgs<T> args{};
  Array<T> x, weight, residual, y;
  Array<float> bias, squares, sums, gate_squares;
  Array<uint8_t> keep, out_keep;
};

float wide(float number) { return number; }
float wide(isw::BFloat16 number) {
  float result = 0;
  memcpy(reinterpret_cast<char*>(&result) + 2, &number, 2);
  return result;
}

void take(float number, float& out) { out = number; }
void take(float number, isw::BFloat16& out) { memcpy(&out, reinterpret_cast<const char*>(&number) + 2, 2); }

template <typename T = float>
Array<T> numbers(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Array<T> values(new T[count]);
  for (int64_t i = 0; i < count; ++i) take(normal(random), values[i]);
  return values;
}

int64_t choose(std::mt19937& random, std::initializer_list<int64_t> values) {
  return values.begin()[random() % values.size()];
}

isw::Window random_window(std::mt19937& random) {
  isw::Window w{};
  w.h = choose(random, {1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 17, 30});
  w.w = random() % 2 ? w.h : 1 + random() % 72;
  w.kh = choose(random, {1, 1, 2, 3, 3, 3, 5});
  w.kw = random() % 3 ? w.kh : choose(random, {1, 2, 3, 7});
  w.sh = choose(random, {1, 1, 2, 2, 3, 4});
  w.sw = random() % 3 ? w.sh : choose(random, {1, 2, 3, 4});
  const auto padding = [&](int64_t size, int64_t kernel) -> int64_t {
    return size < kernel ? kernel : random() % 2 ? kernel / 2 : random() % (kernel + 4);
  };
  w.ph = padding(w.h, w.kh);
  w.pw = padding(w.w, w.kw);
  const int64_t more = random() % 5 ? 0 : random() % 4;  // behind
  w.oh = (w.h + 2 * w.ph + more - w.kh) / w.sh + 1;
  w.ow = (w.w + 2 * w.pw + more - w.kw) / w.sw + 1;
  return w;
}

template <typename T>
Case<T> random_case(std::mt19937& random, bool depthwise) {
  Case<T> c;
  isw::ConvArgs<T>& a = c.args;
  const isw::Window w = a.window = random_window(random);
  a.n = choose(random, {1, 1, 2, 3, 9});
  a.c_in = w.kh * w.kw == 1 ? choose(random, {1, 37, 150, 390}) : choose(random, {1, 3, 16, 37, 64, 150});
  a.c_out = depthwise ? a.c_in : choose(random, {1, 7, 16, 17, 32, 53, 70});
  a.groups = depthwise ? a.c_in : 1;
  if (!depthwise && sizeof(T) == 4 && random() % 3 == 0) {
    a.groups = choose(random, {2, 3, 5});
    a.c_in = a.groups * choose(random, {1, 4, 16, 33});
    a.c_out = a.groups * choose(random, {1, 8, 16, 24, 40});
  }
  a.zeros = true;
  a.slots = depthwise ? 1 : isw::slots_of(w.oh, w.ow);
  a.act = static_cast<isw::Act>(random() % 6);
  a.pooled = !depthwise && w.oh > 1 && w.ow > 1 && random() % 3 == 0;
  const int64_t blocks = a.groups * ((a.c_out / a.groups + isw::block - 1) / isw::block), unit = a.pooled ? 2 : 1;
  const int64_t outputs = a.n * a.c_out * (w.oh / unit) * (w.ow / unit);
  a.x = (c.x = numbers<T>(a.n * a.c_in * w.h * w.w, random)).get();
  a.weight = (c.weight = numbers<T>((depthwise ? a.c_in : blocks * (a.c_in / a.groups) * isw::block) * w.kh * w.kw, random)).get();
  a.bias = (c.bias = numbers(a.c_out, random)).get();
  a.y = (c.y = Array<T>(new T[outputs])).get();
  a.squares = (c.squares = Array<float>(new float[a.n * a.slots * a.c_out])).get();
  if (random() % 2) a.sums = (c.sums = Array<float>(new float[a.n * a.slots * a.c_out])).get();
  c.keep = Array<uint8_t>(new uint8_t[a.n * (a.c_in + a.c_out)]);
  for (int64_t i = 0; i < a.n * (a.c_in + a.c_out); ++i) c.keep[i] = random() % 2 ? random() % 256 : 0;
  if (random() % 2) {
    a.out_keep = (c.out_keep = Array<uint8_t>(new uint8_t[a.n * a.c_out])).get();
    const bool none = random() % 8 == 0;
    for (int64_t i = 0; i < a.n * a.c_out; ++i) c.out_keep[i] = !none && random() % 2 ? 1 + random() % 255 : 0;
  }
  c.gate_squares = numbers(a.n * 3 * a.c_in, random);
  for (int64_t i = 0; i < a.n * 3 * a.c_in; ++i) c.gate_squares[i] *= c.gate_squares[i];
  if (random() % 3 == 0) a.gate = {c.gate_squares.get(), 3, 0.0f, 1.0f, nullptr};
  else if (random() % 3) a.gate.keep = c.keep.get();
  if (depthwise || a.pooled || random() % 2) return c;
  a.residual = (c.residual = numbers<T>(outputs, random)).get();
  if (random() % 2) a.residual_gate.keep = c.keep.get() + a.n * a.c_in;
  return c;
}

// The sums of what a layer gives.
template <typename T>
void print_sums(unsigned seed, const Case<T>& c) {
  const isw::ConvArgs<T>& a = c.args;
  const int64_t unit = a.pooled ? 2 : 1, outputs = a.n * a.c_out * (a.window.oh / unit) * (a.window.ow / unit);
  double y = 0, squares = 0;
  for (int64_t i = 0; i < outputs; ++i) y += std::abs(wide(c.y[i]));
  for (int64_t i = 0; i < a.n * a.slots * a.c_out; ++i) squares += c.squares[i];
  printf("%u %.6g %.6g\n", seed, y, squares);
}

template <typename T>
void run_predict(std::mt19937& random, const isw::Runner& runner) {
  const int64_t n = choose(random, {1, 2, 5}), outputs = choose(random, {1, 7, 16, 53, 200, 512});
  std::vector<isw::Source> sources(1 + random() % 2);
  std::vector<Array<float>> statistics;
  std::vector<Array<uint8_t>> keeps;
  int64_t features = 0;
  for (isw::Source& source : sources) {
    const int64_t slots = choose(random, {1, 3}), channels = choose(random, {0, 1, 17, 300}), size = n * slots * channels;
    statistics.push_back(numbers(2 * size, random));
    keeps.emplace_back(new uint8_t[n * channels]);
    for (int64_t i = 0; i < size; ++i) statistics.back()[i] *= statistics.back()[i];
    for (int64_t i = 0; i < n * channels; ++i) keeps.back()[i] = random() % 2 ? random() % 256 : 0;
    const float* squares = statistics.back().get();
    source = {squares, squares + size, slots, channels, 9.0f, random() % 3 ? keeps.back().get() : nullptr};
    features += 2 * channels;
  }
  const bool reduced = random() % 2;
  const int64_t rank = reduced ? choose(random, {1, 16, 50}) : features;
  const Array<T> basis = numbers<T>(features * rank, random), weight = numbers<T>(rank * outputs, random);
  const Array<float> bias = numbers(outputs, random), norms(new float[n * outputs]);
  const Array<bool> keep(new bool[n * outputs]);
  const isw::KernelsFor<T>& kernels = *isw_kernels();
  kernels.predict({sources.data(), static_cast<int64_t>(sources.size()), n, features, outputs, rank,
                   reduced ? basis.get() : nullptr, weight.get(), bias.get(), 2.0f, 0.1f, 0.9f, norms.get(), keep.get()}, runner);
}

// A layer's input as the map that a 1x1 layer makes of another one.
template <typename T>
void run_expanded(const isw::ConvArgs<T>& a, std::mt19937& random, const isw::Runner& runner) {
  const isw::Window& w = a.window;
  const int64_t channels = choose(random, {1, 5, 37}), blocks = (a.c_in + isw::block - 1) / isw::block;
  const Array<T> x = numbers<T>(a.n * channels * w.h * w.w, random), weight = numbers<T>(blocks * channels * isw::block, random);
  const Array<float> bias = numbers(a.c_in, random);
  const Array<uint8_t> keep(new uint8_t[a.n * channels]);
  for (int64_t i = 0; i < a.n * channels; ++i) keep[i] = random() % 2;
  isw::Gate gate;
  if (random() % 2) gate.keep = keep.get();
  const isw::Expansion<T> expansion{x.get(), channels, gate, weight.get(), bias.get(), static_cast<isw::Act>(random() % 6)};
  const isw::KernelsFor<T>& kernels = *isw_kernels();
  kernels.expand_depthwise(expansion, a, runner);
}

template <typename T>
void run_case(unsigned seed, bool with_sums) {
  std::mt19937 random(seed);
  const isw::Runner runner{static_cast<int64_t>(1 + seed % 3), run_tasks};
  const isw::KernelsFor<T>& kernels = *isw_kernels();
  const bool depthwise = seed % 4 == 0;
  Case<T> c = random_case<T>(random, depthwise);
  const isw::ConvArgs<T>& a = c.args;
  (depthwise ? kernels.depthwise : kernels.conv)(a, runner);
  if (depthwise && random() % 2) run_expanded(a, random, runner);
  if (with_sums) print_sums(seed, c);
  const int64_t planes = a.n * a.c_in;  // the gate's squares have three slots of as many
  kernels.sum_squares(a.x, c.gate_squares.get(), seed % 2 ? c.gate_squares.get() + planes : nullptr, planes,
                      a.window.h * a.window.w, runner);
  run_predict<T>(random, runner);
  const isw::Window& w = a.window;
  if (depthwise && 2 * w.ph <= w.kh && 2 * w.pw <= w.kw) kernels.max_pool({a.x, a.y, a.n * a.c_in, w}, runner);
  if (a.gate.squares) isw_kernels()->keep_mask(a.gate, a.n, a.c_in, reinterpret_cast<bool*>(c.keep.get()));
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned cases = argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 2000;
  const bool with_sums = argc > 2;
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 4; ++caller)
    callers.emplace_back([=] {
      for (unsigned i = caller; i < cases; i += 4) (i / 8 % 2 ? run_case<isw::BFloat16> : run_case<float>)(i, with_sums);
    });
  for (auto& thread : callers) thread.join();
  printf("%u cases\n", cases);
}
