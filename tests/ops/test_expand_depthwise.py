"""A 1x1 layer and its depthwise one in one operator, against the two by themselves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isw_plugin import ops
from isw_plugin.errors import EngineInputError
from isw_plugin.ops import Statistics, cpu, pack_weight, reference

WINDOWS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {  # kernel, window
    "1x1": ((1, 1), {}),
    "3x3": ((3, 3), {"padding": 1}),
    "5x5 stride 2": ((5, 5), {"padding": 2, "stride": 2}),
    "3x3 stride 2, more behind": ((3, 3), {"padding": (0, 0, 1, 1), "stride": 2}),
    "1x9, more than a column of registers": ((9, 1), {"padding": (4, 0)}),
    "4x2 stride 3": ((4, 2), {"padding": (2, 1), "stride": 3}),
}
SIZES = [(1, 1), (2, 3), (4, 4), (7, 7), (9, 16), (14, 14), (5, 50), (30, 31)]


@pytest.fixture(params=cpu.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield cpu.use(request.param)
    cpu.use()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(inputs: int, channels: int, kernel: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    weight = pack_weight(normal(channels, inputs, 1, 1, seed=1) / inputs**0.5).to(dtype)
    filters = normal(channels, 1, *kernel, seed=2).to(dtype)
    return weight, normal(channels, seed=3), filters, normal(channels, seed=4)


def kept(n: int, channels: int, share: float, seed: int) -> Tensor:
    return torch.rand((n, channels), generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_is_what_the_two_layers_make(window: str, dtype: torch.dtype, isa: str) -> None:
    kernel, options = WINDOWS[window]
    share = 1e-5 if dtype == torch.float32 else 2**-7
    for number, size in enumerate(SIZES):
        inputs, channels = [(1, 1), (3, 8), (5, 37), (16, 33)][number % 4]
        x = (3 * normal(2, inputs, *size, seed=5)).to(dtype)
        if min(reference.pad(x, options.get("padding", 0)).shape[2:]) < max(kernel):
            continue
        gating = [None, kept(2, inputs, 0.5, 6), Statistics(normal(2, 3, inputs).square(), 0.0, 0.9)][number % 3]
        acts = list(reference.ACTS)
        chosen: dict[str, Any] = {"act": acts[number % len(acts)], "filter_act": acts[(number + 2) % len(acts)]}
        for out_keep in (None, kept(2, channels, 0.5, 7), kept(2, channels, 0.0, 8)):
            everything = options | chosen | {"gating": gating, "out_keep": out_keep, "sums": True}
            y, sums = ops.expand_depthwise_conv2d(x, *layers(inputs, channels, kernel, dtype), **everything)
            wanted, of_wanted = reference.expand_depthwise_conv2d(
                x, *layers(inputs, channels, kernel, dtype), **everything
            )
            largest = float(wanted.float().abs().max())
            torch.testing.assert_close(y, wanted, rtol=share, atol=share * largest)
            torch.testing.assert_close(sums, of_wanted, rtol=4 * share, atol=4 * share * float(of_wanted.abs().max()))


def test_the_two_operators_agree_to_rounding() -> None:
    weight, bias, filters, filter_bias = layers(40, 100, (3, 3), torch.float32)
    x, keep, out_keep = normal(2, 40, 14, 14), kept(2, 40, 0.5, 1), kept(2, 100, 0.5, 2)
    one = ops.expand_depthwise_conv2d(
        x, weight, bias, filters, filter_bias, padding=1, act="relu6", gating=keep, out_keep=out_keep
    )
    between, _ = ops.conv2d(x, weight, bias, act="relu6", gating=keep, out_keep=out_keep)
    two = ops.depthwise_conv2d(between, filters, filter_bias, padding=1, gating=out_keep, out_keep=out_keep)
    for found, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_dropped_is_not_read() -> None:
    keep = kept(2, 6, 0.5, 1)
    x = normal(2, 6, 7, 9)
    held = layers(6, 20, (3, 3), torch.float32)
    wanted = ops.expand_depthwise_conv2d(x, *held, padding=1, gating=keep)
    found = ops.expand_depthwise_conv2d(
        x.masked_fill(~keep[..., None, None], float("nan")), *held, padding=1, gating=keep
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_threads_and_order_of_the_batch_change_nothing() -> None:
    x, held = normal(5, 24, 14, 14), layers(24, 150, (5, 5), torch.float32)
    options: dict[str, Any] = {"padding": 2, "act": "relu", "gating": kept(5, 24, 0.5, 1), "sums": True}
    out_keep = kept(5, 150, 0.5, 2)
    threads = torch.get_num_threads()
    wanted = ops.expand_depthwise_conv2d(x, *held, **options, out_keep=out_keep)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = ops.expand_depthwise_conv2d(x, *held, **options, out_keep=out_keep)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_an_empty_batch() -> None:
    y, squares = ops.expand_depthwise_conv2d(normal(0, 3, 7, 7), *layers(3, 8, (3, 3), torch.float32), stride=2)
    assert (y.shape, squares.shape) == ((0, 8, 3, 3), (0, 1, 8))


@pytest.mark.parametrize("gate", [None, "mask", "statistics"])
def test_opcheck(gate: str | None) -> None:
    gates = {None: None, "mask": kept(2, 5, 0.5, 1), "statistics": normal(2, 3, 5).square()}
    held = layers(5, 9, (3, 3), torch.float32)
    window = ([2, 1], [1, 1], "relu6", "relu")
    for rest in ((), (kept(2, 9, 0.5, 2), True, True)):
        arguments = (normal(2, 5, 6, 7), *held, *window, gates[gate], 0.0, 1.0, *rest)
        torch.library.opcheck(torch.ops.isw.expand_depthwise_conv2d.default, arguments)


def test_flops_are_those_of_both() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.expand_depthwise_conv2d(normal(2, 5, 6, 6), *layers(5, 9, (3, 3), torch.float32))
    assert counter.get_total_flops() == 2 * (2 * 5 * 36 * 9 + 2 * 9 * 16 * 9)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "kernel": (
        {"weight": pack_weight(torch.zeros(8, 3, 3, 3))},
        r"weight: packed from a \(3, 3\) kernel, expected 1x1",
    ),
    "filters": ({"filters": torch.zeros(7, 1, 3, 3)}, r"filters: expected shape \(8, 1, any, any\)"),
    "bias of filters": ({"filter_bias": torch.zeros(7)}, r"filter_bias: expected shape \(8\)"),
    "activation": ({"filter_act": "tanh"}, "filter_act='tanh': expected one of none, relu"),
    "kept": ({"out_keep": torch.ones(2, 3, dtype=torch.bool)}, r"out_keep: expected shape \(2, 8\)"),
    "window": ({"filters": torch.zeros(8, 1, 9, 9)}, "smaller than the kernel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused(name: str) -> None:
    changed, message = WRONG[name]
    arguments = {
        "x": torch.zeros(2, 3, 6, 6),
        "weight": pack_weight(torch.zeros(8, 3, 1, 1)),
        "bias": torch.zeros(8),
        "filters": torch.zeros(8, 1, 3, 3),
        "filter_bias": torch.zeros(8),
    }
    with pytest.raises(EngineInputError, match=message):
        ops.expand_depthwise_conv2d(**arguments | changed)


def test_the_operator_itself_refuses_wrong_shapes() -> None:
    cpu.load()
    good: list[Any] = [normal(2, 3, 6, 6), *layers(3, 8, (3, 3), torch.float32), [1, 1], [0, 0], "relu", "relu"]
    wrong = {1: pack_weight(normal(8, 3, 3, 3)), 2: normal(40), 3: normal(7, 1, 3, 3), 4: normal(7), 8: "tanh"}
    for place, value in wrong.items():
        arguments = [*good, None, 0.0, 0.0]
        arguments[place] = value
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.isw.expand_depthwise_conv2d(*arguments)
