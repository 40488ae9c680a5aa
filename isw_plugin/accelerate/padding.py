"""Zeros around a map become a convolution's own padding, so that no padded map is written and gates reach the layer.

"SAME" padding of TensorFlow's networks has more zeros behind a map than before it where a layer's stride is 2. A kernel
that begins with a row of zeros instead, and as many rows of padding before as behind, gives the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

__all__ = ["own_padding"]

_aten = torch.ops.aten
_MOST_INPUTS = 4  # of an output channel; more, and the longer kernel takes longer than writing a padded map


def own_padding(node: fx.Node, weight: Tensor) -> tuple[list[int], Tensor] | None:
    """Padding and weight of a 2-d convolution that reads what ``node`` pads; None: it needs a padded map.

    Args:
        node: A call of ``aten.pad``.
        weight: Of the convolution, whose own padding is 0 and dilation 1.
    """
    amounts: Any = node.args[1]
    is_zero = list(node.args[2:3]) in ([], ["constant"]) and not (node.args[3] if len(node.args) > 3 else 0)
    if not is_zero or node.kwargs or len(amounts) != 4 or not all(isinstance(n, int) and n >= 0 for n in amounts):
        return None
    left, right, above, below = amounts
    if (left, above) != (right, below) and weight.shape[1] > _MOST_INPUTS:
        return None
    more = [max(right - left, 0), max(left - right, 0), max(below - above, 0), max(above - below, 0)]
    return [max(above, below), max(left, right)], F.pad(weight, more) if any(more) else weight
