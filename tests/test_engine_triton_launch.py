"""The CUDA operators around their kernels, without a GPU: what is launched, refused, promised and compiled."""

import sys
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from isw_plugin.engine import cuda, ops, tiles
from isw_plugin.engine.reference import BLOCK
from isw_plugin.errors import EngineInputError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, tensors without contents."""
    made = {"device": device, "dtype": torch.float16}
    x, weight, bias = torch.empty(2, 40, 20, 20, **made), torch.empty(1, 40, 3, 3, 32, **made), torch.empty(9, **made)
    squares = torch.empty(2, 4, 40, device=device)
    residual, keep = torch.empty(2, 9, 10, 10, **made), torch.empty(2, 3, 9, device=device)
    window = ([2, 2], [1, 1], "relu")
    return {
        "conv2d": (x, weight, bias, *window, squares, 0.5, 1.0, residual, keep, 0.0, 1.0),
        "depthwise_conv2d": (
            *(x, torch.empty(40, 1, 3, 3, **made), torch.empty(40, **made)),
            *(*window, squares, 0.0, 1.0),
        ),
        "sum_squares": (x,),
        "keep_mask": (squares, 0.0, 1.0),
    }


@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d", "sum_squares", "keep_mask"])
def test_nothing_on_the_host_depends_on_data(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from isw_plugin.engine import triton_launch, triton_ops

    launched: list[Any] = []
    monkeypatch.setattr(triton_launch.Launch, "run", lambda launch: launched.append(launch))
    outputs = getattr(triton_ops, name)(*calls("meta")[name])  # whoever looks into a meta tensor gets an error
    assert len(launched) == {"conv2d": 4, "depthwise_conv2d": 2, "sum_squares": 1, "keep_mask": 1}[name]
    with FakeTensorMode():
        fakes = getattr(torch.ops.isw, name)(*calls("cuda")[name])
    outputs, fakes = (list(found) if isinstance(found, tuple) else [found] for found in (outputs, fakes))
    described = [[(t.shape, t.stride(), t.dtype) for t in found] for found in (outputs, fakes)]
    assert described[0] == described[1]


def test_a_pooled_map_keeps_its_layout_on_cuda() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 4, 6, 6, device="cuda")
        assert ops.max_pool2d(x, 2).is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last)
        assert ops.max_pool2d(x, 2).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d", "max_pool2d", "sum_squares", "keep_mask"])
def test_operators_have_a_way_on_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"isw::{name}", "CUDA")


def test_half_is_for_cuda_alone() -> None:
    with pytest.raises(EngineInputError, match=r"expected float32 or bfloat16, got torch.float16"):
        ops.sum_squares(torch.zeros(1, 2, 3, 3).half())
    with FakeTensorMode():
        assert ops.sum_squares(torch.empty(1, 2, 3, 3, dtype=torch.float16, device="cuda")).dtype == torch.float32
        with pytest.raises(EngineInputError, match=r"expected float32 or bfloat16, got torch.float64"):
            ops.sum_squares(torch.empty(1, 2, 3, 3, dtype=torch.float64, device="cuda"))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mixed types": ({"bias": meta(5).half()}, "bias is torch.float16 and x torch.float32"),
    "double": ({"x": meta(2, 3, 6, 6).double()}, "expected one type"),
    "device": ({"bias": torch.zeros(5)}, "bias is on cpu but x is on meta"),
    "packed": ({"weight": meta(1, 4, 3, 3, BLOCK)}, r"weight: expected shape \(1, 3"),
    "dimensions": ({"x": meta(3, 6, 6)}, "x: expected shape"),
    "keep": ({"gate": meta(2, 4).bool()}, r"gate: expected a keep mask \(N, C\) for 2 instances and 3 channels"),
    "statistics": ({"gate": meta(2, 0, 3)}, r"gate: expected a float32 statistics \(N, S, C\)"),
    "half statistics": ({"gate": meta(2, 1, 3).half()}, "gate: expected a float32"),
    "residual": ({"residual": meta(2, 5, 6, 5)}, r"residual: expected shape \(2, 5, 6, 6\)"),
    "window": ({"stride": (0, 1)}, "must be positive"),
    "act": ({"act": "tanh"}, "expected one of none, relu, relu6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_operator_refuses_what_it_would_misread(case: str) -> None:
    from isw_plugin.engine import triton_ops

    arguments = {"x": meta(2, 3, 6, 6), "weight": meta(1, 3, 3, 3, BLOCK), "bias": meta(5), "stride": (1, 1)}
    arguments |= {"padding": (1, 1), "act": "relu", "gate": None, "alpha": 0.0, "beta": 1.0, "residual": None}
    arguments |= {"residual_gate": None, "residual_alpha": 0.0, "residual_beta": 0.0}
    changed, message = WRONG[case]
    with pytest.raises(EngineInputError, match=message):
        triton_ops.conv2d(**(arguments | changed))


def test_without_triton_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isw_plugin.engine.triton_ops", None)
    cuda.load.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install triton"):
        assert cuda.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.load() is None
    cuda.load.cache_clear()


@pytest.mark.parametrize("pixels", [1, 2, 4, 16, 25, 49, 64, 81, 144, 196, 784, 1024, 3136, 50176])
def test_tiles_waste_less_than_they_cover(pixels: int) -> None:
    tile = tiles.pixel_tile(pixels)
    covered = tiles.pixel_slots(pixels) * tile
    assert pixels <= covered
    assert covered < max(2 * pixels, 17)


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma"), (90, "wgmma")])
@pytest.mark.parametrize("channels", [128, 53])
def test_the_convolution_compiles_to_tensor_cores_and_asynchronous_copies(
    channels: int, capability: int, instruction: str
) -> None:
    from benchmarks.speed.cuda.assembly import gated_layer, report

    found = report(gated_layer(channels, channels, 3, 16, torch.bfloat16)["conv"], capability)
    assert found[instruction] > 0
    assert found["cp.async 16 B"] >= 12
    assert found["atomics"] == found["stack"] == 0
    assert found["shared"] <= 99 * 1024  # what the smallest of these GPUs has for a program


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, False), (torch.float16, True)])
def test_every_kernel_compiles(dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.speed.cuda.assembly import gated_layer, other_launches, report
    from isw_plugin.engine import triton_launch

    monkeypatch.setattr(triton_launch, "_wide", lambda *maps: wide)
    for name, launch in (gated_layer(37, 53, 3, 8, dtype) | other_launches(dtype)).items():
        found = report(launch, 90)
        assert found["registers"] > 0, name
        assert found["atomics"] == 0, name
