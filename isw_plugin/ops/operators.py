"""The engine's functions on `torch.ops.isw`: kernels where they can be built, else the reference.

Same signatures and results as reference.py, which documents them. Inference only.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import isw_plugin.ops.cpu as cpu
import isw_plugin.ops.reference as reference
from isw_plugin.errors import EngineInputError
from isw_plugin.ops.checks import (
    check_act,
    check_gating,
    check_packed,
    check_tensor,
    check_thresholds,
    check_window,
    output_size,
    pair,
)
from isw_plugin.ops.reference import DTYPES, Gating, Statistics, as_pixels, pack_weight, row_slots, unpack_weight

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
    "sum_squares",
    "unpack_weight",
]

_library: Any = torch.library.Library("isw", "DEF")  # type: ignore[no-untyped-call]
_TYPES = dict.fromkeys(("stride", "padding", "kernel"), "int[2]") | dict.fromkeys(("alpha", "beta"), "float")
_TYPES |= {"groups": "int", "act": "str", "residual": "Tensor?"}  # others are tensors


def _define(plain: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of the signature of `plain`, which runs where there is no kernel: on the CPU until the first call."""
    name, signature = plain.__name__, inspect.signature(plain)
    result = "Tensor" if signature.return_annotation is Tensor else "(Tensor, Tensor)"
    schema = f"{name}({', '.join(map(_argument, signature.parameters))}) -> {result}"
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def named(args: Sequence[Any]) -> dict[str, Any]:
        left = iter(args)
        return {each: _gating(*islice(left, 3)) if _gates(each) else next(left) for each in signature.parameters}

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
    return f"{_TYPES.get(parameter, 'Tensor')} {parameter}"


def _gating(gate: Tensor | None, alpha: float, beta: float) -> Gating:
    return gate if gate is None or gate.dtype == torch.bool else Statistics(gate, alpha, beta)


def _flat(gating: Gating) -> tuple[Tensor | None, float, float]:
    if isinstance(gating, Statistics):
        return gating.squares, gating.alpha, gating.beta
    return gating, 0.0, 0.0


def _fake_outputs(x: Tensor, channels: int, size: tuple[int, int], slots: int) -> tuple[Tensor, Tensor]:
    """A map and its statistics."""
    return x.new_empty((x.shape[0], channels, *size)), x.new_empty((x.shape[0], slots, channels), dtype=torch.float32)


def _fake_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int], **others: object
) -> tuple[Tensor, Tensor]:
    size = output_size(x.shape[2:], weight.shape[2:4], stride, padding)
    return _fake_outputs(x, bias.shape[0], size, row_slots(*size))


def _fake_pooled(**arguments: Any) -> tuple[Tensor, Tensor]:
    y, squares = _fake_conv2d(**arguments)
    return torch.max_pool2d(y, 2), squares


def _fake_depthwise(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], **others: object
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, x.shape[1], output_size(x.shape[2:], weight.shape[2:4], stride, padding), 1)


def _fake_max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:2], *output_size(x.shape[2:], kernel, stride, padding)))


def _fake_sum_squares(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, x.shape[1]), dtype=torch.float32)


def _fake_keep_mask(squares: Tensor, **thresholds: float) -> Tensor:
    return squares.new_empty((squares.shape[0], squares.shape[2]), dtype=torch.bool)


_define(reference.conv2d, _fake_conv2d)
_define(reference.grouped_conv2d, _fake_conv2d)
_define(reference.pooled_conv2d, _fake_pooled)
_define(reference.depthwise_conv2d, _fake_depthwise)
_define(reference.max_pool2d, _fake_max_pool)
_define(reference.sum_squares, _fake_sum_squares)
_define(reference.keep_mask, _fake_keep_mask)


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


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    act: str = "none",
    gating: Gating = None,
    residual: Tensor | None = None,
    residual_gating: Gating = None,
) -> tuple[Tensor, Tensor]:
    """reference.conv2d."""
    strides, paddings = pair(stride, "stride"), pair(padding, "padding")
    check_tensor(x, "x", (None,) * 4, dtypes=DTYPES)
    check_packed(weight, bias, x.shape[1], x)
    check_window(x, weight.shape[2:4], strides, paddings)
    check_act(act)
    check_gating(gating, "gating", x.shape[0], x.shape[1], x.device)
    if residual is not None:
        size = output_size(x.shape[2:], weight.shape[2:4], strides, paddings)
        check_tensor(residual, "residual", (x.shape[0], bias.shape[0], *size), x.device, (x.dtype,))
        check_gating(residual_gating, "residual_gating", x.shape[0], bias.shape[0], x.device)
    elif residual_gating is not None:
        raise EngineInputError("residual_gating: there is no residual; give both or neither")
    y, squares = torch.ops.isw.conv2d(
        x, weight, bias, strides, paddings, act, *_flat(gating), residual, *_flat(residual_gating)
    )
    return y, squares


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    act: str = "none",
    gating: Gating = None,
) -> tuple[Tensor, Tensor]:
    """reference.grouped_conv2d."""
    strides, paddings = pair(stride, "stride"), pair(padding, "padding")
    check_tensor(x, "x", (None,) * 4)
    check_packed(weight, bias, x.shape[1], x, groups)
    check_window(x, weight.shape[2:4], strides, paddings)
    check_act(act)
    check_gating(gating, "gating", x.shape[0], x.shape[1], x.device)
    y, squares = torch.ops.isw.grouped_conv2d(x, weight, bias, groups, strides, paddings, act, *_flat(gating))
    return y, squares


def pooled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    act: str = "none",
    gating: Gating = None,
) -> tuple[Tensor, Tensor]:
    """reference.pooled_conv2d."""
    strides, paddings = pair(stride, "stride"), pair(padding, "padding")
    check_tensor(x, "x", (None,) * 4, dtypes=DTYPES)
    check_packed(weight, bias, x.shape[1], x)
    check_window(x, weight.shape[2:4], strides, paddings)
    check_act(act)
    check_gating(gating, "gating", x.shape[0], x.shape[1], x.device)
    if min(output_size(x.shape[2:], weight.shape[2:4], strides, paddings)) < 2:
        raise EngineInputError(f"x: the output of a map of {x.shape[2]}x{x.shape[3]} is too small to pool")
    y, squares = torch.ops.isw.pooled_conv2d(x, weight, bias, strides, paddings, act, *_flat(gating))
    return y, squares


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, act: str = "none", gating: Gating = None
) -> tuple[Tensor, Tensor]:
    """reference.linear: a 1x1 convolution whose pixels are the axes between."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        raise EngineInputError("x: expected a tensor (N, ..., C_in)")
    check_tensor(x, "x", x.shape, dtypes=DTYPES)
    check_packed(weight, bias, x.shape[-1], x)
    if tuple(weight.shape[2:4]) != (1, 1):
        raise EngineInputError(f"weight: packed from a {tuple(weight.shape[2:4])} kernel, a linear layer has none")
    check_act(act)
    check_gating(gating, "gating", x.shape[0], x.shape[-1], x.device)
    if 0 in x.shape[1:-1]:
        return reference.linear(x, weight, bias, act=act, gating=gating)
    y, squares = torch.ops.isw.conv2d(
        as_pixels(x), weight, bias, (1, 1), (0, 0), act, *_flat(gating), None, None, 0.0, 0.0
    )
    return y.squeeze(3).transpose(1, 2).reshape(*x.shape[:-1], bias.shape[0]), squares


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    act: str = "none",
    gating: Gating = None,
) -> tuple[Tensor, Tensor]:
    """reference.depthwise_conv2d."""
    strides, paddings = pair(stride, "stride"), pair(padding, "padding")
    check_tensor(x, "x", (None,) * 4, dtypes=DTYPES)
    check_tensor(weight, "weight", (x.shape[1], 1, None, None), x.device, (x.dtype,))
    check_tensor(bias, "bias", (x.shape[1],), x.device, (torch.float32, x.dtype))
    check_window(x, weight.shape[2:4], strides, paddings)
    check_act(act)
    check_gating(gating, "gating", x.shape[0], x.shape[1], x.device)
    y, squares = torch.ops.isw.depthwise_conv2d(x, weight, bias, strides, paddings, act, *_flat(gating))
    return y, squares


def max_pool2d(
    x: Tensor,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """reference.max_pool2d."""
    kernels, paddings = pair(kernel, "kernel"), pair(padding, "padding")
    strides = kernels if stride is None else pair(stride, "stride")
    check_tensor(x, "x", (None,) * 4, dtypes=DTYPES)
    check_window(x, kernels, strides, paddings)
    if any(2 * pad > k for pad, k in zip(paddings, kernels, strict=True)):
        raise EngineInputError(f"padding {paddings} is more than half the kernel {kernels}")
    y: Tensor = torch.ops.isw.max_pool2d(x, kernels, strides, paddings)
    return y


def sum_squares(x: Tensor) -> Tensor:
    """reference.sum_squares."""
    check_tensor(x, "x", (None,) * 4, dtypes=DTYPES)
    squares: Tensor = torch.ops.isw.sum_squares(x)
    return squares


def keep_mask(squares: Tensor, alpha: float, beta: float) -> Tensor:
    """reference.keep_mask."""
    check_tensor(squares, "squares", (None,) * 3)
    if squares.shape[1] == 0:
        raise EngineInputError(f"squares: no slot, shape {tuple(squares.shape)}")
    check_thresholds(alpha, beta, "keep_mask")
    keep: Tensor = torch.ops.isw.keep_mask(squares, alpha, beta)
    return keep
