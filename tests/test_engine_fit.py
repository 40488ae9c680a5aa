"""The cost model, with a clock that the tests turn."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Residual, made
from engine_nets import Downsampled, attached, images_for, seeded
from torch import Tensor

from isw_plugin.engine import cpu, fit
from isw_plugin.engine.execution import DenseConv, GatedConv
from isw_plugin.engine.fit import Cost, medians
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
    runs = [clock.run("a", 9.0, 9.0, 1.0, 2.0, 6.0), clock.run("b", 3.0)]
    assert medians(runs, 3, 1e-3) == [2.0, 3.0]
    assert "".join(clock.log) == "ab" + 4 * "ab"  # once to see how long it takes, one round to warm up


def test_short_runs_are_repeated(clock: Clock) -> None:
    assert medians([clock.run("a", 0.25), clock.run("b", 2.0)], 2, 1.0) == [0.25, 2.0]
    assert clock.log.count("a") == 1 + 3 * (1 + 4)  # one before every turn
    assert clock.log.count("b") == 1 + 3 * 1
    clock.log.clear()
    medians([clock.run("c", 0.0)], 1, 1.0)
    assert clock.log.count("c") == 1 + 2 * (1 + 100)


@pytest.mark.parametrize(
    ("gated", "all_kept", "skips"),
    [
        (None, None, False),
        (1.0, 1.0, True),
        (2.0, 2.0, True),
        (2.1, 2.1, False),
        (1.0, 2.2, True),
        (1.0, 2.4, False),  # much slower should every channel be kept
    ],
)
def test_a_layer_skips_where_that_is_no_slower(gated: float | None, all_kept: float | None, skips: bool) -> None:
    assert Cost("a", 0.5, 2.0, all_kept, gated).skips is skips


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
        assert (cost.dense, cost.gated_all, cost.gated, cost.skips) == (5.0, None, None, False)
