"""The graph that runs: modules for layers, statistics for decisions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate.execution import DenseConv, DenseLinear, GatedConv
from isw_plugin.accelerate.layers import Layer, Linear, conv, linear, mask
from isw_plugin.accelerate.lower import Decision, lower, lower_all_kept, lower_dense
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace
from tests.accelerate.nets import Downsampled, above, assert_close, attached, images_for, seeded

isw, aten = torch.ops.isw, torch.ops.aten


def simplified(net: nn.Module, images: Tensor, **options: Any) -> tuple[fx.GraphModule, InstanceWisePruner]:
    pruner = attached(net, images, **options)
    return simplify(trace(net, pruner.sites, images)), pruner


def executions(graph: fx.GraphModule, images: Tensor, dense: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    constants = constants_of(graph)
    found: dict[str, nn.Module] = {}
    for node in graph.graph.nodes:
        layer = Layer.of(node, constants) if node.target is conv else None
        if layer is not None:
            shape = (len(images), *node.args[0].meta["val"].shape[1:])
            found[node.name] = DenseConv(layer, shape) if node.meta["layer"] in dense else GatedConv(layer)
        flat = Linear.of(node, constants) if node.target is linear else None
        if flat is not None:
            found[node.name] = DenseLinear(flat, len(images))
    return found


def targets(graph: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def sites_of(pruner: InstanceWisePruner) -> list[str]:
    return [site.name for site in pruner.sites]


SITES = ["stem", "a1", "a2", "b1", "b2"]


@pytest.mark.parametrize("dense", [(), ("a1", "b2"), ("stem", "a1", "a2", "b1", "short", "b2")])
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_the_gated_graph_gives_outputs_and_statistics(scope: str, dense: tuple[str, ...]) -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    graph, pruner = simplified(net, images, scope=scope)
    lowered, decisions = lower(graph, executions(graph, images, dense), 1, SITES)
    with torch.no_grad():
        wanted = net(images)
        output, *given = lowered(images)
    assert_close(output, wanted)
    assert decisions == [Decision(site, (0.1, 0.9)) for site in SITES]
    for site, squares in zip(SITES, given, strict=True):
        assert_close(squares.sum(1).sqrt(), pruner.norms[site])
        assert torch.equal(isw.keep_mask(squares, 0.1, 0.9), pruner.keep[site])
    assert not {mask, conv, linear, isw.decide.default} & set(targets(lowered))
    # A kernel leaves the statistics of its map; those of other maps are summed once.
    assert targets(lowered).count(isw.sum_squares.default) == len({"stem", "a1", "a2", "b1", "b2"} & set(dense))


def test_every_site_has_its_own_thresholds() -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    graph, _pruner = simplified(net, images, per_site={"a1": {"beta": 0.3}, "b1": {"beta": 0.0}})
    lowered, decisions = lower(graph, executions(graph, images), 1, SITES)
    thresholds = {decision.site: decision.thresholds for decision in decisions}
    assert thresholds == {"stem": (0.1, 0.9), "a1": (0.1, 0.3), "a2": (0.1, 0.9), "b1": (0.1, 0.0), "b2": (0.1, 0.9)}
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))


def test_other_gates_are_given_as_masks_and_norms() -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    graph, pruner = simplified(net, images, gate=above)
    lowered, decisions = lower(graph, executions(graph, images), 1, SITES)
    assert decisions == [Decision(site, None) for site in SITES]
    with torch.no_grad():
        wanted = net(images)
        output, *given = lowered(images)
    assert_close(output, wanted)
    for site, keep, norms in zip(SITES, given[::2], given[1::2], strict=True):
        assert torch.equal(keep, pruner.keep[site])
        assert_close(norms, pruner.norms[site])


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("options", [{}, {"gate": above}], ids=["statistics", "masks"])
def test_the_same_graph_with_everything_kept(options: Any, scope: str) -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    graph, pruner = simplified(net, images, scope=scope, **options)
    modules = executions(graph, images, ("a1",))
    wanted, _ = lower(graph, modules, 1, SITES)
    lowered = lower_all_kept(graph, modules, 1, SITES)
    ones = aten.ones_like.default
    assert [target for target in targets(lowered) if target is not ones] == targets(wanted)
    pruner.disable()
    with torch.no_grad():
        output, *_ = lowered(images)
        assert_close(output, net(images))
        assert (wanted(images)[0] - output).abs().max() > 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_dense_graph_has_no_gates(channels_last: bool) -> None:
    net = seeded(Downsampled)
    images = images_for(net)
    with torch.no_grad():
        wanted = net(images)
    graph, _pruner = simplified(net, images)
    before = [node.target for node in graph.graph.nodes]
    lowered = lower_dense(graph, executions(graph, images, ("stem", "a1", "a2", "b1", "short", "b2")), 1, channels_last)
    assert [node.target for node in graph.graph.nodes] == before
    (output,) = lowered(images)
    assert_close(output, wanted)
    with torch.no_grad():
        assert (net(images) - wanted).abs().max() > 1e-3
    assert not {mask, conv, isw.decide.default, isw.sum_squares.default} & set(targets(lowered))


class Pooled(nn.Module):
    def __init__(self, pool: nn.Module, kernel: int = 1) -> None:
        super().__init__()
        self.c1, self.act, self.pool, self.c2 = nn.Conv2d(3, 8, kernel), nn.ReLU(), pool, nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(self.pool(self.act(self.c1(x)))).mean((2, 3))


@pytest.mark.parametrize(
    ("pool", "ours"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d(3, 2, 1), True),
        (nn.MaxPool2d(2, 1), True),
        (nn.MaxPool2d(2, ceil_mode=True), False),
        (nn.MaxPool2d(2, dilation=2), False),
    ],
)
def test_max_pools_that_the_engine_has_are_its_own(pool: nn.Module, ours: bool) -> None:
    net = seeded(lambda: Pooled(pool))
    images = images_for(net, side=9)
    graph, _ = simplified(net, images)
    lowered, _ = lower(graph, executions(graph, images), 1, ["c1"])
    assert (isw.max_pool2d.default in targets(lowered)) is ours
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))


@pytest.mark.parametrize(
    ("kernel", "dense", "pool", "within"),
    [
        (3, (), nn.MaxPool2d(2), True),
        (3, (), nn.MaxPool2d((2, 2), 2), True),
        (3, ("c1",), nn.MaxPool2d(2), False),
        (1, (), nn.MaxPool2d(2), False),
        (3, (), nn.MaxPool2d(2, 1), False),
        (3, (), nn.MaxPool2d(3, 2), False),
    ],
)
def test_a_layer_pools_what_nothing_else_reads(
    kernel: int, dense: tuple[str, ...], pool: nn.Module, within: bool
) -> None:
    net = seeded(lambda: Pooled(pool, kernel))
    images = images_for(net, side=9)
    graph, pruner = simplified(net, images)
    modules = executions(graph, images, dense)
    lowered, _ = lower(graph, modules, 1, ["c1"])
    assert (isw.max_pool2d.default not in targets(lowered)) is within
    assert [module.pooled for module in lowered.modules() if isinstance(module, GatedConv)].count(True) == within
    assert not any(module.pooled for module in modules.values() if isinstance(module, GatedConv))
    with torch.no_grad():
        wanted = net(images)
        output, squares = lowered(images)
    assert_close(output, wanted)
    assert_close(squares.sum(1).sqrt(), pruner.norms["c1"])


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act, self.c2, self.c3 = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.c1(x))
        return self.c2(F.max_pool2d(x, 2)).mean((2, 3)) + self.c3(x).mean((2, 3))


def test_a_map_that_others_read_is_not_pooled_within() -> None:
    net = seeded(ReadTwice)
    images = images_for(net, side=9)
    graph, _ = simplified(net, images)
    lowered, _ = lower(graph, executions(graph, images), 1, ["c1"])
    assert targets(lowered).count(isw.max_pool2d.default) == 1
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))


class Tail(nn.Module):
    """Constants whose names differ only in where the dots are, and a mask that no convolution takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act, self.a, self.a_b = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Module(), nn.Module()
        self.a.b_c, self.a_b.c = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.act(self.c1(x))).mean((2, 3))
        return self.a.b_c(x) - self.a_b.c(x)


def test_constants_keep_apart() -> None:
    net = seeded(Tail)
    images = images_for(net)
    graph, pruner = simplified(net, images)
    lowered, _ = lower(graph, executions(graph, images), 1, sites_of(pruner))
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))


class Computed(nn.Module):
    """A convolution whose weight comes from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act, self.c2 = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.c1(x))
        weight = y.mean((0, 2, 3))[None, :, None, None].expand(4, -1, 3, 3)
        return self.c2(y).mean((2, 3)) + F.conv2d(y, weight).mean((1, 2, 3))[:, None]


def test_a_layer_without_constants_runs_as_it_is() -> None:
    net = seeded(Computed)
    images = images_for(net)
    graph, pruner = simplified(net, images)
    lowered, _ = lower(graph, executions(graph, images), 1, sites_of(pruner))
    assert conv in targets(lowered)
    with torch.no_grad():
        assert_close(lowered(images)[0], net(images))
