"""Tile sizes of the CUDA kernels: functions of shapes alone, so that results and CUDA graphs do not depend on data."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tiles", "conv_tiles", "output_size", "padded_channels", "pixel_slots", "pixel_tile", "step_depth"]

_PIXELS = (128, 64, 32, 16)
_CHANNELS = (128, 64, 32)
_OVERHEAD = 32  # a tile of b rows is taken to cost b + this: small tiles reuse less of what they load
_PROGRAMS = 128  # about the multiprocessors of a large GPU


@dataclass(frozen=True)
class Tiles:
    """Output pixels, output channels and input channels of a step of a program, and its warps."""

    pixels: int
    channels: int
    depth: int
    warps: int


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """(OH, OW) of a window that slides over a map of this (H, W)."""
    height = (size[0] + 2 * padding[0] - kernel[0]) // stride[0] + 1
    return height, (size[1] + 2 * padding[1] - kernel[1]) // stride[1] + 1


def _cheapest(size: int, tiles: Sequence[int]) -> int:
    return min(tiles, key=lambda tile: -(-size // tile) * (tile + _OVERHEAD))


def pixel_tile(pixels: int) -> int:
    """Pixels of one instance that a program takes."""
    return _cheapest(pixels, _PIXELS)


def pixel_slots(pixels: int) -> int:
    """Partial sums per instance and channel: one for every tile of a map with so many pixels."""
    return max(1, -(-pixels // pixel_tile(pixels)))


def step_depth(c_in: int, itemsize: int) -> int:
    """Input channels of a step: 128 bytes, fewer where there are fewer channels."""
    depth = 128 // itemsize
    while depth > 16 and depth >= 2 * c_in:
        depth //= 2
    return depth


def padded_channels(c_in: int, itemsize: int) -> int:
    """Columns of a compacted map: whole steps, so that rows start on 16 bytes and the last step needs no mask."""
    depth = step_depth(c_in, itemsize)
    return -(-c_in // depth) * depth


def conv_tiles(n: int, pixels: int, c_in: int, c_out: int, itemsize: int) -> Tiles:
    """Tiles of a convolution.

    Args:
        n: Instances.
        pixels: Of an output map.
        c_in: Input channels.
        c_out: Output channels.
        itemsize: Bytes of an input element.
    """
    rows, columns = pixel_tile(pixels), _cheapest(c_out, _CHANNELS)
    while columns > min(_CHANNELS) and n * pixel_slots(pixels) * -(-c_out // columns) < _PROGRAMS:
        columns //= 2
    large = rows * columns >= 128 * 128
    return Tiles(rows, columns, step_depth(c_in, itemsize), warps=8 if large else 4)
