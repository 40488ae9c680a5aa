"""Outputs that are known to be dropped, on the kernels of every instruction set: zero, and the others as ever."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin import ops
from isw_plugin.ops import cpu, reference
from isw_plugin.ops.reference import pack_weight
from tests.ops.test_operators import CONVS, gating_of, normal

KINDS = ("random", "one", "none", "all", "few", "most", "aligned")


@pytest.fixture(
    params=[isa for n, isa in enumerate(cpu.available()) if n == 0 or isa != "avx512"], autouse=True, scope="module"
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


def keep_of(kind: str, n: int, channels: int) -> Tensor:
    """An own mask for each instance."""
    if kind == "aligned":  # whole blocks
        return (torch.arange(channels) // 32 % 2 == 0).repeat(n, 1)
    share = {"random": 0.5, "few": 0.1, "most": 0.9, "one": 0.0, "none": 0.0, "all": 1.0}[kind]
    scores = torch.rand(n, channels, generator=torch.Generator().manual_seed(7))
    keep = scores < share
    if kind == "one":
        keep[torch.arange(n), scores.argmax(1)] = True
    return keep


def assert_skips(name: str, keep: Tensor, *args: Any, **options: Any) -> None:
    """As the reference; dropped ones exactly zero."""
    found = getattr(ops, name)(*args, **options, out_keep=keep)
    wanted = getattr(reference, name)(*args, **options, out_keep=keep)
    rtol = 1e-4 if args[0].dtype == torch.float32 else 2**-7
    for a, b in zip(found, wanted, strict=True):
        scale = b.float().abs().max().item() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * scale)
    y = found[0].movedim(-1, 1) if name == "linear" else found[0]
    assert not y[~keep].any()
    assert not found[1].transpose(1, 2)[~keep].any()
    if name != "linear":
        y, *others = getattr(ops, name)(*args, **options, out_keep=keep, zeros=False)
        assert torch.equal(y[keep], found[0][keep])
        assert torch.equal(others[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", CONVS)
def test_convolutions(conv: str, kind: str, dtype: torch.dtype) -> None:
    kernel, stride, padding = CONVS[conv]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    for n, inputs, outputs, size in ((1, 37, 70, (13, 11)), (3, 5, 130, (4, 4)), (2, 140, 24, (8, 8))):
        x, weight = normal(n, inputs, *size), normal(outputs, inputs, kh, kw, seed=1) / (inputs * kh * kw) ** 0.5
        args = x.to(dtype), pack_weight(weight.to(dtype)), normal(outputs, seed=2)
        options = {"stride": stride, "padding": padding, "act": "relu", "gating": gating_of("random", x)}
        assert_skips("conv2d", keep_of(kind, n, outputs), *args, **options)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (8, 8), (14, 14), (6, 40), (57, 61)])
@pytest.mark.parametrize("conv", ["3x3", "1x1"])
def test_every_map(conv: str, size: tuple[int, int]) -> None:
    kernel, stride, padding = CONVS[conv]
    for inputs, outputs in ((33, 96), (300, 40)):
        x, weight = normal(2, inputs, *size), pack_weight(normal(outputs, inputs, kernel, kernel) / inputs**0.5)
        residual = normal(2, outputs, *reference.conv2d(x, weight, normal(outputs), padding=padding)[0].shape[2:])
        options = {"stride": stride, "padding": padding, "residual": residual, "act": "silu"}
        options["residual_gating"] = gating_of("random", residual)
        assert_skips("conv2d", keep_of("random", 2, outputs), x, weight, normal(outputs, seed=2), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 2), (4, 4), (9, 13), (32, 32), (57, 61)])
def test_pooled(size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(2, 40, *size).to(dtype), pack_weight((normal(70, 40, 3, 3) / 19).to(dtype))
    for kind in KINDS:
        options = {"padding": 1, "act": "relu", "gating": gating_of("random", x)}
        assert_skips("pooled_conv2d", keep_of(kind, 2, 70), x, weight, normal(70), **options)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (9, 30)])
def test_grouped(size: tuple[int, int]) -> None:
    for groups, inputs, outputs in ((2, 9, 13), (3, 4, 40), (5, 17, 8)):
        x = normal(2, groups * inputs, *size)
        weight = pack_weight(normal(groups * outputs, inputs, 3, 3), groups)
        for kind in KINDS:
            keep = keep_of(kind, 2, groups * outputs)
            keep[:, outputs : 2 * outputs] &= kind != "few"  # a group without outputs
            bias, gating = normal(groups * outputs), gating_of("random", x)
            assert_skips("grouped_conv2d", keep, x, weight, bias, groups, padding=1, gating=gating)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", CONVS)
def test_depthwise(conv: str, dtype: torch.dtype) -> None:
    """What drops an input, and keeps the output, gives the activated bias."""
    kernel, stride, padding = CONVS[conv]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    for size in ((9, 7), (8, 35), (4, 4)):
        x, weight = normal(2, 13, *size).to(dtype), normal(13, 1, kh, kw).to(dtype)
        for kind in ("random", "none", "all"):
            options = {"stride": stride, "padding": padding, "act": "relu6", "gating": gating_of("random", x)}
            assert_skips("depthwise_conv2d", keep_of(kind, 2, 13), x, weight, normal(13), **options)


@pytest.mark.parametrize("shape", [(3, 37), (1, 600), (2, 5, 37), (2, 3, 7, 20), (0, 8), (2, 0, 8)])
def test_linear(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), pack_weight(normal(53, shape[-1]) / shape[-1] ** 0.5)
    for kind in KINDS:
        gating = gating_of("random", x, axis=-1)
        assert_skips("linear", keep_of(kind, shape[0], 53), x, weight, normal(53), act="relu", gating=gating)


def test_any_byte_but_zero_keeps_an_output() -> None:
    x, weight, bias = normal(1, 5, 8, 8), pack_weight(normal(7, 5, 3, 3)), normal(7)
    given = torch.tensor([[0, 1, 2, 255, 0, 16, 128]], dtype=torch.uint8)
    y, _ = ops.conv2d(x, weight, bias, padding=1, out_keep=given.view(torch.bool))
    wanted, _ = ops.conv2d(x, weight, bias, padding=1, out_keep=given != 0)
    assert torch.equal(y, wanted)
    plane, _ = ops.depthwise_conv2d(
        x, normal(5, 1, 3, 3), normal(5), out_keep=given[:, :5].contiguous().view(torch.bool)
    )
    assert plane.flatten(2).any(2).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_of_dropped_outputs_do_not_matter(kernel: int, side: int) -> None:
    keep = keep_of("random", 1, 70)
    weight = normal(70, 40, kernel, kernel)
    weight[~keep[0]] = float("nan")
    x, bias = normal(1, 40, side, side), torch.where(keep[0], normal(70), float("inf"))
    y, squares = ops.conv2d(x, pack_weight(weight), bias, padding=kernel // 2, out_keep=keep)
    assert y.isfinite().all()
    assert squares.isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    keep, x = keep_of("random", 3, 200), normal(3, 60, 14, 14)
    threads = torch.get_num_threads()
    given = []
    for kernel in (1, 3):
        args = x, pack_weight(normal(200, 60, kernel, kernel)), normal(200)
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            given.append(ops.conv2d(*args, padding=kernel // 2, out_keep=keep))
            assert torch.equal(given[-1][0], given[-1 if count == 1 else -2][0])
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "arguments",
    [
        ("conv2d", (2, 5, 6, 6), (7, 5, 3, 3), [None, None, 0.0, 0.0]),
        ("pooled_conv2d", (2, 5, 6, 6), (7, 5, 3, 3), []),
        ("depthwise_conv2d", (2, 5, 6, 6), (5, 1, 3, 3), []),
    ],
    ids=lambda arguments: arguments[0],
)
def test_opcheck(arguments: Any) -> None:
    name, shape, kernel, others = arguments
    weight = normal(*kernel) if name == "depthwise_conv2d" else pack_weight(normal(*kernel))
    given = [normal(*shape), weight, normal(kernel[0]), [1, 1], [1, 1], "relu", None, 0.0, 0.0, *others]
    torch.library.opcheck(getattr(torch.ops.isw, name).default, (*given, keep_of("random", 2, kernel[0])))


def test_what_nobody_reads_is_not_written() -> None:
    """A map that fills memory that held another: what is dropped holds that still."""
    x, keep = normal(1, 8, 256, 256), torch.arange(8).ge(4)[None]
    weights = {"1x1": (1, 0), "3x3": (3, 1)}
    for side, padding in weights.values():
        weight = pack_weight(normal(8, 8, side, side))
        first, _ = ops.conv2d(x, weight, normal(8), padding=padding)
        address, held = first.data_ptr(), first.clone()
        del first
        y, squares = ops.conv2d(x, weight, normal(8), padding=padding, act="relu", out_keep=keep, zeros=False)
        assert y.data_ptr() == address  # of maps.h
        assert torch.equal(y[:, :4], held[:, :4])
        assert not squares[..., :4].any()
