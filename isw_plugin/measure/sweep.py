"""Time against the share of channels kept, by gate parameters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import SettingError
from isw_plugin.gates import LearnedGate
from isw_plugin.measure.latency import Latency, compare
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["LatencyPoint", "at_reference", "latency_by_keep"]


@dataclass(frozen=True)
class LatencyPoint:
    """The time of a model at one share of channels kept (all sites and images together).

    Attributes:
        execution: "accelerated": dropped channels were skipped; "dense": the best dense form; "masked".
    """

    keep_ratio: float
    execution: str
    latency: Latency


def latency_by_keep(
    pruner: InstanceWisePruner, images: Tensor, settings: Sequence[Mapping[str, Any]], *, rounds: int = 9
) -> list[LatencyPoint]:
    """Accelerate a model at several gate parameters and time all in turn, beside its best dense form.

    Args:
        pruner: Its parameters are as before afterwards.
        images: A batch of real images: what the gates keep of them is the keep ratio.
        settings: Gate parameters of each point, as ``pruner.gating`` takes them; a gated model is timed at each
            whether it gains or not.
        rounds: Timed batches of each.

    Returns:
        The best dense form first (keep ratio 1), or a gate with parameters at its reference; then a point for each of
        ``settings``.

    Raises:
        SettingError: ``settings`` is empty, or ``rounds`` under 1.
    """
    if not settings or rounds < 1:
        raise SettingError(f"{len(settings)} settings, rounds={rounds}: at least one of each is needed")
    models = [_at_most(pruner, images)]
    for parameters in settings:
        with pruner.gating(**parameters):
            models.append(pruner.accelerate(images, backend="gated"))
    with torch.inference_mode():
        ratios = [_kept(model, images) for model in models]
        runs = {str(index): partial(model, images) for index, model in enumerate(models)}
        times = compare(runs, len(images), rounds, images.device)
    return [
        LatencyPoint(ratio, model.execution, latency)
        for ratio, model, latency in zip(ratios, models, times.values(), strict=True)
    ]


def _at_most(pruner: InstanceWisePruner, images: Tensor) -> Accelerated:
    gate = pruner.gate
    if not isinstance(gate, LearnedGate):
        return pruner.accelerate(images, backend="dense")
    with at_reference(pruner, gate):
        return pruner.accelerate(images, backend="gated")


@contextmanager
def at_reference(pruner: InstanceWisePruner, gate: LearnedGate) -> Iterator[None]:
    """Gates on at the reference inside, at all sites; what else differs at single sites goes on differing."""
    others = {
        site: {name: value for name, value in differs.items() if name not in gate.reference}
        for site, differs in pruner.per_site.items()
    }
    with pruner.gating(per_site=others, **gate.reference):
        yield


def _kept(model: Accelerated, images: Tensor) -> float:
    with model.recording() as record:
        model(images)
    return record.keep_ratio
