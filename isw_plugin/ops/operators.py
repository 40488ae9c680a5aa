"""The engine's functions on `torch.ops.isw`: kernels where they can be built, else the reference.

Signatures, results and documentation are those of reference.py. Inference only.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from itertools import islice
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import isw_plugin.ops.cpu as cpu
import isw_plugin.ops.reference as reference
from isw_plugin.errors import EngineInputError
from isw_plugin.ops.checks import (
    check_conv2d,
    check_depthwise,
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

__all__ = [
    "Gating",
    "Statistics",
    "conv2d",
    "depthwise_conv2d",
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
_library: Any = torch.library.Library("isw", "DEF")  # type: ignore[no-untyped-call]
_TYPES = dict.fromkeys(("stride", "padding", "kernel"), "int[2]") | dict.fromkeys(("alpha", "beta"), "float")
_TYPES |= {"groups": "int", "act": "str", "residual": "Tensor?", "out_keep": "Tensor?", "sums": "bool", "size": "int"}
_TYPES |= {"statistics": "Tensor[]", "keeps": "Tensor?[]", "positions": "int[]"}  # others are tensors
_DEFAULTS = {"out_keep": "=None", "sums": "=False"}  # they came last


def _define(plain: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of the signature of `plain`, which runs where there is no kernel: on the CPU until the first call."""
    name, signature = plain.__name__, inspect.signature(plain)
    result = "Tensor" if signature.return_annotation is Tensor else "(Tensor, Tensor)"
    schema = f"{name}({', '.join(map(_argument, signature.parameters))}) -> {result}"
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def named(args: Sequence[Any]) -> dict[str, Any]:
        left = iter(args)
        return {each: _gating(*islice(left, 3)) if _gates(each) else next(left, None) for each in signature.parameters}

    def run(*args: Any) -> Any:
        if args[0].is_cpu and cpu.active() is None and cpu.load():  # now there is one
            return getattr(torch.ops.isw, name)(*args)
        if any(isinstance(each, Tensor) and _apart(each, args[0]) for each in args):
            raise EngineInputError(f"isw::{name}: expected dense tensors on one device")
        return plain(**named(args))

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"isw::{name}", lambda *args: fake(**named(args)), lib=_library)


def _apart(tensor: Tensor, x: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.device != x.device


def _gates(parameter: str) -> bool:
    return parameter.endswith("gating")


def _argument(parameter: str) -> str:
    """As the schema has it: a gating is a mask or statistics, and thresholds."""
    prefix = parameter.removesuffix("gating")
    if _gates(parameter):
        return f"Tensor? {prefix}gate, float {prefix}alpha, float {prefix}beta"
    return f"{_TYPES.get(parameter, 'Tensor')} {parameter}{_DEFAULTS.get(parameter, '')}"


def _gating(gate: Tensor | None, alpha: float, beta: float) -> Gating:
    return gate if gate is None or gate.dtype == torch.bool else Statistics(gate, alpha, beta)


def _flat(arguments: dict[str, Any]) -> Iterator[Any]:
    for name, value in arguments.items():
        if not _gates(name):
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


def _fake_max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:2], *output_size(x.shape[2:], kernel, stride, padding)))


def _fake_sum_squares(x: Tensor, sums: bool | None) -> Tensor:
    return _fake_statistics(x, 1, x.shape[1], sums)


def _fake_keep_mask(squares: Tensor, **thresholds: float) -> Tensor:
    return squares.new_empty((squares.shape[0], squares.shape[2]), dtype=torch.bool)


def _fake_predict(bias: Tensor, statistics: Sequence[Tensor], **others: object) -> tuple[Tensor, Tensor]:
    shape = (statistics[0].shape[1], bias.shape[0])
    return bias.new_empty(shape), bias.new_empty(shape, dtype=torch.bool)


_define(reference.conv2d, _fake_conv2d)
_define(reference.grouped_conv2d, _fake_conv2d)
_define(reference.pooled_conv2d, _fake_pooled)
_define(reference.depthwise_conv2d, _fake_depthwise)
_define(reference.max_pool2d, _fake_max_pool)
_define(reference.sum_squares, _fake_sum_squares)
_define(reference.keep_mask, _fake_keep_mask)
_define(reference.predict, _fake_predict)


@register_flop_formula([torch.ops.isw.conv2d, torch.ops.isw.grouped_conv2d, torch.ops.isw.depthwise_conv2d])
def _conv_flops(x: Sequence[int], weight: Sequence[int], *args: object, out_shape: Any, **kwargs: object) -> int:
    """Two per multiply-add of the dense layer: which channels are kept is not known from shapes."""
    positions: int = math.prod(out_shape[0])
    return 2 * positions * math.prod(weight[1:4])


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
    pairs = [name for name in defaults if _TYPES.get(name) == "int[2]"]

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
max_pool2d = _public(reference.max_pool2d, check_max_pool)
sum_squares = _public(reference.sum_squares, check_sum_squares)
keep_mask = _public(reference.keep_mask, check_keep_mask)
predict = _public(reference.predict, check_predict)
