"""Part (b), continued: the accelerated model, and where the bare model exports and compiles, the gated one."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from benchmarks.zoo.heads import random_heads
from benchmarks.zoo.subject import Skipped, Subject, distance, flat, gated, outcome, output, require
from isw_plugin.accelerate import Accelerated
from isw_plugin.accelerate.trace import trace_call
from isw_plugin.copies import copy_of
from isw_plugin.hooks import memory_of

__all__ = ["MAKERS", "check_engine", "check_graphs"]

Maker: TypeAlias = Callable[[nn.Module, Tensor], Callable[[Tensor], object]]

_TOLERANCE = 1e-3
# Their package has functions of these names.
choose_module, plan_module = (import_module(f"isw_plugin.accelerate.{name}") for name in ("choose", "plan"))
fit_module = import_module("isw_plugin.accelerate.fit")


def check_engine(model: nn.Module, images: Tensor, *, predicted: bool = False) -> dict[str, str]:
    """Whether accelerate() computes what masking does, on the images that it was fitted on and on one alone.

    Args:
        predicted: With heads wherever there can be one, but that sites behind depthwise layers follow.
    """
    results: dict[str, str] = {}
    with _traced_once(), _untimed():
        results["accelerate"] = outcome(_check_engine, model, images, results, predicted)
    return results


def _check_engine(model: nn.Module, images: Tensor, results: dict[str, str], predicted: bool) -> None:
    subject = Subject.of(model, images)
    pruner = subject.attach(heads=random_heads if predicted else None)
    if predicted:
        results["heads"] = f"{len(pruner.heads)} of {len(pruner.sites)} sites"
    masked, keep = gated(pruner, images)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # that it runs masked is judged here
        fast = pruner.accelerate(images, backend="gated")
    results["execution"] = f"{fast.execution} {fast.reason}".strip()
    differs = "differs" in fast.reason
    if (differs or _flips(fast, images, keep)) and _rounding_decides(model, images, keep):
        raise Skipped("the masked model in float64 decides otherwise too")
    require(not differs, fast.reason)
    _compare(fast, images, masked, keep, results)
    one = {name: kept[:1] for name, kept in keep.items()}
    _compare(fast, images[:1], masked[:1], one, results)
    if fast.execution != "accelerated":
        return
    fast.plans.clear()
    fast.choices = {name: index % 2 == 0 for index, name in enumerate(fast.choices)}
    _compare(fast, images, masked, keep, results)
    apart = distance(output(pruner.accelerate(images, backend="dense"), images), subject.bare)
    require(apart < _TOLERANCE, f"the best dense form differs from the bare model by {apart:.1e}")


@contextmanager
def _untimed() -> Iterator[None]:
    """Run once what would be timed, so that no choice is the clock's, nor that of what is installed."""

    def once(runs: Sequence[Callable[[], object]], *_: object) -> list[list[float]]:
        for run in runs:
            run()
        return [[0.0] * len(runs)]

    def layers(graphs: Sequence[fx.GraphModule], inputs: Sequence[Tensor]) -> list[dict[str, float]]:
        for graph in graphs:
            graph(*inputs)
        return [dict.fromkeys((name for name, _ in graph.named_children()), 0.0) for graph in graphs]

    with (
        patch.object(fit_module, "seconds_in_place", layers),
        patch.object(choose_module, "take_turns", once),
        patch.object(plan_module, "is_installed", lambda: False),
    ):
        yield


@contextmanager
def _traced_once() -> Iterator[None]:
    """Take all graphs of one model from one export, in which nearly all of the time goes."""
    held: list[fx.GraphModule] = []

    def once(*args: Any) -> fx.GraphModule:
        if not held:
            held.append(trace_call(*args))
        return copy.deepcopy(held[0])

    with patch.object(plan_module, "trace_call", once):
        yield


def _compare(
    fast: Accelerated, images: Tensor, masked: Tensor, keep: dict[str, Tensor], results: dict[str, str]
) -> None:
    """Decisions and outputs; notes the largest distance of all."""
    flips = _flips(fast, images, keep)
    require(not flips, f"decisions differ at {flips[:3]} for {len(images)} images")
    apart = distance(output(fast, images), masked)
    results["apart"] = f"{max(apart, float(results.get('apart', 0))):.1e}"
    require(apart < _TOLERANCE, f"differs from masking by {apart:.1e} for {len(images)} images")


def _flips(fast: Accelerated, images: Tensor, keep: dict[str, Tensor]) -> list[str]:
    with fast.recording() as record:
        output(fast, images)
    return [name for name, kept in keep.items() if not torch.equal(record.keep[name], kept)]


def _rounding_decides(model: nn.Module, images: Tensor, keep: dict[str, Tensor]) -> bool:
    """Whether the masked model itself, attached, decides otherwise without the rounding of float32."""
    exact = copy_of(model).double()
    memory = memory_of(exact)
    assert memory is not None
    memory.enabled = True
    output(exact, images.double())
    return any(not torch.equal(memory.keep[name], kept) for name, kept in keep.items())


def exported(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    return torch.export.export(model, (images,)).module()


def compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], object]:
    torch._dynamo.reset()
    run: Callable[[Tensor], object] = torch.compile(model, backend="aot_eager")
    return run


MAKERS: dict[str, Maker] = {"export": exported, "compile": compiled}


def check_graphs(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Export and compile (aot_eager) the gated model; where that does not go well, the bare one for comparison."""
    results = {name: outcome(_check_graph, make, model, images) for name, make in MAKERS.items()}
    torch._dynamo.reset()
    return results


def _check_graph(make: Maker, model: nn.Module, images: Tensor) -> None:
    pruner = Subject.of(model, images).attach()
    masked, _ = gated(pruner, images)
    try:
        with pruner.gating():
            apart = distance(_run(make, model, images), masked)
    except Exception:
        pruner.remove()
        bare = outcome(_run, make, model, images)
        if bare == "ok":
            raise
        raise Skipped(f"nor does the bare model: {bare}") from None
    finally:
        pruner.remove()
    require(apart < _TOLERANCE, f"differs from masking by {apart:.1e}")


def _run(make: Maker, model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return flat(make(model, images)(images), len(images))
