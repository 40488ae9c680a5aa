"""One model of the zoo under test: its pruner with thresholds far from any norm, and what steps say of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isw_plugin import InstanceWisePruner
from isw_plugin.sites import Site

__all__ = [
    "Failed",
    "Skipped",
    "Subject",
    "described",
    "distance",
    "flat",
    "gated",
    "outcome",
    "output",
    "require",
]

LAMBDA = 1e-3


class Skipped(Exception):
    """A step that cannot be asked of this model."""


class Failed(Exception):
    """A step whose result is wrong."""


@dataclass
class Subject:
    """A bare model in eval mode, its images, (N, C, H, W), what it gives for them, and its pruner once attached."""

    model: nn.Module
    images: Tensor
    bare: Tensor
    state: dict[str, Tensor]
    pruner: InstanceWisePruner | None = None
    saved: dict[str, Any] = field(default_factory=dict)  # the pruner's state with thresholds far from any norm
    masked: tuple[Tensor, dict[str, Tensor]] | None = None  # what the gated model gives: output and decisions

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> "Subject":
        state = {name: value.clone() for name, value in model.state_dict().items()}
        bare = output(model, images)
        require(bool(bare.isfinite().all()), "the bare model's output is not finite")
        return cls(model, images, bare, state)

    def attach(
        self, scope: Literal["all", "consumers"] = "all", heads: Callable[[Sequence[Site]], Any] | None = None
    ) -> InstanceWisePruner:
        """Attach, predict by heads where there shall be some, and set the thresholds that the first pruner found."""
        gate = _WidestGap(())
        self.pruner = InstanceWisePruner(self.model, self.images, LAMBDA, gate=gate, scope=scope)
        if heads:
            self.pruner.load_state_dict(self.pruner.state_dict() | heads(self.pruner.sites))
        if not self.saved:
            self.saved = with_thresholds(self.pruner, self.images)
        sites = self.pruner.state_dict()["sites"]
        per_site = {name: beta for name, beta in self.saved["per_site"].items() if name in sites}
        self.pruner.load_state_dict(self.saved | {"scope": scope, "sites": sites, "per_site": per_site})
        return self.pruner

    @property
    def attached(self) -> InstanceWisePruner:
        if self.pruner is None:
            raise Failed("not attached")
        return self.pruner


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failed(message)


def output(model: nn.Module, images: Tensor) -> Tensor:
    """All that the model gives, (N, features)."""
    with torch.no_grad():
        given = model(images)
    return flat(given, len(images))


def flat(given: Any, instances: int) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.reshape(instances, -1) for leaf in leaves if leaf.dim()], dim=1)


def distance(given: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; infinite where not finite."""
    ratio = (given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(ratio) if ratio.isfinite() else float("inf")


@dataclass(frozen=True)
class _WidestGap:
    """The CV gate at the threshold, 0.5 to 1.3 of the mean, that lies farthest from any norm; notes it in a list."""

    betas: Any  # a list, or nothing to note thresholds in; plain values only, so that the pruner's state can be saved

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        ratios = norms / norms.mean(1, keepdim=True).clamp_min(1e-30)
        inside = ratios[(ratios > 0.5) & (ratios < 1.3)].double()
        points = torch.cat([inside.new_tensor([0.5]), inside.sort().values, inside.new_tensor([1.3])])
        widest = points.diff().argmax()
        beta = float(points[widest : widest + 2].mean())
        if isinstance(self.betas, list):
            self.betas.append(beta)
        return ratios >= beta


def with_thresholds(pruner: InstanceWisePruner, images: Tensor) -> dict[str, Any]:
    """The state of a pruner with the CV gate and, for every site, a threshold that rounding does not cross."""
    betas: list[float] = []
    with pruner.gating(betas=betas):
        output(pruner.model, images)
    ran = [name for name in pruner._memory.norms if name not in pruner.followers]  # in the order of the gates' calls
    per_site = {name: {"beta": beta} for name, beta in zip(ran, betas, strict=True)}
    gate = {"type": "CVGate", "parameters": {"alpha": 0.0, "beta": 1.0}}
    return pruner.state_dict() | {"gate": gate, "per_site": per_site}


def gated(pruner: InstanceWisePruner, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and decisions with gates on."""
    with pruner.gating():
        given = output(pruner.model, images)
        return given, dict(pruner.keep)


def outcome(step: Callable[..., None], *args: Any) -> str:
    """ "ok", or how the step did not go well."""
    try:
        step(*args)
    except Skipped as why:
        return f"skipped: {why}"
    except Exception as error:
        return described(error)
    return "ok"


def described(error: Exception) -> str:
    kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:400]
