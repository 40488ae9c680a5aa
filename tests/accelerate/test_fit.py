"""The cost model, with a clock that the tests turn."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate import fit
from isw_plugin.accelerate.execution import DenseConv, GatedConv
from isw_plugin.accelerate.fit import Cost, Turns, spare, take_turns
from isw_plugin.accelerate.layers import Layer, conv
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace
from tests.accelerate.nets import Downsampled, attached, images_for, seeded
from tests.conftest import Residual, made


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


def rounds(count: int) -> Callable[[list[list[float]]], bool]:
    return lambda taken: len(taken) == count


def test_runs_take_turns_until_the_rounds_are_enough(clock: Clock) -> None:
    runs = [clock.run("a", 9.0, 9.0, 9.0, 9.0, 1.0, 9.0, 2.0, 9.0, 6.0), clock.run("b", 3.0)]
    assert take_turns(runs, 1e-3, rounds(3)) == [[1.0, 3.0], [2.0, 3.0], [6.0, 3.0]]
    # Once to see how long it takes, one round to warm up; the first call of a turn is not counted.
    assert "".join(clock.log) == "ab" + 4 * "aabb"


def test_a_round_gives_the_seconds_of_each_run(clock: Clock) -> None:
    turns = Turns([clock.run("a", 9.0, 9.0, 1.0, 9.0, 2.0), clock.run("b", 3.0)], 1e-3)
    assert [turns.round(), turns.round()] == [[1.0, 3.0], [2.0, 3.0]]


def test_short_runs_are_repeated(clock: Clock) -> None:
    assert take_turns([clock.run("a", 0.25), clock.run("b", 2.0)], 1.0, rounds(2)) == 2 * [[0.25, 2.0]]
    assert clock.log.count("a") == 1 + 3 * (1 + 4)  # one before every turn
    assert clock.log.count("b") == 1 + 3 * (1 + 1)
    clock.log.clear()
    take_turns([clock.run("c", 0.0)], 1.0, rounds(1))
    assert clock.log.count("c") == 1 + 2 * (1 + 100)


def test_what_a_layer_gains_and_risks() -> None:
    cost = Cost("a", 0.5, dense=2.0, gated=1.25, gated_all=2.5)
    assert (cost.gain, cost.risk) == (0.75, 0.5)
    without = Cost("a", 1.0, dense=2.0, gated=None, gated_all=None)
    assert (without.gain, without.risk) == (-math.inf, math.inf)


def cost(gain: float, risk: float) -> Cost:
    return Cost("", 0.5, 10.0, gated=10 - gain, gated_all=10 + risk)


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


class Taking(nn.Module):
    """A layer that takes these seconds in turn, the last ones for good, and gives its input."""

    def __init__(self, clock: Clock, *seconds: float) -> None:
        super().__init__()
        self.run = clock.run("", *seconds)

    def forward(self, x: Tensor) -> Tensor:
        self.run()
        return x


def graph_of(**layers: nn.Module) -> fx.GraphModule:
    """Layers in a row."""
    root = nn.Module()
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name, layer in layers.items():
        root.add_module(name, layer)
        x = graph.call_module(name, (x,))
    graph.output(x)
    return fx.GraphModule(root, graph)


def test_layers_are_timed_within_their_graphs_in_turns(clock: Clock) -> None:
    one = graph_of(a=Taking(clock, 9.0, 9.0, 9.0, 1.0, 9.0, 2.0, 9.0, 6.0), b=Taking(clock, 3.0))
    two = graph_of(a=Taking(clock, 5.0))
    found = fit.seconds_in_place([one, two], [torch.zeros(1)])
    # a's counted times are 1, 2 and 6: one round warms up, and the first run of every turn is not counted.
    assert found == [{"a": 2.0, "b": 3.0}, {"a": 5.0}]


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 3), (0.125, 10), (1e-6, 25)])
def test_short_networks_get_more_rounds(seconds: float, rounds: int, clock: Clock) -> None:
    fit.seconds_in_place([graph_of(a=Taking(clock, seconds))], [torch.zeros(1)])
    assert len(clock.log) == 2 * (1 + rounds)


def test_a_layer_has_the_sums_and_the_pool_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(fit, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    graph, root = fx.Graph(), nn.Module()
    for name in ("a", "b"):
        root.add_module(name, nn.ReLU())
    isw = torch.ops.isw
    a = graph.call_module("a", (graph.placeholder("x"),))
    squares = graph.call_function(isw.sum_squares.default, (a,))
    pooled = graph.call_function(isw.max_pool2d.default, (a, [2, 2], [2, 2], [0, 0]))
    elsewhere = graph.call_function(isw.sum_squares.default, (pooled,))  # what is behind the pool is the layer's too
    doubled = graph.call_function(torch.add, (pooled, pooled))
    b = graph.call_module("b", (doubled,))
    graph.output((squares, elsewhere, b, graph.call_function(isw.sum_squares.default, (doubled,))))
    (seconds,) = fit.seconds_in_place([fx.GraphModule(root, graph)], [torch.ones(1, 2, 4, 4)])
    assert seconds == {"a": 4.0, "b": 1.0}


def graph_for(net: nn.Module, images: Tensor) -> tuple[fx.GraphModule, InstanceWisePruner, list[str]]:
    """Simplified, and the names of its layers' nodes."""
    pruner = attached(net, images)
    graph = simplify(trace(net, pruner.sites, images))
    return graph, pruner, [node.name for node in graph.graph.nodes if node.target is conv]


def forms_of(graph: fx.GraphModule, nodes: list[str]) -> tuple[fx.GraphModule, fx.GraphModule, fx.GraphModule]:
    """Dense, gated and all kept, never run; the first layer cannot skip."""
    layers = [Layer.of(node, constants_of(graph)) for node in graph.graph.nodes if node.target is conv]
    dense: dict[str, nn.Module] = {
        name: DenseConv(layer, (0,)) for name, layer in zip(nodes, layers, strict=True) if layer
    }
    gated = {name: dense[name] if name == nodes[0] else GatedConv(dense[name].layer) for name in nodes}
    return graph_of(**dense), graph_of(**gated), graph_of(**gated)


def test_costs_are_those_of_the_three_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    graph, _, nodes = graph_for(net, images)
    forms = forms_of(graph, nodes)
    given: list[Any] = []

    def in_place(graphs: Any, inputs: Any) -> list[dict[str, float]]:
        given[:] = [graphs, inputs]
        return [dict.fromkeys(nodes, seconds) for seconds in (5.0, 1.0, 4.0)]

    monkeypatch.setattr(fit, "seconds_in_place", in_place)
    costs = fit.fit(graph, *forms, [images])
    assert given == [list(forms), [images]]
    assert list(costs) == nodes
    assert [cost.layer for cost in costs.values()] == ["stem", "a1", "a2", "b1", "short", "b2"]
    stem, *others = costs.values()
    assert stem == Cost("stem", 1.0, 5.0, None, None)
    for cost in others:
        assert 0 < cost.keep_ratio < 1
        assert (cost.dense, cost.gated, cost.gated_all) == (5.0, 1.0, 4.0)
    assert costs[nodes[3]].keep_ratio == costs[nodes[4]].keep_ratio  # two readers of one map


def test_the_kept_share_is_that_of_the_given_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(Residual)
    graph, pruner, nodes = graph_for(net, net.images())
    monkeypatch.setattr(fit, "seconds_in_place", lambda *_: [dict.fromkeys(nodes, 1.0)] * 3)
    forms = forms_of(graph, nodes)
    for seed in (0, 1):
        images = net.images(9, seed=seed)
        costs = {cost.layer: cost for cost in fit.fit(graph, *forms, [images]).values()}
        with torch.no_grad():
            net(images)
        assert costs["block.c1"].keep_ratio == pytest.approx(pruner.keep["stem"].float().mean().item())
        assert costs["block.c2"].keep_ratio == pytest.approx(pruner.keep["block.c1"].float().mean().item())
    empty = fit.fit(graph, *forms, [net.images(0)])
    assert {cost.keep_ratio for cost in empty.values()} == {1.0}
