"""The cost model, with a clock that the tests turn."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Residual, made
from engine_nets import Downsampled, attached, images_for, seeded
from torch import Tensor

from isw_plugin.engine import cpu, fit
from isw_plugin.engine.execution import DenseConv, GatedConv
from isw_plugin.engine.fit import Cost, Turns, medians, spare
from isw_plugin.engine.simplify import simplify
from isw_plugin.engine.trace import trace


class Clock:
    """A time that only runs move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds in turn, the last one for good."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fit, "time", clock)
    return clock


def test_medians_are_over_rounds_in_which_runs_take_turns(clock: Clock) -> None:
    runs = [clock.run("a", 9.0, 9.0, 9.0, 9.0, 1.0, 9.0, 2.0, 9.0, 6.0), clock.run("b", 3.0)]
    assert medians(runs, 3, 1e-3) == [2.0, 3.0]
    # Once to see how long it takes, one round to warm up; the first call of a turn is not counted.
    assert "".join(clock.log) == "ab" + 4 * "aabb"


def test_a_round_gives_the_seconds_of_each_run(clock: Clock) -> None:
    turns = Turns([clock.run("a", 9.0, 9.0, 1.0, 9.0, 2.0), clock.run("b", 3.0)], 1e-3)
    assert [turns.round(), turns.round()] == [[1.0, 3.0], [2.0, 3.0]]


def test_short_runs_are_repeated(clock: Clock) -> None:
    assert medians([clock.run("a", 0.25), clock.run("b", 2.0)], 2, 1.0) == [0.25, 2.0]
    assert clock.log.count("a") == 1 + 3 * (1 + 4)  # one before every turn
    assert clock.log.count("b") == 1 + 3 * (1 + 1)
    clock.log.clear()
    medians([clock.run("c", 0.0)], 1, 1.0)
    assert clock.log.count("c") == 1 + 2 * (1 + 100)


def test_what_a_layer_gains_and_risks() -> None:
    cost = Cost("a", 0.5, dense=2.0, gated_all=2.5, gated=1.25)
    assert (cost.gain, cost.risk) == (0.75, 0.5)
    without = Cost("a", 1.0, dense=2.0, gated_all=None, gated=None)
    assert (without.gain, without.risk) == (-math.inf, math.inf)


def cost(gain: float, risk: float) -> Cost:
    return Cost("", 0.5, 10.0, 10 + risk, 10 - gain)


COSTS = {"a": cost(4, 2), "b": cost(1, 1), "c": cost(3, 4), "safe": cost(0, -1), "even": cost(1, 0)}


@pytest.mark.parametrize(
    ("excess", "left"),
    [
        (-1, ["a", "b", "c", "safe", "even"]),
        (0, ["a", "b", "c", "safe", "even"]),
        (0.5, ["a", "b", "safe", "even"]),  # c gains least for what it risks
        (4, ["a", "b", "safe", "even"]),
        (4.5, ["a", "safe", "even"]),
        (6, ["safe", "even"]),
        (99, ["safe", "even"]),  # dense ones would take as long, or longer
    ],
)
def test_layers_that_gain_least_for_their_risk_go_dense_first(excess: float, left: list[str]) -> None:
    assert spare(COSTS, list(COSTS), excess) == left


def test_layers_that_are_dense_already_save_nothing_more() -> None:
    assert spare(COSTS, ["b", "a"], 1.5) == []
    assert spare(COSTS, ["b", "a"], 1.0) == ["a"]


def seconds(*given: float) -> Any:
    def medians(runs: Sequence[Callable[[], object]], rounds: int, least: float) -> list[float]:
        for run in runs:
            run()
        return list(given[: len(runs)])

    return medians


def simplified(kind: Any, **options: Any) -> tuple[torch.fx.GraphModule, Tensor]:
    net = seeded(kind)
    images = images_for(net)
    pruner = attached(net, images, **options)
    return simplify(trace(net, pruner.sites, images)), images


def test_the_time_of_a_layer_is_a_line_in_its_kept_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "medians", seconds(5.0, 4.0, 1.0))  # dense, all kept, a quarter kept
    graph, images = simplified(Downsampled)
    costs = {cost.layer: cost for cost, _ in fit.fit(graph, [images]).values()}
    assert list(costs) == ["stem", "a1", "a2", "b1", "short", "b2"]
    first = costs["stem"]
    assert (first.keep_ratio, first.dense, first.gated_all, first.gated) == (1.0, 5.0, 4.0, 4.0)
    for name in ("a1", "a2", "b1", "short", "b2"):
        cost = costs[name]
        assert 0 < cost.keep_ratio < 1
        assert cost.gated == pytest.approx(4 * cost.keep_ratio)
    assert costs["b1"].keep_ratio == costs["short"].keep_ratio


def test_the_kept_share_is_that_of_the_given_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "medians", seconds(5.0, 4.0, 1.0))
    net = made(Residual)
    pruner = attached(net, net.images())
    graph = simplify(trace(net, pruner.sites, net.images()))
    for seed in (0, 1):
        images = net.images(9, seed=seed)
        costs = {cost.layer: cost for cost, _ in fit.fit(graph, [images]).values()}
        with torch.no_grad():
            net(images)
        assert costs["block.c1"].keep_ratio == pytest.approx(pruner.keep["stem"].float().mean().item())
        assert costs["block.c2"].keep_ratio == pytest.approx(pruner.keep["block.c1"].float().mean().item())
    empty = fit.fit(graph, [net.images(0)])
    assert {cost.keep_ratio for cost, _ in empty.values()} == {1.0}


def test_every_layer_gets_the_modules_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "medians", seconds(5.0, 4.0, 1.0))
    graph, images = simplified(Downsampled)
    for _, modules in fit.fit(graph, [images]).values():
        assert isinstance(modules["dense"], DenseConv)
        assert isinstance(modules["gated"], GatedConv)
    monkeypatch.setattr(cpu, "load", lambda: False)
    for cost, modules in fit.fit(graph, [images]).values():
        assert list(modules) == ["dense"]
        assert (cost.dense, cost.gated_all, cost.gated) == (5.0, None, None)
