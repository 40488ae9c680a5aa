"""Random calls of every operator on every instruction set: right, or refused.

`ISW_FUZZ_CALLS=100000 pytest -m slow tests/ops/test_fuzz.py` makes so many calls on each instruction set. A case
depends on ISW_FUZZ_SEED and its number alone; ISW_FUZZ_FIRST is the first number.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin import ops
from isw_plugin.ops import Statistics, cpu, pack_weight, reference

SEED = os.environ.get("ISW_FUZZ_SEED", "0")
FIRST = int(os.environ.get("ISW_FUZZ_FIRST", "0"))
MOST_MACS = 300_000  # of a call
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(params=cpu.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


class Draw(random.Random):
    """One case: its numbers, tensors, gates and windows."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{SEED} {number}")
        self.torch = torch.Generator().manual_seed(self.getrandbits(60))
        self.dtype = self.choice([FLOAT32, FLOAT32, BFLOAT16])

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.torch).to(dtype or self.dtype)

    def feature(self, *shape: int) -> Tensor:
        """Channels of different sizes, in one of the layouts that a map may have."""
        x = self.tensor(*shape) * self.tensor(1, shape[1], *[1] * (len(shape) - 2))
        layouts: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.mT.contiguous().mT,
            lambda x: torch.stack([x, x], -1)[..., 0],
        ]
        return self.choice(layouts)(x) if len(shape) == 4 and self.random() < 0.2 else x

    def gating(self, x: Tensor, axis: int = 1) -> tuple[Any, Tensor | None]:
        """What the operator takes, and the keep mask that it stands for."""
        shape = (x.shape[0], x.shape[axis])
        kind = self.choice(["none", "mask", "bytes", "transposed", "statistics", "nothing"])
        keep = self.tensor(*shape, dtype=FLOAT32) > self.choice([-9.0, -1.0, 0.0, 1.0])
        if kind == "none":
            return None, None
        if kind == "statistics":
            squares = self.tensor(shape[0], self.randint(1, 5), shape[1], dtype=FLOAT32) ** 4
            statistics = Statistics(squares, self.choice([0.0, 0.3, 0.9]), self.choice([0.0, 0.6, 1.0, 1.5]))
            return statistics, ops.keep_mask(squares, statistics.alpha, statistics.beta)
        if kind == "bytes":  # as numpy and OpenCV write them
            given = torch.randint(1, 256, shape, generator=self.torch, dtype=torch.uint8) * keep
            return given.view(torch.bool), keep
        return (keep.T.contiguous().T if kind == "transposed" else keep & (kind != "nothing")), keep & (
            kind != "nothing"
        )

    def out_keep(self, n: int, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """Which outputs are kept, in bytes that need not be 1, and in plain ones."""
        keep = self.tensor(n, channels, dtype=FLOAT32) > self.choice([-9.0, -1.0, 0.0, 1.0, 9.0])
        given = torch.randint(1, 256, keep.shape, generator=self.torch, dtype=torch.uint8) * keep
        return self.choice([(None, None), (keep, keep), (given.view(torch.bool), keep)])

    def window(self) -> tuple[tuple[int, ...], ...]:
        """Map, kernel, stride and padding, which may be more than the kernel."""
        size = self.choice([(self.randint(1, 24), self.randint(1, 72)), (n := self.choice([1, 2, 4, 7, 8, 14, 16]), n)])
        kernel = self.choice([(1, 1), (3, 3), (3, 3), (self.randint(1, 7), self.randint(1, 7))])
        stride = self.choice([(1, 1), (2, 2), (self.randint(1, 4), self.randint(1, 4))])
        same = (kernel[0] // 2, kernel[1] // 2)
        padding = self.choice([same, (self.randint(0, kernel[0] + 3), self.randint(0, kernel[1] + 3))])
        fitting = [max(p, -(-(k - s) // 2)) for p, k, s in zip(padding, kernel, size, strict=True)]
        if self.random() < 0.2:  # as many more behind
            fitting += [border + self.randint(0, 3) for border in fitting]
        return size, kernel, stride, tuple(fitting)

    def channels(self, macs_of_one: int) -> tuple[int, int]:
        for _ in range(20):
            inputs, outputs = (self.choice([1, 2, 3, 7, 16, 17, 33, 64, 130, 390]) for _ in range(2))
            if inputs * outputs * macs_of_one <= MOST_MACS:
                return inputs, outputs
        return 1, 1


def check(found: Any, wanted: Any, bound: float, unread: Tensor | None = None) -> None:
    """Equal but for rounding, where no sum of absolute values is above the bound, and but for unread outputs."""
    (y, squares), (wanted_y, wanted_squares) = found, wanted
    if unread is not None:
        y = y.masked_fill(unread[..., None, None], 0.0)
    sums = wanted_sums = None
    if squares.dim() == 4:
        assert squares.shape == wanted_squares.shape
        (squares, sums), (wanted_squares, wanted_sums) = squares, wanted_squares
    assert (y.shape, y.dtype, squares.shape) == (wanted_y.shape, wanted_y.dtype, wanted_squares.shape)
    if not y.numel():
        return
    error, share = 1e-5 * bound, 1e-5 if y.dtype == FLOAT32 else 2**-7
    torch.testing.assert_close(y, wanted_y, rtol=share, atol=error)
    pixels = y.numel() / squares[:, 0].numel()
    allowed = 2.1 * share * wanted_squares + 2 * error * (4 * pixels * wanted_squares).sqrt() + 4 * pixels * error**2
    assert ((squares - wanted_squares).abs() <= allowed + 1e-30).all()
    if sums is not None:
        share = 2.1 * share * (4 * pixels * wanted_squares).sqrt() + 4 * pixels * error
        assert ((sums - wanted_sums).abs() <= share + 1e-30).all()


def unread(zeros: bool, out_keep: Tensor | None) -> Tensor | None:
    return None if zeros or out_keep is None else ~out_keep


def bound_of(x: Tensor, weight: Tensor, *added: Tensor) -> float:
    largest = [each.nan_to_num().abs().max() if each.numel() else torch.zeros(()) for each in (x, *added)]
    return float(largest[0] * weight.abs().flatten(1).sum(1).max() + sum(largest[1:]))


def hide(draw: Draw, x: Tensor, keep: Tensor | None, axis: int = 1) -> Tensor:
    """Dropped channels may hold anything."""
    if keep is None or draw.random() < 0.7:
        return x
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    shape[axis] = x.shape[axis]
    return x.masked_fill(~keep.view(shape), draw.choice([float("nan"), float("inf"), 1e30]))


def convolution(draw: Draw, name: str) -> None:
    size, kernel, stride, padding = draw.window()
    n, groups = draw.choice([0, 1, 1, 2, 3, 5]), draw.choice([1, 2, 3, 5]) if name == "grouped_conv2d" else 1
    draw.dtype = FLOAT32 if name == "grouped_conv2d" else draw.dtype
    out = reference_size(size, kernel, stride, padding)
    if name == "pooled_conv2d" and min(out) < 2:
        return
    inputs, outputs = draw.channels(
        max(1, n) * groups * max(out[0] * out[1] * kernel[0] * kernel[1], size[0] * size[1])
    )
    x, bias = draw.feature(n, groups * inputs, *size), draw.tensor(groups * outputs, dtype=FLOAT32)
    weight = draw.tensor(groups * outputs, inputs, *kernel) / (inputs * kernel[0] * kernel[1]) ** 0.5
    gating, keep = draw.gating(x)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "act": draw.choice(list(reference.ACTS))}
    others: dict[str, Any] = {}
    if name == "conv2d" and draw.random() < 0.4:
        residual = draw.feature(n, outputs, *out)
        given, residual_keep = draw.gating(residual)
        options["residual"], options["residual_gating"] = hide(draw, residual, residual_keep), given
        others = {"residual_gating": residual_keep}
    more = (groups,) if name == "grouped_conv2d" else ()
    options["out_keep"], others["out_keep"] = draw.out_keep(n, groups * outputs)
    options["sums"], options["zeros"] = draw.random() < 0.5, draw.random() < 0.5
    args = hide(draw, x, keep), pack_weight(weight, groups), bias, *more
    wanted = getattr(reference, name)(*args, **options | others, gating=keep)
    bound = bound_of(x, weight, bias, *[residual] if "residual" in options else [])
    check(
        getattr(ops, name)(*args, **options, gating=gating), wanted, bound, unread(options["zeros"], others["out_keep"])
    )


def reference_size(size: Any, kernel: Any, stride: Any, padding: Any) -> tuple[int, int]:
    behind = padding[-2:]
    numbers = [
        (s + p + q - k) // t + 1 for s, k, t, p, q in zip(size, kernel, stride, padding[:2], behind, strict=True)
    ]
    return numbers[0], numbers[1]


def depthwise(draw: Draw) -> None:
    size, kernel, stride, padding = draw.window()
    x = draw.feature(draw.choice([0, 1, 2, 3]), draw.choice([1, 3, 5, 8, 13]), *size)
    weight, bias = draw.tensor(x.shape[1], 1, *kernel), draw.tensor(x.shape[1], dtype=FLOAT32)
    gating, keep = draw.gating(x)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "act": draw.choice(list(reference.ACTS))}
    args = hide(draw, x, keep), weight, bias
    options["out_keep"], out_keep = draw.out_keep(x.shape[0], x.shape[1])
    options["sums"], options["zeros"] = draw.random() < 0.5, draw.random() < 0.5
    wanted = reference.depthwise_conv2d(*args, **options | {"out_keep": out_keep}, gating=keep)
    found = ops.depthwise_conv2d(*args, **options, gating=gating)
    check(found, wanted, bound_of(x, weight, bias), unread(options["zeros"], out_keep))


def expanded(draw: Draw) -> None:
    size, kernel, stride, padding = draw.window()
    n, inputs, channels = draw.choice([0, 1, 2, 3]), draw.choice([1, 3, 8, 40]), draw.choice([1, 5, 8, 13, 40])
    x = draw.feature(n, inputs, *size)
    weight, bias = draw.tensor(channels, inputs, 1, 1) / inputs**0.5, draw.tensor(channels, dtype=FLOAT32)
    filters, filter_bias = draw.tensor(channels, 1, *kernel), draw.tensor(channels, dtype=FLOAT32)
    gating, keep = draw.gating(x)
    acts = {name: draw.choice(list(reference.ACTS)) for name in ("act", "filter_act")}
    options: dict[str, Any] = {"stride": stride, "padding": padding} | acts
    args = hide(draw, x, keep), pack_weight(weight), bias, filters, filter_bias
    options["out_keep"], out_keep = draw.out_keep(n, channels)
    options["sums"], options["zeros"] = draw.random() < 0.5, draw.random() < 0.5
    wanted = reference.expand_depthwise_conv2d(*args, **options | {"out_keep": out_keep}, gating=keep)
    found = ops.expand_depthwise_conv2d(*args, **options, gating=gating)
    between = torch.tensor(bound_of(x, weight, bias))
    share = 2**9 if draw.dtype == BFLOAT16 else 1  # the map between may be rounded to a neighbour
    check(found, wanted, share * bound_of(between, filters, filter_bias), unread(options["zeros"], out_keep))


def linear(draw: Draw) -> None:
    between = [draw.randint(0, 20) for _ in range(draw.choice([0, 0, 1, 2]))]
    x = draw.tensor(draw.choice([0, 1, 2, 3, 9]), *between, draw.choice([1, 3, 16, 37, 200, 500]))
    weight, bias = draw.tensor(draw.choice([1, 5, 32, 70]), x.shape[-1]), draw.tensor(1, dtype=FLOAT32)
    gating, keep = draw.gating(x, -1)
    args = hide(draw, x, keep, -1), pack_weight(weight), bias.expand(len(weight))
    given, out_keep = draw.out_keep(x.shape[0], len(weight))
    options: Any = {"act": draw.choice(list(reference.ACTS)), "out_keep": given}
    wanted = reference.linear(*args, **options | {"out_keep": out_keep}, gating=keep)
    check(ops.linear(*args, **options, gating=gating), wanted, bound_of(x, weight, bias))


def pooling(draw: Draw) -> None:
    size, kernel, stride, padding = draw.window()
    half = (min(padding[0], kernel[0] // 2), min(padding[1], kernel[1] // 2))
    if any(s + 2 * p < k for s, p, k in zip(size, half, kernel, strict=True)):
        return
    x = draw.feature(draw.choice([0, 1, 2]), draw.choice([1, 3, 8]), *size)
    x = x.masked_fill(draw.tensor(*x.shape) > 2, draw.choice([float("nan"), -float("inf"), 0.0]))
    wanted = reference.max_pool2d(x, kernel, stride=stride, padding=half)
    found = ops.max_pool2d(x, kernel, stride=stride, padding=half)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ops.sum_squares(x), reference.sum_squares(x), rtol=1e-5, atol=0, equal_nan=True)


def decisions(draw: Draw) -> None:
    """Of norms that float32 can keep, near its ends too, but for ties."""
    norms = draw.tensor(draw.choice([0, 1, 2, 5]), draw.choice([1, 2, 3, 17, 64, 600]), dtype=FLOAT32).abs()
    squares = (norms * 10 ** draw.choice([-20.5, -17.0, 0.0, 10.0, 17.5])).square()[:, None]
    alpha, beta = draw.choice([0.0, 0.3, 0.7, 1.0]), draw.choice([0.0, 0.5, 1.0, 1.9])
    exact = squares.double().sum(1).sqrt()
    mean = exact.mean(1, keepdim=True)
    variation = (exact / mean - 1).square().mean(1, keepdim=True).sqrt()
    near = ((exact - beta * mean).abs() <= 1e-5 * mean) | ((variation - alpha).abs() <= 1e-5)
    wanted = ~((variation > alpha) & (exact < beta * mean))
    for found in (ops.keep_mask(squares, alpha, beta), reference.keep_mask(squares, alpha, beta)):
        assert torch.equal(found | near, wanted | near)


def heads(draw: Draw) -> None:
    n, outputs = draw.choice([0, 1, 2, 7]), draw.choice([1, 7, 16, 33, 130, 260])
    weight_of = draw.choice([FLOAT32, BFLOAT16])
    known: list[Tensor] = []
    keeps: list[Tensor | None] = []
    plain: list[Tensor | None] = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        slots, channels = draw.randint(1, 4), draw.choice([0, 1, 5, 64, 150])
        numbers = draw.tensor(2, n, slots, channels, dtype=FLOAT32)
        numbers[0] = numbers[0] ** 4
        given, keep = draw.out_keep(n, channels)
        if keep is not None and draw.random() < 0.3:
            numbers = numbers.masked_fill(~keep[:, None], draw.choice([float("nan"), float("inf")]))
        known.append(numbers)
        keeps, plain = [*keeps, given], [*plain, keep]
    positions = [draw.randint(1, 3000) for _ in known]
    features = 2 * sum(each.shape[3] for each in known)
    rank = draw.choice([None, None, 1, 16, 40])
    basis = None if rank is None else draw.tensor(features, rank, dtype=weight_of) / max(1, features) ** 0.5
    weight = draw.tensor(features if rank is None else rank, outputs, dtype=weight_of)
    basis = None if basis is None else basis.to(weight_of)
    head = weight, draw.tensor(outputs, dtype=FLOAT32)
    others = positions, draw.randint(1, 3000), draw.choice([0.0, 0.3]), draw.choice([0.0, 1.0, 1.5]), basis
    norms, keep = ops.predict(*head, known, keeps, *others)
    wanted, decided = reference.predict(*head, known, plain, *others)
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    torch.testing.assert_close(norms, wanted, rtol=1e-4, atol=1e-3 * scale)
    assert (keep.shape, keep.dtype) == (decided.shape, torch.bool)
    if others[2] == 0:
        near = (wanted - others[3] * wanted.mean(1, keepdim=True)).abs() <= 3e-3 * scale
        assert torch.equal(keep | near, decided | near)


def hostile(draw: Draw) -> None:
    """Operators themselves, past the checks in Python: any answer, but the process lives."""
    sizes = [-(2**63), -1, 0, 1, 2, 3, 2**24 + 1, 2**31, 2**58, 2**63 - 1]
    x, bias = draw.tensor(2, 3, 6, 6), torch.zeros(5)
    tensors = [
        x,
        x[:0],
        x[:, :0],
        x[:, :, :0],
        x.double(),
        x.to_sparse(),
        x.to("meta"),
        x[0],
        pack_weight(x),
        bias,
        bias[:3],
    ]
    tensors += [torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1, 3), torch.ones(2, 0, 3), torch.ones(3, 1, 3, 3)]
    window = [[1, 1], [1, 1], "relu"]
    gate = [draw.choice(tensors), 0.0, draw.choice([1.0, float("nan")])] if draw.random() < 0.5 else [None, 0.0, 1.0]
    packed = pack_weight(draw.tensor(5, 3, 3, 3))
    calls: dict[str, list[Any]] = {
        "conv2d": [x, packed, bias, *window, *gate, None, None, 0.0, 0.0, None],
        "grouped_conv2d": [x, pack_weight(draw.tensor(6, 1, 3, 3), 3), torch.zeros(6), 3, *window, *gate],
        "pooled_conv2d": [x, packed, bias, *window, *gate, None],
        "depthwise_conv2d": [x, draw.tensor(3, 1, 3, 3), torch.zeros(3), *window, *gate, None],
        "expand_depthwise_conv2d": [
            *(x, pack_weight(draw.tensor(5, 3, 1, 1)), bias, draw.tensor(5, 1, 3, 3), torch.zeros(5)),
            *(*window, "relu6", *gate, None),
        ],
        "max_pool2d": [x, [2, 2], [2, 2], [0, 0]],
        "sum_squares": [x],
        "keep_mask": [torch.ones(2, 1, 3), 0.0, 1.0],
        "predict": [torch.ones(6, 5), torch.zeros(5), [torch.ones(2, 2, 1, 3)], [None], [4], 4, 0.0, 1.0, None],
    }
    name = draw.choice(list(calls))
    args = calls[name]
    for i in draw.sample(range(len(args)), draw.choice([1, 1, 2]) if len(args) > 1 else 1):
        if isinstance(args[i], list):
            args[i] = [draw.choice(sizes) for _ in range(draw.choice([0, 1, 2, 2, 2, 3]))]
        elif isinstance(args[i], Tensor) or args[i] is None:
            args[i] = draw.choice(tensors)
        elif isinstance(args[i], int):
            args[i] = draw.choice(sizes)
    with suppress(ValueError, RuntimeError, TypeError, MemoryError, IndexError):
        getattr(torch.ops.isw, name)(*args)


KINDS: list[Callable[[Draw], None]] = [
    *[lambda draw: convolution(draw, "conv2d")] * 3,
    lambda draw: convolution(draw, "grouped_conv2d"),
    lambda draw: convolution(draw, "pooled_conv2d"),
    *[depthwise] * 3,
    *[expanded] * 2,
    linear,
    pooling,
    decisions,
    heads,
    hostile,
]


def run(calls: int) -> None:
    for number in range(FIRST, FIRST + calls):
        draw = Draw(number)
        try:
            draw.choice(KINDS)(draw)
        except Exception as error:
            raise AssertionError(f"ISW_FUZZ_SEED={SEED} ISW_FUZZ_FIRST={number}, {cpu.active()}: {error}") from error


def test_some_calls(isa: str) -> None:
    run(1000)


@pytest.mark.slow
def test_many_calls(isa: str) -> None:
    run(int(os.environ.get("ISW_FUZZ_CALLS", "100000")))
