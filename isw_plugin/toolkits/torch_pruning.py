"""Beside torch-pruning: the importance that network slimming needs."""

from typing import Any

import torch
from torch import Tensor
from torch_pruning.pruner.importance import BNScaleImportance

__all__ = ["SlimmingImportance"]

_SAFE = 1e6  # above any gamma


class SlimmingImportance(BNScaleImportance):  # type: ignore[misc]  # torch-pruning ships no types
    """Rank channels by |gamma| of their batch norm over the whole network (Liu et al., ICCV 2017).

    torch-pruning's own ``BNScaleImportance()`` divides by each layer's mean, so every layer loses about
    the same share; with ``normalizer=None`` it ranks globally, but a layer that falls whole below the
    threshold is skipped and keeps all its channels. Here the ``min_channels`` largest of every layer
    are safe, and all the others compete globally.

    Args:
        min_channels: Channels that every layer keeps, >= 1.
    """

    def __init__(self, min_channels: int = 1) -> None:
        if min_channels < 1:
            raise ValueError(f"min_channels={min_channels}: a layer needs at least 1 channel")
        super().__init__(group_reduction="mean", normalizer=None)
        self.min_channels = min_channels

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Return |gamma| of one group's channels, shape (C,), far above all others where the channel is safe."""
        importance: Tensor | None = super().__call__(group)
        if importance is None:
            return None
        # Finite, or a threshold among the safe ones would be infinite and select every channel of every layer.
        safe = importance.topk(min(self.min_channels, len(importance))).indices
        return importance.index_add(0, safe, importance.new_full((len(safe),), _SAFE))
