"""What every CUDA kernel is launched with: grid, arguments and compile-time constants from shapes and strides alone.

Activations may have any strides; channels_last is what the kernels are fast on and what they write. N instances, C
channels, a gate as operators take it: a keep mask (N, C) or partial sums of squares (N, S, C).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import isw_plugin.engine.triton_kernels as kernels
from isw_plugin.engine.reference import BLOCK
from isw_plugin.engine.tiles import conv_tiles, pixel_slots, pixel_tile, step_depth

__all__ = ["Launch", "compact", "conv", "depthwise", "indices", "keep", "precision", "sum_squares"]

_ROW_CHANNELS = 64  # channels of a program that has nothing to multiply
_COMPACT_PIXELS = 64
_GATE_ELEMENTS = 8192  # sums that a decision reads at once


@dataclass(frozen=True)
class Launch:
    """A kernel and everything it is called with.

    Attributes:
        kernel: A function of triton_kernels.
        programs: Size of its grid.
        arguments: By name, the compile-time constants among them.
        warps: Of a program.
        stages: Of its pipeline.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler is told."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Enqueues the kernel on the current stream, where it has anything to do."""
        if self.programs:
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _strides(x: Tensor, name: str) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", x.stride(), strict=True)}


def _reach(x: Tensor) -> int:
    """Elements from an instance's first to its last."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))


def _wide(*maps: Tensor) -> bool:
    """Whether offsets within an instance need 64 bits."""
    return max(map(_reach, maps)) >= 2**31 - 2**16


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as cuDNN is allowed to."""
    allowed = dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if allowed else "ieee"


def _decision(gate: Tensor, alpha: float, beta: float) -> dict[str, Any]:
    channels, mask = gate.shape[-1], gate.dtype == torch.bool
    slots = 1 if mask else gate.shape[1]
    wide = _power_of_two(channels)
    return {
        "gate": gate,
        "slots": slots,
        "channels": channels,
        "alpha": alpha,
        "beta": beta,
        "MASK": mask,
        "CHANNELS": wide,
        "SLOTS": min(_power_of_two(slots), max(1, _GATE_ELEMENTS // wide)),
    }


def _decision_warps(channels: int) -> int:
    return min(32, max(4, _power_of_two(channels) // 512))


def keep(gate: Tensor, alpha: float, beta: float, mask: Tensor) -> Launch:
    """Writes decisions into mask, bool (N, C)."""
    arguments = _decision(gate, alpha, beta) | {"mask": mask}
    return Launch(kernels.keep, gate.shape[0], arguments, _decision_warps(gate.shape[-1]))


def indices(gate: Tensor, alpha: float, beta: float, index: Tensor, count: Tensor) -> Launch:
    """Writes the surviving channels into index, int32 (N, C), and their number into count, int32 (N,)."""
    arguments = _decision(gate, alpha, beta) | {"index": index, "count": count}
    return Launch(kernels.indices, gate.shape[0], arguments, _decision_warps(gate.shape[-1]))


def compact(x: Tensor, index: Tensor, count: Tensor, y: Tensor) -> Launch:
    """Writes surviving channels of x (N, C, H, W) into y (N, padded C, H, W), channels_last."""
    n, channels, height, width = x.shape
    padded, pixels, depth = y.shape[1], height * width, step_depth(channels, x.element_size())
    rows = min(_COMPACT_PIXELS, max(16, _power_of_two(pixels)))
    tiles = -(-pixels // rows)
    arguments = {
        **{"x": x, "index": index, "count": count, "y": y},
        **{"width": width, "pixels": pixels, "channels": channels, "padded": padded, "tiles": tiles},
        **_strides(x, "x"),
        **{"WIDE": _wide(x, y), "PIXELS": rows, "DEPTH": depth},
    }
    return Launch(kernels.compact, n * tiles * (padded // depth), arguments)


def _window(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> dict[str, int]:
    return dict(zip(("KH", "KW", "SH", "SW", "PH", "PW"), (*kernel, *stride, *padding), strict=True))


def _residual(residual: Tensor | None, residual_keep: Tensor | None) -> dict[str, Any]:
    strides = _strides(residual, "r") if residual is not None else dict.fromkeys(("r_n", "r_c", "r_h", "r_w"), 0)
    return {"residual": residual, "residual_keep": residual_keep, **strides}


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    survivors: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    residual_keep: Tensor | None,
    y: Tensor,
    squares: Tensor,
) -> Launch:
    """Convolution, bias, residual, activation and statistics.

    Args:
        x: (N, C_in, H, W), or with survivors as `compact` wrote it.
        weight: From pack_weight.
        bias: (C_out,).
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        act: One of reference.ACTS.
        survivors: Index list and count.
        residual: (N, C_out, OH, OW).
        residual_keep: Its mask, bool (N, C_out).
        y: Output, channels_last.
        squares: Output, (N, pixel_slots(OH * OW), C_out).
    """
    n, c_out, pixels = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    c_in, maps = weight.shape[1], [x, y] if residual is None else [x, y, residual]
    tiles = conv_tiles(n, pixels, c_in, c_out, x.element_size())
    index, count = survivors or (None, None)
    columns = -(-c_out // tiles.channels)
    arguments = {
        **{"x": x, "weight": weight, "bias": bias, "index": index, "count": count, "y": y, "squares": squares},
        **_residual(residual, residual_keep),
        **{"height": x.shape[2], "width": x.shape[3], "out_width": y.shape[3], "pixels": pixels},
        **{"c_in": c_in, "c_out": c_out, "weight_columns": weight.shape[0] * BLOCK},
        **{"slots": squares.shape[1], "columns": columns},
        **_strides(x, "x"),
        **_window(weight.shape[2:4], stride, padding),
        **{"ACT": act, "BLOCK": BLOCK, "WIDE": _wide(*maps) or weight.numel() >= 2**31},
        **{"PRECISION": precision(x.dtype)},
        **{"PIXELS": tiles.pixels, "CHANNELS": tiles.channels, "DEPTH": tiles.depth},
    }
    # The compiler splits stages between an index and what it points to: both forms load two steps ahead.
    stages = 3 if index is None else 5
    return Launch(kernels.conv, n * squares.shape[1] * columns, arguments, tiles.warps, stages)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    survives: Tensor | None,
    y: Tensor,
    squares: Tensor,
) -> Launch:
    """Depthwise convolution, bias, activation and statistics; arguments as for `conv`, survives a mask (N, C)."""
    n, channels, pixels = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    columns = -(-channels // _ROW_CHANNELS)
    arguments = {
        **{"x": x, "weight": weight, "bias": bias, "survives": survives, "y": y, "squares": squares},
        **{"height": x.shape[2], "width": x.shape[3], "out_width": y.shape[3], "pixels": pixels},
        **{"channels": channels, "slots": squares.shape[1], "columns": columns},
        **_strides(x, "x"),
        **_window(weight.shape[2:4], stride, padding),
        **{"ACT": act, "WIDE": _wide(x, y), "PIXELS": pixel_tile(pixels), "CHANNELS": _ROW_CHANNELS},
    }
    return Launch(kernels.depthwise, n * squares.shape[1] * columns, arguments, warps=8)


def sum_squares(x: Tensor, squares: Tensor) -> Launch:
    """Writes sums of squares of x (N, C, H, W) into squares (N, pixel_slots(H * W), C)."""
    n, channels, height, width = x.shape
    pixels, columns = height * width, -(-channels // _ROW_CHANNELS)
    arguments = {
        **{"x": x, "squares": squares, "width": width, "pixels": pixels, "channels": channels},
        **{"slots": pixel_slots(pixels), "columns": columns},
        **_strides(x, "x"),
        **{"WIDE": _wide(x), "PIXELS": pixel_tile(pixels), "CHANNELS": _ROW_CHANNELS},
    }
    return Launch(kernels.sum_squares, n * pixel_slots(pixels) * columns, arguments, warps=8)
