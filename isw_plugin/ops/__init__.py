"""Operators of gated layers on `torch.ops.isw`: they skip dropped channels on the clock, and know tensors only."""

from isw_plugin.ops.operators import (
    Gating,
    Statistics,
    conv2d,
    depthwise_conv2d,
    expand_depthwise_conv2d,
    grouped_conv2d,
    keep_mask,
    linear,
    max_pool2d,
    pack_weight,
    pooled_conv2d,
    predict,
    sum_squares,
    unpack_weight,
)

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
