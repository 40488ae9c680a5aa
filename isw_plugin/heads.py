"""Norms of a map before its layer runs: one linear map of what is known of the maps that the layer reads.

docs/predicting.md has the definition and what it was measured against.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from isw_plugin.errors import PredictionError, StateMismatchError
from isw_plugin.functional import is_tracing
from isw_plugin.gates import Gate
from isw_plugin.sites import Site

__all__ = [
    "UNSEEN",
    "Head",
    "Lesson",
    "Statistics",
    "features",
    "heads_of",
    "heads_tensors",
    "positions",
    "require_norms_only",
    "restored",
    "statistics",
    "stored",
]

_SEEN = "this gate reads the map itself, which does not exist yet where norms are predicted: go on measuring"


class _Unseen:
    """What a gate gets for the map where norms are predicted."""

    def __getattr__(self, name: str) -> Any:
        raise PredictionError(f"{_SEEN} (it asks for .{name})")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise PredictionError(_SEEN)


UNSEEN: Any = _Unseen()


class Statistics(NamedTuple):
    """What a head knows of a map after its own mask: root mean square and mean of every channel, (N, C) each.

    ``positions``: elements of a channel of one instance.
    """

    rms: Tensor
    mean: Tensor
    positions: int


Lesson = tuple[Mapping[str, Statistics], Tensor]  # what a head read, and the root mean squares (N, C) that there were


def positions(feature: Tensor, axis: int) -> int:
    """Elements of a channel of one instance."""
    if not is_tracing():
        return math.prod(feature.shape[1:]) // feature.shape[axis]
    with warnings.catch_warnings(action="ignore"):  # all sizes but the number of instances are constants
        return math.prod(map(int, feature.shape[1:])) // int(feature.shape[axis])


def statistics(feature: Tensor, axis: int, norms: Tensor) -> Statistics:
    """Statistics of a map (N, C, H, W), (N, T, C) or (N, C), C on ``axis``, whose channel norms are these (N, C).

    float32 (float64 for float64).
    """
    others = [dim for dim in range(1, feature.dim()) if dim != axis % feature.dim()]
    wide = torch.promote_types(feature.dtype, torch.float32)
    mean = feature.mean(others, dtype=wide) if others else feature.to(wide)
    size = positions(feature, axis)
    return Statistics(norms / math.sqrt(size), mean, size)


def features(read: Mapping[str, Statistics], sources: Sequence[str]) -> Tensor:
    """phi: the inputs of a head that reads these sites, in this order, (N, 2 * sum of their channels)."""
    return torch.cat([part for source in sources for part in (read[source].rms, read[source].mean)], 1)


@dataclass(frozen=True)
class Head:
    """Predicts the norms of one site, or of the last that follows it: ``norms = sqrt(P) relu(A B phi + b)``.

    P: the positions of the map.

    Attributes:
        sources: The sites that it reads.
        weight: A, (C, R).
        bias: b, (C,).
        basis: B, (R, F); None: there is none, and R = F.
        moments: Where it follows a network, what was seen so far, as ``predict.ridge.moments`` has it.
        followed: Calls of ``follow_predictors`` since it was fitted.
    """

    sources: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    basis: Tensor | None = None
    moments: Tensor | None = None
    followed: int = 0

    def norms(self, read: Mapping[str, Statistics], size: int) -> Tensor:
        """Predicted channel norms (N, C) of a map of ``size`` positions, from statistics by site."""
        phi = features(read, self.sources)
        with torch.autocast(phi.device.type, enabled=False):
            known = phi if self.basis is None else phi @ self.basis.to(phi).T
            rms: Tensor = torch.addmm(self.bias.to(phi), known, self.weight.to(phi).T).relu()
        return rms * math.sqrt(size)

    @property
    def inputs(self) -> int:
        """F."""
        return (self.weight if self.basis is None else self.basis).shape[1]

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return self.weight.numel() + (0 if self.basis is None else self.basis.numel())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What predicts, by name."""
        factors = {"weight": self.weight, "bias": self.bias}
        return factors if self.basis is None else factors | {"basis": self.basis}

    def to(self, device: torch.device) -> Self:
        """The same head with what predicts on a device."""
        there: dict[str, Any] = {key: tensor.to(device) for key, tensor in self.tensors.items()}
        return replace(self, **there, moments=None)


def require_norms_only(gate: Gate, site: Site) -> None:
    """Raise PredictionError where a gate needs the map of a site to decide on it."""
    try:
        gate(UNSEEN, torch.ones(2, site.channels))
    except Exception as error:  # whatever a gate makes of it
        raise PredictionError(
            f"{site.name} cannot be predicted with {gate}, which needs more than norms ({error}): go on measuring, or "
            "take a gate that decides on norms alone"
        ) from error


# -- saving ----------------------------------------------------------------------------------------


def stored(heads: Mapping[str, Head]) -> dict[str, Any]:
    """Heads as a part of a pruner's state; nothing where there are none."""
    return {"heads": {name: _stored(head) for name, head in heads.items()}} if heads else {}


def _stored(head: Head) -> dict[str, Any]:
    held = {"sources": list(head.sources), **{key: tensor.cpu() for key, tensor in head.tensors.items()}}
    return held if head.moments is None else held | {"moments": head.moments.cpu(), "followed": head.followed}


def restored(heads: Any, sites: Sequence[Site]) -> dict[str, Head]:
    """What ``stored`` gave under "heads", for these sites.

    Raises:
        StateMismatchError: They are another model's, or no heads.
    """
    if not isinstance(heads, Mapping):
        raise StateMismatchError(f"heads are a {type(heads).__name__}, and not a dict by site name")
    here = {site.name: site for site in sites}
    found = {}
    for name, head in heads.items():
        if name not in here:
            raise StateMismatchError(f"a head of another model: there is no site {name!r} here")
        found[name] = _restored(head, here[name], here)
    return found


def _restored(head: Any, site: Site, sites: Mapping[str, Site]) -> Head:
    lacking = [key for key in ("sources", "weight", "bias") if not isinstance(head, Mapping) or key not in head]
    if lacking:
        raise StateMismatchError(f"the head of {site.name} is damaged: it has no {', '.join(lacking)}")
    sources = tuple(head["sources"]) if isinstance(head["sources"], list | tuple) else (head["sources"],)
    if site.making.reason or sources != site.making.sources:
        here = site.making.reason or f"its layers read {', '.join(site.making.sources)}"
        raise StateMismatchError(f"the head of {site.name} reads {', '.join(map(str, sources))}, and here {here}")
    inputs = 2 * sum(sites[source].channels for source in sources)
    shapes = {"weight": (site.channels, inputs), "bias": (site.channels,)}
    if "basis" in head:
        rank = len(head["basis"]) if isinstance(head["basis"], Tensor) and head["basis"].dim() else 1
        shapes |= {"weight": (site.channels, rank), "basis": (rank, inputs)}
    followed = head.get("followed", 0)
    if type(followed) is not int or followed < 0:
        raise StateMismatchError(f"the head of {site.name} followed {followed!r} steps: a whole number, 0 or more")
    if followed:
        shapes["moments"] = (1 + inputs, 1 + inputs + site.channels)
    tensors = {key: head.get(key) for key in shapes}
    for key, tensor in tensors.items():
        shape = shapes[key]
        if not isinstance(tensor, Tensor) or tensor.shape != shape or not tensor.is_floating_point():
            what = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise StateMismatchError(f"the {key} of the head of {site.name} is {what}, and {shape} floats here")
        if not tensor.isfinite().all():
            raise StateMismatchError(f"the {key} of the head of {site.name} holds NaN or infinity")
    return Head(sources, **{key: tensor.detach().clone() for key, tensor in tensors.items()}, followed=followed)


_TENSORS = ("weight", "bias", "basis")  # the last one where there is one


def heads_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A pruner's state as plain values, its heads as their sources, and the heads' tensors by name."""
    held = state.get("heads", {})
    if not held:
        return dict(state), {}
    tensors = {f"{name}.{key}": head[key] for name, head in held.items() for key in _TENSORS if key in head}
    return {**state, "heads": {name: {"sources": head["sources"]} for name, head in held.items()}}, tensors


def heads_of(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of which ``heads_tensors`` made the two.

    Raises:
        StateMismatchError: Tensors are missing, or there are others.
    """
    held = state.get("heads", {})
    names = {f"{name}.{key}" for name in held for key in _TENSORS}
    needed = {f"{name}.{key}" for name in held for key in _TENSORS[:2]}
    if other := sorted((tensors.keys() - names) | (needed - tensors.keys())):
        raise StateMismatchError(f"the stored heads and their tensors differ: {', '.join(other[:5])}")
    if not held:
        return dict(state)
    return {
        **state,
        "heads": {
            name: {**head, **{key: tensors[f"{name}.{key}"] for key in _TENSORS if f"{name}.{key}" in tensors}}
            for name, head in held.items()
        },
    }
