"""The old name of ``isw_plugin.ops``; goes in the release after 0.2."""

import warnings

from isw_plugin.ops import (
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

warnings.warn("isw_plugin.engine is now isw_plugin.ops", DeprecationWarning, stacklevel=2)
