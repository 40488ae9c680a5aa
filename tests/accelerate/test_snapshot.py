"""Nothing that an accelerated model shows can change it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate import Accelerated, fit
from isw_plugin.accelerate import choose as module
from isw_plugin.errors import UnsupportedError
from tests.accelerate.nets import attached, clock, whole_clock
from tests.conftest import Plain, made


@pytest.fixture(scope="module")
def fast() -> Accelerated:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "seconds_in_place", clock("gated", "dense"))
        patch.setattr(module, "take_turns", whole_clock("gated"))
        net = made(Plain)
        return attached(net, net.images()).accelerate(net.images(), backend="gated")


def test_a_state_dict_is_read_and_not_loaded(fast: Accelerated) -> None:
    images = made(Plain).images()
    wanted, state = fast(images), fast.state_dict()
    assert torch.equal(state["masked.c1.weight"], made(Plain).c1.weight)
    for value in state.values():
        value.zero_()
    parent = nn.Sequential(fast)
    for loaded in (lambda: fast.load_state_dict(state), lambda: parent.load_state_dict(parent.state_dict())):
        with pytest.raises(UnsupportedError, match="snapshot, it loads no state_dict: change the model"):
            loaded()
    assert torch.equal(fast(images), wanted)


def zero_parameters(fast: Accelerated) -> None:
    assert next(fast.parameters()).device.type == "cpu"
    for tensor in (*fast.parameters(), *fast.buffers(), *fast.masked.parameters(), *fast.masked.buffers()):
        tensor.data.zero_()


def open_gates(fast: Accelerated) -> None:
    InstanceWisePruner.of(fast.masked).enable(beta=0.0)


@pytest.mark.parametrize(
    "change",
    [
        zero_parameters,
        open_gates,
        lambda fast: fast.masked.half(),
        lambda fast: setattr(fast.masked, "c1", nn.Conv2d(3, 4, 3)),
        lambda fast: fast.masked.load_state_dict(made(Plain, 1).state_dict()),
    ],
)
def test_changes_of_what_it_shows_reach_no_call(change: Callable[[Accelerated], Any], fast: Accelerated) -> None:
    known, fresh = made(Plain).images(), made(Plain).images(3)
    wanted, alike = fast(known), copy.deepcopy(fast)
    changed = copy.deepcopy(fast)
    change(changed)
    assert torch.equal(changed(known), wanted)
    assert torch.equal(changed(fresh), alike(fresh))


@pytest.mark.parametrize(
    "change",
    [
        lambda fast: fast.half(),
        lambda fast: fast.to(torch.bfloat16),
        lambda fast: fast.double(),
        lambda fast: fast.to("meta"),
        lambda fast: nn.Sequential(fast).half(),
    ],
)
def test_another_type_or_device_is_refused(change: Callable[[Accelerated], Any], fast: Accelerated) -> None:
    with pytest.raises(
        UnsupportedError, match=r"stays as it is, it cannot become .*: change the model it was made from"
    ):
        change(fast)
    assert fast(made(Plain).images()).dtype == torch.float32


def test_the_type_and_device_that_it_has_are_nothing_new(fast: Accelerated) -> None:
    assert fast.to("cpu") is fast.float() is fast.cpu() is fast.to(memory_format=torch.channels_last) is fast


@pytest.mark.parametrize(
    ("name", "value"), [("masked", None), ("masked", nn.Identity()), ("head", nn.Identity()), ("w", torch.zeros(1))]
)
def test_assigning_is_refused(name: str, value: nn.Module | Tensor | None, fast: Accelerated) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} cannot be assigned"):
        setattr(fast, name, value)
    with pytest.raises(UnsupportedError, match="no gradients"):
        fast.requires_grad_()
    assert fast.requires_grad_(False) is fast


def test_copies_are_of_what_it_is(fast: Accelerated) -> None:
    fast.masked.c1.weight.data.zero_()  # type: ignore[union-attr]
    images = made(Plain).images()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(images), fast(images))
        assert other.masked.c1.weight.abs().max() > 0
