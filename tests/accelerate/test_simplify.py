"""Every rewriting of the graph on a network that calls for it: nodes counted, results equal."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate.layers import conv, linear, mask
from isw_plugin.accelerate.padding import own_padding
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace
from tests.accelerate.nets import CASES, assert_close, attached, images_for, near_ties, seeded

aten = torch.ops.aten
NORM = "_native_batch_norm_legit_no_training.default"
X, RESIDUAL, KEEP, RESIDUAL_KEEP, ACT = 0, 3, 4, 5, -1  # arguments of ``conv``


def simplified(net: nn.Module, images: Tensor, **options: Any) -> tuple[fx.GraphModule, InstanceWisePruner]:
    pruner = attached(net, images, **options)
    return simplify(trace(net, pruner.sites, images)), pruner


def calls(graph: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is target]


def counted(graph: fx.GraphModule) -> Counter[str]:
    return Counter(getattr(n.target, "__name__", "") for n in graph.graph.nodes if n.op == "call_function")


def assert_same(graph: fx.GraphModule, pruner: InstanceWisePruner, images: Tensor) -> None:
    with torch.no_grad():
        wanted = pruner.model(images)
        clear = ~near_ties(pruner)
        output, *decided = graph(images)
    assert clear.sum() > len(images) // 2
    assert_close(output[clear], wanted[clear])
    keeps, norms = decided[: len(pruner.keep)], decided[len(pruner.keep) :]
    for name, keep, norm in zip(pruner.keep, keeps, norms, strict=True):
        assert torch.equal(keep[clear], pruner.keep[name][clear]), name
        assert_close(norm[clear], pruner.norms[name][clear])


@pytest.mark.parametrize(("kind", "scope"), CASES[::3])
def test_results_are_those_of_the_masked_model(kind: type[nn.Module], scope: str) -> None:
    net = seeded(kind)
    graph, pruner = simplified(net, images_for(net), scope=scope)
    assert_same(graph, pruner, images_for(net, 9, seed=1))


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_resnet_is_convolutions_with_everything_in_them(scope: str) -> None:
    net = timm.create_model("resnet18", num_classes=10).eval()
    graph, pruner = simplified(net, torch.zeros(2, 3, 32, 32), scope=scope)
    found = counted(graph)
    layers = calls(graph, conv)
    assert len(layers) == 20
    assert not {"add.Tensor", "relu.default", "relu_.default", "_native_batch_norm_legit_no_training.default"} & set(
        found
    )
    (last,) = calls(graph, mask)
    (reader,) = last.users
    (reader,) = reader.users if reader.target is aten.reshape.default else (reader,)
    assert reader.target is linear
    assert sum(layer.args[KEEP] is not None for layer in layers) == 19
    assert sum(layer.args[RESIDUAL] is not None for layer in layers) == 8
    # The other three blocks add a convolution of the map.
    assert sum(layer.args[RESIDUAL_KEEP] is not None for layer in layers) == (5 if scope == "all" else 0)
    assert Counter(layer.args[ACT] for layer in layers) == {"relu": 17, "none": 3}
    convolutions = {name for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    assert {layer.meta["layer"] for layer in layers} == convolutions
    assert pruner.enabled


# -- one rule at a time ----------------------------------------------------------------------------


class One(nn.Module):
    """A stem whose map a given part reads."""

    def __init__(self, part: Callable[["One", Tensor], Tensor]) -> None:
        super().__init__()
        self.part = part
        self.stem, self.act, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.depth, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.dilated, self.head = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Linear(8, 5)
        self.mixer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.linspace(-1.0, 2.0, 8))
        self.bare = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self, self.act(self.stem(x))).mean((2, 3)))


def rewritten(part: Callable[[One, Tensor], Tensor], **options: Any) -> fx.GraphModule:
    net = seeded(lambda: One(part))
    graph, pruner = simplified(net, images_for(net), **options)
    assert_same(graph, pruner, images_for(net, 9, seed=1))
    return graph


def pixels(net: One, x: Tensor) -> Tensor:
    y = net.c(x)
    bright = y.mean(1).flatten(1) > 0
    return torch.where(bright.view(y.shape[0], 1, 8, 8), y, 0)


def standardised(net: One, x: Tensor) -> Tensor:
    weight = net.c.weight
    return F.conv2d(x, (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std(), padding=1) + net.depth(x)


def mixed(net: One, x: Tensor) -> Tensor:
    return F.gelu(net.mixer(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def mixed_by_itself(net: One, x: Tensor) -> Tensor:
    return F.relu(F.linear(net.c(x).permute(0, 2, 3, 1), net.mixer.weight * x.mean())).permute(0, 3, 1, 2)


def both(net: One, x: Tensor) -> Tensor:
    y = net.c(x)
    return F.relu(y) + net.depth(y)


def twice(net: One, x: Tensor) -> Tensor:
    y = net.c(x)
    return y + y


PARTS: dict[str, tuple[Callable[[One, Tensor], Tensor], dict[str, int]]] = {  # nodes that are left
    "norm": (lambda net, x: net.norm(net.c(x)), {"conv": 2}),
    "norm of a depthwise layer": (lambda net, x: net.norm(net.depth(x)), {"conv": 2}),
    "norm of nothing": (lambda net, x: net.norm(x), {"conv": 1, NORM: 1}),
    "norm and map": (
        lambda net, x: (lambda y: net.norm(y) * y)(net.c(x)),
        {"conv": 2, NORM: 1, "mul.Tensor": 1},
    ),
    "relu": (lambda net, x: F.relu(net.c(x)), {"conv": 2}),
    "relu6": (lambda net, x: F.relu6(net.c(x)), {"conv": 2}),
    "hardtanh to 6": (lambda net, x: F.hardtanh(net.c(x), 0.0, 6.0), {"conv": 2}),
    "hardtanh": (lambda net, x: F.hardtanh(9 * net.c(x)), {"conv": 2, "hardtanh.default": 1, "mul.Tensor": 1}),
    "clamp to 6": (lambda net, x: net.c(x).clamp(0, 6), {"conv": 2}),
    "clamp below 6": (lambda net, x: net.c(x).clamp(max=6.0), {"conv": 2, "clamp.default": 1}),
    "clamp above 0": (lambda net, x: net.c(x).clamp(min=0.0), {"conv": 2, "clamp.default": 1}),
    "silu": (lambda net, x: F.silu(net.c(x)), {"conv": 2, "silu.default": 0}),
    "hardswish": (lambda net, x: F.hardswish(net.c(x)), {"conv": 2, "hardswish.default": 0}),
    "gelu": (lambda net, x: F.gelu(net.c(x)), {"conv": 2, "gelu.default": 0}),
    "gelu by tanh": (lambda net, x: F.gelu(net.c(x), approximate="tanh"), {"conv": 2, "gelu.default": 1}),
    "scaled": (
        lambda net, x: net.c(F.silu(x) * torch.sigmoid(x.mean((2, 3), True))),
        {"conv": 2, "silu.default": 1, "mul.Tensor": 1},
    ),
    "activated and not": (both, {"conv": 3, "relu.default": 1, "add.Tensor": 1}),
    "activated twice": (lambda net, x: F.relu6(F.relu(net.c(x))), {"conv": 2, "relu6.default": 1}),
    "residual": (lambda net, x: F.relu(net.c(x) + x), {"conv": 2}),
    "residual first": (lambda net, x: F.relu(x + net.c(x)), {"conv": 2}),
    "residual of a dilated layer": (lambda net, x: net.dilated(x) + x, {"conv": 2}),
    "residual of a depthwise layer": (
        lambda net, x: F.relu(net.depth(x) + x),
        {"conv": 2, "add.Tensor": 1, "relu.default": 1, "mask": 2},
    ),
    "two layers added": (lambda net, x: net.c(x) + net.dilated(x), {"conv": 3}),
    "three added": (lambda net, x: net.c(x) + net.dilated(x) + x, {"conv": 3, "add.Tensor": 1}),
    "a layer added to itself": (twice, {"conv": 2, "add.Tensor": 1}),
    "weighed residual": (lambda net, x: torch.add(net.c(x), x, alpha=2), {"conv": 2, "add.Tensor": 1, "mask": 2}),
    "a number added": (lambda net, x: net.c(x) + 1.0, {"conv": 2, "add.Tensor": 1}),
    "a truth value added": (lambda net, x: net.c(x) + (x > 0.3), {"conv": 2, "add.Tensor": 1}),
    "one for all channels added": (lambda net, x: net.c(x) + x.mean(1, True), {"conv": 2, "add.Tensor": 1}),
    "activated, then residual": (lambda net, x: F.relu(net.c(x)) + x, {"conv": 2, "add.Tensor": 1, "mask": 2}),
    "pixels masked": (pixels, {"conv": 2, "where.ScalarOther": 1}),
    "weights of weights": (standardised, {"conv": 3}),
    "scaled channels": (lambda net, x: net.c(x) * net.scale[:, None, None] + x, {"conv": 2}),
    "scaled channels, from the left": (lambda net, x: net.scale.view(1, 8, 1, 1) * net.c(x) + x, {"conv": 2}),
    "scaled map of a site": (lambda net, x: net.scale.view(1, 8, 1, 1) * net.c(x), {"conv": 2, "mul.Tensor": 1}),
    "scaled channels without a bias": (
        lambda net, x: F.relu(net.bare(x) * net.scale.view(8, 1, 1)),
        {"conv": 2},
    ),
    "scaled tokens": (
        lambda net, x: (net.mixer(x.permute(0, 2, 3, 1)) * net.scale).permute(0, 3, 1, 2) + x,
        {"conv": 1, "linear": 2, "add.Tensor": 1},
    ),
    "scaled columns": (lambda net, x: net.c(x) * net.scale, {"conv": 2, "mul.Tensor": 1}),
    "scaled rows": (lambda net, x: net.c(x) * net.scale[:, None], {"conv": 2, "mul.Tensor": 1}),
    "scaled map and map": (
        lambda net, x: (lambda y: y * net.scale[:, None, None] + y)(net.c(x)),
        {"conv": 2, "mul.Tensor": 1, "add.Tensor": 1},
    ),
    "scaled input": (lambda net, x: net.c(x * net.scale[:, None, None]), {"conv": 2, "mul.Tensor": 1}),
    "scaled by one for all": (lambda net, x: net.c(x) * net.scale[:1], {"conv": 2, "mul.Tensor": 1}),
    "linear": (mixed, {"conv": 1, "linear": 2, "gelu.default": 0}),
    "linear of computed weights": (mixed_by_itself, {"conv": 2, "linear": 2, "mul.Tensor": 1}),
    "dropout": (lambda net, x: F.dropout(net.c(x), 0.5, net.training), {"conv": 2}),
    "max pool": (lambda net, x: net.c(F.max_pool2d(x, 3, 2, 1)), {"conv": 2, "max_pool2d.default": 1}),
    "average pool": (lambda net, x: net.c(F.avg_pool2d(x, 3, 2, 1)), {"conv": 2, "avg_pool2d.default": 1}),
    "pools": (
        lambda net, x: net.c(F.adaptive_avg_pool2d(F.relu(F.max_pool2d(x, 2)), 2)),
        {"conv": 2, "relu.default": 1},
    ),
    "pool of its own size": (
        lambda net, x: F.adaptive_avg_pool2d(net.c(x), x.shape[2:]),
        {"conv": 2, "adaptive_avg_pool2d.default": 0},
    ),
    "pool to less": (
        lambda net, x: F.adaptive_avg_pool2d(net.c(x), (1, x.shape[3])),
        {"conv": 2, "adaptive_avg_pool2d.default": 1},
    ),
    "pool and map": (lambda net, x: net.c(x) + F.max_pool2d(x, 3, 1, 1), {"conv": 2, "max_pool2d.default": 1}),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_left_of_a_part(name: str) -> None:
    part, left = PARTS[name]
    found = counted(rewritten(part))
    layers = ("conv", "conv2d.default", "dropout.default", "where.ScalarOther", NORM)
    others = ("add.Tensor", "mul.Tensor", "relu.default", "relu6.default", "hardtanh.default", "clamp.default")
    watched = layers + others
    assert {name: found[name] for name in watched if found[name]} == {n: k for n, k in left.items() if n in watched}
    assert all(found[name] == number for name, number in left.items())


@pytest.mark.parametrize("pool", ["max pool", "average pool", "pools", "scaled"])
def test_a_gate_moves_past_pools_to_the_layer(pool: str) -> None:
    graph = rewritten(PARTS[pool][0])
    layer = calls(graph, conv)[1]
    assert isinstance(layer.args[KEEP], fx.Node)
    assert layer.args[KEEP].target is torch.ops.isw.decide.default
    assert layer.args[X].target is not mask  # type: ignore[union-attr]  # a node
    read = (linear, aten.sigmoid.default)
    assert all(user.target in read for node in calls(graph, mask) for user in node.users)


def test_a_residual_behind_a_pool_has_its_gate_too() -> None:
    graph = rewritten(PARTS["pool and map"][0])
    layer = calls(graph, conv)[1]
    assert layer.args[KEEP] is layer.args[RESIDUAL_KEEP] is not None


def test_dropout_that_never_ends_stays() -> None:
    net = seeded(lambda: One(lambda net, x: F.dropout(net.c(x), 0.5, True)))
    graph, _ = simplified(net, images_for(net))
    assert sum("dropout" in name for name in counted(graph)) == 1


def test_a_gate_that_keeps_all_leaves_nothing() -> None:
    graph = rewritten(PARTS["residual"][0], per_site={"stem": {"beta": 0.0}})
    layer = calls(graph, conv)[1]
    assert layer.args[KEEP] is layer.args[RESIDUAL_KEEP] is None


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.act, self.fc2 = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.bn(self.fc1(x))))


@pytest.mark.parametrize(("shape", "norms"), [((9, 8), 0), ((9, 8, 8), 1)])
def test_a_norm_folds_into_a_linear_layer_unless_it_is_over_tokens(shape: tuple[int, ...], norms: int) -> None:
    net, x = seeded(Linears), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph, pruner = simplified(net, x)
    assert len(calls(graph, aten._native_batch_norm_legit_no_training.default)) == norms
    assert_same(graph, pruner, x)


def test_constants_are_by_node() -> None:
    graph = rewritten(PARTS["norm"][0])
    constants = constants_of(graph)
    layer = calls(graph, conv)[1]
    assert constants[layer.args[1]].shape == (8, 8, 3, 3)  # type: ignore[index]  # a node
    assert all(node.op == "get_attr" for node in constants)


class Padded(nn.Module):
    """Zeros around what layers read: more behind than before, as TensorFlow has it, and the other way."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(3, 8, 3, stride=2),
            nn.Conv2d(8, 8, 5, stride=2, groups=8),
            nn.Conv2d(8, 8, (1, 3), groups=8),
            nn.Conv2d(8, 8, 3, stride=2),
        ]
        self.layers, self.head = nn.ModuleList(nn.Sequential(layer, nn.ReLU()) for layer in layers), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer, amounts in zip(self.layers, ((0, 1, 0, 1), (1, 2, 1, 2), (3, 1), (1, 1, 1, 1)), strict=True):
            x = layer(F.pad(x, amounts))
        return self.head(x.mean((2, 3)))


def test_paddings_become_those_of_layers() -> None:
    net, images = seeded(Padded), torch.randn(4, 3, 22, 22)
    graph, pruner = simplified(net, images)
    assert counted(graph)["pad.default"] == 1  # on one axis: of another form
    assert [list(node.args[7]) for node in calls(graph, conv)] == [
        [0, 0, 1, 1],
        [1, 1, 2, 2],
        [0, 0],
        [1, 1],
    ]
    assert len([node for node in calls(graph, conv) if node.args[KEEP] is not None]) == 2
    assert_same(graph, pruner, torch.randn(9, 3, 22, 22))


def test_a_gate_reaches_through_a_padding() -> None:
    """Of a layer with many inputs, too, which PyTorch runs on a padded map."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.pad(self.a(x).relu(), (0, 1, 0, 1))).mean((2, 3))

    net, images = seeded(Net), torch.randn(4, 3, 12, 12)
    graph, pruner = simplified(net, images)
    assert counted(graph)["pad.default"] == 0
    assert [node.args[KEEP] is not None for node in calls(graph, conv)] == [False, True]
    assert_same(graph, pruner, torch.randn(9, 3, 12, 12))


@pytest.mark.parametrize(
    ("amounts", "own"),
    [
        ([[0, 1, 0, 1]], [0, 0, 1, 1]),
        ([[2, 1, 1, 1], "constant", 0.0], [1, 2, 1, 1]),
        ([[1, 1, 2, 2], "constant", None], [2, 1]),
        ([[1, 1, 1, 1], "constant", 1.0], None),
        ([[1, 1, 1, 1], "reflect"], None),
        ([[-1, 1, 1, 1]], None),
        ([[1, 1]], None),
    ],
)
def test_which_paddings_a_layer_takes(amounts: list[Any], own: list[int] | None) -> None:
    graph = fx.Graph()
    found = own_padding(graph.call_function(aten.pad.default, (graph.placeholder("x"), *amounts)))
    assert found == own
    if found is not None:
        x, weight = torch.randn(1, 2, 6, 7), torch.randn(3, 2, 3, 3)
        y = conv(x, weight, None, None, None, None, [2, 2], found, [1, 1], 1, "none")
        assert_close(y, F.conv2d(aten.pad(x, *amounts), weight, stride=2))
