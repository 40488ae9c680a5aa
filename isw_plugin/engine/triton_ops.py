"""The operators of ops.py on CUDA tensors: reference.py's results in float32, float16 and bfloat16.

Products are summed, biased, added to and activated in float32 and rounded once; statistics are those of the rounded
output. Outputs are channels_last. Nothing waits for the device, and workspace depends on shapes alone, so calls can be
captured into a CUDA graph after a first call has compiled the kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import isw_plugin.engine.triton_launch as launch
from isw_plugin.engine.checks import check_act, check_like, check_window
from isw_plugin.engine.reference import BLOCK
from isw_plugin.engine.tiles import output_size, padded_channels, pixel_slots
from isw_plugin.errors import EngineInputError

__all__ = ["conv2d", "depthwise_conv2d", "keep_mask", "pooled_conv2d", "sum_squares"]


def _outputs(x: Tensor, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y = torch.empty((x.shape[0], channels, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    slots = pixel_slots(size[0] * size[1])
    return y, torch.empty((x.shape[0], slots, channels), dtype=torch.float32, device=x.device)


def _checked_gate(gate: Tensor, n: int, channels: int, x: Tensor) -> Tensor:
    """The gate, contiguous; a kernel would read beyond one of another shape."""
    dims, kind = (2, "keep mask (N, C)") if gate.dtype == torch.bool else (3, "float32 statistics (N, S, C)")
    fits = gate.dim() == dims and (gate.shape[0], gate.shape[-1]) == (n, channels) and gate.device == x.device
    if not fits or gate.dtype not in (torch.bool, torch.float32) or 0 in gate.shape[1:-1]:
        raise EngineInputError(
            f"gate: expected a {kind} for {n} instances and {channels} channels on {x.device}, "
            f"got {gate.dtype} {tuple(gate.shape)} on {gate.device}"
        )
    return gate.contiguous()


def _mask(gate: Tensor | None, alpha: float, beta: float, n: int, channels: int, x: Tensor) -> Tensor | None:
    """The keep mask behind a gate."""
    if gate is None:
        return None
    gate = _checked_gate(gate, n, channels, x)
    if gate.dtype == torch.bool:
        return gate
    mask = torch.empty((n, channels), dtype=torch.bool, device=x.device)
    launch.keep(gate, alpha, beta, mask).run()
    return mask


def _compacted(x: Tensor, gate: Tensor, alpha: float, beta: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x with surviving channels first, their index list and count."""
    n, channels, height, width = x.shape
    index = torch.empty((n, channels), dtype=torch.int32, device=x.device)
    count = torch.empty((n,), dtype=torch.int32, device=x.device)
    launch.indices(_checked_gate(gate, n, channels, x), alpha, beta, index, count).run()
    shape = (n, padded_channels(channels, x.element_size()), height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch.compact(x, index, count, y).run()
    return y, (index, count)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    gate: Tensor | None,
    alpha: float,
    beta: float,
    residual: Tensor | None,
    residual_gate: Tensor | None,
    residual_alpha: float,
    residual_beta: float,
) -> tuple[Tensor, Tensor]:
    """reference.conv2d with gates as `torch.ops.isw.conv2d` takes them: a keep mask or sums of squares."""
    check_like(x, x, "x", (None,) * 4)
    n, channels = x.shape[0], bias.shape[0]
    check_like(x, bias, "bias", (None,))
    check_like(x, weight, "weight", (-(-channels // BLOCK), x.shape[1], None, None, BLOCK))
    check_window(x, weight.shape[2:4], stride, padding)
    check_act(act)
    size = output_size(x.shape[2:], weight.shape[2:4], stride, padding)
    if residual is not None:
        check_like(x, residual, "residual", (n, channels, *size))
    y, squares = _outputs(x, channels, size)
    if y.numel() == 0:
        return y, squares
    if tuple(weight.shape[2:4]) == (1, 1) and not any(padding):
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)  # pixels that are skipped need not be compacted
    survivors = None
    if gate is not None:
        x, survivors = _compacted(x, gate, alpha, beta)
    keep = _mask(residual_gate, residual_alpha, residual_beta, n, channels, x) if residual is not None else None
    launch.conv(
        x, weight.contiguous(), bias.contiguous(), stride, padding, act, survivors, residual, keep, y, squares
    ).run()
    return y, squares


def pooled_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    gate: Tensor | None,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """reference.pooled_conv2d, the map between written: no kernel pools on the way yet."""
    y, squares = conv2d(x, weight, bias, stride, padding, act, gate, alpha, beta, None, None, 0.0, 0.0)
    return torch.max_pool2d(y, 2), squares


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    act: str,
    gate: Tensor | None,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """reference.depthwise_conv2d with the gate as `torch.ops.isw.depthwise_conv2d` takes it."""
    check_like(x, x, "x", (None,) * 4)
    n, channels = x.shape[:2]
    check_like(x, weight, "weight", (channels, 1, None, None))
    check_like(x, bias, "bias", (channels,))
    check_window(x, weight.shape[2:4], stride, padding)
    check_act(act)
    y, squares = _outputs(x, channels, output_size(x.shape[2:], weight.shape[2:4], stride, padding))
    if y.numel():
        keep = _mask(gate, alpha, beta, n, channels, x)
        weight, bias = weight.contiguous(), bias.contiguous()
        launch.depthwise(x, weight, bias, stride, padding, act, keep, y, squares).run()
    return y, squares


def sum_squares(x: Tensor) -> Tensor:
    """reference.sum_squares in pixel_slots(H * W) partial sums."""
    check_like(x, x, "x", (None,) * 4)
    shape = (x.shape[0], pixel_slots(x.shape[2] * x.shape[3]), x.shape[1])
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    squares = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch.sum_squares(x, squares).run()
    return squares


def keep_mask(squares: Tensor, alpha: float, beta: float) -> Tensor:
    """reference.keep_mask."""
    check_like(squares, squares, "squares", (None,) * 3)
    n, channels = squares.shape[0], squares.shape[2]
    if n == 0 or channels == 0:
        return torch.empty((n, channels), dtype=torch.bool, device=squares.device)
    squares = _checked_gate(squares, n, channels, squares)
    mask = torch.empty((n, channels), dtype=torch.bool, device=squares.device)
    launch.keep(squares, alpha, beta, mask).run()
    return mask
