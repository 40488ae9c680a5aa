"""Part (b), continued: the accelerated model, and where the bare model exports and compiles, the gated one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from benchmarks.zoo_subject import Skipped, Subject, distance, flat, gated, outcome, output, require
from isw_plugin.engine.accelerate import Accelerated
from isw_plugin.engine.trace import trace

__all__ = ["check_engine", "check_graphs"]

_TOLERANCE = 1e-3
accelerate_module = import_module("isw_plugin.engine.accelerate")  # its package has a function of this name


def check_engine(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Whether accelerate() computes what masking does, on the images that it was fitted on and on one alone."""
    results: dict[str, str] = {}
    results["accelerate"] = outcome(_check_engine, model, images, results)
    return results


def _check_engine(model: nn.Module, images: Tensor, results: dict[str, str]) -> None:
    pruner = Subject.of(model, images).attach()
    masked, keep = gated(pruner, images)
    with _traced_once():
        fast = pruner.accelerate(images, backend="gated")
        results["execution"] = f"{fast.execution} {fast.reason}".strip()
        _compare_decisions(fast, images, masked, keep)
        if fast.execution == "accelerated":
            fast.plans.clear()
            fast.choices = {}  # the clock's choice forgotten: every layer that can skip does
            _compare_decisions(fast, images, masked, keep)
    apart = distance(output(fast, images[:1]), masked[:1])
    require(apart < _TOLERANCE, f"one image alone differs from masking by {apart:.1e}")


@contextmanager
def _traced_once() -> Iterator[None]:
    """Take all graphs of one model from one export, in which nearly all of the time goes."""
    held: list[fx.GraphModule] = []

    def once(*args: Any) -> fx.GraphModule:
        if not held:
            held.append(trace(*args))
        return copy.deepcopy(held[0])

    with patch.object(accelerate_module, "trace", once):
        yield


def _compare_decisions(fast: Accelerated, images: Tensor, masked: Tensor, keep: dict[str, Tensor]) -> None:
    with fast.recording() as record:
        given = output(fast, images)
    flips = {name: int((record.keep[name] != kept).sum()) for name, kept in keep.items()}
    require(not any(flips.values()), f"decisions differ at {[name for name, count in flips.items() if count][:3]}")
    require(distance(given, masked) < _TOLERANCE, f"differs from masking by {distance(given, masked):.1e}")


def exported(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    return torch.export.export(model, (images,)).module()


def compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    torch._dynamo.reset()
    run: Callable[[Tensor], object] = torch.compile(model, backend="aot_eager")
    return run


def check_graphs(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Export and compile (aot_eager) the bare model and, where that goes well, the gated one."""
    results = {}
    for name, make in (("export", exported), ("compile", compiled)):
        bare = outcome(lambda make: _run(make, model, images), make)
        results[name] = outcome(_compare, make, model, images, bare)
    torch._dynamo.reset()
    return results


def _run(make: Callable[[nn.Module, Tensor], Callable[[Tensor], object]], model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return flat(make(model, images)(images), len(images))


def _compare(
    make: Callable[[nn.Module, Tensor], Callable[[Tensor], object]], model: nn.Module, images: Tensor, bare: str
) -> None:
    if bare != "ok":
        raise Skipped(f"nor does the bare model: {bare}")
    pruner = Subject.of(model, images).attach()
    try:
        masked, _ = gated(pruner, images)
        with pruner.gating():
            apart = distance(_run(make, model, images), masked)
    finally:
        pruner.remove()
    require(apart < _TOLERANCE, f"differs from masking by {apart:.1e}")
