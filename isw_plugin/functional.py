"""The paper as pure functions, one an equation (Liu et al., "Learning Instance-wise Sparsity for
Accelerating Deep Models", 2019).

N instances, C channels, H W map size. Norms are float32 (float64 for float64 features).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "channel_norm",
    "coefficient_of_variation",
    "instance_penalty",
    "is_tracing",
    "keep_mask",
    "mask",
    "mean_norm",
]

_CACHED = 1 << 18  # elements: 1 MB in float32


def channel_norm(feature: Tensor, axis: int = 1) -> Tensor:
    """Norm of every channel of every instance (Eq. 3).

    Args:
        feature: Feature map, instances on axis 0: (N, C, H, W), (N, T, C), (N, C), ...
        axis: The channel axis.

    Returns:
        ||feature[n, c]||_2, shape (N, C). The gradient of an all-zero channel is 0.
    """
    with torch.autocast(feature.device.type, enabled=False):
        if feature.dim() == 2:
            return feature.to(torch.promote_types(feature.dtype, torch.float32)).abs()
        if not torch.is_grad_enabled() or is_tracing():  # no gradient is asked for, and a trace can be saved
            return _norms(feature.detach(), axis % feature.dim())
        function = _ChannelNorm if torch.compiler.is_compiling() else _ChannelNormInTransforms
        norms: Tensor = function.apply(feature, axis % feature.dim())
        return norms


def is_tracing() -> bool:
    """Whether torch.jit.trace runs, where sizes are no numbers."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _norms(feature: Tensor, axis: int) -> Tensor:
    others = [dim for dim in range(1, feature.dim()) if dim != axis]
    wide = torch.promote_types(feature.dtype, torch.float32)  # squares overflow float16
    sums = [feature[part].to(wide, copy=True).pow_(2).sum(others) for part in _parts(feature)]
    return torch.cat(sums).sqrt_()


class _ChannelNorm(torch.autograd.Function):
    """Eq. 3 with the gradient F / ||F||, 0 on dead channels, where that of sqrt(sum(F^2)) is NaN.

    torch.linalg.vector_norm has that gradient too, but takes 4 times as long on channels_last maps.
    """

    @staticmethod
    def forward(feature: Tensor, axis: int) -> Tensor:
        return _norms(feature, axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        feature, ctx.axis = inputs
        ctx.save_for_backward(feature, output)
        ctx.save_for_forward(feature, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        feature, norms = ctx.saved_tensors
        scale = torch.where(norms == 0, 0.0, gradient / norms)
        shape = [len(norms)] + [1] * (feature.dim() - 1)
        shape[ctx.axis] = norms.shape[1]
        scale, result = scale.view(shape), torch.empty_like(feature)
        for part in _parts(feature):
            result[part] = feature[part] * scale[part]
        return result, None


class _ChannelNormInTransforms(_ChannelNorm):
    """The same under torch.func and forward-mode AD; torch.compile takes none of the two rules."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        feature, norms = ctx.saved_tensors
        others = [dim for dim in range(1, feature.dim()) if dim != ctx.axis]
        inner = (feature.to(norms.dtype) * tangent).sum(others)
        return torch.where(norms == 0, 0.0, inner / norms)


def _parts(feature: Tensor) -> list[slice]:
    """Instances whose float32 copies stay in a core's cache together: 3 to 10 times as fast on large maps."""
    if feature.device.type != "cpu" or torch.compiler.is_compiling() or is_tracing():
        return [slice(None)]
    size = max(1, _CACHED // max(1, math.prod(feature.shape[1:])))
    return [slice(start, start + size) for start in range(0, max(1, len(feature)), size)]


def instance_penalty(norms: Iterable[Tensor]) -> Tensor:
    """Sum of an instance's channel norms over all sites (Eq. 4).

    Args:
        norms: Channel norms of each site, shapes (N, C_l); at least one.

    Returns:
        N_n, shape (N,).
    """
    return torch.stack([norm.sum(1) for norm in norms]).sum(0)


def mean_norm(norms: Tensor) -> Tensor:
    """Mean over channels (Eq. 7).

    Args:
        norms: Channel norms of one site, shape (N, C).

    Returns:
        mu, shape (N, 1).
    """
    return norms.mean(1, keepdim=True)


def coefficient_of_variation(norms: Tensor) -> Tensor:
    """Population standard deviation over mean (Eq. 6).

    Args:
        norms: Channel norms of one site, shape (N, C).

    Returns:
        CV, shape (N,). An all-zero map has CV 0; the paper does not say.
    """
    mean = mean_norm(norms)
    # Relative to the mean first: the squares of large norms overflow.
    relative = torch.where(mean == 0, 0.0, norms / mean - 1)
    return relative.square().mean(1).sqrt()


def keep_mask(norms: Tensor, alpha: float, beta: float) -> Tensor:
    """Which channels are kept (section 3.3).

    A site takes part for an instance when its CV exceeds alpha; there, channels with a norm under
    beta times the mean are dropped. Both tests are strict, so NaN statistics drop nothing.

    Args:
        norms: Channel norms of one site, shape (N, C).
        alpha: CV threshold, >= 0; infinity keeps everything.
        beta: Drop threshold as a multiple of the mean norm, in [0, 2); 0 keeps everything.

    Returns:
        True where the channel is kept, bool, shape (N, C).
    """
    prunable = coefficient_of_variation(norms).unsqueeze(1) > alpha
    return ~(prunable & (norms < beta * mean_norm(norms)))


def mask(feature: Tensor, keep: Tensor, axis: int = 1) -> Tensor:
    """Dropped channels are zero, whatever they hold (section 3.3).

    Args:
        feature: (N, C, H, W), (N, T, C), (N, C), ...
        keep: True where the channel is kept, bool, shape (N, C).
        axis: The channel axis.

    Returns:
        A map of the same shape and memory format.
    """
    shape = [keep.shape[0]] + [1] * (feature.dim() - 1)  # len() would make it a constant for torch.export
    shape[axis] = keep.shape[1]
    return torch.where(keep.view(shape), feature, 0)  # masked_fill would make channels_last maps contiguous
