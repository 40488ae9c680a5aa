"""Zeros around a map become a convolution's own padding, so that no padded map is written and gates reach the layer.

"SAME" padding of TensorFlow's networks has more zeros behind a map than before it where a layer's stride is 2. The
engine's kernels take that; PyTorch's need a padded map, or a kernel that begins with a row of zeros.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from isw_plugin.accelerate.layers import Layer

__all__ = ["even", "own_padding"]

_aten = torch.ops.aten
_MOST_INPUTS = 4  # of an output channel; more, and the longer kernel takes longer than writing a padded map


def own_padding(node: fx.Node) -> list[int] | None:
    """Padding of a 2-d convolution that reads what ``node``, a call of ``aten.pad``, pads; None: it needs a padded map.

    (vertical, horizontal), or (above, left, below, right) where they differ.
    """
    amounts: Any = node.args[1]
    is_zero = list(node.args[2:3]) in ([], ["constant"]) and not (node.args[3] if len(node.args) > 3 else 0)
    if not is_zero or node.kwargs or len(amounts) != 4 or not all(isinstance(n, int) and n >= 0 for n in amounts):
        return None
    left, right, above, below = amounts
    return [above, left] if (left, above) == (right, below) else [above, left, below, right]


def even(layer: Layer) -> tuple[Layer, tuple[int, ...] | None]:
    """The layer with as many zeros before a map as behind it, and what the map is to be padded with before."""
    if len(layer.padding) == 2:
        return layer, None
    if layer.weight.shape[1] > _MOST_INPUTS or layer.dilation != (1, 1):
        return replace(layer, padding=(0, 0)), layer.padding
    above, left, below, right = layer.padding
    more = [max(right - left, 0), max(left - right, 0), max(below - above, 0), max(above - below, 0)]
    return replace(layer, weight=F.pad(layer.weight, more), padding=(max(above, below), max(left, right))), None
