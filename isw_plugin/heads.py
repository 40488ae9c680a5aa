"""Norms of a map before its layer runs: one linear map of what is known of the maps that the layer reads.

Section 3 of docs/predicting.md has the definition and what it was measured against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from isw_plugin.errors import PredictionError
from isw_plugin.functional import channel_norm

__all__ = ["UNSEEN", "Head", "Statistics", "features", "positions", "statistics"]


class _Unseen:
    """What a gate gets for the map where norms are predicted: the map does not exist yet."""

    def __getattr__(self, name: str) -> Any:
        raise PredictionError(f"this gate reads the map itself (.{name}), which predicted sites decide before: measure")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PredictionError("this gate reads the map itself, which predicted sites decide before: measure")


UNSEEN = _Unseen()


class Statistics(NamedTuple):
    """What a head knows of a map after its own mask: root mean square and mean of every channel, (N, C) each.

    ``positions``: elements of a channel of one instance.
    """

    rms: Tensor
    mean: Tensor
    positions: int


def positions(feature: Tensor, axis: int) -> int:
    """Elements of a channel of one instance."""
    size: int = feature[0].numel() // feature.shape[axis]
    return size


def statistics(feature: Tensor, axis: int) -> Statistics:
    """Statistics of a map (N, C, H, W), (N, T, C) or (N, C), C on ``axis``; float32 (float64 for float64)."""
    others = [dim for dim in range(1, feature.dim()) if dim != axis % feature.dim()]
    wide = torch.promote_types(feature.dtype, torch.float32)
    mean = feature.mean(others, dtype=wide) if others else feature.to(wide)
    size = positions(feature, axis)
    return Statistics(channel_norm(feature, axis) / size**0.5, mean, size)


def features(read: Mapping[str, Statistics], sources: tuple[str, ...]) -> Tensor:
    """phi: the inputs of a head that reads these sites, in this order, (N, 2 * sum of their channels)."""
    return torch.cat([part for source in sources for part in (read[source].rms, read[source].mean)], 1)


@dataclass(frozen=True)
class Head:
    """Predicts the norms of one site: ``norms = sqrt(P) relu(A phi + b)``, P positions of the map.

    Attributes:
        sources: The sites that it reads.
        weight: A, (C, F).
        bias: b, (C,).
    """

    sources: tuple[str, ...]
    weight: Tensor
    bias: Tensor

    def norms(self, read: Mapping[str, Statistics], size: int) -> Tensor:
        """Predicted channel norms (N, C) of a map of ``size`` positions, from statistics by site."""
        phi = features(read, self.sources)
        with torch.autocast(phi.device.type, enabled=False):
            rms = torch.addmm(self.bias.to(phi), phi, self.weight.to(phi).T).relu_()
        return rms * size**0.5

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.weight.numel()

    def to(self, device: torch.device) -> Self:
        """The same head with its tensors on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))
