"""Part (b) of the zoo: one real model, attached, trained for a step, gated in every way, and restored.

Every step gives "ok", "skipped: why" (not counted as passed), or what went wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.zoo.sites import unaccounted
from benchmarks.zoo.subject import Failed, Subject, described, distance, gated, outcome, output, require
from isw_plugin import InstanceWisePruner
from isw_plugin.copies import copy_of
from isw_plugin.hooks import column_keep, has_hooks, reader_parts

__all__ = ["STEPS", "check"]

_TOLERANCE = 1e-3  # of the largest output, in float32: two batch sizes are two orders of summation


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
        alive = {name for name, norms in pruner._memory.tape[-1].recorded.items() if bool(norms[-1].any())}
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
        model = copy_of(subject.model).double()
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
