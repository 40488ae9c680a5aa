"""Which layers skip, and whether the gated graph runs at all: whatever was seen to be the fastest."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from isw_plugin.accelerate.calls import instances_of
from isw_plugin.accelerate.execution import GatedConv
from isw_plugin.accelerate.fit import Cost, fit, spare, take_turns
from isw_plugin.accelerate.plan import Plan, Traced

__all__ = ["Chosen", "Fitted", "choose"]

_LEAST, _CONFIRMED, _MOST = 7, 14, 41  # rounds: at least, before gates are said to lose, at most
_LIMIT = 20.0  # seconds, after which no more than the least are timed
_TURN = 25e-3  # seconds of one form, at least
_REST = 0.05  # seconds before each turn: idle threads of the one before look for work, onnxruntime's for 40 ms
_CHANCE = 0.02  # of such a split of rounds where neither form is the faster
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
        rounds: In which the whole model was timed.
        runtime: What runs the best dense form, "PyTorch" or "onnxruntime".
        gains: Whether gates gain, and lose little should every channel be kept; None: not measured, or rounds
            contradict each other.
    """

    instances: int
    threads: int
    costs: list[Cost] = field(default_factory=list)
    dense: float | None = None
    gated: float | None = None
    all_kept: float | None = None
    rounds: int = 0
    gains: bool | None = None
    runtime: str = "PyTorch"

    @property
    def wins(self) -> bool:
        """Whether "auto" takes the gated form: only where it is sure to gain."""
        return self.gains is True


@dataclass(frozen=True)
class Chosen:
    """What is to run ("accelerated" or "dense"), why, and by layer whether it skips."""

    plan: Plan
    execution: str
    fitted: Fitted
    choices: dict[str, bool] = field(default_factory=dict)


def choose(traced: Traced, inputs: Sequence[Any], backend: str, tell: Callable[[str], None]) -> Chosen:
    """Time the layers and the whole graph on these flat inputs.

    Args:
        backend: One of ``accelerate``'s.
        tell: Hears what is timed next.
    """
    instances = instances_of(inputs)
    all_dense = traced.executions(instances, lambda name: False)
    dense = [traced.dense(all_dense, channels_last) for channels_last in (False, True)]
    if (other := traced.by_runtime(dense[0])) is not None:
        dense.append(other)
    if backend == "dense":
        tell("timing the model")
        return _best_dense(dense, inputs)
    able = {
        node: module
        for node, module in traced.executions(instances, lambda name: True).items()
        if isinstance(module, GatedConv)
    }
    tell("timing its layers")
    skips = all_dense | able
    forms = traced.gated(all_dense), traced.gated(skips, fused=False), traced.all_kept(skips, fused=False)
    costs = fit(traced.graph, forms[0].graph, forms[1].graph, forms[2].graph, inputs)
    skipping = [node for node, cost in costs.items() if cost.gain >= 0]
    tell("timing the model")
    limit = time.monotonic() + _LIMIT
    while True:
        executions = all_dense | {node: able[node] for node in skipping}
        gated = traced.gated(executions)
        plans = [gated, traced.all_kept(executions), *dense]
        rounds = _timed(plans, inputs, limit, _is_settled if backend == "auto" else _at_once)
        seconds = _medians(rounds)
        best, best_dense = _fastest(seconds[2:], dense)
        fewer = spare(costs, skipping, seconds[1] - _WORST * best)
        if fewer == skipping:
            break
        skipping, dense = fewer, [best_dense]
    choices = {cost.layer: node in skipping for node, cost in costs.items()}
    taken = (best, seconds[0], seconds[1], len(rounds), _gains(rounds), _runtime_of(best_dense))
    fitted = Fitted(instances, torch.get_num_threads(), list(costs.values()), *taken)
    if backend == "gated" or fitted.wins:
        return Chosen(gated, "accelerated", fitted, choices)
    return Chosen(best_dense, "dense", fitted, choices)


def _best_dense(plans: Sequence[Plan], inputs: Sequence[Any]) -> Chosen:
    rounds = _timed(plans, inputs, time.monotonic() + _LIMIT, _at_once)
    best, plan = _fastest(_medians(rounds), plans)
    threads, runtime = torch.get_num_threads(), _runtime_of(plan)
    fitted = Fitted(instances_of(inputs), threads, dense=best, rounds=len(rounds), runtime=runtime)
    return Chosen(plan, "dense", fitted)


def _fastest(seconds: Sequence[float], plans: Sequence[Plan]) -> tuple[float, Plan]:
    """What a runtime does faster has PyTorch's fastest graph, too, for torch.compile."""
    timed = sorted(zip(seconds, plans, strict=True), key=lambda timed: timed[0])
    graph = next((plan.graph for _, plan in timed if plan.runtime is None), timed[0][1].graph)
    return timed[0][0], dataclasses.replace(timed[0][1], graph=graph)


def _runtime_of(plan: Plan) -> str:
    return "PyTorch" if plan.runtime is None else "onnxruntime"


# -- rounds ----------------------------------------------------------------------------------------

_Rounds = list[list[float]]  # seconds by form: gated, with everything kept, dense ones


def _timed(plans: Sequence[Plan], inputs: Sequence[Any], limit: float, settled: Callable[[_Rounds], bool]) -> _Rounds:
    """Rounds in which the plans take turns, until they settle what is asked, or ``limit`` is near."""

    def enough(rounds: _Rounds) -> bool:
        late = len(rounds) == _MOST or time.monotonic() > limit
        return len(rounds) >= _LEAST and (late or settled(rounds))

    rest = _REST if torch.get_num_threads() > 1 else 0.0
    return take_turns([partial(plan.run, *inputs) for plan in plans], _TURN, enough, rest)


def _medians(rounds: _Rounds) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def _at_once(rounds: _Rounds) -> bool:
    return True


def _is_settled(rounds: _Rounds) -> bool:
    """Other programs slow kernels down for a second or longer, the engine's by more than oneDNN's."""
    gains = _gains(rounds)
    return gains is not None and (gains or len(rounds) >= _CONFIRMED)


def _gains(rounds: _Rounds) -> bool | None:
    """Whether the gated form is the faster and bearable with everything kept; None: rounds contradict each other."""
    medians = _medians(rounds)
    best = 2 + medians[2:].index(min(medians[2:]))
    faster = _agreed([taken[0] < taken[best] for taken in rounds])
    bearable = _agreed([taken[1] <= _WORST * taken[best] for taken in rounds])
    if faster is False or bearable is False:
        return False
    return True if faster and bearable else None


def _agreed(votes: Sequence[bool]) -> bool | None:
    """What rounds say by a sign test; None: what a fair coin might have said, too."""
    ayes = sum(votes)
    fewer = min(ayes, len(votes) - ayes)
    chance = 2 * sum(math.comb(len(votes), k) for k in range(fewer + 1)) / 2 ** len(votes)
    return ayes > fewer if chance < _CHANCE else None
