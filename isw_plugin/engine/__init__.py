"""The engine: gated layers that skip dropped channels on the clock."""

from isw_plugin.engine.ops import (
    Gating,
    Statistics,
    conv2d,
    depthwise_conv2d,
    grouped_conv2d,
    keep_mask,
    linear,
    max_pool2d,
    pack_weight,
    sum_squares,
    unpack_weight,
)

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
    "sum_squares",
    "unpack_weight",
]
