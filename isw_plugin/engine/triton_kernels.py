# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics
"""The CUDA kernels in Triton. triton_launch.py says what their arguments are.

A program writes what no other writes, and loops end where a count on the device says: nothing is atomic, and the host
never waits.
"""

import triton
import triton.language as tl

__all__ = ["compact", "conv", "depthwise", "indices", "keep", "sum_squares"]


@triton.jit
def _survivors(gate, n, slots, channels, alpha, beta, MASK: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr):
    """Which channels of instance n survive: bool (CHANNELS,), False beyond the last."""
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    if MASK:
        survives = tl.load(gate + n.to(tl.int64) * channels + c, mask=inside, other=0) != 0
    else:
        gate += n.to(tl.int64) * slots * channels
        total = tl.zeros([CHANNELS], tl.float32)
        for first in range(0, slots, SLOTS):
            s = first + tl.arange(0, SLOTS)
            within = (s < slots)[:, None] & inside[None, :]
            total += tl.sum(tl.load(gate + s[:, None] * channels + c[None, :], mask=within, other=0.0), 0)
        norms = tl.sqrt_rn(total)
        mean = tl.zeros_like(norms) + tl.sum(norms, 0) / channels
        # Relative to the mean first: the squares of large norms overflow.
        relative = tl.where(inside & (mean != 0.0), tl.div_rn(norms, mean) - 1.0, 0.0)
        variation = tl.sqrt_rn(tl.zeros_like(norms) + tl.sum(relative * relative, 0) / channels)
        dropped = (variation > alpha) & (norms < beta * mean)
        survives = inside & ~dropped
    return survives


@triton.jit
def keep(
    gate, mask, slots, channels, alpha, beta, MASK: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Decisions as a mask; a program an instance."""
    n = tl.program_id(0)
    survives = _survivors(gate, n, slots, channels, alpha, beta, MASK, CHANNELS, SLOTS)
    c = tl.arange(0, CHANNELS)
    tl.store(mask + n.to(tl.int64) * channels + c, survives, mask=c < channels)


@triton.jit
def indices(
    gate, index, count, slots, channels, alpha, beta, MASK: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr
):
    """Decisions as a list of the surviving channels and its length; a program an instance."""
    n = tl.program_id(0)
    survives = _survivors(gate, n, slots, channels, alpha, beta, MASK, CHANNELS, SLOTS)
    ones = survives.to(tl.int32)
    place = tl.cumsum(ones, 0) - 1
    tl.store(index + n.to(tl.int64) * channels + place, tl.arange(0, CHANNELS), mask=survives)
    tl.store(count + n, tl.sum(ones, 0))


@triton.jit
def compact(
    x, index, count, y, width, pixels, channels, padded, x_n, x_c, x_h, x_w, tiles,
    WIDE: tl.constexpr, PIXELS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Surviving channels first, then zeros up to a multiple of DEPTH; what follows is not written."""
    program = tl.program_id(0)
    steps = padded // DEPTH
    tile, step = program // steps, program % steps
    n = tile // tiles
    kept = tl.load(count + n)
    if step * DEPTH < kept:
        k = step * DEPTH + tl.arange(0, DEPTH)
        p = tile % tiles * PIXELS + tl.arange(0, PIXELS)
        if WIDE:
            p = p.to(tl.int64)
        c = tl.load(index + n.to(tl.int64) * channels + k, mask=k < kept, other=0)
        if WIDE:
            c = c.to(tl.int64)
        source = (p // width * x_h + p % width * x_w)[:, None] + (c * x_c)[None, :]
        inside = (p < pixels)[:, None]
        values = tl.load(x + n.to(tl.int64) * x_n + source, mask=inside & (k < kept)[None, :], other=0.0)
        y += n.to(tl.int64) * pixels * padded
        tl.store(y + p[:, None] * padded + k[None, :], values, mask=inside)


@triton.jit
def _activate(v, ACT: tl.constexpr):
    """NaN passes, as in PyTorch."""
    if ACT == "silu":
        v = v * tl.sigmoid(v)
    elif ACT == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(0.7071067811865476 * v))
    elif ACT == "hardswish":
        gate = tl.where(v < -3.0, 0.0, v + 3.0)
        v = v * tl.where(gate > 6.0, 6.0, gate) / 6.0
    elif ACT != "none":
        v = tl.where(v < 0.0, 0.0, v)
        if ACT == "relu6":
            v = tl.where(v > 6.0, 6.0, v)
    return v


@triton.jit
def _finish(v, y, squares, at, inside, slot, c, within, ACT: tl.constexpr):
    """Activates and stores a tile, and the sums of squares of what was stored."""
    rounded = _activate(v, ACT).to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside)
    stored = tl.where(inside, rounded.to(tl.float32), 0.0)
    tl.store(squares + slot + c, tl.sum(stored * stored, 0), mask=within)


@triton.jit
def conv(
    x, weight, bias, index, count, residual, residual_keep, y, squares,
    height, width, out_width, pixels, c_in, c_out, weight_columns, slots, columns,
    x_n, x_c, x_h, x_w, r_n, r_c, r_h, r_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """A tile of one instance's output; with an index list x is compacted and weight rows are gathered."""
    TAPS: tl.constexpr = KH * KW
    program = tl.program_id(0)
    tile = program // columns
    n, slot = tile // slots, tile % slots
    p = slot * PIXELS + tl.arange(0, PIXELS)
    c = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    top, left = p // out_width * SH - PH, p % out_width * SW - PW
    x += n.to(tl.int64) * x_n
    weight += (c // BLOCK * (c_in * TAPS * BLOCK) + c % BLOCK)[None, :]
    depth = c_in
    if index is not None:
        depth = tl.load(count + n)
        index += n.to(tl.int64) * c_in
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for step in range(0, tl.cdiv(depth, DEPTH) * TAPS):
        tap = step % TAPS
        k = step // TAPS * DEPTH + tl.arange(0, DEPTH)
        if WIDE:
            k = k.to(tl.int64)
        inside = k < depth
        row, column = top + tap // KW, left + tap % KW
        on_map = ((p < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
        at = (row * x_h + column * x_w)[:, None] + (k * x_c)[None, :]
        if index is not None:
            a = tl.load(x + at, mask=on_map, other=0.0)
            source = tl.load(index + k, mask=inside, other=0)
        else:
            a = tl.load(x + at, mask=on_map & inside[None, :], other=0.0)
            source = k
        taken = inside[:, None] & (c < weight_columns)[None, :]
        w = tl.load(weight + (source * (TAPS * BLOCK) + tap * BLOCK)[:, None], mask=taken, other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    within = c < c_out
    total += tl.load(bias + c, mask=within, other=0.0).to(tl.float32)[None, :]
    inside_y = (p < pixels)[:, None] & within[None, :]
    if residual is not None:
        read = inside_y
        if residual_keep is not None:
            read = read & (tl.load(residual_keep + n.to(tl.int64) * c_out + c, mask=within, other=0) != 0)[None, :]
        at = (p // out_width * r_h + p % out_width * r_w)[:, None] + (c * r_c)[None, :]
        total += tl.load(residual + n.to(tl.int64) * r_n + at, mask=read, other=0.0).to(tl.float32)
    y += n.to(tl.int64) * pixels * c_out
    _finish(total, y, squares, p[:, None] * c_out + c[None, :], inside_y, tile.to(tl.int64) * c_out, c, within, ACT)


@triton.jit
def depthwise(
    x, weight, bias, survives, y, squares, height, width, out_width, pixels, channels, slots, columns,
    x_n, x_c, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACT: tl.constexpr, WIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A tile of one instance's output; channels that do not survive are not read."""
    program = tl.program_id(0)
    tile = program // columns
    n, slot = tile // slots, tile % slots
    p = slot * PIXELS + tl.arange(0, PIXELS)
    c = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    within = c < channels
    read = within
    if survives is not None:
        read = read & (tl.load(survives + n.to(tl.int64) * channels + c, mask=within, other=0) != 0)
    top, left = p // out_width * SH - PH, p % out_width * SW - PW
    x += n.to(tl.int64) * x_n
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for tap in range(0, KH * KW):
        row, column = top + tap // KW, left + tap % KW
        on_map = (p < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = (row * x_h + column * x_w)[:, None] + (c * x_c)[None, :]
        a = tl.load(x + at, mask=on_map[:, None] & read[None, :], other=0.0).to(tl.float32)
        total += a * tl.load(weight + c * (KH * KW) + tap, mask=read, other=0.0).to(tl.float32)[None, :]
    total += tl.load(bias + c, mask=within, other=0.0).to(tl.float32)[None, :]
    inside = (p < pixels)[:, None] & within[None, :]
    y += n.to(tl.int64) * pixels * channels
    _finish(total, y, squares, p[:, None] * channels + c[None, :], inside, tile.to(tl.int64) * channels, c, within, ACT)


@triton.jit
def sum_squares(
    x, squares, width, pixels, channels, slots, columns, x_n, x_c, x_h, x_w,
    WIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Sums of squares of a tile of one instance."""
    program = tl.program_id(0)
    tile = program // columns
    n = tile // slots
    p = tile % slots * PIXELS + tl.arange(0, PIXELS)
    c = program % columns * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        p = p.to(tl.int64)
        c = c.to(tl.int64)
    within = c < channels
    at = (p // width * x_h + p % width * x_w)[:, None] + (c * x_c)[None, :]
    inside = (p < pixels)[:, None] & within[None, :]
    values = tl.load(x + n.to(tl.int64) * x_n + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + tile.to(tl.int64) * channels + c, tl.sum(values * values, 0), mask=within)
