"""The engine's functions on `torch.ops.isw`: kernels where they can be built, else the reference.

Signatures, results and documentation are those of reference.py. Inference only.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import isw_plugin.ops.reference as reference
from isw_plugin.ops.checks import (
    check_conv2d,
    check_depthwise,
    check_expand_depthwise,
    check_keep_mask,
    check_linear,
    check_max_pool,
    check_pooled,
    check_predict,
    check_sum_squares,
    output_size,
    pair,
)
from isw_plugin.ops.reference import Gating, Statistics, as_pixels, pack_weight, row_slots, unpack_weight
from isw_plugin.ops.registration import define
from isw_plugin.ops.schemas import TYPES, gates

__all__ = [
    "Gating",
    "Statistics",
    "conv2d",
    "depthwise_conv2d",
    "expand_depthwise_conv2d",
    "grouped_conv2d",
    "keep_mask",
    "linear",
    "max_pool2d",
    "pack_weight",
    "pooled_conv2d",
    "predict",
    "sum_squares",
    "unpack_weight",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _flat(arguments: dict[str, Any]) -> Iterator[Any]:
    for name, value in arguments.items():
        if not gates(name):
            yield value
        elif isinstance(value, Statistics):
            yield from (value.squares, value.alpha, value.beta)
        else:
            yield from (value, 0.0, 0.0)


def _fake_statistics(x: Tensor, slots: int, channels: int, sums: bool | None) -> Tensor:
    shape = (x.shape[0], slots, channels)
    return x.new_empty((2, *shape) if sums else shape, dtype=torch.float32)


def _fake_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    sums: bool | None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    size, channels = output_size(x.shape[2:], weight.shape[2:4], stride, padding), bias.shape[0]
    return x.new_empty((x.shape[0], channels, *size)), _fake_statistics(x, row_slots(*size), channels, sums)


def _fake_pooled(**arguments: Any) -> tuple[Tensor, Tensor]:
    y, squares = _fake_conv2d(**arguments)
    return torch.max_pool2d(y, 2), squares


def _fake_depthwise(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], sums: bool | None, **others: object
) -> tuple[Tensor, Tensor]:
    size = output_size(x.shape[2:], weight.shape[2:4], stride, padding)
    return x.new_empty((*x.shape[:2], *size)), _fake_statistics(x, 1, x.shape[1], sums)


def _fake_expand_depthwise(
    x: Tensor,
    bias: Tensor,
    filters: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    sums: bool | None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    size = output_size(x.shape[2:], filters.shape[2:], stride, padding)
    return x.new_empty((x.shape[0], bias.shape[0], *size)), _fake_statistics(x, 1, bias.shape[0], sums)


def _fake_max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:2], *output_size(x.shape[2:], kernel, stride, padding)))


def _fake_sum_squares(x: Tensor, sums: bool | None) -> Tensor:
    return _fake_statistics(x, 1, x.shape[1], sums)


def _fake_keep_mask(squares: Tensor, **thresholds: float) -> Tensor:
    return squares.new_empty((squares.shape[0], squares.shape[2]), dtype=torch.bool)


def _fake_predict(bias: Tensor, statistics: Sequence[Tensor], **others: object) -> tuple[Tensor, Tensor]:
    shape = (statistics[0].shape[1], bias.shape[0])
    return bias.new_empty(shape), bias.new_empty(shape, dtype=torch.bool)


define("conv2d", _fake_conv2d)
define("grouped_conv2d", _fake_conv2d)
define("pooled_conv2d", _fake_pooled)
define("depthwise_conv2d", _fake_depthwise)
define("expand_depthwise_conv2d", _fake_expand_depthwise)
define("max_pool2d", _fake_max_pool)
define("sum_squares", _fake_sum_squares)
define("keep_mask", _fake_keep_mask)
define("predict", _fake_predict)


@register_flop_formula([torch.ops.isw.conv2d, torch.ops.isw.grouped_conv2d, torch.ops.isw.depthwise_conv2d])
def _conv_flops(x: Sequence[int], weight: Sequence[int], *args: object, out_shape: Any, **kwargs: object) -> int:
    """Two per multiply-add of the dense layer: which channels are kept is not known from shapes."""
    positions: int = math.prod(out_shape[0])
    return 2 * positions * math.prod(weight[1:4])


@register_flop_formula(torch.ops.isw.expand_depthwise_conv2d)
def _expand_depthwise_flops(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int],
    filters: Sequence[int],
    *args: object,
    out_shape: Any,
    **rest: object,
) -> int:
    between = math.prod(x) * bias[0]
    filtered: int = math.prod(out_shape[0]) * math.prod(filters[1:])
    return 2 * (between + filtered)


@register_flop_formula(torch.ops.isw.pooled_conv2d)
def _pooled_flops(
    x: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int],
    stride: Any,
    padding: Any,
    *args: object,
    **rest: object,
) -> int:
    positions = x[0] * bias[0] * math.prod(output_size(x[2:], weight[2:4], stride, padding))
    return 2 * positions * math.prod(weight[1:4])


def _public(
    plain: Callable[_P, _R], check: Callable[..., None], run: Callable[..., Any] | None = None
) -> Callable[_P, _R]:
    """`plain` for users: its arguments are checked, then its operator runs, or what is given."""
    signature = inspect.signature(plain)
    defaults = {name: each.default for name, each in signature.parameters.items()}
    pairs = [name for name in defaults if TYPES.get(name) == "int[2]"]

    @wraps(plain)
    def public(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        named = defaults | signature.bind(*args, **kwargs).arguments  # in the order of the signature
        for name in pairs:
            as_kernel = named[name] is None is defaults[name]  # pooling's stride
            named[name] = named["kernel"] if as_kernel else pair(named[name], name)
        check(**named)
        result: _R = run(**named) if run else getattr(torch.ops.isw, plain.__name__)(*_flat(named))
        return result

    public.__module__ = __name__  # where pickle finds it
    return public


def _linear(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution whose pixels are the axes between."""
    if 0 in x.shape[1:-1]:
        return reference.linear(x, weight, bias, **options)
    y, squares = conv2d(as_pixels(x), weight, bias, **options)
    return y.squeeze(3).transpose(1, 2).reshape(*x.shape[:-1], bias.shape[0]), squares


conv2d = _public(reference.conv2d, check_conv2d)
grouped_conv2d = _public(reference.grouped_conv2d, partial(check_conv2d, dtypes=(torch.float32,)))
pooled_conv2d = _public(reference.pooled_conv2d, check_pooled)
linear = _public(reference.linear, check_linear, _linear)
depthwise_conv2d = _public(reference.depthwise_conv2d, check_depthwise)
expand_depthwise_conv2d = _public(reference.expand_depthwise_conv2d, check_expand_depthwise)
max_pool2d = _public(reference.max_pool2d, check_max_pool)
sum_squares = _public(reference.sum_squares, check_sum_squares)
keep_mask = _public(reference.keep_mask, check_keep_mask)
predict = _public(reference.predict, check_predict)
