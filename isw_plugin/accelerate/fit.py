"""The cost model: what every convolution takes where it stands in the network, dense and in the engine's kernel."""

import math
import operator
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from isw_plugin.accelerate.execution import GatedConv
from isw_plugin.accelerate.layers import conv

__all__ = ["Cost", "Turns", "fit", "seconds_in_place", "spare", "take_turns"]

_ROUNDS = (3, 25)  # at least, at most
_SECONDS = 2.5  # that the rounds take, within these limits
_BEHIND = {operator.getitem, torch.ops.isw.sum_squares.default, torch.ops.isw.max_pool2d.default}


@dataclass(frozen=True)
class Cost:
    """What a layer was seen to cost in the whole network, in seconds a batch.

    Attributes:
        layer: Its name in the model.
        keep_ratio: Share of its MACs that are left: by inputs that were kept, and by outputs where it knew which.
        dense: All channels; dropped ones are set to zero first.
        gated, gated_all: The engine's kernel as its gate decides, and with every channel kept; None: it has none.
    """

    layer: str
    keep_ratio: float
    dense: float
    gated: float | None
    gated_all: float | None

    @property
    def gain(self) -> float:
        """Seconds that the engine's kernel saves; below 0 where the dense layer is the faster."""
        return self.dense - self.gated if self.gated is not None else -math.inf

    @property
    def risk(self) -> float:
        """Seconds that it loses should every channel be kept; below 0 where it is the faster even then."""
        return self.gated_all - self.dense if self.gated_all is not None else math.inf


def fit(
    graph_module: fx.GraphModule,
    dense: fx.GraphModule,
    gated: fx.GraphModule,
    all_kept: fx.GraphModule,
    inputs: Sequence[Tensor],
) -> dict[str, Cost]:
    """Time every convolution inside the running network: alone, its weights would wait in the cache.

    Args:
        graph_module: Simplified.
        dense: Lowered, no layer skips.
        gated: Lowered, those skip that can.
        all_kept: The same, with gates that drop nothing.
        inputs: Flat, at the size that will run.

    Returns:
        Costs by node, in the order of execution.
    """
    ratios = _KeepRatios(graph_module)
    ratios.run(*inputs)
    seconds, *skipping = seconds_in_place([dense, gated, all_kept], inputs)
    costs = {}
    for node in (node for node in ratios.layers if node in seconds):
        skips = isinstance(getattr(gated, node), GatedConv)
        others = [form[node] if skips else None for form in skipping]
        costs[node] = Cost(ratios.layers[node], ratios.kept[node], seconds[node], *others)
    return costs


class _KeepRatios(fx.Interpreter):
    """Names of layers and the kept shares of their inputs, by node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.layers: dict[str, str] = {}
        self.kept: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is conv:
            args = self.fetch_args_kwargs_from_env(n)[0]
            self.layers[n.name] = n.meta["layer"]
            self.kept[n.name] = _share_left(args[1], args[4], *args[11:])
        return super().run_node(n)


def _share_left(weight: Tensor, keep: Tensor | None, out_keep: Tensor | None = None) -> float:
    masks = [each for each in (keep, out_keep) if each is not None and each.numel()]
    if len(masks) == 2 and weight.shape[1] == 1 < masks[0].shape[1] == masks[1].shape[1]:  # depthwise
        masks = [masks[0] & masks[1]]
    return torch.stack([each.float().mean(1) for each in masks]).prod(0).mean().item() if masks else 1.0


def seconds_in_place(graphs: Sequence[fx.GraphModule], inputs: Sequence[Tensor]) -> list[dict[str, float]]:
    """Seconds of the layers of each lowered graph, by node: medians over rounds in which the graphs take turns.

    The first run of a turn is not counted, as in ``Turns``, nor is the first round.
    """
    clocks = [_Clock(graph) for graph in graphs]
    start = time.perf_counter()
    for clock in clocks:
        clock.turn(inputs)
    rounds = min(max(int(_SECONDS / max(time.perf_counter() - start, 1e-7)), _ROUNDS[0]), _ROUNDS[1])
    taken = [[clock.turn(inputs) for clock in clocks] for _ in range(rounds)]
    return [
        {name: statistics.median(seconds[name] for seconds in column) for name in column[0]}
        for column in zip(*taken, strict=True)
    ]


class _Clock(fx.Interpreter):
    """Times the layers of a lowered graph, each with the sums of squares and the pool that follow it."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.layer_of: dict[fx.Node, str] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                self.layer_of[node] = str(node.target)
            elif node.target in _BEHIND and node.args[0] in self.layer_of:
                self.layer_of[node] = self.layer_of[node.args[0]]
        self.current: fx.Node | None = None
        self.taken: dict[str, float] = defaultdict(float)

    def turn(self, inputs: Sequence[Tensor]) -> dict[str, float]:
        """Seconds by layer, of the second of two runs."""
        self.run(*inputs)
        self.taken.clear()
        self.run(*inputs)
        return dict(self.taken)

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._timed(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._timed(super().call_function, target, args, kwargs)

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        layer = self.layer_of.get(self.current)  # type: ignore[arg-type]  # None has none
        if layer is not None:
            self.taken[layer] += time.perf_counter() - start
        return result


def spare(costs: Mapping[str, Cost], skipping: Collection[str], excess: float) -> list[str]:
    """Which layers go on skipping, so that the model takes ``excess`` seconds less with every channel kept.

    Those go back to their dense form first that gain least for what they risk.
    """
    risky = sorted((name for name in skipping if costs[name].risk > 0), key=lambda n: costs[n].gain / costs[n].risk)
    dense = set()
    for name in risky:
        if excess <= 0:
            break
        dense.add(name)
        excess -= costs[name].risk
    return [name for name in skipping if name not in dense]


def take_turns(
    runs: Sequence[Callable[[], object]],
    least: float,
    enough: Callable[[list[list[float]]], bool],
    rest: float = 0.0,
) -> list[list[float]]:
    """Seconds of each run in every round in which they took turns, after one that warms up.

    Args:
        least: Seconds of a turn, at least.
        enough: Whether these rounds are.
        rest: Seconds of sleep before each turn.
    """
    turns = Turns(runs, least, rest)
    turns.round()
    taken: list[list[float]] = []
    while not enough(taken):
        taken.append(turns.round())
    return taken


class Turns:
    """Times runs one after another; those that take less than ``least`` seconds are repeated.

    The first call of a turn is not counted: it finds caches, and memory that malloc gave back, as another left them.
    """

    def __init__(self, runs: Sequence[Callable[[], object]], least: float, rest: float = 0.0) -> None:
        self.runs = runs
        self.rest = rest
        self.repeats = [max(1, min(100, int(least / max(_seconds(run, 1), 1e-7)))) for run in runs]

    def round(self) -> list[float]:
        """Seconds of each run."""
        return [self.turn(run, count) for run, count in zip(self.runs, self.repeats, strict=True)]

    def turn(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of one call of so many."""
        if self.rest:
            time.sleep(self.rest)
        run()
        return _seconds(run, repeats)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats
