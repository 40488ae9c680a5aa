"""What gates do, as one operator each, so that a traced graph names it: norms, decisions, masks."""

import torch
from torch import Tensor

from isw_plugin.ops.registration import define

__all__ = ["channel_norm", "decide", "mask"]


def _fake_norm(feature: Tensor, axis: int) -> Tensor:
    return feature.new_empty(
        (feature.shape[0], feature.shape[axis]), dtype=torch.promote_types(feature.dtype, torch.float32)
    )


def _fake_decide(norms: Tensor, alpha: float, beta: float) -> Tensor:
    return norms.new_empty(norms.shape, dtype=torch.bool)


def _fake_mask(feature: Tensor, keep: Tensor, axis: int) -> Tensor:
    return torch.empty_like(feature)


define("channel_norm", _fake_norm)
define("decide", _fake_decide)
define("mask", _fake_mask)

channel_norm = torch.ops.isw.channel_norm  # norms (N, C) of a map (Eq. 3)
decide = torch.ops.isw.decide  # keep mask (N, C) of the CV gate (Eq. 6-7)
mask = torch.ops.isw.mask  # a map with zeros in its dropped channels
