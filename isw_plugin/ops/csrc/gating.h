// What gates do, by the operations of functional.py in the same order, so that results are the same to the last bit.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <vector>

namespace isw {

using at::Tensor;

// Norms (N, C) of a map (Eq. 3), of as many instances at once as stay in a core's cache.
inline Tensor channel_norm(const Tensor& x, int64_t axis) {
  constexpr int64_t cached = 1 << 18;
  const at::ScalarType wide = c10::promoteTypes(x.scalar_type(), at::kFloat);
  if (x.dim() == 2) return x.to(wide).abs();
  std::vector<int64_t> others;
  int64_t elements = 1;
  for (int64_t dim = 1; dim < x.dim(); ++dim) {
    if (dim != (axis + x.dim()) % x.dim()) others.push_back(dim);
    elements *= x.size(dim);
  }
  const int64_t size = std::max<int64_t>(1, cached / std::max<int64_t>(1, elements));
  std::vector<Tensor> sums;
  for (int64_t start = 0; start < std::max<int64_t>(1, x.size(0)); start += size) {
    Tensor part = x.slice(0, start, start + size).to(wide, false, true);
    sums.push_back(part.pow_(2).sum(others));
  }
  return at::cat(sums).sqrt_();
}

// Keep mask (N, C) of the CV gate (Eq. 6-7).
inline Tensor decide(const Tensor& norms, double alpha, double beta) {
  const Tensor mean = norms.mean(1, true);
  const Tensor relative = at::where(mean.eq(0), 0.0, norms.div(mean).sub(1));
  const Tensor prunable = relative.square().mean(1).sqrt().unsqueeze(1).gt(alpha);
  return prunable.bitwise_and(norms.lt(mean.mul(beta))).bitwise_not();
}

// A map with zeros in its dropped channels; keep is (N, C), C lies on `axis`.
inline Tensor mask(const Tensor& x, const Tensor& keep, int64_t axis) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[0] = keep.size(0);
  shape[(axis + x.dim()) % x.dim()] = keep.size(1);
  return at::where(keep.view(shape), x, 0);
}

}  // namespace isw
