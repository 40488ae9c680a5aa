"""What a simplified graph is made of: layers with all that was fused into them, in plain PyTorch.

They define the results of what ``execution.py`` runs instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx

from isw_plugin.ops import reference
from isw_plugin.ops.reference import ACTS

__all__ = ["Layer", "Linear", "conv", "linear", "mask", "predict"]


def mask(x: Tensor, keep: Tensor, axis: int) -> Tensor:
    """A map with zeros in its dropped channels; keep is (N, C), C lies on ``axis``."""
    shape = [keep.shape[0]] + [1] * (x.dim() - 1)
    shape[axis] = keep.shape[1]
    return x.masked_fill(~keep.view(shape), 0.0)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    residual_keep: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
    out_keep: Tensor | None = None,
) -> Tensor:
    """Convolution of a map's kept channels (N, C_in, H, W), plus the kept channels of a residual, activated.

    Padding is (vertical, horizontal) or (above, left, below, right).
    Outputs that ``out_keep`` (N, C_out) drops are zero.
    """
    x = x if keep is None else mask(x, keep, 1)
    if len(padding) == 4:
        x, padding = reference.pad(x, padding), (0, 0)
    y = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    if residual is not None:
        y = y + (residual if residual_keep is None else mask(residual, residual_keep, 1))
    activated: Tensor = ACTS[act](y)
    return activated if out_keep is None else mask(activated, out_keep, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Linear layer on the last axis of (N, ..., C_in), activated."""
    activated: Tensor = ACTS[act](F.linear(x, weight, bias))
    return activated


def predict(
    maps: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor,
    size: int,
    basis: Tensor | None = None,
) -> Tensor:
    """Norms (N, C) of a map of so many pixels from what is kept of those that its layer reads, as ``Head`` has them."""
    known = [reference.sum_squares(x, sums=True) for x in maps]
    return reference.predict(weight, bias, known, keeps, [x[0, 0].numel() for x in maps], size, 0.0, 0.0, basis)[0]


@dataclass(frozen=True)
class Layer:
    """A ``conv`` node's constants."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, ...]
    dilation: tuple[int, int]
    groups: int
    act: str

    @classmethod
    def of(cls, node: fx.Node, constants: dict[fx.Node, Tensor]) -> "Layer | None":
        """The layer of a node; None where its weight is computed from its inputs."""
        _, weight, bias, _, _, _, stride, padding, dilation, groups, act = node.args[:11]
        if weight not in constants or (bias is not None and bias not in constants):
            return None
        held = constants[weight]  # type: ignore[index]  # a node
        zeros = held.new_zeros(held.shape[0])
        return cls(
            held,
            zeros if bias is None else constants[bias],  # type: ignore[index]
            _pair(stride),
            _padding(padding),
            _pair(dilation),
            int(groups),  # type: ignore[arg-type]
            str(act),
        )

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.weight.shape[0] > 1 and self.weight.shape[1] == 1

    @property
    def is_grouped(self) -> bool:
        return self.groups > 1 and not self.is_depthwise

    @property
    def is_pointwise(self) -> bool:
        """Whether pixels do not see each other, nor are any left out."""
        alone = self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)
        return alone and self.groups == 1

    def as_linear(self) -> "Linear":
        """A pointwise layer as one of its pixels, (N, C_in) to (N, C_out)."""
        return Linear(self.weight.flatten(1), self.bias, self.act)

    def dense(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """All channels."""
        return conv(
            x,
            self.weight,
            self.bias,
            residual,
            None,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.act,
        )


@dataclass(frozen=True)
class Linear:
    """A ``linear`` node's constants."""

    weight: Tensor
    bias: Tensor | None
    act: str

    @classmethod
    def of(cls, node: fx.Node, constants: dict[fx.Node, Tensor]) -> "Linear | None":
        """The layer of a node; None where its weight is computed from its inputs."""
        _, weight, bias, act = node.args
        if weight not in constants or (bias is not None and bias not in constants):
            return None
        return cls(constants[weight], None if bias is None else constants[bias], str(act))  # type: ignore[index]  # nodes

    def dense(self, x: Tensor) -> Tensor:
        """All channels."""
        return linear(x, self.weight, self.bias, self.act)


def _pair(value: object) -> tuple[int, int]:
    values = [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]  # type: ignore[call-overload]
    return (values[0], values[-1])


def _padding(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) and len(value) == 4 else _pair(value)
