"""What gates do, as one operator each, so that a traced graph names it: norms, decisions, masks."""

import torch
from torch import Tensor

from isw_plugin import functional

__all__ = ["channel_norm", "decide", "mask"]


@torch.library.custom_op("isw::channel_norm", mutates_args=())
def channel_norm(x: Tensor, axis: int) -> Tensor:
    """Norms (N, C) of a map (Eq. 3)."""
    return functional.channel_norm(x, axis)


@channel_norm.register_fake
def _(x: Tensor, axis: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[axis]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("isw::decide", mutates_args=())
def decide(norms: Tensor, alpha: float, beta: float) -> Tensor:
    """Keep mask (N, C) of the CV gate (Eq. 6-7)."""
    return functional.keep_mask(norms, alpha, beta)


@decide.register_fake
def _(norms: Tensor, alpha: float, beta: float) -> Tensor:
    return norms.new_empty(norms.shape, dtype=torch.bool)


@torch.library.custom_op("isw::mask", mutates_args=())
def mask(x: Tensor, keep: Tensor, axis: int) -> Tensor:
    """A map with zeros in its dropped channels; keep is (N, C), C lies on ``axis``."""
    return functional.mask(x, keep, axis)


@mask.register_fake
def _(x: Tensor, keep: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x)
