"""Part (b) of the zoo: one real model, attached, trained for a step, gated in every way, and restored.

Every step gives "ok", "skipped: why" (not counted as passed), or what went wrong.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from benchmarks.zoo_sites import unaccounted
from isw_plugin import InstanceWisePruner
from isw_plugin.hooks import column_keep, has_hooks, reader_parts

__all__ = ["STEPS", "Subject", "check"]

LAMBDA = 1e-3
_TOLERANCE = 1e-3  # of the largest output, in float32: two batch sizes are two orders of summation


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

    def attach(self, scope: Literal["all", "consumers"] = "all") -> InstanceWisePruner:
        """Attach, and set the thresholds that the first pruner of this model found."""
        gate = _WidestGap(())
        self.pruner = InstanceWisePruner(self.model, self.images, LAMBDA, gate=gate, scope=scope)
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


# -- what the steps are made of --------------------------------------------------------------------


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
    """The CV gate at the threshold, 0.5 to 1.3 of the mean, that lies farthest from any norm; notes it."""

    betas: Any  # a list to note thresholds in; plain values only, so that the pruner's state can be saved

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        ratios = norms / norms.mean(1, keepdim=True).clamp_min(1e-30)
        inside = ratios[(ratios > 0.5) & (ratios < 1.3)].double()
        points = torch.cat([inside.new_tensor([0.5]), inside.sort().values, inside.new_tensor([1.3])])
        widest = points.diff().argmax()
        beta = float(points[widest : widest + 2].mean())
        self.betas.append(beta)
        return ratios >= beta


def with_thresholds(pruner: InstanceWisePruner, images: Tensor) -> dict[str, Any]:
    """The state of a pruner with the CV gate and, for every site, a threshold that rounding does not cross."""
    betas: list[float] = []
    with pruner.gating(betas=betas):
        output(pruner.model, images)
    ran = list(pruner._memory.norms)  # in the order that the gates were called in
    per_site = {name: {"beta": beta} for name, beta in zip(ran, betas, strict=True)}
    gate = {"type": "CVGate", "parameters": {"alpha": 0.0, "beta": 1.0}}
    return pruner.state_dict() | {"gate": gate, "per_site": per_site}


# -- the steps -------------------------------------------------------------------------------------


def attach(subject: Subject) -> None:
    found = subject.attach()._found
    require(len(found.sites) > 0, "no sites")
    require(not unaccounted(subject.model, found), f"not accounted for: {unaccounted(subject.model, found)[:3]}")


def forward(subject: Subject) -> None:
    require(torch.equal(output(subject.model, subject.images), subject.bare), "attaching changed the output")


def penalty(subject: Subject) -> None:
    model, pruner = subject.model, subject.attached
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        model(subject.images)
        alive = {name for name, norms in pruner._memory.tape[-1].items() if bool(norms.any())}
        loss = pruner.penalty()
        loss.backward()
        _check_gradients(subject, float(loss.detach()), alive)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval().load_state_dict(saved)


def _check_gradients(subject: Subject, loss: float, alive: set[str]) -> None:
    """``alive``: sites whose map is not zero; a dead ReLU (a few channels of squeeze-excite) has no gradient."""
    require(0 < loss < float("inf"), f"the penalty is {loss}")
    require(len(alive) >= 0.9 * len(subject.attached.sites), "more than a tenth of the maps is zero")
    modules = dict(subject.model.named_modules())
    found = subject.attached._found
    for name, parameter in subject.model.named_parameters():
        require(parameter.grad is None or bool(parameter.grad.isfinite().all()), f"{name}: gradient not finite")
    for name in {name for site in found.sites if site.name in alive for name in site.layers}:
        gradients = [parameter.grad for parameter in modules[name].parameters()]
        require(any(g is not None and bool(g.any()) for g in gradients), f"{name}: a site without a gradient")
    for name, reason in found.left_out.items():
        if reason in ("the classifier", "the model's output"):
            gradients = [parameter.grad for parameter in modules[name].parameters()]
            require(not any(g is not None and bool(g.any()) for g in gradients), f"{name}: a gradient and no site")


def beta_zero(subject: Subject) -> None:
    pruner = subject.attached
    pruner.load_state_dict(subject.saved | {"per_site": {}})
    with pruner.gating(alpha=0.0, beta=0.0):
        given = output(subject.model, subject.images)
        keep = pruner.keep
    pruner.load_state_dict(subject.saved)
    require(all(bool(kept.all()) for kept in keep.values()), "beta 0 dropped channels")
    require(torch.equal(given, subject.bare), "beta 0 changed the output")


def gate(subject: Subject) -> None:
    pruner, wrong = subject.attached, list[str]()
    with _watching(pruner, wrong):
        subject.masked = given, keep = gated(pruner, subject.images)
    require(keep.keys() == {site.name for site in pruner.sites}, "a site was not decided")
    kept = torch.cat([k.flatten() for k in keep.values()]).float().mean()
    require(0.05 <= 1 - float(kept) <= 0.95, f"dropped {1 - float(kept):.1%} of the channels")
    require(not wrong, f"dropped channels reach {wrong[:3]}")
    require(bool(given.isfinite().all()), "the gated output is not finite")
    require(distance(given, subject.bare) > 1e-6, "the gated output hardly differs from the dense one")


def gated(pruner: InstanceWisePruner, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and decisions with gates on."""
    with pruner.gating():
        given = output(pruner.model, images)
        return given, dict(pruner.keep)


@contextmanager
def _watching(pruner: InstanceWisePruner, wrong: list[str]) -> Iterator[None]:
    """Note the layers that do not get zeros in the columns that the dropped channels of their sites fill."""
    handles = []
    for name, parts in reader_parts(pruner.sites).items():
        layer = pruner.model.get_submodule(name)
        watch = partial(_watch, pruner, parts, wrong, name)
        handles.append(layer.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(pruner: Any, parts: Any, wrong: list[str], name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    feature = args[0].movedim(1, -1) if isinstance(layer, _ConvNd) else args[0]
    keep = column_keep(parts, pruner._memory.keep, feature.shape[-1])
    dropped = ~keep.view(len(keep), *[1] * (feature.dim() - 2), -1)
    if bool((feature.ne(0) & dropped).any()):
        wrong.append(name)


def one_by_one(subject: Subject) -> None:
    """A batch is its instances; where float32 cannot tell, float64 does."""
    try:
        _compare_instances(subject.attached, subject.images, _TOLERANCE, subject.masked)
    except Failed:
        model = copy.deepcopy(subject.model).double()
        _compare_instances(InstanceWisePruner.of(model), subject.images.double(), 1e-9)


def _compare_instances(
    pruner: InstanceWisePruner, images: Tensor, tolerance: float, masked: tuple[Tensor, dict[str, Tensor]] | None = None
) -> None:
    together, keep = masked or gated(pruner, images)
    alone = [gated(pruner, image[None]) for image in images]
    for name, kept in keep.items():
        flips = int((torch.cat([one[name] for _, one in alone]) != kept).sum())
        require(not flips, f"{name}: {flips} decisions differ between a batch and its instances")
    apart = distance(torch.cat([one for one, _ in alone]), together)
    require(apart < tolerance, f"a batch differs from its instances by {apart:.1e}")


def for_readers_only(subject: Subject) -> None:
    """The same with scope="consumers"."""
    subject.attached.remove()
    pruner, wrong = subject.attach("consumers"), list[str]()
    require(torch.equal(output(subject.model, subject.images), subject.bare), "attaching changed the output")
    with _watching(pruner, wrong):
        gated(pruner, subject.images)
    require(not wrong, f"dropped channels reach {wrong[:3]}")


def remove(subject: Subject) -> None:
    subject.attached.remove()
    require(not has_hooks(subject.model), "hooks are left")
    state = subject.model.state_dict()
    require(state.keys() == subject.state.keys(), "state_dict has other keys")
    require(all(torch.equal(state[name], value) for name, value in subject.state.items()), "weights changed")
    require(torch.equal(output(subject.model, subject.images), subject.bare), "the output is not restored")


STEPS: dict[str, Callable[[Subject], None]] = {
    "attach": attach,
    "forward": forward,
    "penalty": penalty,
    "beta 0": beta_zero,
    "gate": gate,
    "one by one": one_by_one,
    "consumers": for_readers_only,
    "remove": remove,
}


def check(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Take a bare model in eval mode through every step: step -> "ok", "skipped: ..." or what went wrong."""
    results: dict[str, str] = {}
    try:
        subject = Subject.of(model, images)
    except Exception as error:
        return {"attach": described(error)}
    for name, step in STEPS.items():
        results[name] = outcome(step, subject)
    return results


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
