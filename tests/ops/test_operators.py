"""The kernels of every instruction set against reference.py, which defines the results."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isw_plugin import ops
from isw_plugin.errors import EngineInputError
from isw_plugin.functional import channel_norm, keep_mask
from isw_plugin.ops import cpu, reference
from isw_plugin.ops.reference import Statistics, pack_weight

ACTS = tuple(reference.ACTS)
KEEPS = ("dense", "none", "one", "all", "random", "statistics")
CONVS = {  # kernel, stride, padding
    "3x3": (3, 1, 1),
    "3x3 stride 2": (3, 2, 1),
    "3x3 unpadded": (3, 1, 0),
    "1x1": (1, 1, 0),
    "1x1 stride 2": (1, 2, 0),
    "1x1 padded": (1, 1, 1),
    "5x5": (5, 1, 2),
    "7x7 stride 2": (7, 2, 3),
    "4x4 stride 4": (4, 4, 0),
    "2x2 stride 3": (2, 3, 1),
    "1x3": ((1, 3), 1, (0, 1)),
    "3x2 stride 1x2": ((3, 2), (1, 2), (2, 0)),
    "3x3 stride 2, more behind": (3, 2, (0, 1, 1, 2)),
    "5x5, more before": (5, 1, (3, 2, 1, 0)),
}


# In float32 both kinds of AVX-512 run the same source: the one that nobody gets here is for the slow tests.
_ISAS = [
    pytest.param(isa, marks=pytest.mark.slow if n > 0 and isa == "avx512" else ())
    for n, isa in enumerate(cpu.available())
]


@pytest.fixture(params=_ISAS, autouse=True, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


def in_turn(values: Sequence[str], *places: int) -> str:
    """Which value goes with others at these places of theirs: each meets each of another's in some case."""
    return values[sum(places) % len(values)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gating_of(kind: str, x: Tensor, axis: int = 1) -> Any:
    n, channels = x.shape[0], x.shape[axis]
    if kind == "dense":
        return None
    if kind == "statistics":
        squares = x.movedim(axis, 1).unsqueeze(2).flatten(2).square().sum(2)
        return Statistics(torch.stack([0.25 * squares, 0.75 * squares], 1), 0.0, 1.0)
    keep = torch.full((n, channels), kind == "all")
    if kind == "random":
        keep = normal(n, channels, seed=9) > 0
    if kind == "one" and channels:
        keep[:, channels // 2] = True
    return keep


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = b.abs().max() if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=float(1e-5 * scale))


def check_conv(n: int, c_in: int, c_out: int, size: tuple[int, int], conv: Any, keep: str, **options: Any) -> None:
    kernel, stride, padding = conv
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = normal(n, c_in, *size) * (0.2 + normal(1, c_in, 1, 1, seed=3).abs())
    weight = pack_weight(normal(c_out, c_in, kh, kw, seed=1) / (max(c_in, 1) * kh * kw) ** 0.5)
    arguments = dict(stride=stride, padding=padding, gating=gating_of(keep, x), **options)
    bias = normal(c_out, seed=2)
    assert_close(ops.conv2d(x, weight, bias, **arguments), reference.conv2d(x, weight, bias, **arguments))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv_agrees_for_every_kernel_and_mask(conv: str, keep: str) -> None:
    check_conv(3, 37, 53, (9, 11), CONVS[conv], keep, act="relu")


@pytest.mark.parametrize("channels", [(1, 1), (37, 129), (129, 37), (53, 16), (3, 64), (64, 33)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (8, 8), (6, 4), (1, 40), (40, 1), (16, 16), (33, 29)])
def test_conv_agrees_for_every_map_and_channel_count(size: tuple[int, int], channels: tuple[int, int]) -> None:
    for conv in ("3x3", "1x1", "3x3 stride 2"):
        check_conv(2, *channels, size, CONVS[conv], "random", act="relu6")


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("size", [(3, 6), (5, 5), (7, 7), (12, 12)])
def test_pointwise_with_outputs_on_the_lanes_agrees(size: tuple[int, int], keep: str) -> None:
    residual = normal(3, 70, *size, seed=5)
    check_conv(3, 421, 70, size, CONVS["1x1"], keep, act="silu", residual=residual)


@pytest.mark.parametrize("width", range(1, 34))
def test_conv_agrees_for_every_width(width: int) -> None:
    for height in (2, 3, 8):
        check_conv(1, 5, 20, (height, width), CONVS["3x3"], "random", act="none")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("keep", KEEPS)
def test_residual_carries_its_own_decision(keep: str, act: str) -> None:
    conv = in_turn(("3x3", "1x1"), KEEPS.index(keep), ACTS.index(act))
    residual = normal(2, 21, 6, 6, seed=5) * normal(1, 21, 1, 1, seed=6)
    gating = gating_of(keep, residual)
    check_conv(2, 40, 21, (6, 6), CONVS[conv], "random", act=act, residual=residual, residual_gating=gating)


def check_grouped(
    n: int, groups: int, c_in: int, c_out: int, size: tuple[int, int], conv: Any, keep: str, **options: Any
) -> None:
    """c_in and c_out are of a group."""
    kernel, stride, padding = conv
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = normal(n, groups * c_in, *size) * (0.2 + normal(1, groups * c_in, 1, 1, seed=3).abs())
    weight = pack_weight(normal(groups * c_out, c_in, kh, kw, seed=1) / (c_in * kh * kw) ** 0.5, groups)
    arguments = dict(stride=stride, padding=padding, gating=gating_of(keep, x), **options)
    bias = normal(groups * c_out, seed=2)
    found = ops.grouped_conv2d(x, weight, bias, groups, **arguments)
    assert_close(found, reference.grouped_conv2d(x, weight, bias, groups, **arguments))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_groups_agree_for_every_kernel_and_mask(conv: str, keep: str) -> None:
    check_grouped(3, 4, 9, 13, (9, 11), CONVS[conv], keep, act="relu")


@pytest.mark.parametrize("widths", [(1, 1), (8, 8), (16, 16), (24, 24), (1, 40), (33, 16), (40, 70)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (8, 8), (33, 29)])
def test_groups_agree_for_every_map_and_width(size: tuple[int, int], widths: tuple[int, int]) -> None:
    for groups in (1, 2, 5):
        check_grouped(2, groups, *widths, size, CONVS["3x3"], "random", act="relu6")


def test_a_group_may_lose_all_its_channels() -> None:
    x, weight, bias = normal(1, 12, 6, 6), pack_weight(normal(12, 4, 3, 3), 3), normal(12)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[:, 4:8] = False
    y, _ = ops.grouped_conv2d(x, weight, bias, 3, padding=1, gating=keep)
    torch.testing.assert_close(y[0, 4:8], bias[4:8, None, None].expand(4, 6, 6))
    dense, _ = ops.grouped_conv2d(x, weight, bias, 3, padding=1)
    assert torch.equal(y[0, :4], dense[0, :4])
    assert torch.equal(y[0, 8:], dense[0, 8:])


POOLED_KEEPS = ("none", "random", "statistics")
POOLED = {  # map, conv
    "3x3": ((9, 13), "3x3"),
    "3x3 even": ((32, 32), "3x3"),
    "3x3 in odd slots": ((28, 28), "3x3"),
    "3x3 in many passes": ((57, 61), "3x3"),
    "3x3 of one tile": ((2, 2), "3x3"),
    "3x3 of some instances": ((4, 4), "3x3"),
    "5x5": ((7, 40), "5x5"),
    "7x7 stride 2": ((31, 33), "7x7 stride 2"),
    "1x1": ((2, 90), "1x1"),
}


@pytest.mark.parametrize("keep", POOLED_KEEPS)
@pytest.mark.parametrize("case", POOLED)
def test_pooling_on_the_way_is_pooling_afterwards(case: str, keep: str) -> None:
    act = in_turn(("none", "relu", "silu"), list(POOLED).index(case), POOLED_KEEPS.index(keep))
    size, conv = POOLED[case]
    kernel, stride, padding = CONVS[conv]
    x = normal(3, 40, *size) * (0.2 + normal(1, 40, 1, 1, seed=3).abs())
    weight, bias = pack_weight(normal(53, 40, kernel, kernel, seed=1) / (40 * kernel * kernel) ** 0.5), normal(53)
    arguments: Any = {"stride": stride, "padding": padding, "act": act, "gating": gating_of(keep, x)}
    found = ops.pooled_conv2d(x, weight, bias, **arguments)
    assert_close(found, reference.pooled_conv2d(x, weight, bias, **arguments))
    y, squares = ops.conv2d(x, weight, bias, **arguments)
    assert_close((found[0], found[1].sum(1)), (ops.max_pool2d(y, 2), squares.sum(1)))


def test_a_map_too_small_to_pool() -> None:
    with pytest.raises(EngineInputError, match="too small to pool"):
        ops.pooled_conv2d(normal(1, 3, 1, 8), pack_weight(normal(4, 3, 3, 3)), normal(4), padding=1)
    with pytest.raises(ValueError, match="too small to pool"):
        torch.ops.isw.pooled_conv2d(
            normal(1, 3, 1, 8), pack_weight(normal(4, 3, 3, 3)), normal(4), [1, 1], [1, 1], "none", None, 0.0, 0.0
        )


@pytest.mark.parametrize("n", [0, 1, 3, 40])
def test_any_batch(n: int) -> None:
    for conv in ("3x3", "1x1"):
        for size in ((4, 4), (12, 12)):
            check_conv(n, 24, 40, size, CONVS[conv], "random")


def test_very_wide_map_and_very_many_channels() -> None:
    check_conv(1, 2, 3, (3, 5000), CONVS["3x3"], "statistics", act="relu")
    check_conv(1, 2, 3, (3, 5000), CONVS["1x1"], "statistics", act="relu")
    check_conv(2, 5000, 33, (2, 2), CONVS["3x3"], "statistics")
    check_conv(1, 9, 4500, (4, 4), CONVS["1x1"], "statistics")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3),
    c_in=st.integers(1, 70),
    c_out=st.integers(1, 70),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    keep=st.sampled_from(KEEPS),
    act=st.sampled_from(ACTS),
)
def test_conv_agrees_everywhere(
    n: int, c_in: int, c_out: int, size: Any, kernel: Any, stride: Any, extra: Any, keep: str, act: str
) -> None:
    padding = tuple(max(e, -(-(k - s) // 2)) for e, k, s in zip(extra, kernel, size, strict=True))
    check_conv(n, c_in, c_out, size, (kernel, stride, padding), keep, act=act)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("shape", [(3, 37), (1, 600), (2, 5, 37), (2, 3, 7, 20), (0, 8), (2, 0, 8), (40, 64)])
def test_linear(shape: tuple[int, ...], keep: str) -> None:
    x = normal(*shape)
    gating = gating_of(keep, x, axis=-1)
    weight, bias = pack_weight(normal(53, shape[-1], seed=1)), normal(53, seed=2)
    arguments = {"act": "relu", "gating": gating}
    assert_close(ops.linear(x, weight, bias, **arguments), reference.linear(x, weight, bias, **arguments))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_depthwise(conv: str, keep: str) -> None:
    act = in_turn(ACTS, list(CONVS).index(conv), KEEPS.index(keep))
    kernel, stride, padding = CONVS[conv]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    for size in ((9, 7), (8, 35), (4, 16), (4, 4)):
        x = normal(2, 13, *size) * normal(1, 13, 1, 1, seed=3)
        arguments = {"stride": stride, "padding": padding, "act": act, "gating": gating_of(keep, x)}
        weight, bias = normal(13, 1, kh, kw, seed=1), 5 * normal(13, seed=2)
        found = ops.depthwise_conv2d(x, weight, bias, **arguments)
        assert_close(found, reference.depthwise_conv2d(x, weight, bias, **arguments))


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_depthwise_of_stride_two_agrees_for_every_width_and_padding(kernel: int) -> None:
    for width in range(1, 73):
        for padding in (kernel - 1, kernel, kernel + 2):
            x, weight, bias = normal(1, 2, 5, width), normal(2, 1, kernel, kernel, seed=1), normal(2)
            options: Any = {"stride": 2, "padding": (kernel, padding)}
            found = ops.depthwise_conv2d(x, weight, bias, **options)
            assert_close(found, reference.depthwise_conv2d(x, weight, bias, **options))


def test_dropped_depthwise_plane_is_act_of_bias_up_to_the_border() -> None:
    keep = torch.tensor([[False, True]])
    y, squares = ops.depthwise_conv2d(
        normal(1, 2, 5, 5), normal(2, 1, 3, 3), torch.tensor([7.0, 0.0]), padding=1, act="relu6", gating=keep
    )
    assert y[0, 0].eq(6).all()
    assert squares[0, 0, 0] == 36 * 25


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 1), ((1, 2), 2, 0)])
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (7, 45), (112, 40)])
def test_max_pool(size: tuple[int, int], kernel: Any, stride: int, padding: int) -> None:
    x = normal(2, 5, *size)
    x[0, 0, 1, 1], x[1, 2, 0, 0], x[1, 3] = float("nan"), float("inf"), -float("inf")
    found = ops.max_pool2d(x, kernel, stride=stride, padding=padding)
    wanted = reference.max_pool2d(x, kernel, stride=stride, padding=padding)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_sum_squares() -> None:
    for size in ((1, 1), (3, 5), (30, 31)):
        assert_close((ops.sum_squares(normal(3, 7, *size)),), (reference.sum_squares(normal(3, 7, *size)),))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 4),
    slots=st.integers(1, 9),
    channels=st.integers(1, 90),
    alpha=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    beta=st.sampled_from([0.0, 0.5, 1.0, 1.9]),
    seed=st.integers(0, 1000),
)
def test_decisions_agree_away_from_ties(
    n: int, slots: int, channels: int, alpha: float, beta: float, seed: int
) -> None:
    squares = normal(n, slots, channels, seed=seed) ** 6
    found, wanted = ops.keep_mask(squares, alpha, beta), reference.keep_mask(squares, alpha, beta)
    norms = squares.double().sum(1).sqrt()
    mean = norms.mean(1, keepdim=True)
    variation = (norms - mean).square().mean(1, keepdim=True).sqrt() / mean
    near = (norms - beta * mean).abs() <= 1e-5 * mean
    near |= (variation - alpha).abs() <= 1e-5
    assert torch.equal(found | near, wanted | near)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_drop_nothing(value: float) -> None:
    squares = normal(2, 3, 40).square()
    squares[1, 0, 7] = value
    keep = ops.keep_mask(squares, 0.0, 1.0)
    assert keep[1].all()
    assert not keep[0].all()


def test_a_zero_map_keeps_all() -> None:
    assert ops.keep_mask(torch.zeros(1, 2, 30), 0.0, 1.0).all()


def test_the_tests_are_strict() -> None:
    squares = torch.tensor([[[1.0, 1.0, 1.0, 9.0, 9.0, 9.0]]])  # mean 2, deviation 1, CV 0.5
    assert ops.keep_mask(squares, 0.5, 1.0).all()
    assert ops.keep_mask(squares, 0.49, 0.5).all()
    assert ops.keep_mask(squares, 0.49, 0.51).tolist() == [[False] * 3 + [True] * 3]


@pytest.mark.parametrize("size", [1e-20, 1.0, 2e18])  # of the last, squared deviations overflow
def test_decisions_agree_at_any_size_of_the_norms(size: float) -> None:
    x = normal(2, 600, 4, 4)
    x[0] *= torch.linspace(0.1, 1.0, 600)[:, None, None]
    wanted = keep_mask(channel_norm(x.double()), 0.3, 1.0)
    assert wanted[1].all()  # its variation is not above alpha
    assert 0 < wanted.sum() < wanted.numel()
    assert torch.equal(keep_mask(channel_norm(x * size), 0.3, 1.0), wanted)  # the masked model's
    assert torch.equal(ops.keep_mask(ops.sum_squares(x * size), 0.3, 1.0), wanted)


def bytes_of(keep: Tensor) -> Tensor:
    """The mask as other libraries write it: any byte but 0 is true."""
    numbers = torch.randint(1, 256, keep.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return (numbers * keep).view(torch.bool)


@pytest.mark.parametrize("conv", ["3x3", "1x1"])
@pytest.mark.parametrize("size", [5, 12, 30])
def test_any_byte_but_zero_keeps(size: int, conv: str) -> None:
    kernel, _, padding = CONVS[conv]
    x, bias = normal(3, 37, size, size), normal(70)
    keep, residual_keep = normal(3, 37, seed=4) > 0, normal(3, 70, seed=5) > 0
    weight = pack_weight(normal(70, 37, kernel, kernel))
    residual = normal(3, 70, size, size, seed=3)

    def results(keep: Tensor, residual_keep: Tensor) -> list[Tensor]:
        both: Any = {"residual": residual, "residual_gating": residual_keep}
        found = [*ops.conv2d(x, weight, bias, padding=padding, gating=keep, **both)]
        found += ops.pooled_conv2d(x, weight, bias, padding=padding, gating=keep)
        found += ops.grouped_conv2d(x, pack_weight(x[:1].mT.reshape(37, 1, size, size), 37), bias[:37], 37, gating=keep)
        found += ops.depthwise_conv2d(x, normal(37, 1, 3, 3), bias[:37], padding=1, gating=keep)
        return [*found, *ops.linear(x[:, :, 0, 0], pack_weight(normal(70, 37)), bias, gating=keep)]

    given = bytes_of(keep), bytes_of(residual_keep)
    assert all(map(torch.equal, results(*given), results(keep, residual_keep)))
    clean = reference.linear(x[:, :, 0, 0], pack_weight(normal(70, 37)), bias, gating=keep)
    assert_close(reference.linear(x[:, :, 0, 0], pack_weight(normal(70, 37)), bias, gating=given[0]), clean)


def test_what_a_dropped_channel_holds_does_not_matter() -> None:
    x, keep = normal(1, 8, 6, 6), torch.ones(1, 8, dtype=torch.bool)
    keep[0, 3] = False
    weight, bias = pack_weight(normal(5, 8, 3, 3)), normal(5)
    clean = ops.conv2d(x, weight, bias, padding=1, gating=keep)
    x[0, 3] = float("nan")
    assert_close(ops.conv2d(x, weight, bias, padding=1, gating=keep), clean)


def test_weights_of_dropped_channels_are_not_read() -> None:
    keep = torch.tensor([[True, False, True]])
    for kernel in (1, 3):
        weight = normal(5, 3, kernel, kernel)
        weight[:, 1] = float("nan")
        y, _ = ops.conv2d(normal(1, 3, 6, 6), pack_weight(weight), normal(5), gating=keep)
        assert y.isfinite().all()


@pytest.mark.parametrize("act", ACTS)
def test_nan_passes_through_every_activation(act: str) -> None:
    x = normal(1, 3, 6, 6)
    x[0, 1, 2, 2] = float("nan")
    for kernel, padding in ((3, 1), (1, 0)):
        weight, bias = pack_weight(normal(5, 3, kernel, kernel)), normal(5)
        found, _ = ops.conv2d(x, weight, bias, padding=padding, act=act)
        wanted, _ = reference.conv2d(x, weight, bias, padding=padding, act=act)
        assert torch.equal(found.isnan(), wanted.isnan())
        pooled, _ = ops.pooled_conv2d(x, weight, bias, padding=padding, act=act)
        assert torch.equal(pooled.isnan(), reference.max_pool2d(wanted, 2).isnan())


@pytest.mark.parametrize("act", ["silu", "hardswish", "gelu"])
def test_activations_are_those_of_torch_over_all_their_range(act: str) -> None:
    x = torch.cat([torch.linspace(-120, 120, 4801), torch.linspace(-4, 4, 4801)])[None, None, None]
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    y, _ = ops.depthwise_conv2d(x, weight, bias, act=act)
    torch.testing.assert_close(y, reference.ACTS[act](x), rtol=2e-6, atol=1e-6)
    one, _ = ops.conv2d(x, pack_weight(weight), bias, act=act)
    assert torch.equal(one, y)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu", "hardswish", "gelu"])
def test_activations_of_what_is_not_finite_are_those_of_torch(act: str) -> None:
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 89.0, -89.0])
    x = ends.repeat(9)[None, None, None]
    wanted = reference.ACTS[act](x.double()).float()  # in float32 oneDNN's GELU of infinity is NaN
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    for found in (
        ops.depthwise_conv2d(x, weight, bias, act=act)[0],
        ops.conv2d(x, pack_weight(weight), bias, act=act)[0],
        ops.conv2d(x[..., :7], pack_weight(weight), bias, act=act)[0],
        ops.depthwise_conv2d(torch.zeros(7, 7, 1, 1)[:1], weight.expand(7, 1, 1, 1), ends, act=act)[0].view(1, 1, 1, 7),
    ):
        expected = wanted[..., : found.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_a_stride_larger_than_the_map_finds_one_pixel() -> None:
    x, weight, bias = normal(1, 3, 6, 7), normal(3, 1, 3, 3), normal(3)
    for stride in (6, (2, 1 << 24), 1 << 24):
        options: Any = {"stride": stride, "padding": 1}
        found = ops.depthwise_conv2d(x, weight, bias, **options)
        assert_close(found, reference.depthwise_conv2d(x, weight, bias, **options))
        assert torch.equal(ops.max_pool2d(x, 3, **options), reference.max_pool2d(x, 3, **options))


def test_layouts_other_than_contiguous_are_right() -> None:
    x = normal(2, 6, 9, 9)
    weight, bias = pack_weight(normal(5, 6, 3, 3)), normal(5)
    wanted = ops.conv2d(x, weight, bias)
    keep = torch.ones(6, 2, dtype=torch.bool).t()
    assert_close(ops.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, gating=keep), wanted)
    assert_close(ops.conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), weight, bias), wanted)
    wide = torch.stack([x, x], 4)[..., 0]
    assert_close(ops.conv2d(wide, weight, bias), wanted)


WINDOW = ([1, 1], [1, 1], "relu")
SAMPLES = {
    "conv2d": lambda gate: (
        *(normal(2, 5, 6, 6), pack_weight(normal(7, 5, 3, 3)), normal(7), *WINDOW),
        *(gate, 0.0, 1.0, normal(2, 7, 6, 6), None, 0.0, 0.0),
    ),
    "grouped_conv2d": lambda gate: (
        *(normal(2, 5, 6, 6), pack_weight(normal(10, 1, 3, 3), 5), normal(10), 5, *WINDOW),
        *(gate, 0.0, 1.0),
    ),
    "pooled_conv2d": lambda gate: (
        *(normal(2, 5, 7, 6), pack_weight(normal(7, 5, 3, 3)), normal(7), *WINDOW),
        *(gate, 0.0, 1.0),
    ),
    "depthwise_conv2d": lambda gate: (normal(2, 5, 6, 6), normal(5, 1, 3, 3), normal(5), *WINDOW, gate, 0.0, 1.0),
    "max_pool2d": lambda gate: (normal(2, 5, 6, 6), [2, 2], [2, 2], [0, 0]),
    "sum_squares": lambda gate: (normal(2, 5, 6, 6),),
    "keep_mask": lambda gate: (normal(2, 3, 5).square(), 0.1, 0.9),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("keep", ["dense", "random", "statistics"])
def test_opcheck(name: str, keep: str) -> None:
    arguments = SAMPLES[name](gating_tensor(keep))
    torch.library.opcheck(getattr(torch.ops.isw, name).default, arguments)


def gating_tensor(keep: str) -> Tensor | None:
    gating = gating_of(keep, normal(2, 5, 6, 6))
    return gating.squares if isinstance(gating, Statistics) else gating


def test_flops_are_two_per_multiply_add() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.conv2d(normal(2, 5, 6, 6), pack_weight(normal(7, 5, 3, 3)), normal(7))
        ops.grouped_conv2d(normal(2, 6, 6, 6), pack_weight(normal(8, 3, 3, 3), 2), normal(8), 2)
        ops.depthwise_conv2d(normal(2, 5, 6, 6), normal(5, 1, 3, 3), normal(5))
        ops.pooled_conv2d(normal(2, 5, 6, 7), pack_weight(normal(7, 5, 3, 3)), normal(7))
    plain, grouped, depthwise, pooled = 2 * 7 * 16 * 45, 2 * 8 * 16 * 27, 2 * 5 * 16 * 9, 2 * 7 * 20 * 45
    assert counter.get_total_flops() == 2 * (plain + grouped + depthwise + pooled)


def test_compiles_into_one_graph() -> None:
    weight, bias = pack_weight(normal(7, 5, 3, 3)), normal(7)

    def network(x: Tensor) -> Tensor:
        y, squares = ops.conv2d(x, weight, bias, act="relu")
        y = ops.max_pool2d(y, 2)
        keep = ops.keep_mask(squares, 0.0, 0.9).repeat_interleave(4, 1)
        return ops.linear(y.flatten(1), weight_2, bias, gating=keep)[0]

    weight_2 = pack_weight(normal(7, 28))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = normal(2, 5, 6, 6)
    assert_close((compiled(x),), (network(x),))
