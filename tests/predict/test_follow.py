"""Heads that follow a network in training: what they become, what counts, and what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from isw_plugin import InstanceWisePruner, calibrate, load_pretrained, ranks, steer_thresholds
from isw_plugin.errors import AttachError, NothingRecordedError, PredictionError, SettingError, StateMismatchError
from isw_plugin.functional import channel_norm
from isw_plugin.heads import Head
from isw_plugin.predict.follow import _require_memory
from isw_plugin.predict.ridge import r_squared
from tests.conftest import Net, made
from tests.predict.nets import PREDICTED, Down, Stack, predicting
from tests.predict.test_hooks import Checkpointed


def batch(net: Net, step: int, size: int = 32) -> Tensor:
    return net.images(size, seed=step)


def train(net: Net, pruner: InstanceWisePruner, steps: range, decay: float = 0.9, every: int = 5) -> None:
    """Forwards in training mode whose batch norms use the statistics of evaluation."""
    pruner.lambda_ = 0.0
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for step in steps:
        net(batch(net, step)).square().mean().backward()
        pruner.follow_predictors(decay=decay, every=every)
    net.eval()


def rows(net: Net, pruner: InstanceWisePruner, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the head of a Stack reads, 1 before it, and what it should have predicted."""
    bare = made(Stack)
    with torch.no_grad():
        net(images)
        feature = bare.act1(bare.bn1(bare.c1(images))) * pruner.keep["c1"][:, :, None, None]
        there = bare.act2(bare.bn2(bare.c2(feature)))
    phi = torch.cat([feature.square().mean((2, 3)).sqrt(), feature.mean((2, 3))], 1)
    return torch.cat([torch.ones(len(phi), 1), phi], 1).double(), there.square().mean((2, 3)).sqrt().double()


def assert_equal(head: Head, other: Head) -> None:
    assert torch.equal(head.weight, other.weight)
    assert torch.equal(head.bias, other.bias)
    assert head.followed == other.followed
    assert (head.moments is None) == (other.moments is None)
    assert head.moments is None or torch.equal(head.moments, other.moments)


# -- what they become ------------------------------------------------------------------------------


def test_moments_are_exponentially_weighted_sums_and_heads_their_least_squares() -> None:
    net, pruner = predicting(Stack)
    random = pruner.heads["c2"]
    train(net, pruner, range(4))
    assert torch.equal(pruner.heads["c2"].weight, random.weight)  # not yet the fifth call
    expected = torch.zeros(9, 15, dtype=torch.float64)
    for step in range(5):
        x, y = rows(net, pruner, batch(net, step))  # at the decisions of the random head
        expected = 0.9 * expected + x.T @ torch.cat([x, y], 1)
    train(net, pruner, range(4, 5))
    head = pruner.heads["c2"]
    assert head.moments is not None
    assert head.followed == 5
    torch.testing.assert_close(head.moments, expected, rtol=1e-5, atol=1e-4)
    weights = torch.cat([torch.full((32, 1), math.sqrt(0.9) ** (4 - step)) for step in range(5)])
    x, y = map(torch.cat, zip(*(rows(net, pruner, batch(net, step)) for step in range(5)), strict=True))
    solved = torch.linalg.lstsq(weights * x, weights * y).solution
    found = x @ torch.cat([head.bias[:, None], head.weight], 1).T.double()
    assert r_squared(found, x @ solved) > 0.99  # a small penalty apart


@pytest.mark.parametrize("kind", PREDICTED)
def test_heads_come_to_predict_what_there_is(kind: type[Net]) -> None:
    net, pruner = predicting(kind, beta=0.0)
    images = net.images(200, seed=99)
    with torch.no_grad():
        net(images)
        before = pruner.norms
    train(net, pruner, range(40))
    with torch.no_grad():
        net(images)
        true = {name: channel_norm(feature, 1) for name, feature in made(kind).features(images).items()}
    for name in pruner.predicted:
        apart, random = ((norms[name] - true[name]).square().mean() for norms in (pruner.norms, before))
        assert apart < 0.5 * random
        assert apart < 1.5 * true[name].var(0).mean() + 1e-6


def test_heads_follow_a_network_that_changes() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(30))
    images = net.images(100, seed=99)
    net(images)
    before = pruner.norms["c2"]
    with torch.no_grad():
        net.bn2.weight.mul_(3.0)
        net.bn2.bias.mul_(3.0)
    train(net, pruner, range(30, 110))
    net(images)
    assert r_squared(pruner.norms["c2"], 3 * before) > 0.9


def test_what_was_fitted_stays_until_enough_was_seen() -> None:
    net, pruner = predicting(Down)
    pruner.fit_predictors([net.images(400)], max_instances=400)
    before = pruner.heads
    assert "c2" in before
    net.train()
    for step in range(9):  # the head has 18 inputs: 36 images
        net(batch(net, step, 4)).mean().backward()
        pruner.follow_predictors(decay=0.999, every=1)
        now = pruner.heads["c2"]
        assert torch.equal(now.weight, before["c2"].weight) == (step < 9 - 1 or now.moments[0, 0] < 36)
    net(batch(net, 9, 8)).mean().backward()
    pruner.follow_predictors(decay=0.999, every=1)
    assert not torch.equal(pruner.heads["c2"].weight, before["c2"].weight)


def test_a_new_fit_forgets() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(3))
    pruner.fit_predictors([net.images(200)])
    assert pruner.heads["c2"].moments is None
    assert pruner.heads["c2"].followed == 0


# -- what counts -----------------------------------------------------------------------------------


def test_a_forward_counts_once() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(2))
    before = pruner.heads["c2"]
    with pytest.raises(NothingRecordedError, match="was taken already"):
        pruner.follow_predictors()
    net.eval()
    net(net.images())
    net.train()
    with torch.no_grad():
        net(net.images())
    with pytest.raises(NothingRecordedError, match="in training mode, with gradients"):
        pruner.follow_predictors()
    assert_equal(pruner.heads["c2"], before)


def test_a_validation_in_between_is_not_taken() -> None:
    net, pruner = predicting(Stack)
    other, pruner_too = predicting(Stack)
    net.train()
    net(net.images()).mean().backward()
    with torch.no_grad():
        net.eval()(net.images(8, seed=3))
    pruner.follow_predictors()
    other.train()(net.images()).mean().backward()
    pruner_too.follow_predictors()
    assert_equal(pruner.heads["c2"], pruner_too.heads["c2"])


def test_a_checkpoint_counts_once() -> None:
    found = []
    for again in (False, True):
        net, pruner = predicting(Checkpointed)
        net.again = again
        train(net, pruner, range(6))
        found.append((pruner.heads["c2"], [parameter.grad for parameter in net.parameters()]))
    (head, gradients), (other, others) = found
    assert_equal(head, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_heads_may_follow_before_backward_where_activations_are_checkpointed() -> None:
    found = []
    for early in (False, True):
        net, pruner = predicting(Checkpointed)
        net.train()
        for step in range(6):
            loss = net(batch(net, step)).square().mean()
            if early:
                pruner.follow_predictors(every=1)
            loss.backward()
            if not early:
                pruner.follow_predictors(every=1)
        found.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_penalty_is_as_without() -> None:
    penalties = []
    for follows in (False, True):
        net, pruner = predicting(Stack, lambda_=1e-3)
        net.train()
        loss = pruner.regularize(net, net(net.images()).square().mean())
        loss.backward()
        if follows:
            pruner.follow_predictors(every=1)
        penalties.append((loss.detach(), net.c1.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*penalties, strict=True))


def test_a_step_that_overflows_is_no_lesson() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(4))
    moments = pruner.heads["c2"].moments
    net.train()
    net(torch.full((4, 3, 8, 8), float("inf"))).mean()
    pruner.follow_predictors(decay=0.9, every=1)
    assert moments is not None
    torch.testing.assert_close(pruner.heads["c2"].moments, moments * 0.9)
    assert pruner.heads["c2"].weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_teaches_in_float32(dtype: torch.dtype) -> None:
    net, pruner = predicting(Stack)
    exact, exact_pruner = predicting(Stack)
    net.train()
    exact.train()
    for step in range(10):
        with torch.autocast("cpu", dtype=dtype):
            loss = net(batch(net, step)).float().mean()
            pruner.follow_predictors(every=5)
        loss.backward()
        exact(batch(net, step)).mean().backward()
        exact_pruner.follow_predictors(every=5)
    head = pruner.heads["c2"]
    assert head.moments is not None
    assert head.moments.dtype == torch.float64
    assert head.weight.dtype == torch.float32
    expected = exact_pruner.heads["c2"].moments
    torch.testing.assert_close(head.moments, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_a_compiled_network_teaches_its_heads() -> None:
    found = []
    for compiled in (False, True):
        net, pruner = predicting(Stack)
        net.train()
        run = torch.compile(net, backend="aot_eager") if compiled else net
        for step in range(6):
            run(batch(net, step)).mean().backward()
            pruner.follow_predictors(every=2)
        found.append(pruner.heads["c2"])
    assert found[0].followed == found[1].followed == 6
    torch.testing.assert_close(found[0].moments, found[1].moments)
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=1e-3, atol=1e-3)


# -- beside the rest -------------------------------------------------------------------------------


def test_training_goes_on_where_it_stopped() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(13))
    state = copy.deepcopy(pruner.state_dict())
    other, resumed = predicting(Stack, seed=3)
    resumed.load_state_dict(state)
    assert_equal(resumed.heads["c2"], pruner.heads["c2"])
    train(net, pruner, range(13, 20))
    train(other, resumed, range(13, 20))
    assert_equal(resumed.heads["c2"], pruner.heads["c2"])


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("moments", torch.zeros(2, 2), r"moments of the head of c2 is of shape \(2, 2\)"),
        ("moments", None, "a NoneType"),
        ("moments", torch.full((9, 15), math.nan), "NaN"),
        ("followed", -1, "followed"),
        ("followed", "3", "followed"),
    ],
)
def test_damaged_moments_are_refused(key: str, value: Any, match: str) -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(2))
    state = copy.deepcopy(pruner.state_dict())
    state["heads"]["c2"][key] = value
    before = pruner.heads["c2"]
    with pytest.raises(StateMismatchError, match=match):
        pruner.load_state_dict(state)
    assert_equal(pruner.heads["c2"], before)


def test_a_folder_has_the_heads_without_what_they_have_seen(tmp_path: Path) -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(5))
    pruner.save_pretrained(tmp_path)
    head = load_pretrained(tmp_path, made(Stack)).heads["c2"]
    assert torch.equal(head.weight, pruner.heads["c2"].weight)
    assert head.moments is None


def test_an_average_is_told_of_followed_heads() -> None:
    net, pruner = predicting(Stack)
    average = AveragedModel(net)
    train(net, pruner, range(10))
    average.update_parameters(net)
    theirs = InstanceWisePruner.of(average.module)
    assert not torch.equal(theirs.heads["c2"].weight, pruner.heads["c2"].weight)
    theirs.load_state_dict(pruner.state_dict())
    assert_equal(theirs.heads["c2"], pruner.heads["c2"])
    assert torch.equal(average.module.eval()(net.images()), net.eval()(net.images()))


def test_thresholds_are_steered_by_followed_heads() -> None:
    net, pruner = predicting(Stack)
    net.train()
    for step in range(60):
        net(batch(net, step)).mean().backward()
        pruner.follow_predictors(decay=0.95, every=5)
        steer_thresholds(pruner, {"c2": 0.5}, rate=0.2)
    net(net.images(200, seed=99))
    assert pruner.keep["c2"].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_thresholds_are_calibrated_with_followed_heads() -> None:
    net, pruner = predicting(Stack)
    train(net, pruner, range(10))
    images = net.images(64)
    with torch.no_grad():
        labels = made(Stack)(images).argmax(1)
    found = calibrate(pruner, [(images, labels)], max_drop=0.3)
    with pruner.gating():
        accuracy = (net(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(found.best.accuracy)
    assert pruner.heads["c2"].followed == 10


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"decay": 1.0}, "decay=1.0: the weight of the past"),
        ({"decay": -0.1}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"decay": "0.9"}, "decay"),
        ({"every": 0}, "every=0: the calls from one solution to the next"),
        ({"every": 1.5}, "every"),
        ({"decay": 0.0, "every": 1}, r"remembers about 4 images .* head of c2 needs 16: decay=0\.875 "),
    ],
)
def test_settings_are_checked_before_anything_is_changed(settings: dict[str, Any], match: str) -> None:
    net, pruner = predicting(Stack)
    net.train()
    net(batch(net, 0, 4)).mean().backward()
    before = pruner.heads["c2"]
    with pytest.raises(SettingError, match=match):
        pruner.follow_predictors(**settings)
    assert_equal(pruner.heads["c2"], before)


def test_the_decay_that_is_named_is_below_one() -> None:
    with pytest.raises(SettingError, match=r"needs 8,192: decay=0\.999878 remembers"):
        _require_memory("c2", 20, 0.9, 8192)


def test_memory_is_checked_at_the_first_call_alone() -> None:
    net, pruner = predicting(Stack)
    net.train()
    net(batch(net, 0, 4)).mean().backward()
    with pytest.raises(SettingError, match="remembers about 8 images"):
        pruner.follow_predictors(decay=0.5, every=10)
    for _ in range(4):
        net(torch.full((4, 3, 8, 8), math.inf)).mean()
        pruner.follow_predictors(decay=0.9, every=5)
    net(batch(net, 1, 4)).mean().backward()
    before = pruner.heads["c2"].weight
    pruner.follow_predictors(decay=0.9, every=5)  # 4 images of the 16 that it needs, of 40 that it remembers
    assert torch.equal(pruner.heads["c2"].weight, before)


def test_what_one_rank_raises_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    net, pruner = predicting(Stack)
    net.train()(batch(net, 0)).mean().backward()
    before = pruner.heads["c2"]
    monkeypatch.setattr(ranks, "of_all_ranks", lambda mine: [mine, NothingRecordedError("of the other")])
    with pytest.raises(NothingRecordedError, match="of the other"):
        pruner.follow_predictors()
    assert_equal(pruner.heads["c2"], before)


def test_without_heads_or_gates_there_is_nothing_to_follow() -> None:
    net, pruner = predicting(Stack)
    pruner.disable()
    net.train()(net.images()).mean().backward()
    with pytest.raises(NothingRecordedError, match="after step"):
        pruner.follow_predictors()
    pruner.drop_predictors()
    with pytest.raises(PredictionError, match="fit_predictors first"):
        pruner.follow_predictors()
    pruner.remove()
    with pytest.raises(AttachError):
        pruner.follow_predictors()


# -- torch.distributed -----------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        net, pruner = predicting(Stack)
        net.train()
        net.bn1.eval()
        net.bn2.eval()
        wrapped = DistributedDataParallel(net)
        for step in range(10):
            wrapped(batch(net, step).chunk(2)[rank]).mean().backward()
            pruner.follow_predictors(decay=0.9, every=5)
        head = pruner.heads["c2"]
        torch.save((head.weight, head.bias, head.moments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_heads_are_equal_on_all_ranks_and_learn_from_all(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    net, pruner = predicting(Stack)
    train(net, pruner, range(10))
    head = pruner.heads["c2"]
    torch.testing.assert_close(first[2] * 2, head.moments, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(first[0], head.weight, rtol=1e-2, atol=1e-3)
