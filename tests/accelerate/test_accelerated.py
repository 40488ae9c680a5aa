"""An accelerated model against the masked model that it was made from."""

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate
from isw_plugin.accelerate import Accelerated, Record, fit
from isw_plugin.accelerate import choose as module
from isw_plugin.accelerate.execution import DenseConv, GatedConv
from isw_plugin.errors import EngineInputError, UnsupportedError
from isw_plugin.ops import cpu
from tests.accelerate.nets import (
    CASES,
    NETS,
    above,
    assert_close,
    assert_runs_as_masked,
    attached,
    images_for,
    seeded,
    set_clock,
)
from tests.accelerate.nets import Downsampled as Down
from tests.conftest import Plain, Residual, hooks_of, made

GATES = [CVGate(0.1, 0.9), CVGate(0.4, 1.2), MinNorm(0.45), RandomGate(0.4, seed=3), above]


@pytest.fixture(autouse=True)
def _gated_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "gated")


def accelerated(net: nn.Module, images: Any, backend: str = "gated", **options: Any) -> tuple[Any, Accelerated]:
    pruner = attached(net, images, **options)
    return pruner, pruner.accelerate(images, backend=backend)


def layers_of(fast: Accelerated, kind: type[nn.Module]) -> list[nn.Module]:
    (plan,) = fast.plans.values()
    return [module for module in plan.graph.modules() if isinstance(module, kind)]


# -- equal to the masked model ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scope"), CASES)
def test_it_runs_as_the_masked_model(kind: type[nn.Module], scope: str) -> None:
    net = seeded(kind)
    images = images_for(net, 8)
    pruner, fast = accelerated(net, images, scope=scope)
    assert fast.execution == "accelerated"
    compared = assert_runs_as_masked(fast, pruner, (images,))
    assert compared.sum() >= 7
    assert not all(keep.all() for keep in pruner.keep.values())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_small_random_networks(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = data.draw
    net = seeded(lambda: Random(draw), draw(st.integers(0, 99)))
    images = images_for(net, draw(st.sampled_from([1, 3, 7])), draw(st.sampled_from([5, 8])))
    set_clock(monkeypatch, *draw(st.lists(st.sampled_from(["gated", "dense"]), min_size=1, max_size=6)))
    options = {"scope": draw(st.sampled_from(["all", "consumers"])), "min_keep": draw(st.sampled_from([0, 0, 2]))}
    pruner, fast = accelerated(net, images, gate=draw(st.sampled_from(GATES)), **options)
    assert fast.execution == "accelerated"
    assert_runs_as_masked(fast, pruner, (images,))


class Random(nn.Module):
    """Blocks in a row, drawn."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        blocks, width = [], 6
        for _ in range(draw(st.integers(1, 4))):
            block = Block(draw, width)
            blocks.append(block)
            width = block.width
        self.blocks, self.fc = nn.ModuleList(blocks), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, draw: Any, width: int) -> None:
        super().__init__()
        self.form = draw(st.sampled_from(["plain", "residual", "depthwise", "cat", "before", "squeeze", "pool"]))
        keeps = self.form in ("residual", "depthwise", "squeeze")
        wide = width if keeps else draw(st.sampled_from([1, 4, 10, 37]))
        self.width = width + wide if self.form == "cat" else wide
        kernel, stride = draw(st.sampled_from([1, 3])), 1 if keeps or self.form == "cat" else draw(st.integers(1, 2))
        groups = width if self.form == "depthwise" else 1
        bias = draw(st.booleans())
        self.conv = nn.Conv2d(width, wide, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(width if self.form == "before" else wide) if draw(st.booleans()) else nn.Identity()
        self.act = draw(st.sampled_from([nn.ReLU, nn.ReLU6, nn.SiLU]))()
        self.pool = draw(st.sampled_from([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2)]))
        self.scale = nn.Conv2d(wide, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "before":
            return self.conv(self.act(self.norm(x)))
        y = self.norm(self.conv(x))
        if self.form == "residual":
            return self.act(y + x)
        y = self.act(y)
        if self.form == "squeeze":
            return y * self.scale(y.mean((2, 3), keepdim=True)).sigmoid()
        if self.form == "pool" and min(y.shape[2:]) > 1:  # a window has to fit
            return self.pool(y)
        return torch.cat([x, y], 1) if self.form == "cat" else y


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
def test_every_gate(gate: Any) -> None:
    net = seeded(Down)
    images = images_for(net, 12)
    pruner, fast = accelerated(net, images, gate=gate)
    assert assert_runs_as_masked(fast, pruner, (images,)).sum() >= 4
    assert not all(keep.all() for keep in pruner.keep.values())


def test_sites_with_gates_of_their_own_and_channels_that_always_stay() -> None:
    net = seeded(Down)
    images = images_for(net)
    for options in ({"per_site": {"a1": {"beta": 0.2}, "b1": {"beta": 0.0}}}, {"min_keep": 5, "beta": 1.9}):
        pruner, fast = accelerated(net, images, **options)
        assert assert_runs_as_masked(fast, pruner, (images,)).sum() >= 5
        pruner.remove()
    assert all((keep.sum(1) >= 5).all() for keep in record_of(fast, images).keep.values())


@pytest.mark.parametrize("gate", [CVGate(0.0, 0.0), MinNorm(0.0), RandomGate(0.0)])
def test_gates_that_keep_all_mask_nothing_and_record_it(gate: Any) -> None:
    net = made(Residual)
    bare, images = net(net.images()), net.images()
    _, fast = accelerated(net, images, gate=gate)
    record = record_of(fast, images)
    assert_close(fast(images), bare)
    assert {name: keep.shape for name, keep in record.keep.items()} == {
        name: (4, channels) for name, (channels, _) in net.sites.items()
    }
    assert record.keep_ratio == 1
    assert record_of(fast, images[:1]).keep["stem"].shape == (1, 4)


def test_a_shortcut_is_masked_under_all_and_whole_under_consumers() -> None:
    images = made(Residual).images(8)
    outputs = {}
    for scope in ("all", "consumers"):
        _pruner, fast = accelerated(made(Residual), images, scope=scope, beta=1.1)
        outputs[scope] = fast(images)
        wanted = made(Residual).gated_by_hand(images, 0.1, 1.1, scope)
        assert_close(outputs[scope], wanted.detach())
        residual_gated = [node.args[5] is not None for node in calls_of(fast) if node.args[4] is not None]
        assert residual_gated == [scope == "all"]
    assert (outputs["all"] - outputs["consumers"]).abs().max() > 1e-2


def calls_of(fast: Accelerated) -> list[Any]:
    """The calls of the engine's layers: (x, gate, alpha, beta, residual, residual gate, ...)."""
    (plan,) = fast.plans.values()
    modules = dict(plan.graph.named_modules())
    return [n for n in plan.graph.graph.nodes if n.op == "call_module" and isinstance(modules[n.target], GatedConv)]


def test_dropped_channels_are_not_read() -> None:
    net = made(Plain)
    pruner = attached(net, net.images(), gate=not_the_first)
    wanted = net(net.images()).detach()
    with torch.no_grad():
        net.c2.weight[:, 0] = float("nan")  # zero times NaN is NaN
    assert net(net.images()).isnan().all()
    fast = pruner.accelerate(net.images(), backend="gated")
    assert_close(fast(net.images()), wanted)
    assert not record_of(fast, net.images()).keep["c1"][:, 0].any()


def not_the_first(feature: Tensor, norms: Tensor) -> Tensor:
    return torch.arange(norms.shape[1]).expand(norms.shape) > 0


def test_an_image_that_keeps_nothing() -> None:
    net = seeded(Down)
    images = images_for(net)
    pruner, fast = accelerated(net, images, gate=none)
    assert assert_runs_as_masked(fast, pruner, (images,)).any()
    assert record_of(fast, images).keep_ratio == 0


def none(feature: Tensor, norms: Tensor) -> Tensor:
    return norms < 0


def test_images_with_nan_drop_nothing_and_disturb_no_other() -> None:
    net = seeded(Down)
    images = images_for(net)
    _pruner, fast = accelerated(net, images)
    alone = fast(images)
    images[1, 0, 2, 2] = float("nan")
    with torch.no_grad():
        wanted = net(images)
    record = record_of(fast, images)
    assert all(keep[1].all() for keep in record.keep.values())
    assert_close(fast(images), wanted)
    assert wanted[1].isnan().all()
    assert torch.equal(fast(images)[2:], alone[2:])


# -- what runs -------------------------------------------------------------------------------------


def test_dense_is_the_model_without_gates() -> None:
    net = seeded(Down)
    images = images_for(net)
    wanted = net(images).detach()
    pruner, fast = accelerated(net, images, backend="dense")
    assert fast.execution == "dense"
    assert_close(fast(images), wanted)
    assert (net(images) - wanted).abs().max() > 1e-3
    assert record_of(fast, images).keep == {}
    assert record_of(fast, images).keep_ratio == 1
    assert_close(fast(images_for(net, 2, 12)), gates_off(pruner, images_for(net, 2, 12)))


def gates_off(pruner: InstanceWisePruner, images: Tensor) -> Tensor:
    pruner.disable()
    with torch.no_grad():
        return pruner.model(images)


def test_auto_takes_the_faster_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = seeded(Down), images_for(seeded(Down))
    pruner, fast = accelerated(net, images, backend="auto")
    assert fast.execution == "accelerated"
    times = "gated 1.00 ms, with all channels kept 2.00 ms, best dense form 2.00 ms"
    assert fast.summary().splitlines()[-1].startswith(f"accelerated: {times} (batch 6, ")
    set_clock(monkeypatch, "dense")
    slow = pruner.accelerate(images, backend="auto")
    assert slow.execution == "dense"
    times = "gated 4.00 ms, with all channels kept 4.00 ms, best dense form 2.00 ms"
    assert slow.summary().splitlines()[-1].startswith(f"dense: {times} (batch 6, ")
    assert_close(slow(images), gates_off(pruner, images))
    assert pruner.accelerate(images, backend="gated").execution == "accelerated"


@pytest.mark.parametrize(
    ("all_kept", "skipping", "execution"),
    [
        ([2.3e-3], 6, "accelerated"),  # 1.15 of the dense form
        ([2.4e-3, 2.2e-3], 5, "accelerated"),  # a layer risks 0.5 ms
        ([3.7e-3, 2.2e-3], 3, "accelerated"),
        (6 * [2.4e-3], 1, "dense"),
    ],
)
def test_layers_run_dense_until_little_is_lost_with_everything_kept(
    all_kept: list[float], skipping: int, execution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(runs: Sequence[Callable[[], object]], least: float, enough: Any, rest: float) -> list[list[float]]:
        return 14 * [[1e-3, all_kept.pop(0), 2e-3, 3e-3][: len(runs)]]

    def layers(graphs: Sequence[fx.GraphModule], inputs: Sequence[Tensor]) -> list[dict[str, float]]:
        stem, *others = (name for name, _ in graphs[0].named_children())
        return [{stem: 2e-3} | dict.fromkeys(others, seconds) for seconds in (2e-3, 1e-3, 2.5e-3)]

    monkeypatch.setattr(fit, "seconds_in_place", layers)
    monkeypatch.setattr(module, "take_turns", whole)
    net, images = seeded(Down), images_for(seeded(Down))
    pruner, fast = accelerated(net, images, backend="auto")
    assert all_kept == []
    assert sum(fast.choices.values()) == skipping
    assert fast.execution == execution
    assert fast.fitted.wins is (execution == "accelerated")
    if execution == "accelerated":
        assert assert_runs_as_masked(fast, pruner, (images,)).any()


def test_each_layer_takes_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = seeded(Down), images_for(seeded(Down))
    set_clock(monkeypatch, "gated", "dense", "gated", "dense", "dense", "gated", "gated")
    pruner, fast = accelerated(net, images)
    assert fast.choices == {"stem": True, "a1": False, "a2": True, "b1": False, "short": False, "b2": True}
    assert (len(layers_of(fast, GatedConv)), len(layers_of(fast, DenseConv))) == (3, 3)
    assert assert_runs_as_masked(fast, pruner, (images,)).any()
    larger = images_for(net, 3, 12)
    assert assert_runs_as_masked(fast, pruner, (larger,)).any()
    for plan in fast.plans.values():
        assert sum(isinstance(module, DenseConv) for module in plan.graph.modules()) == 3


def test_the_summary_shows_every_layer() -> None:
    net, images = seeded(Down), images_for(seeded(Down))
    _, fast = accelerated(net, images)
    rows = [line.split() for line in fast.summary().splitlines()[1:-1]]
    assert [row[0] for row in rows] == ["stem", "a1", "a2", "b1", "short", "b2"]
    assert rows[0] == ["stem", "1.00", "2000", "500", "1000", "gated"]
    assert float(rows[1][1]) == pytest.approx(record_of(fast, images).keep["stem"].float().mean().item(), abs=0.006)


def test_without_kernels_it_is_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: False)
    net, images = seeded(Down), images_for(seeded(Down))
    pruner, fast = accelerated(net, images)
    assert layers_of(fast, GatedConv) == []
    assert assert_runs_as_masked(fast, pruner, (images,)).any()


# -- other inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gated", "dense"])
def test_other_batches_and_sizes(backend: str) -> None:
    net = seeded(Down)
    pruner, fast = accelerated(net, images_for(net), backend=backend)
    for n, side in ((1, 8), (9, 8), (2, 11), (5, 11)):
        images = images_for(net, n, side)
        if backend == "gated":
            assert assert_runs_as_masked(fast, pruner, (images,)).any()
        else:
            assert_close(fast(images), gates_off(pruner, images))
    assert len(fast.plans) == 2
    assert fast(images_for(net, 0)).shape == (0, 5)


def test_other_memory_orders() -> None:
    net = seeded(NETS[0])
    images = images_for(net)
    pruner, fast = accelerated(net, images)
    for other in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert_close(fast(other), fast(images))
    lying = seeded(NETS[0]).to(memory_format=torch.channels_last)
    pruner, fast = accelerated(lying, images)
    assert assert_runs_as_masked(fast, pruner, (images,)).any()


@pytest.mark.parametrize("backend", ["gated", "dense"])
def test_inputs_that_the_model_does_not_take_are_refused_as_by_the_model(backend: str) -> None:
    net = made(Plain)
    _, fast = accelerated(net, net.images(), backend=backend)
    for wrong in (net.images().double(), net.images().half(), net.images()[:, :2], net.images().int()):
        with pytest.raises(EngineInputError, match=r"Plain does not take .* accelerated on float32 \(4, 3, 8, 8\)"):
            fast(wrong)
    assert_close(fast(net.images()[:2]), fast(net.images())[:2])


class Several(nn.Module):
    """Takes a number and two maps of one shape, gives a tuple, a dict and None."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.act, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)

    def forward(self, scale: float, a: Tensor, b: Tensor) -> Any:
        y = self.c2(self.act(self.c1(a)))
        return (y * scale).mean((2, 3)), {"sum": y.mean((2, 3)) + b.mean((1, 2, 3))[:, None], "none": None}, b


def test_several_inputs_and_outputs() -> None:
    net, a, b = seeded(Several), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    for inputs in ((2.0, a, b), {"scale": 2.0, "a": a, "b": b}):
        pruner, fast = accelerated(net, inputs)
        assert fast.execution == "accelerated"
        with torch.no_grad():
            wanted = net(2.0, a, b)
        # The same values by position, by name, and by name in another order.
        for found in (fast(2.0, a, b), fast(scale=2.0, a=a, b=b), fast(2.0, b=b, a=a), fast(b=b, scale=2.0, a=a)):
            assert isinstance(found, tuple)
            assert list(found[1]) == ["sum", "none"]
            assert found[1]["none"] is None
            assert torch.equal(found[2], b)
            assert_close(found[0], wanted[0])
            assert_close(found[1]["sum"], wanted[1]["sum"])
        assert_close(fast(3.0, a, b)[0], 1.5 * wanted[0])
        pruner.remove()


class Both(NamedTuple):
    logits: Tensor
    features: Tensor


class Named(Plain):
    def forward(self, x: Tensor) -> Any:
        features = self.act1(self.bn1(self.c1(x)))
        return Both(self.fc(self.pool(self.act2(self.bn2(self.c2(features)))).flatten(1)), features)


def test_an_output_that_is_itself_a_gated_map() -> None:
    net = made(Named)
    _pruner, fast = accelerated(net, net.images())
    found = fast(net.images())
    with torch.no_grad():
        wanted = net(net.images())
    assert isinstance(found, Both)
    assert_close(found.logits, wanted.logits)
    assert_close(found.features, wanted.features)
    assert (wanted.features.sum((2, 3)) == 0).any()


# -- what cannot be exported -----------------------------------------------------------------------


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Counting(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def of_length(feature: Tensor, norms: Tensor) -> Tensor:
    keep = torch.zeros(len(norms), norms.shape[1], dtype=torch.bool)
    keep[:, ::2] = True
    return keep


@pytest.mark.parametrize(
    ("kind", "gate", "reason"),
    [
        (Branching, CVGate(0.1, 0.9), "Branching cannot be exported: "),
        (Counting, CVGate(0.1, 0.9), "changes the buffer calls"),
        (Plain, of_length, "the number of instances"),
    ],
)
def test_a_model_that_cannot_be_exported_runs_masked_and_says_why(kind: Any, gate: Any, reason: str) -> None:
    net = made(kind)
    images = net.images(5)
    pruner, fast = accelerated(net, images, gate=gate)
    assert fast.execution == "masked"
    assert reason in fast.reason
    assert fast.summary().splitlines()[-1].startswith("masked: ")
    assert reason in fast.summary()
    for shown in (images, -images):
        with torch.no_grad():
            wanted = net(shown)
        with fast.recording() as record:
            assert torch.equal(fast(shown), wanted)
        assert record.keep.keys() == pruner.keep.keys()
        assert all(torch.equal(record.keep[site], keep) for site, keep in pruner.keep.items())
        assert record.keep_ratio < 1
    assert not fast(images).requires_grad


# -- recording -------------------------------------------------------------------------------------


def record_of(fast: Accelerated, images: Tensor) -> Record:
    with fast.recording() as record:
        fast(images)
    return record


def test_a_recording_joins_its_calls_and_no_others() -> None:
    net = made(Residual)
    pruner, fast = accelerated(net, net.images())
    fast(net.images())
    with fast.recording() as record:
        fast(net.images(3))
        fast(net.images(2, seed=1))
    fast(net.images())
    assert {len(keep) for keep in record.keep.values()} == {5}
    with torch.no_grad():
        net(net.images(2, seed=1))
    for site in net.sites:
        assert torch.equal(record.keep[site][3:], pruner.keep[site])
        assert_close(record.norms[site][3:], pruner.norms[site])
    kept = sum(int(keep.sum()) for keep in record.keep.values())
    assert record.keep_ratio == pytest.approx(kept / (5 * (4 + 6 + 4)))
    assert 0 < record.keep_ratio < 1


def test_recordings_of_two_models_are_apart() -> None:
    net = made(Plain)
    pruner, one = accelerated(net, net.images())
    two = pruner.accelerate(net.images(), backend="gated")
    with one.recording() as first, two.recording() as second:
        one(net.images(3))
        two(net.images(5))
    assert (len(first.keep["c1"]), len(second.keep["c1"])) == (3, 5)


def test_nothing_recorded_is_all_kept() -> None:
    assert Record().keep_ratio == 1


def test_sixteen_threads_compute_what_one_does() -> None:
    net = seeded(Down)
    _, fast = accelerated(net, images_for(net))
    # Half of them at a size that is planned while the others run.
    batches = [images_for(net, 1 + k % 3, 8 if k % 2 else 10, seed=k) for k in range(16)]
    alone = copy.deepcopy(fast)
    wanted = [(alone(images), record_of(alone, images)) for images in batches]
    found: list[Any] = [None] * 16
    start = threading.Barrier(16)

    def work(k: int) -> None:
        start.wait()
        with fast.recording() as record:
            outputs = [fast(batches[k]) for _ in range(4)]
        found[k] = outputs, record

    threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (outputs, record), (wanted_output, wanted_record) in zip(found, wanted, strict=True):
        assert all(torch.equal(output, wanted_output) for output in outputs)
        for site, keep in wanted_record.keep.items():
            assert torch.equal(record.keep[site], keep.repeat(4, 1))


# -- modes, copies, the original -------------------------------------------------------------------


def test_any_number_of_threads_decides_the_same() -> None:
    net = seeded(Down)
    images = images_for(net)
    _, fast = accelerated(net, images)
    wanted, keep = fast(images), record_of(fast, images).keep
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_close(fast(images), wanted)
            assert all(torch.equal(mask, keep[site]) for site, mask in record_of(fast, images).keep.items())
    finally:
        torch.set_num_threads(before)


def test_it_has_no_gradients() -> None:
    net = made(Residual)
    _pruner, fast = accelerated(net, net.images())
    wanted = fast(net.images())
    found = fast(net.images().requires_grad_())
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    with torch.inference_mode():
        assert torch.equal(fast(net.images()), wanted)
        larger = torch.randn(2, 3, 12, 12)
        planned = fast(larger)
    assert torch.equal(fast(larger.clone()), planned)
    with pytest.raises(UnsupportedError, match="no gradients"):
        fast.train()
    assert fast.train(False) is fast.eval() is fast
    assert not fast.training


def test_it_compiles_into_one_graph() -> None:
    net = seeded(Down)
    images = images_for(net)
    _, fast = accelerated(net, images)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), fast(images))
    torch._dynamo.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
@pytest.mark.parametrize("backend", ["gated", "dense"])
def test_copies_run_the_same(copied: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, "gated", "dense", "gated")
    net = seeded(Down)
    _, fast = accelerated(net, images_for(net), backend=backend)
    other = copied(fast)
    assert other.execution == fast.execution
    assert other.summary() == fast.summary()
    for images in (images_for(net), images_for(net, 2, 10)):
        assert torch.equal(other(images), fast(images))
        assert record_of(other, images).keep_ratio == record_of(fast, images).keep_ratio
    with torch.inference_mode():  # some were made in it
        for tensor in (*fast.parameters(), *fast.plans.popitem()[1].graph.buffers()):
            tensor.zero_()
    assert other(images).abs().max() > 0


def test_it_is_a_snapshot() -> None:
    net = seeded(Down)
    pruner, fast = accelerated(net, images_for(net))
    known, larger = images_for(net), images_for(net, 3, 10)
    wanted = fast(known)
    with torch.no_grad():
        expected = net(larger)
        for parameter in net.parameters():
            parameter.mul_(0.5)
    net.bn.running_mean.add_(1)
    pruner.enable(beta=0.2)
    assert torch.equal(fast(known), wanted)
    assert_close(fast(larger), expected)
    pruner.remove()
    assert torch.equal(fast(known), wanted)


def test_the_original_is_left_as_it_was() -> None:
    net = made(Residual)
    pruner = attached(net, net.images())
    net(net.images(3))
    keep, norms = dict(pruner.keep), dict(pruner.norms)
    pruner.disable()
    net.train()
    net.bn.eval()
    before, hooks = copy.deepcopy(net.state_dict()), hooks_of(net)
    pruner.accelerate(net.images(), backend="gated")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert hooks_of(net) == hooks
    assert (net.training, net.bn.training, net.stem.training, pruner.enabled) == (True, False, True, False)
    assert all(torch.equal(pruner.keep[site], keep[site]) for site in keep)
    assert all(torch.equal(pruner.norms[site], norms[site]) for site in norms)
    assert F.mse_loss(net(net.images()), torch.zeros(4, 5)).requires_grad


def test_gates_that_are_off_are_on_in_the_copy() -> None:
    net = made(Residual)
    pruner = attached(net, net.images())
    pruner.disable()
    fast = pruner.accelerate(net.images(), backend="gated")
    assert record_of(fast, net.images()).keep_ratio < 1
    assert not pruner.enabled
