"""Both ways to run a layer against the layer itself."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin.accelerate.execution import DenseConv, DenseLinear, GatedConv, can_skip
from isw_plugin.accelerate.layers import Layer, Linear, conv
from isw_plugin.ops import cpu
from tests.accelerate.nets import assert_close

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {  # weight, window
    "3x3": ((9, 5, 3, 3), {"padding": (1, 1)}),
    "1x1": ((37, 5, 1, 1), {}),
    "stride 2": ((9, 5, 3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    "1x5": ((9, 5, 1, 5), {"padding": (0, 2), "stride": (2, 1)}),
    "depthwise": ((5, 1, 3, 3), {"padding": (1, 1), "groups": 5}),
    "depthwise stride 2": ((5, 1, 5, 5), {"padding": (2, 2), "stride": (2, 2), "groups": 5}),
    "same of many inputs": ((9, 5, 3, 3), {"stride": (2, 2), "padding": (0, 0, 1, 1)}),
    "same and depthwise": ((5, 1, 3, 3), {"stride": (2, 2), "padding": (0, 1, 1, 1), "groups": 5}),
    "same and dilated": ((9, 5, 3, 3), {"padding": (1, 2, 2, 2), "dilation": (2, 2)}),
    "dilated": ((9, 5, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "grouped": ((40, 1, 3, 3), {"groups": 5, "padding": (1, 1)}),
    "grouped with few outputs": ((35, 1, 3, 3), {"groups": 5}),
    "grouped and dilated": ((40, 1, 3, 3), {"groups": 5, "dilation": (2, 2)}),
}
SKIPPED = ("3x3", "1x1", "stride 2", "1x5", "depthwise", "depthwise stride 2", "grouped")
SKIPPED += ("same of many inputs", "same and depthwise")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind: str, act: str = "relu") -> Layer:
    shape, window = LAYERS[kind]
    settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | window
    return Layer(normal(*shape, seed=1), normal(shape[0], seed=2), **settings, act=act)


def reference(layer: Layer, x: Tensor, residual: Tensor | None, keep: Any, residual_keep: Any) -> Tensor:
    window = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.act)
    return conv(x, layer.weight, layer.bias, residual, keep, residual_keep, *window)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_dense_form(kind: str, act: str) -> None:
    layer, x, keep = layer_of(kind, act), 3 * normal(3, 5, 8, 9), normal(3, 5, seed=3) > 0
    dense = DenseConv(layer, x.shape)
    assert dense.reordered is not None
    wanted = reference(layer, x, None, keep, None)
    assert_close(dense(x, keep, None, None), wanted)
    assert_close(dense(x, None, None, None), reference(layer, x, None, None, None))
    residual, residual_keep = 3 * normal(*wanted.shape, seed=4), normal(*wanted.shape[:2], seed=5) > 0
    for masked in (None, residual_keep):
        assert_close(dense(x, keep, residual, masked), reference(layer, x, residual, keep, masked))
    other = normal(2, 5, 11, 7)  # than the one that oneDNN ordered the weights for
    assert_close(dense(other, None, None, None), reference(layer, other, None, None, None))
    assert dense(x[:0], None, None, None).shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("kind", SKIPPED)
def test_the_gated_form(kind: str, act: str) -> None:
    layer, x, keep = layer_of(kind, act), 3 * normal(3, 5, 8, 9), normal(3, 5, seed=3) > 0
    assert can_skip(layer)
    gated = GatedConv(layer)
    y, squares = gated(x, keep, 0.0, 0.0, None, None, 0.0, 0.0)
    assert_close(y, reference(layer, x, None, keep, None))
    assert_close(squares.sum(1), y.square().sum((2, 3)))
    statistics = torch.ops.isw.sum_squares(x)
    decided = torch.ops.isw.keep_mask(statistics, 0.0, 1.0)
    assert not decided.all()
    y, _ = gated(x, statistics, 0.0, 1.0, None, None, 0.0, 0.0)
    assert_close(y, reference(layer, x, None, decided, None))


@pytest.mark.parametrize("kind", ["3x3", "1x1", "stride 2", "1x5"])
def test_the_gated_form_takes_a_residual_with_a_gate_of_its_own(kind: str) -> None:
    layer, x, keep = layer_of(kind), normal(3, 5, 8, 9), normal(3, 5, seed=3) > 0
    gated = GatedConv(layer)
    residual = normal(*layer.dense(x).shape, seed=4)
    residual_keep = normal(*residual.shape[:2], seed=5) > 0
    for masked in (None, residual_keep):
        y, _ = gated(x, keep, 0.0, 0.0, residual, masked, 0.0, 0.0)
        assert_close(y, reference(layer, x, residual, keep, masked))


@pytest.mark.parametrize("kind", LAYERS)
def test_what_has_a_kernel(kind: str) -> None:
    assert can_skip(layer_of(kind)) == (kind in SKIPPED)


def test_what_has_none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("3x3")
    double = Layer(layer.weight.double(), layer.bias.double(), (1, 1), (1, 1), (1, 1), 1, "relu")
    assert not can_skip(double)
    x = normal(2, 5, 6, 6).double()
    dense = DenseConv(double, x.shape)
    assert dense.reordered is None
    assert_close(dense(x, None, None, None), double.dense(x))
    grouped = layer_of("grouped")
    assert not can_skip(dataclasses.replace(grouped, weight=grouped.weight.bfloat16()))
    monkeypatch.setattr(cpu, "load", lambda: False)
    assert not can_skip(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_the_dense_form_are_ordered_again(copied: Any) -> None:
    x = normal(3, 5, 8, 9)
    dense = DenseConv(layer_of("3x3"), x.shape)
    other = copied(dense)
    assert other.reordered is not None
    assert torch.equal(other(x, None, None, None), dense(x, None, None, None))
    assert other.layer.weight.data_ptr() != dense.layer.weight.data_ptr()


def test_an_empty_example_is_no_reason_to_fail() -> None:
    layer, x = layer_of("3x3"), normal(3, 5, 8, 9)
    dense = DenseConv(layer, x[:0].shape)
    assert dense.reordered is None
    assert_close(dense(x, None, None, None), layer.dense(x))


def test_weights_are_kept_once() -> None:
    layer = layer_of("1x1")
    assert sum(buffer.numel() for buffer in GatedConv(layer).buffers()) == 64 * 5 + 37  # whole blocks of 32
    assert sum(buffer.numel() for buffer in GatedConv(layer_of("depthwise")).buffers()) == 5 * 9 + 5


@pytest.mark.parametrize("width", [37, 2048])  # narrow: PyTorch's linear layer; wide: oneDNN's
def test_the_dense_form_on_maps_of_one_pixel(width: int) -> None:
    weight, bias = normal(width, 512, 1, 1, seed=1) / 23, normal(width, seed=2)
    layer = Layer(weight, bias, (1, 1), (0, 0), (1, 1), 1, "silu")
    x, keep = 3 * normal(3, 512, 1, 1), normal(3, 512, seed=3) > 0
    dense = DenseConv(layer, x.shape)
    assert dense.linear is not None
    assert (dense.reordered, dense.linear.reordered is None) == (None, width == 37)
    assert_close(dense(x, keep, None, None), reference(layer, x, None, keep, None))
    residual, residual_keep = normal(3, width, 1, 1, seed=4), normal(3, width, seed=5) > 0
    wanted = reference(layer, x, residual, keep, residual_keep)
    assert_close(dense(x, keep, residual, residual_keep), wanted)
    larger = normal(3, 512, 2, 3)
    assert_close(dense(larger, None, None, None), layer.dense(larger))
    other = pickle.loads(pickle.dumps(dense))
    assert_close(other(x, keep, None, None), reference(layer, x, None, keep, None))


@pytest.mark.parametrize(
    "window", [{"stride": (2, 2)}, {"padding": (1, 1)}, {"groups": 2}, {"weight": normal(8, 4, 1, 2)}]
)
def test_only_pointwise_layers_are_linear_on_one_pixel(window: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "act": "none"}
    settings |= {"weight": normal(8, 4, 1, 1), "bias": normal(8)}
    assert Layer(**settings).is_pointwise
    assert not Layer(**settings | window).is_pointwise


def linear_of(act: str = "none", bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    weight, added = normal(96, 128, seed=1) / 11, normal(96, seed=2)
    return Linear(weight.to(dtype), added.to(dtype) if bias else None, act)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "hardswish", "gelu"])
def test_the_dense_form_of_a_linear_layer(act: str, bias: bool) -> None:
    layer = linear_of(act, bias)
    dense = DenseLinear(layer, 100)
    assert dense.reordered is not None
    for shape in ((100, 128), (4, 25, 128), (2, 3, 5, 128), (1, 128), (0, 7, 128)):  # others than it was ordered for
        x = 3 * normal(*shape)
        assert dense(x).shape == (*shape[:-1], 96)
        assert_close(dense(x), layer.dense(x))
    transposed = normal(128, 50, seed=3).T
    assert_close(dense(transposed), layer.dense(transposed))


def test_small_and_double_linear_layers_stay_with_pytorch() -> None:
    few, many = ((1 << 19) // (96 * 128) + extra for extra in (0, 1))
    assert DenseLinear(linear_of(), few).reordered is None
    assert DenseLinear(linear_of(), many).reordered is not None
    double = DenseLinear(linear_of(dtype=torch.float64), many)
    assert double.reordered is None
    x = normal(3, 128).double()
    assert torch.equal(double(x), double.layer.dense(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_a_linear_layer_are_ordered_again(copied: Any) -> None:
    dense, x = DenseLinear(linear_of("gelu"), 100), normal(100, 128)
    other = copied(dense)
    assert other.reordered is not None
    assert torch.equal(other(x), dense(x))
