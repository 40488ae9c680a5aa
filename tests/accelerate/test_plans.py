"""Which inputs a graph runs: those that it was seen to be right for."""

import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate import Accelerated, plans
from isw_plugin.accelerate.execution import DenseConv, DenseLinear, GatedConv
from isw_plugin.errors import EngineInputError, SettingError
from tests.accelerate.nets import assert_close, assert_runs_as_masked, attached, images_for, seeded, set_clock
from tests.conftest import Plain, made


@pytest.fixture(autouse=True)
def _gated_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "gated")


class Two(nn.Module):
    """One of two heads, behind a map that both runs of a probe read alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bend = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.c1, self.act, self.one, self.other = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Conv2d(8, 5, 3)
        self.register_buffer("table", torch.arange(5.0))

    def choose(self, x: Tensor, first: bool) -> Tensor:
        return (self.one if first else self.other)(self.act(self.c1(self.bend(self.stem(x))))).mean((2, 3))


class Even(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.shape[0] % 2 == 0)


class Few(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.shape[0] <= 5)


class Alone(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.shape[0] > 1)


class InOrder(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.is_contiguous())


class Large(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.shape[2] > 8)


def fast_of(net: nn.Module, inputs: Any, **options: Any) -> tuple[InstanceWisePruner, Accelerated]:
    pruner = attached(net, inputs, **options)
    return pruner, pruner.accelerate(inputs, backend="gated")


def masked(net: nn.Module, *inputs: Any) -> Any:
    with torch.no_grad():
        return net(*inputs)


@pytest.mark.filterwarnings("ignore:.*runs masked")
@pytest.mark.parametrize(
    ("kind", "refused"),
    [(Even, [1, 3]), (Few, [6]), (Alone, [1]), (InOrder, []), (Large, [])],
)
def test_a_model_that_branches_on_sizes_is_right_at_every_one(kind: type[Two], refused: list[int]) -> None:
    net = seeded(kind)
    _, fast = fast_of(net, images_for(net, 4))
    assert fast.execution == "accelerated"
    for n in (1, 2, 3, 6, 1, 3):
        assert_close(fast(images_for(net, n)), masked(net, images_for(net, n)))
    assert list(fast.refused) == [f"float32 ({n}, 3, 8, 8)" for n in refused]
    for images in (images_for(net, 4).contiguous(memory_format=torch.channels_last), images_for(net, 4, 12)):
        assert_close(fast(images), masked(net, images))
    assert all(f"masked at {inputs}: " in fast.summary() for inputs in fast.refused)


def test_one_warning_says_that_a_size_runs_masked() -> None:
    net = seeded(Even)
    _, fast = fast_of(net, images_for(net, 4))
    with pytest.warns(RuntimeWarning, match=r"\(3, 3, 8, 8\) runs masked, not faster: .* another branch"):
        fast(images_for(net, 3))
    for n in (1, 3):
        fast(images_for(net, n))


class Squeezed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, True).squeeze()


@pytest.mark.parametrize("n", [1, 4])
def test_a_rank_that_hangs_on_the_batch(n: int) -> None:
    net = seeded(Squeezed)
    _, fast = fast_of(net, images_for(net, n))
    assert fast(images_for(net, 1)).shape == (5,)
    for others in (1, 4):
        assert_close(fast(images_for(net, others)), masked(net, images_for(net, others)))


class Nested(Two):
    def forward(self, pair: Any, scale: float = 1.0) -> Tensor:
        flat = isinstance(pair[0], Tensor)
        a, b = pair if flat else pair[0]
        return self.choose(a + 2 * b, scale > 0) * (1 if flat else 3) + isinstance(scale, int)


def test_structure_and_values_of_arguments_tell_calls_apart() -> None:
    net = seeded(Nested)
    a, b = images_for(net, 3), images_for(net, 3, seed=1)
    _, fast = fast_of(net, ((a, b),))
    for call in (((a, b),), ([a, b],), (((a, b),),), ((a, b), -1.0), ((a, b), 1), ((a, b), 1.0), ((a, a),)):
        assert_close(fast(*call), masked(net, *call))


def test_a_size_first_seen_under_autocast_is_another_without() -> None:
    net = seeded(Large)
    _, fast = fast_of(net, images_for(net))
    for images in (images_for(net, 3, 12), images_for(net)):
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = fast(images), masked(net, images)
        assert found.dtype == wanted.dtype == torch.bfloat16
        torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
        assert_close(fast(images), masked(net, images))


class Giving(Two):
    def forward(self, x: Tensor) -> Any:
        y = self.one(self.act(self.c1(x)))
        held = {"table": self.table, "twice": self.table * 2, "rows": self.table.expand(x.shape[0], -1)}
        apart = {"y": y, "pooled": F.adaptive_avg_pool2d(y, (4, 4)), "x": F.adaptive_avg_pool2d(x, (8, 8))}
        return held, apart, (y, x), x.shape[0], 3, "name", None, torch.zeros(x.shape[0], 2)


def test_what_a_call_gives_is_the_callers() -> None:
    net = seeded(Giving)
    _, fast = fast_of(net, images_for(net))
    assert fast.execution == "accelerated"
    images = images_for(net)
    wanted = masked(net, images)
    held, apart, (y, x), *others, zeros = fast(images)
    assert x is images
    assert others == [6, 3, "name", None]
    for tensor in (*held.values(), apart["pooled"], apart["x"], zeros):
        if tensor is not held["rows"]:  # one memory for all, as the model's own
            tensor.add_(7)
    assert_close(y, wanted[2][0])
    assert torch.equal(images, images_for(net))
    again = fast(images)
    for name in held:
        assert torch.equal(again[0][name], wanted[0][name])
    assert_close(again[1]["pooled"], wanted[1]["pooled"])
    assert not again[-1].any()


class Changing(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.choose(x, True)
        x.zero_()
        return y


class Counting(Two):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.choose(x, True) * self.calls


def test_a_model_that_changes_its_input_still_does() -> None:
    net = seeded(Changing)
    example, images = images_for(net), images_for(net)
    _, fast = fast_of(net, example)
    assert torch.equal(example, images)
    assert "changes its input" in fast.summary()
    assert_close(fast(images), masked(net, example))
    assert not images.any()


def test_a_model_that_does_not_repeat_itself_runs_masked() -> None:
    net = seeded(Counting)
    with pytest.warns(RuntimeWarning, match="runs masked, not faster: the masked model does not give the same twice"):
        _, fast = fast_of(net, images_for(net))
    assert fast.execution == "masked"


# -- the check -------------------------------------------------------------------------------------


def wrong(kind: type[nn.Module], side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are a little off for maps of this size."""
    right = kind.forward

    def forward(self: Any, x: Tensor, *others: Any) -> Any:
        given = right(self, x, *others)
        if x.shape[-1] != side:
            return given
        return (given[0] * 1.01, given[1]) if isinstance(given, tuple) else given * 1.01

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("backend", ["gated", "auto"])
def test_a_copy_that_differs_is_not_handed_over(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(Plain)
    images = net.images()
    pruner = attached(net, images)
    wrong(GatedConv, images.shape[-1], monkeypatch)
    with pytest.warns(RuntimeWarning, match="runs masked, not faster: the graph differs from the masked model") as told:
        fast = pruner.accelerate(images, backend=backend)
    assert len(told) == 1
    assert fast.execution == "masked"
    assert fast.summary().splitlines()[-1].startswith("masked: the graph differs from the masked model: ")
    assert_runs_as_masked(fast, pruner, (images,))


class Reversed(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > -1e9 else -x)  # cannot be exported


@pytest.mark.parametrize("kind", [Plain, Reversed])
def test_dense_keeps_every_channel_where_it_runs_no_graph_too(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(kind)
    images = net.images()
    wanted = net.eval()(images).detach()
    pruner = attached(net, images)
    wrong(DenseConv, images.shape[-1], monkeypatch)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        fast = pruner.accelerate(images, backend="dense")
    assert fast.execution == "masked"
    assert_close(fast(images), wanted)
    with pruner.gating():
        assert (net(images) - wanted).abs().max() > 1e-3


def test_a_size_that_comes_later_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Large)
    pruner, fast = fast_of(net, images_for(net))
    wrong(GatedConv, 12, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"\(3, 3, 12, 12\) runs masked"):
        assert_runs_as_masked(fast, pruner, (images_for(net, 3, 12),))
    assert fast.execution == "accelerated"
    assert list(fast.refused) == ["float32 (3, 3, 12, 12)"]


def test_a_graph_that_does_not_run_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Large)
    pruner, fast = fast_of(net, images_for(net))

    def fails(*_: Any) -> None:
        raise RuntimeError("no such form")

    for plan in fast.plans.values():
        monkeypatch.setattr(plan, "run", fails)
    with pytest.warns(RuntimeWarning, match=r"\(3, 3, 8, 8\) runs masked, not faster: the graph does not run: no such"):
        assert_runs_as_masked(fast, pruner, (images_for(net, 3),))


# -- how many are held -----------------------------------------------------------------------------


def storages(fast: Accelerated) -> int:
    """Bytes that plans hold, each memory once."""
    held: dict[int, int] = {}
    for plan in fast.plans.values():
        for layer in plan.graph.modules():
            tensors = list(layer.buffers(recurse=False))
            if isinstance(layer, DenseConv | DenseLinear):
                tensors += [t for t in (layer.layer.weight, layer.layer.bias) if t is not None]
                order = layer.reordered
                held |= {} if order is None else {id(order): torch.ops.mkldnn._nbytes(order)}
            for tensor in tensors:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("backend", ["gated", "dense"])
def test_plans_of_other_sizes_hold_the_same_weights(backend: Any) -> None:
    net = seeded(Large)
    fast = attached(net, images_for(net, 4, 10)).accelerate(images_for(net, 4, 10), backend=backend)
    before = storages(fast)
    for side in (11, 12):
        fast(images_for(net, 4, side))
    assert len(fast.plans) == 3
    assert storages(fast) == before > 0


def test_the_plans_used_last_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    net = seeded(Large)
    _, fast = fast_of(net, images_for(net, 2, 10))
    fast._plans.limit = 2
    for side in (11, 10, 12, 10):  # 12 takes the place of 11
        assert_close(fast(images_for(net, 2, side)), masked(net, images_for(net, 2, side)))
    assert [form[0][2:4] for form in fast.plans] == [(3, 10), (3, 12)]
    assert_close(fast(images_for(net, 2, 11)), masked(net, images_for(net, 2, 11)))


class SmallOnly(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.choose(x, x.shape[2] <= 8 or bool(x.sum() > 0))


def test_what_cannot_be_exported_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(SmallOnly)
    _, fast = fast_of(net, images_for(net))
    tried: list[Any] = []
    real = plans.Traced
    monkeypatch.setattr(plans, "Traced", lambda *given: tried.append(given) or real(*given))
    with pytest.warns(RuntimeWarning, match="SmallOnly cannot be exported"):
        fast(images_for(net, 2, 12))
    for n in (2, 3):
        assert_close(fast(images_for(net, n, 12)), masked(net, images_for(net, n, 12)))
    assert len(tried) == 1


def test_prepared_sizes_are_there_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(Large)
    _, fast = fast_of(net, images_for(net))
    fast._plans.limit = 1
    fast.prepare([1, 3, (2, 3, 10, 10), images_for(net, 2, 12)])
    assert len(fast.plans) == 3
    monkeypatch.setattr(plans.Plans, "first", None)
    for images in (images_for(net, 1), images_for(net, 3), images_for(net, 2, 10), images_for(net, 2, 12)):
        assert_close(fast(images), masked(net, images))
    for wrong_ones in ([()], ["x"]):
        with pytest.raises(SettingError, match="prepare: "):
            fast.prepare(wrong_ones)  # type: ignore[list-item]
    monkeypatch.undo()
    with pytest.raises(EngineInputError, match="Large does not take"):
        fast.prepare([(2, 4, 8, 8)])


def test_a_graph_module_is_accelerated() -> None:
    net = made(Plain)
    traced = fx.symbolic_trace(net)
    pruner, fast = fast_of(traced, net.images())
    assert fast.execution == "accelerated"
    assert assert_runs_as_masked(fast, pruner, (net.images(),)).any()


def test_compiled_it_runs_graphs_that_hold_and_no_others() -> None:
    net = seeded(Even)
    _, fast = fast_of(net, images_for(net, 4))
    compiled = torch.compile(fast, backend="eager")
    with warnings.catch_warnings(action="ignore"):
        for n in (4, 3, 1):
            assert_close(compiled(images_for(net, n)), masked(net, images_for(net, n)))
    torch._dynamo.reset()
