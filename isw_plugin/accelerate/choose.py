"""Which layers skip, and whether the gated graph runs at all: whatever was seen to be the fastest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from isw_plugin.accelerate.execution import GatedConv
from isw_plugin.accelerate.fit import Cost, fit, medians, spare
from isw_plugin.accelerate.plan import Plan, Traced, instances_of

__all__ = ["Chosen", "Fitted", "choose"]

_ROUNDS = 5
_SECONDS = 25e-3
_WORST = 1.15  # times the best dense form, with every channel kept


@dataclass(frozen=True)
class Fitted:
    """What was measured when the model was accelerated, in seconds a batch.

    Attributes:
        instances: In the batch.
        threads: CPU threads of torch.
        costs: Of every convolution, in the order of execution.
        dense, gated, all_kept: Of the whole model in its best dense form, with its gates, and with gates that drop
            nothing; None: not measured.
    """

    instances: int
    threads: int
    costs: list[Cost] = field(default_factory=list)
    dense: float | None = None
    gated: float | None = None
    all_kept: float | None = None

    @property
    def wins(self) -> bool:
        """Whether gates gain, and lose little should every channel be kept."""
        if self.dense is None or self.gated is None or self.all_kept is None:
            return False
        return _gains(self.gated, self.all_kept, self.dense)


@dataclass(frozen=True)
class Chosen:
    """What is to run ("accelerated" or "dense"), why, and by layer whether it skips."""

    plan: Plan
    execution: str
    fitted: Fitted
    choices: dict[str, bool] = field(default_factory=dict)


def choose(traced: Traced, inputs: Sequence[Any], backend: str) -> Chosen:
    """Time the layers and the whole graph on these flat inputs; ``backend`` is one of ``accelerate``'s."""
    instances = instances_of(inputs)
    all_dense = traced.executions(instances, lambda name: False)
    dense = [traced.dense(all_dense, channels_last) for channels_last in (False, True)]
    if backend == "dense":
        return _best_dense(dense, inputs)
    able = {
        node: module
        for node, module in traced.executions(instances, lambda name: True).items()
        if isinstance(module, GatedConv)
    }
    forms = traced.gated(all_dense), traced.gated(all_dense | able), traced.all_kept(all_dense | able)
    costs = fit(traced.graph, forms[0].graph, forms[1].graph, forms[2].graph, inputs)
    skipping = [node for node, cost in costs.items() if cost.gain >= 0]
    while True:
        executions = all_dense | {node: able[node] for node in skipping}
        gated = traced.gated(executions)
        plans = [gated, traced.all_kept(executions), *dense]
        seconds = _seconds([partial(plan.run, *inputs) for plan in plans])
        best, best_dense = min(zip(seconds[2:], dense, strict=True), key=lambda timed: timed[0])
        fewer = spare(costs, skipping, seconds[1] - _WORST * best)
        if fewer == skipping:
            break
        skipping, dense = fewer, [best_dense]
    choices = {cost.layer: node in skipping for node, cost in costs.items()}
    fitted = Fitted(instances, torch.get_num_threads(), list(costs.values()), best, *seconds[:2])
    if backend == "gated" or fitted.wins:
        return Chosen(gated, "accelerated", fitted, choices)
    return Chosen(best_dense, "dense", fitted, choices)


def _best_dense(plans: Sequence[Plan], inputs: Sequence[Any]) -> Chosen:
    seconds = medians([partial(plan.run, *inputs) for plan in plans], _ROUNDS, _SECONDS)
    best, plan = min(zip(seconds, plans, strict=True), key=lambda timed: timed[0])
    return Chosen(plan, "dense", Fitted(instances_of(inputs), torch.get_num_threads(), dense=best))


def _seconds(runs: list[Callable[[], object]]) -> list[float]:
    """Of the gated model, the same with everything kept, and dense forms; the better of two times where gates lose.

    Other programs slow kernels down for a second or longer, the engine's by more than oneDNN's.
    """
    seconds = medians(runs, _ROUNDS, _SECONDS)
    gated, all_kept, *dense = seconds
    if _gains(gated, all_kept, min(dense)):
        return seconds
    return [min(pair) for pair in zip(seconds, medians(runs, _ROUNDS, _SECONDS), strict=True)]


def _gains(gated: float, all_kept: float, dense: float) -> bool:
    return gated < dense and all_kept <= _WORST * dense
