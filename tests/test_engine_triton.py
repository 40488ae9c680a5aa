"""The CUDA kernels against reference.py: by Triton's interpreter on the CPU, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, so it runs in a process of its own.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isw_plugin.engine import ops, reference, tiles
from isw_plugin.engine.reference import Statistics, pack_weight

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")

ACTS = tuple(reference.ACTS)
KEEPS = ("dense", "none", "one", "all", "random", "statistics")
DTYPES = ("float32", "float16", "bfloat16")
CONVS = {  # kernel, stride, padding
    "3x3": ((3, 3), (1, 1), (1, 1)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1)),
    "3x3 unpadded": ((3, 3), (1, 1), (0, 0)),
    "1x1": ((1, 1), (1, 1), (0, 0)),
    "1x1 stride 2": ((1, 1), (2, 2), (0, 0)),
    "1x1 padded": ((1, 1), (1, 1), (1, 1)),
    "5x5": ((5, 5), (1, 1), (2, 2)),
    "7x7 stride 2": ((7, 7), (2, 2), (3, 3)),
    "2x2 stride 3": ((2, 2), (3, 3), (1, 1)),
    "3x2 stride 1x2": ((3, 2), (1, 2), (2, 0)),
}
Run = Callable[..., Any]


def interpret() -> None:
    """Sets up a process in which kernels are interpreted."""
    torch.set_num_threads(1)
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle, _convert_float, tl

    builder = interpreter.interpreter_builder
    product = builder.create_dot

    def widened(handle: Any) -> Any:
        """Of bfloat16 the interpreter would multiply the bits."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32"), tl.float32)

    builder.create_dot = lambda a, b, *others: product(widened(a), widened(b), *others)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn"), interpret) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield pool


@pytest.fixture(params=["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"], scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a function of this file whose first argument is a device."""
    if request.param == "interpreter":
        pool = request.getfixturevalue("interpreter")
        yield lambda function, *args, **options: pool.submit(function, "cpu", *args, **options).result()
        return
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield lambda function, *args, **options: function("cuda", *args, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gate_of(kind: str, x: Tensor) -> Tensor | None:
    """A gate as operators take it, for (N, C, H, W)."""
    n, channels = x.shape[:2]
    if kind == "dense":
        return None
    if kind == "statistics":
        squares = x.float().square().sum((2, 3))
        return torch.stack([0.25 * squares, 0.75 * squares], 1)
    keep = torch.full((n, channels), kind == "all")
    if kind == "random":
        keep = normal(n, channels, seed=9) > 0
    if kind == "one":
        keep[:, channels // 2] = True
    return keep


def gating(gate: Tensor | None, alpha: float) -> Any:
    return Statistics(gate, alpha, 1.0) if gate is not None and gate.dtype != torch.bool else gate


def moved(device: str, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def check_outputs(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """y up to one rounding to its type; statistics are those of y as it is stored."""
    y, squares = found
    error = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[y.dtype]  # interpreted, bf16 truncates
    assert y.shape == wanted[0].shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    if y.numel() == 0:
        return
    scale = float(wanted[0].abs().max())
    torch.testing.assert_close(y.float(), wanted[0], rtol=error, atol=max(1e-5, error / 8) * scale)
    assert squares.shape == (y.shape[0], tiles.pixel_slots(y.shape[2] * y.shape[3]), y.shape[1])
    own = y.float().square().sum((2, 3))
    torch.testing.assert_close(squares.sum(1), own, rtol=1e-5, atol=float(own.abs().max()) * 1e-6)


def conv_case(
    device: str,
    shape: tuple[int, int, int, int],
    c_out: int,
    conv: str,
    keep: str,
    act: str = "relu",
    dtype: str = "float32",
    alpha: float = 0.0,
    residual: str | None = None,
) -> None:
    from isw_plugin.engine import triton_ops

    kernel, stride, padding = CONVS[conv]
    c_in, kind = shape[1], getattr(torch, dtype)
    x = (normal(*shape) * (0.2 + normal(1, c_in, 1, 1, seed=3).abs())).to(kind)
    weight = (normal(c_out, c_in, *kernel, seed=1) / (c_in * kernel[0] * kernel[1]) ** 0.5).to(kind)
    bias, added, added_gate = normal(c_out, seed=2).to(kind), None, None
    if residual is not None:
        size = tiles.output_size(shape[2:], kernel, stride, padding)
        added = (normal(shape[0], c_out, *size, seed=5) * normal(1, c_out, 1, 1, seed=6)).to(kind)
        added_gate = gate_of(residual, added)
    x, weight, bias, gate, added, added_gate = moved(
        device, x, weight, bias, gate_of(keep, x), added, added_gate
    )  # fmt: skip
    window = (pack_weight(weight), bias, stride, padding, act)
    found = triton_ops.conv2d(x, *window, gate, alpha, 1.0, added, added_gate, alpha, 1.0)
    wanted = reference.conv2d(
        x.float(),
        pack_weight(weight.float()),
        bias.float(),
        stride=stride,
        padding=padding,
        act=act,
        gating=gating(gate, alpha),
        residual=None if added is None else added.float(),
        residual_gating=gating(added_gate, alpha),
    )
    check_outputs(found, wanted)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", ["3x3", "3x3 stride 2", "1x1"])
def test_conv_agrees_for_every_mask(run: Run, conv: str, keep: str) -> None:
    run(conv_case, (3, 37, 9, 11), 53, conv, keep)


@pytest.mark.parametrize("conv", CONVS)
def test_conv_agrees_for_every_window(run: Run, conv: str) -> None:
    run(conv_case, (2, 20, 9, 7), 33, conv, "random", act="relu6")


@pytest.mark.parametrize("channels", [(1, 1), (37, 129), (129, 37), (53, 16)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (11, 13)])
def test_conv_agrees_for_every_map_and_channel_count(
    run: Run, size: tuple[int, int], channels: tuple[int, int]
) -> None:
    for conv in ("3x3", "1x1"):
        run(conv_case, (2, channels[0], *size), channels[1], conv, "random", act="none")


@pytest.mark.parametrize("alpha", [0.0, 100.0])
def test_alpha_decides_whether_a_map_is_prunable(run: Run, alpha: float) -> None:
    run(conv_case, (2, 40, 6, 6), 21, "3x3", "statistics", alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["dense", "random", "statistics"])
@pytest.mark.parametrize("conv", ["3x3", "1x1 stride 2"])
def test_conv_in_every_type(run: Run, conv: str, keep: str, dtype: str) -> None:
    run(conv_case, (2, 70, 8, 8), 40, conv, keep, dtype=dtype, residual="random")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("keep", KEEPS)
def test_residual_carries_its_own_decision(run: Run, keep: str, act: str) -> None:
    run(conv_case, (2, 24, 6, 6), 21, "3x3", "random", act=act, residual=keep)


@pytest.mark.parametrize("n", [0, 1, 9])
def test_any_batch(run: Run, n: int) -> None:
    run(conv_case, (n, 24, 4, 4), 40, "3x3", "random")


def padding_case(device: str) -> None:
    from isw_plugin.engine import triton_ops

    x, weight, bias, keep = moved(
        device, normal(2, 5, 0, 0), pack_weight(normal(7, 5, 7, 7)), normal(7), normal(2, 5) > 0
    )
    for gate in (None, keep):
        y, _ = triton_ops.conv2d(x, weight, bias, (1, 1), (4, 4), "none", gate, 0.0, 0.0, None, None, 0.0, 0.0)
        assert torch.equal(y, bias[:, None, None].expand(2, 7, 2, 2))


def test_a_map_that_is_all_padding(run: Run) -> None:
    run(padding_case)


def test_many_channels(run: Run) -> None:
    run(conv_case, (1, 4100, 1, 1), 33, "1x1", "statistics")
    run(conv_case, (1, 9, 1, 1), 4100, "1x1", "statistics")


def wide_case(device: str, *args: Any, **options: Any) -> None:
    from isw_plugin.engine import triton_launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_launch, "_wide", lambda *maps: True)
        conv_case(device, *args, **options)
        depthwise_case(device, "3x3", "random")
        sum_squares_case(device)


def test_offsets_of_64_bits(run: Run) -> None:
    run(wide_case, (2, 37, 9, 7), 33, "3x3", "random", residual="random")


def depthwise_case(device: str, conv: str, keep: str, act: str = "relu6", dtype: str = "float32") -> None:
    from isw_plugin.engine import triton_ops

    kernel, stride, padding = CONVS[conv]
    for shape in ((2, 13, 9, 7), (1, 70, 4, 35)):
        x = (normal(*shape) * normal(1, shape[1], 1, 1, seed=3)).to(getattr(torch, dtype))
        weight, bias = normal(shape[1], 1, *kernel, seed=1).to(x.dtype), 5 * normal(shape[1], seed=2).to(x.dtype)
        x, weight, bias, gate = moved(device, x, weight, bias, gate_of(keep, x))
        found = triton_ops.depthwise_conv2d(x, weight, bias, stride, padding, act, gate, 0.0, 1.0)
        check_outputs(
            found,
            reference.depthwise_conv2d(
                x.float(),
                weight.float(),
                bias.float(),
                stride=stride,
                padding=padding,
                act=act,
                gating=gating(gate, 0.0),
            ),
        )


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", ["3x3", "3x3 stride 2", "5x5", "3x2 stride 1x2"])
def test_depthwise(run: Run, conv: str, keep: str) -> None:
    run(depthwise_case, conv, keep)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_depthwise_in_every_type(run: Run, act: str, dtype: str) -> None:
    run(depthwise_case, "5x5", "statistics", act, dtype)


def sum_squares_case(device: str) -> None:
    from isw_plugin.engine import triton_ops

    for size in ((1, 1), (3, 5), (30, 31)):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(3, 70, *size).to(device, dtype)
            squares = triton_ops.sum_squares(x)
            assert squares.shape == (3, tiles.pixel_slots(size[0] * size[1]), 70)
            torch.testing.assert_close(squares.sum(1), reference.sum_squares(x.float()).sum(1))


def test_sum_squares(run: Run) -> None:
    run(sum_squares_case)


def keep_mask_case(device: str, squares: Tensor, alpha: float, beta: float) -> Tensor:
    from isw_plugin.engine import triton_ops

    return triton_ops.keep_mask(squares.to(device), alpha, beta).cpu()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 4),
    slots=st.integers(1, 300),
    channels=st.integers(1, 90),
    alpha=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    beta=st.sampled_from([0.0, 0.5, 1.0, 1.9]),
    seed=st.integers(0, 1000),
)
def test_decisions_agree_away_from_ties(
    run: Run, n: int, slots: int, channels: int, alpha: float, beta: float, seed: int
) -> None:
    squares = normal(n, slots, channels, seed=seed) ** 6 * normal(n, 1, channels, seed=seed + 1) ** 4
    found, wanted = run(keep_mask_case, squares, alpha, beta), reference.keep_mask(squares, alpha, beta)
    norms = squares.double().sum(1).sqrt()
    mean = norms.mean(1, keepdim=True)
    variation = (norms - mean).square().mean(1, keepdim=True).sqrt() / mean
    near = (norms - beta * mean).abs() <= 1e-5 * mean
    near |= (variation - alpha).abs() <= 1e-5
    assert torch.equal(found | near, wanted | near)


def test_special_statistics(run: Run) -> None:
    squares = normal(3, 3, 40).square()
    squares[1, 0, 7], squares[2, 1, 3] = float("nan"), float("inf")
    assert run(keep_mask_case, squares, 0.0, 1.0).all(1).tolist() == [False, True, True]
    assert run(keep_mask_case, torch.zeros(1, 2, 30), 0.0, 1.0).all()
    assert not run(keep_mask_case, 1e36 * squares[:1], 0.0, 1.0).all()
    ramp = torch.tensor([[[1.0, 1.0, 1.0, 9.0, 9.0, 9.0]]])  # mean 2, deviation 1, CV 0.5
    assert run(keep_mask_case, ramp, 0.5, 1.0).all()
    assert run(keep_mask_case, ramp, 0.49, 0.5).all()
    assert run(keep_mask_case, ramp, 0.49, 0.51).tolist() == [[False] * 3 + [True] * 3]


def conv_3x3(device: str, x: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, act: str = "none") -> Tensor:
    from isw_plugin.engine import triton_ops

    x, weight, bias, keep = moved(device, x, pack_weight(weight), bias, keep)
    return triton_ops.conv2d(x, weight, bias, (1, 1), (1, 1), act, keep, 0.0, 0.0, None, None, 0.0, 0.0)[0].cpu()


def test_what_a_dropped_channel_holds_does_not_matter(run: Run) -> None:
    x, keep, weight, bias = normal(2, 40, 6, 6), normal(2, 40, seed=4) > 0, normal(5, 40, 3, 3), normal(5)
    keep[:, 3], keep[:, 0] = False, False
    clean = run(conv_3x3, x, weight, bias, keep)
    x[:, 3], weight[:, 3], x[:, 0], weight[:, 0] = (float("nan"),) * 4
    assert torch.equal(run(conv_3x3, x, weight, bias, keep), clean)


@pytest.mark.parametrize("act", ACTS)
def test_nan_passes_through_every_activation(run: Run, act: str) -> None:
    x, weight, bias = normal(1, 3, 6, 6), normal(5, 3, 3, 3), normal(5)
    x[0, 1, 2, 2] = float("nan")
    wanted, _ = reference.conv2d(x, pack_weight(weight), bias, padding=1, act=act)
    assert torch.equal(run(conv_3x3, x, weight, bias, None, act).isnan(), wanted.isnan())


def layouts_case(device: str) -> None:
    x, weight, bias = normal(2, 6, 9, 9), normal(5, 6, 3, 3), normal(5)
    keep = torch.ones(6, 2, dtype=torch.bool).t()
    wanted = conv_3x3(device, x, weight, bias, None)
    others = (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], 4)[..., 0],
        x[:, :1].expand(-1, 6, -1, -1),
    )
    for other in others[:3]:
        torch.testing.assert_close(conv_3x3(device, other, weight, bias, keep), wanted)
        torch.testing.assert_close(conv_3x3(device, other, weight, bias, None), wanted)
    expanded = conv_3x3(device, others[3].contiguous(), weight, bias, None)
    torch.testing.assert_close(conv_3x3(device, others[3], weight, bias, keep), expanded)


def test_any_layout(run: Run) -> None:
    run(layouts_case)


def repeated_case(device: str) -> None:
    from isw_plugin.engine import triton_ops

    x, weight, bias = moved(device, normal(3, 40, 20, 20), pack_weight(normal(21, 40, 3, 3)), normal(21))
    squares = triton_ops.sum_squares(x)
    options = ((1, 1), (1, 1), "relu", squares, 0.0, 1.0, None, None, 0.0, 0.0)
    first, again = (triton_ops.conv2d(x, weight, bias, *options) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_runs_repeat_bit_by_bit(run: Run) -> None:
    run(repeated_case)


def network_case(device: str) -> None:
    from benchmarks.speed.cuda import nets
    from isw_plugin.engine import triton_ops

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """ops.conv2d, but on any device by the CUDA operator."""
        window = [(options[name],) * 2 for name in ("stride", "padding")]
        gates = ops._flat(options["gating"]), ops._flat(options.get("residual_gating"))
        return triton_ops.conv2d(
            x, weight, bias, *window, options["act"], *gates[0], options.get("residual"), *gates[1]
        )  # fmt: skip

    torch.manual_seed(0)
    network = nets.resnet18(16, 0.125).placed(torch.device(device), torch.float32)
    images = normal(2, 3, 8, 8).to(device)
    network(images, nets.Calibrated(0.5))
    wanted, dense = network(images, nets.Masked()), network(images, nets.Dense())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nets, "conv2d", conv2d)
        found = network(images, nets.Gated())
    assert not torch.allclose(dense, wanted, rtol=0.01)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_whole_network(run: Run) -> None:
    run(network_case)
