import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from isw_plugin.accelerate.layers import Layer, Linear, conv, linear, mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 1), ((2, 5, 3), 2), ((2, 5, 3), -1), ((2, 3), 1)])
def test_a_mask_zeroes_what_each_instance_dropped(shape: tuple[int, ...], axis: int) -> None:
    x, keep = normal(*shape), torch.tensor([[True, False, True], [False, False, True]])
    masked = mask(x, keep, axis)
    for n in range(2):
        for c in range(3):
            found, given = (
                masked[n].select(axis - 1 if axis > 0 else -1, c),
                x[n].select(axis - 1 if axis > 0 else -1, c),
            )
            assert torch.equal(found, given if keep[n, c] else torch.zeros_like(given))


def test_a_dropped_channel_counts_as_zero_whatever_it_holds() -> None:
    x = torch.full((1, 2, 3, 3), float("nan"))
    assert mask(x, torch.zeros(1, 2, dtype=torch.bool), 1).eq(0).all()


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
def test_a_convolution_masks_adds_and_activates(act: str) -> None:
    x, weight, bias, residual = normal(2, 4, 6, 6), normal(5, 4, 3, 3, seed=1), normal(5, seed=2), normal(2, 5, 3, 3)
    keep, residual_keep = normal(2, 4, seed=3) > 0, normal(2, 5, seed=4) > 0
    y = conv(x, weight, bias, residual, keep, residual_keep, (2, 2), (1, 1), (1, 1), 1, act)
    wanted = F.conv2d(x * keep[:, :, None, None], weight, bias, 2, 1) + residual * residual_keep[:, :, None, None]
    wanted = {"none": wanted, "relu": wanted.relu(), "relu6": wanted.clamp(0, 6)}[act]
    torch.testing.assert_close(y, wanted)
    bare = conv(x, weight, None, None, None, None, (2, 2), (1, 1), (1, 1), 1, "none")
    torch.testing.assert_close(bare, F.conv2d(x, weight, None, 2, 1))


def node_of(weight: Tensor | None, bias: bool = True, **window: object) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """A call of ``conv``, and the constants around it; a weight of None is no constant."""
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.placeholder("w"), graph.placeholder("b")
    settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "act": "relu"} | window
    call = graph.call_function(conv, (x, w, b if bias else None, None, None, None, *settings.values()))
    return call, {} if weight is None else {w: weight, b: torch.arange(float(len(weight)))}


def test_a_layer_holds_a_nodes_constants() -> None:
    node, constants = node_of(normal(5, 4, 3, 3), stride=[2, 1], padding=[1])
    layer = Layer.of(node, constants)
    assert layer is not None
    assert (layer.stride, layer.padding, layer.dilation, layer.groups, layer.act) == ((2, 1), (1, 1), (1, 1), 1, "relu")
    assert torch.equal(layer.bias, torch.arange(5.0))
    x, residual = normal(2, 4, 6, 6), normal(2, 5, 3, 6)
    torch.testing.assert_close(layer.dense(x), F.conv2d(x, layer.weight, layer.bias, (2, 1), 1).relu())
    wanted = (F.conv2d(x, layer.weight, layer.bias, (2, 1), 1) + residual).relu()
    torch.testing.assert_close(layer.dense(x, residual), wanted)


def test_a_missing_bias_is_zero() -> None:
    layer = Layer.of(*node_of(normal(5, 4, 3, 3), bias=False))
    assert layer is not None
    assert torch.equal(layer.bias, torch.zeros(5))


def test_a_computed_weight_makes_no_layer() -> None:
    assert Layer.of(*node_of(None)) is None
    node, constants = node_of(normal(5, 4, 3, 3))
    del constants[node.args[2]]  # type: ignore[arg-type]  # a node
    assert Layer.of(node, constants) is None


@pytest.mark.parametrize(
    ("shape", "window", "grouped", "depthwise"),
    [
        ((5, 4, 3, 3), {}, False, False),
        ((1, 1, 3, 3), {}, False, False),
        ((6, 1, 3, 3), {"groups": 6}, False, True),
        ((6, 2, 3, 3), {"groups": 3}, True, False),
        ((12, 1, 3, 3), {"groups": 6}, True, False),
    ],
)
def test_kinds_of_layers(shape: tuple[int, ...], window: dict[str, object], grouped: bool, depthwise: bool) -> None:
    layer = Layer.of(*node_of(normal(*shape), **window))
    assert layer is not None
    assert (layer.is_grouped, layer.is_depthwise) == (grouped, depthwise)


def test_a_linear_layer_activates() -> None:
    x, weight, bias = normal(2, 3, 4), normal(5, 4, seed=1), normal(5, seed=2)
    torch.testing.assert_close(linear(x, weight, bias, "gelu"), F.gelu(x @ weight.T + bias))
    torch.testing.assert_close(linear(x, weight, None, "none"), x @ weight.T)


@pytest.mark.parametrize("known", ["wb", "w", "b", ""])
def test_a_linear_layer_holds_a_nodes_constants(known: str) -> None:
    graph = fx.Graph()
    x, w, b = graph.placeholder("x"), graph.placeholder("w"), graph.placeholder("b")
    held = {node: tensor for node, tensor in ((w, normal(5, 4)), (b, normal(5))) if node.name in known}
    found = Linear.of(graph.call_function(linear, (x, w, b, "relu")), held)
    assert (found == Linear(held[w], held[b], "relu")) if known == "wb" else found is None
    bare = Linear.of(graph.call_function(linear, (x, w, None, "none")), held)
    assert (bare == Linear(held[w], None, "none")) if "w" in known else bare is None
