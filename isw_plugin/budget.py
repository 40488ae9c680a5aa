"""The thresholds of all sites under one budget of MACs.

Every site gives up channels until the last one costs as much for the MACs that it saves as anywhere else. What it
costs is the share of its map's energy (squared norms) that goes; what it saves is the work of its readers and, where
norms are predicted, of the layers that make it, as far as what is before and behind them is kept. docs/calibrating.md
says why.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from isw_plugin.followers import root
from isw_plugin.functional import coefficient_of_variation, mean_norm
from isw_plugin.hooks import memory_of
from isw_plugin.inputs import call, instances_in
from isw_plugin.measure.macs import DenseMacs, count_dense, require_decided, saved_by_site
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.settings import Settings

__all__ = ["Budget", "next_target", "relative_norms"]

_LARGEST = math.nextafter(2.0, 0.0)
_HALVINGS = 40
_PRICES = (-60.0, 60.0)  # logarithms between which the price of a MAC is found


def next_target(before: float | None, macs_left: float, ramp: int) -> float:
    """The share of the MACs to aim at now, on the way to a budget that takes ``ramp`` calls from 1.

    Args:
        before: At the last call; None: there was none.
    """
    before = 1.0 if before is None else before
    step = (1 - macs_left) / ramp if ramp else 1.0
    return max(macs_left, before - step)


def relative_norms(norms: Tensor, alpha: float, min_keep: int) -> Tensor:
    """norm / mean norm of the channels that a batch (N, C) may drop: of instances whose CV exceeds alpha, and there not
    the ``min_keep`` largest; flat."""
    prunable = norms[coefficient_of_variation(norms) > alpha]
    relative = prunable / mean_norm(prunable)
    if min_keep:
        relative = relative.sort(dim=1).values[:, : max(0, norms.shape[1] - min_keep)]
    return relative.flatten()


@dataclass(frozen=True)
class _Curve:
    """What a site keeps under a threshold, in the last batch, and what its energy is spread over.

    Attributes:
        relative: norm / mean norm of all channels that instances may drop, sorted.
        prunable: Their share of the batch's (instance, channel) pairs.
        spread: Mean square over squared mean of the norms, 1 + CV^2.
    """

    relative: np.ndarray
    prunable: float
    spread: float

    @classmethod
    def of(cls, norms: Tensor, alpha: float, min_keep: int) -> Self:
        cv = coefficient_of_variation(norms)
        relative = relative_norms(norms, alpha, min_keep).float().cpu().sort().values.numpy()
        spread = (1 + cv[cv.isfinite()].square()).mean().item() if cv.isfinite().any() else 1.0
        return cls(relative, len(relative) / max(1, norms.numel()), spread)

    def kept(self, beta: float) -> float:
        """Share of (instance, channel) pairs."""
        dropped = np.searchsorted(self.relative, beta) / max(1, len(self.relative))
        return 1 - self.prunable * float(dropped)


@dataclass(frozen=True)
class _Work:
    """A layer's share of the MACs, the sites that fill its input columns with their shares, and the site it makes."""

    share: float
    read: Mapping[str, float]
    made: str | None

    def kept_in(self, kept: Mapping[str, float]) -> float:
        return max(0.0, 1 - sum(share * (1 - kept[site]) for site, share in self.read.items()))

    def left(self, kept: Mapping[str, float]) -> float:
        return self.share * self.kept_in(kept) * (kept[self.made] if self.made else 1.0)


class Budget:
    """Shares of the MACs, as ``count_macs`` counts them, on what the last gated forward decided on.

    Attributes:
        measured: What it left, the mean over its instances.

    Raises:
        SettingError: A site did not decide once for each instance.
    """

    def __init__(self, pruner: InstanceWisePruner) -> None:
        memory = memory_of(pruner.model)
        assert memory is not None
        assert memory.settings is not None
        self.pruner, self.heads, self.followers = pruner, pruner.heads, pruner.followers
        self.gates: dict[str, Any] = dict(memory.gates)
        self.norms, self.keep = pruner.norms, pruner.keep
        self.dense = _dense(pruner, memory.settings)
        require_decided(pruner.sites, self.keep, len(next(iter(self.keep.values()))))
        self.curves = {
            site: _Curve.of(norms, self.gates[site].alpha, memory.min_keep)
            for site, norms in self.norms.items()
            if site not in self.followers
        }
        self.works = self._works()
        saved = sum(saved_by_site(pruner, self.keep, self.norms, self.dense).values())
        self.measured = 1 - float(torch.as_tensor(saved).mean()) / max(1, self.dense.total)

    def _works(self) -> list[_Work]:
        read: dict[str, dict[str, float]] = {}
        for site in self.pruner.sites:
            for reader in site.consumers:
                held = site.channels if reader.channels is None else sum(at >= 0 for at in reader.channels)
                share = held * reader.repeat / self.dense.columns[reader.layer]
                sites, decider = read.setdefault(reader.layer, {}), root(self.followers, site.name)
                sites[decider] = sites.get(decider, 0.0) + share
        made = {
            layer: site.name for site in self.pruner.sites if site.name in self.heads for layer in site.making.layers
        }
        total = max(1, self.dense.total)
        return [
            _Work(macs / total, read.get(layer, {}), made.get(layer)) for layer, macs in self.dense.per_layer.items()
        ]

    @property
    def finite(self) -> bool:
        """Whether the last batch says anything."""
        return all(norms.isfinite().all() for norms in self.norms.values())

    def least(self) -> float:
        """What is left where every site drops all that thresholds can."""
        return self._left({site: curve.kept(_LARGEST) for site, curve in self.curves.items()})

    def wanted(self, target: float) -> dict[str, float]:
        """The beta of each site under which the last batch would have left ``target``; none where a site saves nothing.

        What the present thresholds left in truth, beside what curves of single sites say of them, corrects the rest:
        instances that keep much in one map keep much in the next.
        """
        present = {site: self.keep[site].float().mean().item() for site in self.curves}
        worth = self._worth(present)
        goal = target + self._left(present) - self.measured
        low, high = _PRICES
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            betas = self._betas(middle, worth)
            left = self._left(present | {site: self.curves[site].kept(beta) for site, beta in betas.items()})
            low, high = (middle, high) if left > goal else (low, middle)
        return self._betas(low, worth)

    def _worth(self, kept: Mapping[str, float]) -> dict[str, float]:
        """MACs that a site's last channels save for a unit of its energy."""
        saves = dict.fromkeys(self.curves, 0.0)
        for work in self.works:
            out = kept[work.made] if work.made else 1.0
            for site, share in work.read.items():
                saves[site] += work.share * share * out
            if work.made:
                saves[work.made] += work.share * work.kept_in(kept)
        return {site: saved * self.curves[site].spread for site, saved in saves.items()}

    def _betas(self, price: float, worth: Mapping[str, float]) -> dict[str, float]:
        scale = math.exp(price / 2)
        return {site: min(scale * math.sqrt(of_site), _LARGEST) for site, of_site in worth.items() if of_site > 0}

    def _left(self, kept: Mapping[str, float]) -> float:
        heads = sum(head.macs for head in self.heads.values()) / max(1, self.dense.total)
        return sum(work.left(kept) for work in self.works) + heads


def _dense(pruner: InstanceWisePruner, settings: Settings) -> DenseMacs:
    """Counted once, at the size that the sites were found on, until they are found anew."""
    if settings.counted is None:
        weight = next(pruner.model.parameters(), torch.empty(0))
        inputs = tree_map_only(Tensor, lambda tensor: _zeros(tensor, weight), settings.inputs)
        settings.counted = count_dense(pruner.model, inputs, call, instances_in(inputs))
    counted: DenseMacs = settings.counted
    return counted


def _zeros(tensor: Tensor, weight: Tensor) -> Tensor:
    dtype = weight.dtype if tensor.is_floating_point() else tensor.dtype
    return torch.zeros(tensor.shape, dtype=dtype, device=weight.device)
