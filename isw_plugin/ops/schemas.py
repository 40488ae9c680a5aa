"""How operators are called, from the signatures of the functions that define them; the C++ library has these, too."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

import isw_plugin.ops.reference as reference
from isw_plugin import functional

__all__ = ["DEFINITIONS", "SCHEMAS", "TYPES", "gates"]

DEFINITIONS: dict[str, Callable[..., Any]] = {
    "conv2d": reference.conv2d,
    "grouped_conv2d": reference.grouped_conv2d,
    "pooled_conv2d": reference.pooled_conv2d,
    "depthwise_conv2d": reference.depthwise_conv2d,
    "expand_depthwise_conv2d": reference.expand_depthwise_conv2d,
    "max_pool2d": reference.max_pool2d,
    "sum_squares": reference.sum_squares,
    "keep_mask": reference.keep_mask,
    "predict": reference.predict,
    "channel_norm": functional.channel_norm,
    "decide": functional.keep_mask,
    "mask": functional.mask,
}
TYPES = dict.fromkeys(("stride", "padding", "kernel"), "int[2]") | dict.fromkeys(("alpha", "beta"), "float")
TYPES |= {
    "groups": "int",
    "axis": "int",
    "act": "str",
    "filter_act": "str",
    "residual": "Tensor?",
    "out_keep": "Tensor?",
    "basis": "Tensor?",
    "size": "int",
}
TYPES |= {"statistics": "Tensor[]", "keeps": "Tensor?[]", "positions": "int[]", "sums": "bool", "zeros": "bool"}
_DEFAULTS = {"out_keep": "=None", "basis": "=None", "sums": "=False", "zeros": "=True"}  # they came last


def gates(parameter: str) -> bool:
    """Whether a parameter says which channels are kept."""
    return parameter.endswith("gating")


def _argument(parameter: str) -> str:
    """As the schema has it: a gating is a mask or statistics, and thresholds."""
    prefix = parameter.removesuffix("gating")
    if gates(parameter):
        return f"Tensor? {prefix}gate, float {prefix}alpha, float {prefix}beta"
    return f"{TYPES.get(parameter, 'Tensor')} {parameter}{_DEFAULTS.get(parameter, '')}"


def _schema(name: str, plain: Callable[..., Any]) -> str:
    signature = inspect.signature(plain)
    result = "Tensor" if signature.return_annotation is Tensor else "(Tensor, Tensor)"
    return f"{name}({', '.join(map(_argument, signature.parameters))}) -> {result}"


SCHEMAS = {name: _schema(name, plain) for name, plain in DEFINITIONS.items()}
