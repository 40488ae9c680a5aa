// Activations of the epilogues. Kernels are compiled for the plain ones and once for all others, which cost more than
// the call that tells them apart.
#pragma once
#include <type_traits>

#include "api.h"
#include "vec.h"

namespace isw {
namespace {

// Bits of 2^n for whole n in [-126, 127].
ISW_INLINE Vec power_of_two(Vec n) {
  typedef int32_t Ints __attribute__((vector_size(lanes * 4)));
  return (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// e^v to 2 units in the last place for v in [-87, 88], constant below, infinite above; NaN stays NaN.
ISW_INLINE Vec exponential(Vec v) {
  const Vec low = broadcast(-87), high = broadcast(88), magic = broadcast(12582912);  // 1.5 * 2^23 rounds to whole
  const auto above = v > high;
  v = v < low ? low : v;
  v = above ? high : v;
  const Vec whole = (v * 1.44269504f + magic) - magic;
  const Vec rest = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec sum = broadcast(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + term;
  const Vec value = (sum * rest * rest + rest + 1) * power_of_two(v == v ? whole : Vec{});
  return above ? broadcast(__builtin_inff()) : value;
}

// The error function to 2e-7 (Abramowitz and Stegun, 7.1.26).
ISW_INLINE Vec error_function(Vec v) {
  const Vec size = v < Vec{} ? -v : v;
  const Vec t = 1 / (1 + 0.3275911f * size);
  Vec sum = broadcast(1.061405429f);
  for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + term;
  const Vec value = 1 - sum * t * exponential(-size * size);
  return v < Vec{} ? -value : value;
}

static __attribute__((noinline)) Vec activate_other(Act act, Vec v) {
  if (act == Act::silu) return v / (1 + exponential(-v));
  if (act == Act::gelu) return 0.5f * v * (1 + error_function(0.70710678f * v));
  const Vec six = broadcast(6);
  Vec gate = v + 3;
  gate = gate < Vec{} ? Vec{} : gate;
  gate = gate > six ? six : gate;
  return v * gate / 6;
}

using AnyAct = std::integral_constant<Act, Act::silu>;  // stands for every activation that is not compiled in

// NaN passes through, as in torch.
template <Act act>
ISW_INLINE Vec activate(Act actual, Vec v) {
  if (act == Act::none) return v;
  if (act == AnyAct::value) return activate_other(actual, v);
  v = at_least(Vec{}, v);
  return act == Act::relu ? v : at_most(broadcast(6), v);
}

// body(integral constant of the activation, or AnyAct)
template <typename Body>
auto with_act(Act act, Body body) {
  if (act == Act::none) return body(std::integral_constant<Act, Act::none>());
  if (act == Act::relu) return body(std::integral_constant<Act, Act::relu>());
  if (act == Act::relu6) return body(std::integral_constant<Act, Act::relu6>());
  return body(AnyAct());
}

}  // namespace
}  // namespace isw
