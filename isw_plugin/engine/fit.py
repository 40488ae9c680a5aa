"""The cost model: for every convolution, the time of the dense layer and of the gated one as a + b * kept channels."""

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from isw_plugin.engine.execution import DenseConv, GatedConv, can_skip
from isw_plugin.engine.layers import Layer, conv
from isw_plugin.engine.simplify import constants_of

__all__ = ["Cost", "Turns", "fit", "medians", "spare"]

_ROUNDS = 5
_SECONDS = 1e-3  # a timing repeats a layer for about this long
_FEW = 0.25  # the second share of kept channels that the line is fitted through


@dataclass(frozen=True)
class Cost:
    """What a layer was seen to cost, in seconds a batch.

    Attributes:
        layer: Its name in the model.
        keep_ratio: Share of its input's channels that were kept; 1 where nothing gates it.
        dense: All channels; dropped ones are set to zero first.
        gated_all, gated: The engine's kernel with every channel kept, and at ``keep_ratio``; None: it has none.
    """

    layer: str
    keep_ratio: float
    dense: float
    gated_all: float | None
    gated: float | None

    @property
    def gain(self) -> float:
        """Seconds that the engine's kernel saves at the keep ratio; below 0 where the dense layer is the faster."""
        return self.dense - self.gated if self.gated is not None else -math.inf

    @property
    def risk(self) -> float:
        """Seconds that it loses should every channel be kept; below 0 where it is the faster even then."""
        return self.gated_all - self.dense if self.gated_all is not None else math.inf


def fit(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, tuple[Cost, dict[str, nn.Module]]]:
    """Run the graph once and time every convolution on what it reads there.

    Args:
        graph_module: Simplified.
        inputs: Flat, at the size that will run.

    Returns:
        By node: its cost, and its modules: "dense" and, where there is one, "gated".
    """
    fitter = _Fitter(graph_module)
    fitter.run(*inputs)
    return fitter.costs


class _Fitter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.constants = constants_of(graph_module)
        self.costs: dict[str, tuple[Cost, dict[str, nn.Module]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = Layer.of(n, self.constants) if n.target is conv else None
        if layer is not None:
            x, _, _, residual, keep, residual_keep = self.fetch_args_kwargs_from_env(n)[0][:6]
            decided = any(user.target is torch.ops.isw.decide.default for user in n.users)
            read = _Read(x, residual, keep, residual_keep)
            self.costs[n.name] = _fit_layer(n.meta["layer"], layer, read, decided)
        return result


@dataclass(frozen=True)
class _Read:
    """What a convolution reads."""

    x: Tensor
    residual: Tensor | None
    keep: Tensor | None
    residual_keep: Tensor | None

    @property
    def keep_ratio(self) -> float:
        return self.keep.float().mean().item() if self.keep is not None and self.keep.numel() else 1.0


def _fit_layer(name: str, layer: Layer, read: _Read, decided: bool) -> tuple[Cost, dict[str, nn.Module]]:
    dense = DenseConv(layer, read.x)
    runs = [_dense(dense, read, decided)]
    modules: dict[str, nn.Module] = {"dense": dense}
    if can_skip(layer):
        gated = modules["gated"] = GatedConv(layer)
        runs += [_gated(gated, read, share) for share in ((1.0, _FEW) if read.keep is not None else (1.0,))]
    seconds = medians(runs, _ROUNDS, _SECONDS)
    if len(seconds) == 1:
        return Cost(name, read.keep_ratio, seconds[0], None, None), modules
    slope = (seconds[1] - seconds[-1]) / (1 - _FEW)
    expected = seconds[1] - slope * (1 - read.keep_ratio)
    return Cost(name, read.keep_ratio, seconds[0], seconds[1], expected), modules


def _dense(module: nn.Module, read: _Read, decided: bool) -> Callable[[], object]:
    def run() -> None:
        y = module(read.x, read.keep, read.residual, read.residual_keep)
        if decided:  # the engine's kernel gives the sums with its output
            torch.ops.isw.sum_squares(y)

    return run


def _gated(module: nn.Module, read: _Read, share: float) -> Callable[[], object]:
    """The kernel at a forced share of kept channels, as many in every instance but others."""
    forced = None
    if read.keep is not None:
        draw = torch.rand(read.keep.shape, generator=torch.Generator().manual_seed(0))
        forced = draw.argsort(1) < share * read.keep.shape[1]
    return lambda: module(read.x, forced, 0.0, 0.0, read.residual, read.residual_keep, 0.0, 0.0)


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


def medians(runs: Sequence[Callable[[], object]], rounds: int, least: float) -> list[float]:
    """Seconds of each run, median over rounds in which they take turns, after one that warms up."""
    turns = Turns(runs, least)
    taken = [turns.round() for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


class Turns:
    """Times runs one after another; those that take less than ``least`` seconds are repeated.

    The first call of a turn is not counted: it finds caches, and memory that malloc gave back, as another left them.
    """

    def __init__(self, runs: Sequence[Callable[[], object]], least: float) -> None:
        self.runs = runs
        self.repeats = [max(1, min(100, int(least / max(_seconds(run, 1), 1e-7)))) for run in runs]

    def round(self) -> list[float]:
        """Seconds of each run."""
        return [_turn(run, count) for run, count in zip(self.runs, self.repeats, strict=True)]


def _turn(run: Callable[[], object], repeats: int) -> float:
    run()
    return _seconds(run, repeats)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats
