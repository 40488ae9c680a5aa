"""bfloat16: the kernels of every instruction set against reference.py, and accelerated networks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isw_plugin import InstanceWisePruner, ops
from isw_plugin.accelerate import choose as whole
from isw_plugin.accelerate import fit
from isw_plugin.accelerate.accelerated import Accelerated
from isw_plugin.accelerate.execution import DenseConv, GatedConv
from isw_plugin.errors import EngineInputError
from isw_plugin.ops import cpu, reference
from isw_plugin.ops.reference import Statistics, pack_weight, unpack_weight
from tests.accelerate.nets import clock, whole_clock
from tests.conftest import Net, Plain, Residual, SqueezeExcite, made

CONVS: dict[str, Any] = {  # kernel, stride, padding
    "3x3": (3, 1, 1),
    "3x3 stride 2": (3, 2, 1),
    "1x1": (1, 1, 0),
    "1x1 stride 2": (1, 2, 0),
    "7x7 stride 2": (7, 2, 3),
    "2x2 stride 3": (2, 3, 1),
    "1x3": ((1, 3), 1, (0, 1)),
}
KEEPS = ("dense", "none", "random", "statistics")


@pytest.fixture(params=cpu.available(), autouse=True, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).bfloat16()


def gating_of(kind: str, x: Tensor, axis: int = 1) -> Any:
    if kind == "dense":
        return None
    if kind == "statistics":
        return Statistics(x.float().movedim(axis, 1).unsqueeze(2).flatten(2).square().sum(2)[:, None], 0.0, 1.0)
    keep = normal(x.shape[0], x.shape[axis], seed=9) > 0
    return keep & (kind == "random")


def assert_close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """One step of bfloat16 apart at most, where sums in another order fall on the other side; not biased."""
    (y, squares), (wanted_y, wanted_squares) = found, wanted
    assert y.dtype == wanted_y.dtype == torch.bfloat16
    assert squares.dtype == wanted_squares.dtype == torch.float32
    scale = float(wanted_y.float().abs().max()) if wanted_y.numel() else 1.0
    torch.testing.assert_close(y.float(), wanted_y.float(), rtol=2**-7, atol=1e-5 * scale)
    assert (y != wanted_y).float().mean() <= 0.01 + 1 / max(1, y.numel()) or not y.numel()
    torch.testing.assert_close(squares, wanted_squares, rtol=2**-6, atol=1e-5 * scale**2)
    maps = y.movedim(-1, 1) if y.shape[-1] == squares.shape[2] and y.shape[1] != squares.shape[2] else y
    kept = maps.float().unsqueeze(2).flatten(2).square().sum(2)  # of what was stored
    torch.testing.assert_close(squares.sum(1), kept, rtol=1e-5 + 1e-9 * maps.shape[2:].numel(), atol=1e-6 * scale**2)


def check_conv(n: int, c_in: int, c_out: int, size: tuple[int, int], conv: Any, keep: str, **options: Any) -> None:
    kernel, stride, padding = conv
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = (normal(n, c_in, *size) * (0.2 + normal(1, c_in, 1, 1, seed=3).abs())).bfloat16()
    weight = pack_weight(half(c_out, c_in, kh, kw, seed=1) / (c_in * kh * kw) ** 0.5)
    arguments = dict(stride=stride, padding=padding, gating=gating_of(keep, x), **options)
    bias = normal(c_out, seed=2)
    assert_close(ops.conv2d(x, weight, bias, **arguments), reference.conv2d(x, weight, bias, **arguments))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv(conv: str, keep: str) -> None:
    check_conv(3, 37, 53, (9, 11), CONVS[conv], keep, act="relu")


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (7, 7), (8, 8), (6, 4), (1, 40), (33, 29)])
def test_conv_on_every_tile(size: tuple[int, int]) -> None:
    for channels in ((3, 64), (150, 33), (53, 16)):
        for conv in ("3x3", "1x1", "3x3 stride 2"):
            check_conv(2, *channels, size, CONVS[conv], "random", act="relu6")


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("size", [(3, 6), (7, 7), (12, 12)])
def test_pointwise_with_outputs_on_the_lanes(size: tuple[int, int], keep: str) -> None:
    check_conv(2, 421, 70, size, CONVS["1x1"], keep, act="relu", residual=half(2, 70, *size, seed=5))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("size", [(9, 13), (28, 28), (4, 4), (2, 90)])
def test_pooling_on_the_way_is_pooling_afterwards(size: tuple[int, int], keep: str) -> None:
    x, weight, bias = half(3, 40, *size), pack_weight(half(53, 40, 3, 3, seed=1) / 20), normal(53)
    arguments: Any = {"padding": 1, "act": "relu", "gating": gating_of(keep, x)}
    y, squares = ops.pooled_conv2d(x, weight, bias, **arguments)
    whole_map, whole_squares = ops.conv2d(x, weight, bias, **arguments)
    assert torch.equal(y, ops.max_pool2d(whole_map, 2))  # the same sums in the same order
    torch.testing.assert_close(squares.sum(1), whole_squares.sum(1))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", ["3x3", "1x1"])
def test_residual(conv: str, keep: str) -> None:
    residual = half(2, 21, 6, 7, seed=5)
    for act in ("none", "relu", "relu6"):
        options = {"residual": residual, "residual_gating": gating_of(keep, residual), "act": act}
        check_conv(2, 40, 21, (6, 7), CONVS[conv], "random", **options)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 3),
    c_in=st.integers(1, 70),
    c_out=st.integers(1, 70),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    keep=st.sampled_from(KEEPS),
)
def test_conv_everywhere(n: int, c_in: int, c_out: int, size: Any, kernel: Any, stride: Any, keep: str) -> None:
    padding = tuple(max(0, -(-(k - s) // 2)) for k, s in zip(kernel, size, strict=True))
    check_conv(n, c_in, c_out, size, (kernel, stride, padding), keep, act="relu")


@pytest.mark.parametrize("shape", [(3, 37), (1, 600), (2, 5, 37), (2, 3, 7, 20), (0, 8), (2, 0, 8)])
def test_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = half(*shape), pack_weight(half(53, shape[-1], seed=1)), normal(53, seed=2)
    for keep in KEEPS:
        arguments = {"act": "relu", "gating": gating_of(keep, x, axis=-1)}
        assert_close(ops.linear(x, weight, bias, **arguments), reference.linear(x, weight, bias, **arguments))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("conv", CONVS)
def test_depthwise(conv: str, keep: str) -> None:
    kernel, stride, padding = CONVS[conv]
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    for size in ((9, 7), (8, 35), (4, 16), (150, 150)):
        x, weight, bias = half(2, 13, *size), half(13, 1, kh, kw, seed=1), 5 * normal(13, seed=2)
        arguments = {"stride": stride, "padding": padding, "act": "relu6", "gating": gating_of(keep, x)}
        found = ops.depthwise_conv2d(x, weight, bias, **arguments)
        assert_close(found, reference.depthwise_conv2d(x, weight, bias, **arguments))


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (3, 3, 1)])
def test_max_pool_is_exact(window: tuple[int, int, int]) -> None:
    kernel, stride, padding = window
    for size in ((3, 3), (7, 45), (40, 64)):
        x = half(2, 5, *size)
        x[0, 0, 1, 1], x[1, 2, 0, 0], x[1, 3] = float("nan"), float("inf"), -float("inf")
        found = ops.max_pool2d(x, kernel, stride=stride, padding=padding)
        wanted = F.max_pool2d(x, kernel, stride, padding)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_sum_squares() -> None:
    for size in ((1, 1), (3, 5), (30, 31)):
        x = half(3, 7, *size)
        torch.testing.assert_close(ops.sum_squares(x), x.float().square().sum((2, 3)).unsqueeze(1))


def edges() -> Tensor:
    """Ties to both sides, values beside them, the ends of the range, signed zeros, denormals, infinities."""
    step = 2.0**-8
    ties = [s * m * (1 + k * step) for s in (1, -1) for m in (1.0, 3e-39, 1e30) for k in (0, 1, 2, 3, 5, 7)]
    beside = [1 + step + 2**-23, 1 + step - 2**-23, 1 + 3 * step - 2**-23]
    return torch.tensor([*ties, *beside, 0.0, 3.4028234e38, 3.39e38, -3.4028234e38, float("inf"), -float("inf")])


@pytest.mark.parametrize("layer", ["3x3", "1x1", "depthwise", "dropped depthwise"])
@pytest.mark.parametrize("side", [4, 5])
def test_stores_round_to_nearest_even(layer: str, side: int, isa: str) -> None:
    bias = edges()
    if isa == "avx512_bf16" and "depthwise" not in layer:  # its sums take denormals for zero
        bias = torch.where(bias.abs() < torch.finfo(torch.float32).tiny, 0.0, bias)
    channels = len(bias)
    if "depthwise" in layer:
        keep = torch.full((1, channels), layer == "depthwise")
        x, weight = torch.zeros(1, channels, side, side).bfloat16(), half(channels, 1, 3, 3)
        y, _ = ops.depthwise_conv2d(x, weight, bias, padding=1, gating=keep)
    else:
        kernel = int(layer[0])
        weight = pack_weight(half(channels, 2, kernel, kernel))
        y, _ = ops.conv2d(torch.zeros(1, 2, side, side).bfloat16(), weight, bias, padding=kernel // 2)
    wanted = (bias + 0.0).bfloat16()
    assert torch.equal(y, wanted[None, :, None, None].expand(y.shape))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7FC00000])
def test_nan_stays_nan(bits: int) -> None:
    bias = torch.tensor([bits, 0], dtype=torch.int32).view(torch.float32)
    bias = torch.cat([bias, -bias])
    for kernel in (1, 3):
        weight = pack_weight(torch.zeros(4, 2, kernel, kernel).bfloat16())
        y, _ = ops.conv2d(half(1, 2, 5, 5), weight, bias, padding=kernel // 2)
        assert y.isnan().all((0, 2, 3)).tolist() == [True, False, True, False]
    y, _ = ops.depthwise_conv2d(half(1, 4, 5, 5), torch.zeros(4, 1, 3, 3).bfloat16(), bias, padding=1)
    assert y.isnan().all((0, 2, 3)).tolist() == [True, False, True, False]


def test_packing_keeps_the_type() -> None:
    weight = half(40, 5, 3, 3)
    packed = pack_weight(weight)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(unpack_weight(packed, 40), weight)


def test_a_bias_may_be_either() -> None:
    x, weight, bias = half(2, 5, 6, 6), pack_weight(half(7, 5, 3, 3)), half(7)
    assert torch.equal(ops.conv2d(x, weight, bias)[0], ops.conv2d(x, weight, bias.float())[0])
    y, _ = ops.depthwise_conv2d(x, half(5, 1, 3, 3), half(5))
    assert torch.equal(y, ops.depthwise_conv2d(x, half(5, 1, 3, 3), half(5).float())[0])


MIXED: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (
        lambda: ops.conv2d(half(1, 3, 6, 6), pack_weight(normal(5, 3, 3, 3)), normal(5)),
        r"weight: expected bfloat16, got torch.float32; convert it with .bfloat16\(\)",
    ),
    "x": (
        lambda: ops.conv2d(normal(1, 3, 6, 6), pack_weight(half(5, 3, 3, 3)), normal(5)),
        r"weight: expected float32, got torch.bfloat16; convert it with .float\(\)",
    ),
    "bias": (
        lambda: ops.conv2d(normal(1, 3, 6, 6), pack_weight(normal(5, 3, 3, 3)), half(5)),
        r"bias: expected float32, got torch.bfloat16; convert it with .float\(\)",
    ),
    "residual": (
        lambda: ops.conv2d(half(1, 3, 6, 6), pack_weight(half(5, 3, 3, 3)), normal(5), residual=normal(1, 5, 4, 4)),
        r"residual: expected bfloat16",
    ),
    "depthwise": (
        lambda: ops.depthwise_conv2d(half(1, 3, 6, 6), normal(3, 1, 3, 3), normal(3)),
        r"weight: expected bfloat16",
    ),
    "linear": (lambda: ops.linear(half(1, 3), pack_weight(normal(5, 3)), normal(5)), r"weight: expected bfloat16"),
    "statistics": (
        lambda: ops.conv2d(
            half(1, 3, 6, 6),
            pack_weight(half(5, 3, 3, 3)),
            normal(5),
            gating=Statistics(half(1, 1, 3), 0.0, 1.0),
        ),
        r"gating.squares: expected float32, got torch.bfloat16",
    ),
    "half": (lambda: ops.sum_squares(normal(1, 2, 3, 3).half()), r"x: expected float32 or bfloat16, got torch.float16"),
}


@pytest.mark.parametrize("case", MIXED)
def test_types_do_not_mix(case: str) -> None:
    call, message = MIXED[case]
    with pytest.raises(EngineInputError, match=message):
        call()


WINDOW = ([1, 1], [1, 1], "relu")


def conv_sample(gate: Tensor | None) -> tuple[Any, ...]:
    layer = (half(2, 5, 6, 6), pack_weight(half(7, 5, 3, 3)), normal(7))
    return *layer, *WINDOW, gate, 0.0, 1.0, half(2, 7, 6, 6), None, 0.0, 0.0


SAMPLES: dict[str, Callable[[Tensor | None], tuple[Any, ...]]] = {
    "conv2d": conv_sample,
    "pooled_conv2d": lambda gate: (*conv_sample(gate)[:9],),
    "depthwise_conv2d": lambda gate: (half(2, 5, 6, 6), half(5, 1, 3, 3), normal(5), *WINDOW, gate, 0.0, 1.0),
    "max_pool2d": lambda gate: (half(2, 5, 6, 6), [2, 2], [2, 2], [0, 0]),
    "sum_squares": lambda gate: (half(2, 5, 6, 6),),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    for gate in (None, normal(2, 5) > 0, normal(2, 3, 5).square()):
        torch.library.opcheck(getattr(torch.ops.isw, name).default, SAMPLES[name](gate))


def test_the_operators_themselves_refuse_mixed_types() -> None:
    for place, other in ((0, normal(2, 5, 6, 6)), (1, pack_weight(normal(7, 5, 3, 3))), (9, normal(2, 7, 6, 6))):
        arguments = list(conv_sample(None))
        arguments[place] = other
        with pytest.raises(ValueError, match="expected"):
            torch.ops.isw.conv2d(*arguments)


def test_flops_are_two_per_multiply_add() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.conv2d(half(2, 5, 6, 6), pack_weight(half(7, 5, 3, 3)), normal(7))
    assert counter.get_total_flops() == 2 * (2 * 7 * 16 * 45)


def test_dropped_channels_are_not_read() -> None:
    keep = torch.tensor([[True, False, True]])
    for kernel in (1, 3):
        x, weight = half(1, 3, 6, 6), half(5, 3, kernel, kernel)
        x[:, 1], weight[:, 1] = float("nan"), float("nan")
        y, _ = ops.conv2d(x, pack_weight(weight), normal(5), gating=keep)
        assert y.isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, wide = half(3, 40, 32, 32), pack_weight(half(48, 40, 3, 3)), pack_weight(half(48, 40, 1, 1))
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results = [ops.conv2d(x, w, normal(48), gating=gating_of("random", x)) for w in (weight, wide)]
        results.append(ops.depthwise_conv2d(x, half(40, 1, 3, 3), normal(40), padding=1))
        found.append([tensor for result in results for tensor in result])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


# -- accelerated networks --------------------------------------------------------------------------

on_best = pytest.mark.parametrize("isa", cpu.available()[:1], indirect=True, scope="module")


def thirds(feature: Tensor, norms: Tensor) -> Tensor:
    """A gate that rounding cannot turn: every third channel goes, another one in every instance."""
    place = torch.arange(norms.shape[1]) + torch.arange(norms.shape[0])[:, None]
    return place % 3 != 0


@pytest.fixture
def _engine_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "seconds_in_place", clock("gated"))
    monkeypatch.setattr(whole, "take_turns", whole_clock("gated"))


def modules_of(fast: Accelerated, kind: type[torch.nn.Module]) -> list[torch.nn.Module]:
    (plan,) = fast.plans.values()
    return [module for module in plan.graph.modules() if isinstance(module, kind)]


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Some roundings apart: batch norms are folded, residuals and activations fused."""
    assert found.dtype == wanted.dtype == torch.bfloat16
    scale = float(wanted.float().abs().max())
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.03, atol=0.03 * scale)


NETS = [Plain, Residual, SqueezeExcite]


@on_best
@pytest.mark.usefixtures("_engine_is_fast")
@pytest.mark.parametrize("kind", NETS)
def test_an_accelerated_network_gives_what_the_masked_one_gives(kind: type[Net]) -> None:
    net = made(kind).bfloat16()
    images = net.images(4).bfloat16()
    pruner = InstanceWisePruner(net, images, gate=thirds)
    pruner.enable()
    fast = pruner.accelerate(images, backend="gated")
    assert fast.execution == "accelerated"
    assert modules_of(fast, GatedConv)
    with torch.inference_mode(), fast.recording() as record:
        found, wanted = fast(images), net(images)
    assert_near(found, wanted)
    assert 0 < record.keep_ratio < 1
    assert all(torch.equal(record.keep[name], keep) for name, keep in pruner.keep.items())


@on_best
@pytest.mark.usefixtures("_engine_is_fast")
def test_decisions_come_from_statistics() -> None:
    net = made(Plain, seed=1).bfloat16()
    images = net.images(8).bfloat16()
    pruner = InstanceWisePruner(net, images, alpha=0.1, beta=0.9)
    pruner.enable()
    fast = pruner.accelerate(images, backend="gated")
    with torch.inference_mode(), fast.recording() as record:
        fast(images)
        net(images)
    first = next(iter(pruner.sites)).name  # later ones read maps of other decisions
    norms = pruner.norms[first]
    torch.testing.assert_close(record.norms[first], norms, rtol=0.03, atol=0.03 * float(norms.mean()))
    far = ((norms - 0.9 * norms.mean(1, keepdim=True)).abs() > 0.05 * norms).all(1)
    assert far.any()
    assert torch.equal(record.keep[first][far], pruner.keep[first][far])
    assert not pruner.keep[first].all()


@on_best
@pytest.mark.parametrize("kind", NETS)
def test_dense_execution(kind: type[Net]) -> None:
    net = made(kind).bfloat16()
    images = net.images(4).bfloat16()
    wanted = net(images).detach()
    pruner = InstanceWisePruner(net, images)
    fast = pruner.accelerate(images, backend="dense")
    assert modules_of(fast, DenseConv)
    assert_near(fast(images), wanted)


@on_best
def test_dense_layers_are_reordered_where_onednn_takes_bfloat16() -> None:
    net = made(Residual).bfloat16()
    images = net.images(4).bfloat16()
    pruner = InstanceWisePruner(net, images)
    layers = modules_of(pruner.accelerate(images, backend="dense"), DenseConv)
    takes = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert all((layer.reordered is not None) == takes for layer in layers)
