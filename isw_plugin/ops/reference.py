"""The engine's functions in plain PyTorch. They define the results; operators.py has the same signatures, faster.

N instances, C channels, S slots: partial sums of squares over S groups of rows (a function of the map size only).
A feature's `gating` says which of its channels are kept: `Statistics`, a keep mask (bool (N, C), True = kept),
or None for all. A dropped channel counts as zero, whatever it holds.
``out_keep`` says the same of outputs, before there are any: a dropped one is zero, and so are its sums of squares.
Without ``zeros`` nobody reads it: it may hold anything, here zero all the same.

Maps and weights are float32 or bfloat16, one type in a call. Sums, bias, residual and activation are computed in
float32 and rounded once, to the type of x; a bias is float32 or of that type. Sums of squares are float32 and of the
rounded map, so they are those that `sum_squares` finds in it. With ``sums``, plain sums come with them: (2, N, S, C).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from isw_plugin import functional

__all__ = [
    "ACTS",
    "BLOCK",
    "DTYPES",
    "Gating",
    "Statistics",
    "as_pixels",
    "borders",
    "conv2d",
    "depthwise_conv2d",
    "expand_depthwise_conv2d",
    "grouped_conv2d",
    "keep_mask",
    "linear",
    "max_pool2d",
    "pack_weight",
    "pad",
    "pooled_conv2d",
    "predict",
    "row_slots",
    "sum_squares",
    "unpack_weight",
]

BLOCK = 32  # output channels of a packed block
DTYPES = (torch.float32, torch.bfloat16)  # of maps and weights
ACTS = {  # each leaves zero what is zero
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


@dataclass(frozen=True)
class Statistics:
    """What decides a feature's channels: its producer's sums of squares and the thresholds of its gate.

    Args:
        squares: Partial sums of squares, float32 (N, S, C).
        alpha: A map is prunable for an instance when the CV of its norms exceeds alpha.
        beta: There, channels with a norm under beta times the mean are dropped.
    """

    squares: Tensor
    alpha: float
    beta: float


Gating: TypeAlias = Statistics | Tensor | None


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Orders a weight so that one input channel's weights for a block of output channels lie together.

    Args:
        weight: (C_out, C_in / groups, kh, kw) of a convolution or (C_out, C_in) of a linear layer.
        groups: Of a grouped convolution; a block's outputs are of one group.

    Returns:
        (groups * ceil(C_out / groups / 32), C_in / groups, kh, kw, 32), missing output channels zero.
    """
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    padded = F.pad(by_group, (0, 0) * 3 + (0, -by_group.shape[1] % BLOCK))
    return padded.reshape(-1, BLOCK, *weight.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def unpack_weight(packed: Tensor, out_channels: int, groups: int = 1) -> Tensor:
    """The (C_out, C_in / groups, kh, kw) weight that pack_weight packed."""
    blocks, inputs, *kernel, _ = packed.shape
    padded = packed.permute(0, 4, 1, 2, 3).reshape(groups, blocks // groups * BLOCK, inputs, *kernel)
    return padded[:, : out_channels // groups].flatten(0, 1)


def row_slots(height: int, width: int) -> int:
    """Partial sums per instance and channel for an output map of this size."""
    slots = 1
    while slots < 16 and height >= 8 * slots and height * width >= 392 * slots:
        slots *= 2
    return slots


def _sum_rows(y: Tensor, unit: int = 1, sums: bool = False) -> Tensor:
    """Sums of squares of (N, C, H, W) over row_slots(H, W) groups of rows, of ``unit`` rows and more: (N, S, C)."""
    if sums:
        return torch.stack([_sum_rows(y, unit), _add_rows(y.float(), unit)])
    return _add_rows(y.float().square(), unit)  # squares overflow float16


def _add_rows(values: Tensor, unit: int) -> Tensor:
    height, slots = values.shape[2], row_slots(values.shape[2], values.shape[3])
    rows = values.sum(3)
    bounds = [height // unit * s // slots * unit for s in range(slots)] + [height]
    return torch.stack([rows[:, :, a:b].sum(2) for a, b in pairwise(bounds)], 1)


def as_pixels(x: Tensor) -> Tensor:
    """(N, ..., C) as a map of one column, (N, C, pixels, 1)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).transpose(1, 2).unsqueeze(3)


def _keep_of(gating: Gating) -> Tensor | None:
    """The keep mask (N, C) that a gating stands for; None when all channels are kept."""
    if isinstance(gating, Statistics):
        return keep_mask(gating.squares, gating.alpha, gating.beta)
    return gating


def _drop(x: Tensor, gating: Gating) -> Tensor:
    """x (N, C, ...) with zeros in dropped channels."""
    keep = _keep_of(gating)
    return x if keep is None else torch.where(keep.view(keep.shape + (1,) * (x.dim() - 2)), x, 0.0)


def borders(padding: int | Sequence[int]) -> tuple[int, ...]:
    """Zeros (above, left, below, right) of a map."""
    numbers = (padding, padding) if isinstance(padding, int | torch.SymInt) else tuple(padding)
    return numbers if len(numbers) == 4 else 2 * numbers


def pad(x: Tensor, padding: int | Sequence[int]) -> Tensor:
    """x (N, C, H, W) with zeros around."""
    above, left, below, right = borders(padding)
    return F.pad(x, (left, right, above, below))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    act: str = "none",
    gating: Gating = None,
    residual: Tensor | None = None,
    residual_gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolution of kept channels, then bias, residual and activation.

    Args:
        x: Input, (N, C_in, H, W).
        weight: From pack_weight, (ceil(C_out / 32), C_in, kh, kw, 32).
        bias: (C_out,).
        stride: One number or (vertical, horizontal).
        padding: One number, (vertical, horizontal) or (above, left, below, right).
        act: One of ACTS.
        gating: Which input channels are kept.
        residual: Added before the activation, (N, C_out, OH, OW).
        residual_gating: Which of its channels are kept.
        out_keep: Which outputs are kept, bool (N, C_out); None: all.
        sums: Whether plain sums come with the squares.
        zeros: Whether outputs that are dropped are written.

    Returns:
        y (N, C_out, OH, OW) and its partial sums of squares (N, S, C_out); with ``sums`` (2, N, S, C_out), the latter
        and plain ones.
    """
    wide = unpack_weight(weight, bias.shape[0]).float()
    y = F.conv2d(pad(_drop(x, gating).float(), padding), wide, bias.float(), stride)
    if residual is not None:
        y = y + _drop(residual, residual_gating)
    y = _drop(ACTS[act](y).to(x.dtype), out_keep)
    return y, _sum_rows(y, sums=sums)


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    act: str = "none",
    gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """conv2d without a residual, of channels in groups that do not see each other.

    Args:
        x: Input, float32 (N, C_in, H, W).
        weight: From pack_weight(weight, groups).
        groups: Divides C_in and C_out.
        stride, padding, act, gating, out_keep, sums, zeros, bias: As in conv2d.

    Returns:
        As conv2d.
    """
    wide = unpack_weight(weight, bias.shape[0], groups).float()
    y = F.conv2d(pad(_drop(x, gating).float(), padding), wide, bias.float(), stride, groups=groups)
    y = _drop(ACTS[act](y).to(x.dtype), out_keep)
    return y, _sum_rows(y, sums=sums)


def pooled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    act: str = "none",
    gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """conv2d without a residual, then 2x2 max-pooling: the map between the two is never written.

    Returns:
        The pooled y (N, C_out, OH // 2, OW // 2) and what conv2d sums up, of the map between.
    """
    y, _ = conv2d(x, weight, bias, stride=stride, padding=padding, act=act, gating=gating, out_keep=out_keep)
    return max_pool2d(y, 2), _sum_rows(y, 2, sums)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    act: str = "none",
    gating: Gating = None,
    out_keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear layer on kept features.

    Args:
        x: Input, (N, ..., C_in); axes between hold tokens or pixels, which share the instance's decision.
        weight: From pack_weight, (ceil(C_out / 32), C_in, 1, 1, 32).
        bias: (C_out,).
        act: One of ACTS.
        gating: Which input features are kept.
        out_keep: Which outputs are kept, bool (N, C_out); None: all.

    Returns:
        y (N, ..., C_out) and its partial sums of squares (N, S, C_out).
    """
    kept = _drop(x.movedim(-1, 1), gating).movedim(1, -1)
    wide = unpack_weight(weight, bias.shape[0])[:, :, 0, 0].float()
    y = ACTS[act](F.linear(kept.float(), wide, bias.float())).to(x.dtype)
    y = _drop(y.movedim(-1, 1), out_keep).movedim(1, -1)
    return y, _sum_rows(as_pixels(y))


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    act: str = "none",
    gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution; a dropped channel comes out as act(bias) everywhere.

    Args:
        x: Input, (N, C, H, W).
        weight: As in torch, (C, 1, kh, kw).
        bias: (C,).
        stride: One number or (vertical, horizontal).
        padding: One number, (vertical, horizontal) or (above, left, below, right).
        act: One of ACTS.
        gating: Which channels are kept.
        out_keep: Which outputs are kept, bool (N, C); None: all.
        sums: Whether plain sums come with the squares.
        zeros: Whether outputs that are dropped are written.

    Returns:
        y (N, C, OH, OW) and its sums of squares (N, 1, C), or (2, N, 1, C).
    """
    kept = pad(_drop(x, gating).float(), padding)
    y = ACTS[act](F.conv2d(kept, weight.float(), bias.float(), stride, groups=x.shape[1])).to(x.dtype)
    y = _drop(y, out_keep)
    return y, sum_squares(y, sums)


def expand_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    filters: Tensor,
    filter_bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] = 0,
    act: str = "none",
    filter_act: str = "none",
    gating: Gating = None,
    out_keep: Tensor | None = None,
    sums: bool = False,
    zeros: bool = True,
) -> tuple[Tensor, Tensor]:
    """A 1x1 conv2d, then the depthwise_conv2d that alone reads it: the map between the two is never written.

    Args:
        x: Input, (N, C_in, H, W).
        weight: From pack_weight, (ceil(C / 32), C_in, 1, 1, 32).
        bias: (C,).
        filters: As in torch, (C, 1, kh, kw).
        filter_bias: (C,).
        stride, padding: Of the filters, as in conv2d.
        act: Of the map between; one of ACTS.
        filter_act: Of the filtered one.
        gating: Which input channels are kept.
        out_keep: Which channels of the map between and of the filtered one are kept, bool (N, C); None: all.
        sums, zeros: As in depthwise_conv2d.

    Returns:
        y (N, C, OH, OW) and its sums of squares (N, 1, C), or (2, N, 1, C).
    """
    y, _ = conv2d(x, weight, bias, act=act, gating=gating, out_keep=out_keep)
    window = {"stride": stride, "padding": padding}
    return depthwise_conv2d(y, filters, filter_bias, **window, act=filter_act, out_keep=out_keep, sums=sums)  # type: ignore[arg-type]


def max_pool2d(
    x: Tensor,
    kernel: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Max-pooling of (N, C, H, W); stride is the kernel unless given."""
    return F.max_pool2d(x, kernel, stride, padding)


def sum_squares(x: Tensor, sums: bool = False) -> Tensor:
    """Sums of squares of a map that no engine function made: (N, C, H, W) -> (N, 1, C); with ``sums`` (2, N, 1, C)."""
    squares = x.float().square().sum((2, 3)).unsqueeze(1)
    return torch.stack([squares, x.float().sum((2, 3)).unsqueeze(1)]) if sums else squares


def keep_mask(squares: Tensor, alpha: float, beta: float) -> Tensor:
    """The decision behind Statistics(squares, alpha, beta): bool (N, C), True where the channel is kept."""
    return functional.keep_mask(squares.sum(1).sqrt(), alpha, beta)


def predict(
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor],
    keeps: Sequence[Tensor | None],
    positions: Sequence[int],
    size: int,
    alpha: float,
    beta: float,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms of a map before its layer runs, sqrt(P) relu(A B phi + b), and the CV gate's decision on them.

    phi has root mean squares and means of the channels of one map after the other, zero where a channel is dropped.

    Args:
        weight: A transposed, (R, C), float32 or bfloat16.
        bias: b, (C,), float32.
        statistics: Of the maps that are read, squares and sums, float32 (2, N, S, C_k).
        keeps: Which of their channels are kept, bool (N, C_k); None: all.
        positions: Their pixels.
        size: P, the pixels of the map.
        alpha, beta: As in Statistics.
        basis: B transposed, (F, R), of the type of ``weight``; None: there is none, and R = F.

    Returns:
        Norms, float32 (N, C), and which channels are kept, bool (N, C).
    """
    phi = torch.cat(
        [
            part if keep is None else torch.where(keep, part, 0.0)
            for of_map, keep, pixels in zip(statistics, keeps, positions, strict=True)
            for part in ((of_map[0].sum(1) / pixels).sqrt(), of_map[1].sum(1) / pixels)
        ],
        1,
    )
    known = phi if basis is None else phi @ basis.float()
    norms = torch.addmm(bias, known, weight.float()).relu() * math.sqrt(size)
    return norms, functional.keep_mask(norms, alpha, beta)
