"""Inputs that are told apart, and those that are refused."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate import Accelerated
from isw_plugin.accelerate.calls import Call, size_of
from isw_plugin.errors import EngineInputError, ISWError, SettingError, UnsupportedError
from tests.accelerate.nets import attached, set_clock
from tests.conftest import Plain, made

IMAGES = made(Plain).images()


@pytest.fixture(scope="module")
def pruner() -> InstanceWisePruner:
    return attached(made(Plain), IMAGES)


@pytest.fixture(scope="module")
def fast(pruner: InstanceWisePruner) -> Accelerated:
    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, "gated")
        return pruner.accelerate(IMAGES, backend="gated")


REFUSED = [
    (IMAGES.to_sparse(), "a sparse_coo tensor: give a dense one"),
    (torch.nested.nested_tensor([IMAGES[0], IMAGES[1]], layout=torch.jagged), "a nested tensor: give a dense one"),
    (IMAGES.to("meta"), r"on meta for a model on cpu: give x.to\('cpu'\)"),
    (IMAGES[:, :2], r"Plain does not take float32 \(4, 2, 8, 8\)"),
    (IMAGES.half(), r"Plain does not take float16 \(4, 3, 8, 8\)"),
    (IMAGES.double(), r"Plain does not take float64 \(4, 3, 8, 8\)"),
    (IMAGES.to(torch.complex64), r"Plain does not take complex64 \(4, 3, 8, 8\)"),
]


@pytest.mark.parametrize(("inputs", "reason"), REFUSED)
def test_inputs_that_do_not_run_are_refused_at_once(
    inputs: Any, reason: str, fast: Accelerated, pruner: InstanceWisePruner
) -> None:
    start = time.perf_counter()
    for refusing in (fast, pruner.accelerate):
        with pytest.raises(EngineInputError, match=reason):
            refusing(inputs)
    assert time.perf_counter() - start < 1
    assert len(fast.plans) == 1


def test_arrays_are_refused(fast: Accelerated, pruner: InstanceWisePruner) -> None:
    with pytest.raises(EngineInputError, match=r"ndarray instead of a tensor: torch\.as_tensor makes one"):
        fast(IMAGES.numpy())
    with pytest.raises(SettingError, match=r"hold a ndarray: pass tensors, such as torch\.from_numpy"):
        pruner.accelerate(IMAGES.numpy())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("x", "hold a str: pass tensors"),
        ((4, 3, 8, 8), r"is a shape: pass a tensor, such as torch\.zeros\(4, 3, 8, 8\)"),
        ({}, "holds no tensor: give a batch"),
        (3, "hold a int: pass tensors"),
    ],
)
def test_accelerate_needs_a_tensor(inputs: Any, reason: str, pruner: InstanceWisePruner) -> None:
    with pytest.raises(SettingError, match=reason):
        pruner.accelerate(inputs)


def test_accelerate_needs_an_instance(pruner: InstanceWisePruner) -> None:
    with pytest.raises(SettingError, match=r"float32 \(0, 3, 8, 8\) has no instances"):
        pruner.accelerate(IMAGES[:0])


@pytest.mark.parametrize("inputs", ["x", None, [IMAGES]])
def test_a_call_with_something_else_is_refused_as_by_the_model(inputs: Any, fast: Accelerated) -> None:
    with pytest.raises(ISWError, match=r"Plain does not take .*; it was accelerated on float32"):
        fast(inputs)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return size_of(one, {}, "cpu")[1] == size_of(other, {}, "cpu")[1]


def test_sizes_are_all_that_a_graph_hangs_on() -> None:
    x, y = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert same((x,), (y,))
    assert same(((x, y), 1), ((y, x), 1))
    assert same((x, float("nan")), (y, float("nan")))
    for other in (y[:1], y.double(), y.to("meta"), y.contiguous(memory_format=torch.channels_last), nn.Parameter(y)):
        assert not same((x,), (other,))
    for one, other in (
        ((x, y), [x, y]),
        ((x, y), ((x,), y)),
        ((x, y), (x, x)),
        ((x, 1), (x, 1.0)),
        ((x, 0.0), (x, -0.0)),
    ):
        assert not same((one,), (other,))
    with torch.autocast("cpu", torch.bfloat16):
        cast = size_of((x,), {}, "cpu")[1]
    assert cast != size_of((x,), {}, "cpu")[1]
    assert size_of((x,), {"a": y}, "cpu")[1] != size_of((x,), {"b": y}, "cpu")[1]
    for unknown in ({1, 2}, np.zeros(1), object()):
        assert size_of((x, unknown), {}, "cpu")[1] is None


def test_forms_are_sizes_of_any_instances_and_order() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for other in (x[:1], x.contiguous(memory_format=torch.channels_last)):
        assert Call((x,), {}).form("cpu") == Call((other,), {}).form("cpu")
    for other in (x[..., :2], x.double(), x[0], x.to("meta")):
        assert Call((x,), {}).form("cpu") != Call((other,), {}).form("cpu")
    assert Call((torch.zeros(()),), {}).form("cpu") != Call((torch.zeros(2),), {}).form("cpu")


def test_a_copy_keeps_which_tensors_are_one() -> None:
    x = torch.zeros(2)
    call = Call((x, x), {"a": x, "b": 1}).copied()
    assert call.args[0] is call.args[1] is call.kwargs["a"]
    assert call.args[0].data_ptr() != x.data_ptr()


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], object]] = {
    "vmap": lambda run: torch.func.vmap(run)(IMAGES[None]),
    "grad": lambda run: torch.func.grad(lambda x: run(x).sum())(IMAGES),
    "jvp": lambda run: torch.func.jvp(run, (IMAGES,), (IMAGES,)),
    "per-sample gradients": lambda run: torch.func.vmap(torch.func.grad(lambda x: run(x[None]).sum()))(IMAGES),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # as torch's own forward mode begins
@pytest.mark.parametrize("execution", ["accelerated", "masked"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_torch_func_are_refused(
    transform: Callable[..., object], execution: str, fast: Accelerated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "execution", execution)
    with pytest.raises(UnsupportedError, match=r"no transform of torch\.func .* transform the attached model"):
        transform(fast)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="has no derivatives"):
        fast(forward_ad.make_dual(IMAGES, IMAGES))
    with forward_ad.dual_level():
        assert fast(IMAGES).shape == (4, 5)
