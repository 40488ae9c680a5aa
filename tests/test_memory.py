"""The state of a call belongs to the call: under threads, inside another call, after an error."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isw_plugin import InstanceWisePruner, MinNorm, count_macs, evaluate
from isw_plugin.errors import ISWError, NothingRecordedError, SettingError, UnsupportedError
from isw_plugin.functional import keep_mask
from tests.conftest import Concat, Net, Plain, Residual, made
from tests.test_training import Checkpointed, assert_same_gradients, frozen_statistics, gradients, task_loss

SCOPES = ["all", "consumers"]


def attached(net: Net, **settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(net, net.images(1), **{"alpha": 0.1, "beta": 1.1, **settings})


def in_threads(*runs: Callable[[], object]) -> list[object]:
    """Their results, or what they raised."""
    found: list[object] = [None] * len(runs)

    def run(index: int) -> None:
        try:
            found[index] = runs[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def meeting(module: nn.Module, parties: int = 2) -> None:
    """Forwards in several threads wait for each other in this module, so that all have decided before any reads on."""
    barrier = threading.Barrier(parties, timeout=20)

    def meet(*_: object) -> None:
        barrier.wait()

    module.register_forward_pre_hook(meet)


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("gate", [None, MinNorm(0.5)])
def test_threads_decide_each_for_itself(scope: str, gate: object) -> None:
    net, settings = made(Residual), {"gate": gate, "alpha": None, "beta": None} if gate else {}
    pruner = attached(net, scope=scope, min_keep=1, **settings)
    pruner.step()
    batches = [net.images(n, seed=n) for n in (2, 3)]
    expected = [(net(images), pruner.keep, pruner.norms) for images in batches]
    for module in (net.bn, net.block.bn1, net.pool):
        meeting(module)
    found = in_threads(*(lambda images=images: (net(images), pruner.keep, pruner.norms) for images in batches))
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here[0], there[0])
        for mine, theirs in zip(here[1:], there[1:], strict=True):
            assert mine.keys() == theirs.keys() == net.sites.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_many_threads_give_what_one_gives() -> None:
    net = made(Concat)
    pruner = attached(net, scope="consumers")
    pruner.step()
    batches = [net.images(1 + n % 4, seed=n) for n in range(96)]
    expected = [net(images) for images in batches]
    runs = [lambda part=part: [net(images) for images in batches[part::8]] for part in range(8)]
    for part, outputs in enumerate(in_threads(*runs)):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[part::8], strict=True))


def test_keep_is_of_this_threads_last_forward_or_else_of_any(plain: Net) -> None:
    pruner = attached(plain)
    pruner.step()
    in_threads(lambda: plain(plain.images(3)))
    assert len(pruner.keep["c1"]) == len(pruner.norms["c1"]) == 3
    plain(plain.images(2))
    in_threads(lambda: plain(plain.images(5)))
    assert len(pruner.keep["c1"]) == 2


def test_a_penalty_is_recorded_while_another_thread_evaluates(plain: Net) -> None:
    net = frozen_statistics(plain)
    pruner = attached(net, lambda_=1.0)
    images = net.images()
    expected = net.penalty_by_hand(images, 1.0)
    meeting(net.pool)

    def evaluates() -> None:
        with torch.no_grad():
            net(net.images(7, seed=1))

    def trains() -> Tensor:
        net(images)
        return pruner.penalty().detach()

    found = in_threads(trains, evaluates)
    torch.testing.assert_close(found[0], expected.detach())


def test_threads_that_train_take_each_its_own_penalty(plain: Net) -> None:
    net = frozen_statistics(plain)
    pruner = attached(net, lambda_=1.0)
    batches = [net.images(2, seed=1), net.images(3, seed=2)]
    expected = [net.penalty_by_hand(images, 1.0).detach() for images in batches]
    meeting(net.pool)
    runs = [lambda images=images: (net(images), pruner.penalty().detach())[1] for images in batches]
    torch.testing.assert_close(in_threads(*runs), expected)


def test_the_penalty_of_other_threads_can_be_taken_here(plain: Net) -> None:
    net = frozen_statistics(plain)
    pruner = attached(net, lambda_=1.0)
    in_threads(lambda: net(net.images(seed=1)), lambda: net(net.images(seed=2)))
    expected = net.penalty_by_hand(net.images(seed=1), 1.0) + net.penalty_by_hand(net.images(seed=2), 1.0)
    torch.testing.assert_close(pruner.penalty(), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_an_error_in_one_thread_leaves_the_others_alone(scope: str) -> None:
    net = made(Plain)
    pruner = attached(net, scope=scope)
    pruner.step()
    expected = net(net.images())
    meeting(net.c2)
    good, bad = in_threads(lambda: net(net.images()), lambda: net(torch.zeros(2, 3, 4, 4)))
    assert torch.equal(good, expected)
    assert isinstance(bad, RuntimeError)


def test_sites_are_found_once_where_first_forwards_meet(plain: Net) -> None:
    images = plain.images()
    expected = attached(copy.deepcopy(plain))
    expected.step()
    pruner = InstanceWisePruner(plain, alpha=0.1, beta=1.1)
    pruner.step()
    found = in_threads(*(lambda: plain(images) for _ in range(4)))
    assert all(torch.equal(output, expected.model(images)) for output in found)
    assert sum(len(module._forward_hooks) for module in plain.modules()) == 3  # two sites, and the model's end


# -- calls inside calls, errors, interrupts --------------------------------------------------------


class Outer(nn.Module):
    """Looks at half of the batch first, by a call of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor, deeper: bool = False) -> Tensor:
        hidden = self.a(x).relu()
        if deeper:
            return self.b(hidden) + self(x[:1]).mean()
        return self.b(hidden)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_call_inside_a_call_has_a_state_of_its_own(scope: str) -> None:
    torch.manual_seed(0)
    model, images = Outer(), torch.randn(3, 3, 4, 4)
    pruner = InstanceWisePruner(model, images, lambda_=1.0, alpha=0.0, scope=scope)
    pruner.step()
    expected = model(images) + model(images[:1]).mean()
    penalty = pruner.penalty()
    torch.testing.assert_close(model(images, deeper=True), expected)
    torch.testing.assert_close(pruner.penalty(), penalty)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_was_broken_off_leaves_nothing(plain: Net, kind: type[BaseException]) -> None:
    net = frozen_statistics(plain)
    pruner = attached(net, lambda_=1.0, scope="consumers")
    pruner.step()
    expected, penalty = net(net.images()), pruner.penalty()

    def breaks(*_: object) -> None:
        raise kind

    handle = net.bn2.register_forward_hook(breaks)
    with pytest.raises(kind):
        net(net.images(seed=1))
    handle.remove()
    assert torch.equal(net(net.images()), expected)
    assert torch.equal(pruner.penalty(), penalty)
    assert len(pruner.keep["c2"]) == 4
    with pytest.raises(NothingRecordedError):
        pruner.penalty()


def test_a_forward_in_an_except_block_is_recorded(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain), lambda_=1.0)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        plain(plain.images())
    assert pruner.penalty() > 0


# -- sites that run several times, or not ----------------------------------------------------------


class Pair(nn.Module):
    """Encodes twice, in every mode but the first forward, which the probe sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
        self.order = "once"

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "once":
            return self.b(self.act(self.a(x))).mean((2, 3))
        if self.order == "in turn":
            return (self.b(self.act(self.a(x))) + self.b(self.act(self.a(-x)))).mean((2, 3))
        if self.order == "skipped":
            return self.b(x.repeat(1, 2, 1, 1)).mean((2, 3))
        first, second = self.act(self.a(x)), self.act(self.a(-x))
        return (self.b(first) + self.b(second)).mean((2, 3))


def pair(scope: str) -> tuple[Pair, InstanceWisePruner, Tensor]:
    torch.manual_seed(0)
    model, images = Pair().eval(), torch.randn(3, 3, 4, 4)
    pruner = InstanceWisePruner(model, images, alpha=0.0, scope=scope)
    pruner.step()
    return model, pruner, images


@pytest.mark.parametrize(("scope", "order"), [("all", "in turn"), ("all", "both"), ("consumers", "in turn")])
def test_a_site_that_decides_twice_gates_right_and_keep_holds_both(scope: str, order: str) -> None:
    model, pruner, images = pair(scope)
    expected = model(images) + model(-images)
    model.order = order
    torch.testing.assert_close(model(images), expected)
    assert pruner.keep["a"].shape == pruner.norms["a"].shape == (6, 6)
    assert torch.equal(pruner.keep["a"], keep_mask(pruner.norms["a"], 0.0, 1.0))
    with pytest.raises(SettingError, match="a decided for 6 instances of a batch of 3"):
        evaluate(model, [(images, torch.zeros(3).long())])


def test_readers_that_cannot_know_which_decision_is_meant_say_so() -> None:
    model, _, images = pair("consumers")
    model.order = "both"
    with pytest.raises(UnsupportedError, match="b reads a, which decided 2 times since b last ran"):
        model(images)
    model.order = "once"
    model(images)


def test_a_reader_whose_site_did_not_run_says_so() -> None:
    model, pruner, images = pair("consumers")
    model.order = "skipped"
    with pytest.raises(UnsupportedError, match="b reads a, which decided 0 times"):
        model(images)
    model, pruner, images = pair("all")
    model.order = "skipped"
    model(images)
    assert pruner.keep == {}
    for measured in (lambda: count_macs(model, images), lambda: evaluate(model, [(images, torch.zeros(3).long())])):
        with pytest.raises(ISWError, match="a decided for 0 instances"):
            measured()


# -- parts, and what a checkpoint recomputes -------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_parts_that_are_called_one_after_the_other_gate_as_the_whole(plain: Net, scope: str) -> None:
    pruner = attached(plain, scope=scope)
    pruner.step()
    expected, keep = plain(plain.images()), pruner.keep
    x = plain.act1(plain.bn1(plain.c1(plain.images())))
    x = plain.act2(plain.bn2(plain.c2(x)))
    assert torch.equal(plain.fc(plain.pool(x).flatten(1)), expected)
    assert all(torch.equal(pruner.keep[name], keep[name]) for name in keep)


def test_a_part_whose_site_has_not_just_run_is_refused(plain: Net) -> None:
    attached(plain, scope="consumers").step()
    plain(plain.images())
    with pytest.raises(UnsupportedError, match="c2 reads c1, which decided 0 times"):
        plain.c2(torch.randn(4, 4, 6, 6))


def gated_gradients(kind: type[Net], scope: str) -> tuple[Net, dict[str, Tensor]]:
    net = frozen_statistics(made(kind))
    pruner = attached(net, scope=scope, lambda_=1e-2)
    for step in range(2):
        net.zero_grad()
        pruner.step()
        pruner.regularize(net, task_loss(net(net.images(seed=step)))).backward()
    return net, gradients(net)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_recompute_repeats_the_decisions_of_its_forward(scope: str) -> None:
    net, found = gated_gradients(Checkpointed, scope)
    assert_same_gradients(net, gated_gradients(Residual, scope)[1], atol=1e-6, rtol=1e-5)
    assert found


class ReaderAlone(nn.Module):
    """Only the reader is recomputed; what it reads was decided before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.b, self.act(self.a(x)), use_reentrant=False)


def test_a_recompute_knows_the_decision_of_one_forward_and_says_so_of_two() -> None:
    torch.manual_seed(0)
    model = ReaderAlone()
    first, second = torch.randn(2, 3, 3, 4, 4)
    pruner = InstanceWisePruner(model, first, 0.0, alpha=0.0, scope="consumers")
    pruner.step()
    for images in (first, second):
        model.zero_grad()
        model(images).square().sum().backward()
        with torch.no_grad():
            read = torch.where(pruner.keep["a"][:, :, None, None], model.act(model.a(images)), 0)
        expected = nn.functional.conv2d(read, model.b.weight, model.b.bias).square().sum()
        torch.testing.assert_close(model.b.weight.grad, torch.autograd.grad(expected, model.b.weight)[0])
    loss = model(first).square().sum() + model(second).square().sum()
    with pytest.raises(UnsupportedError, match="several forwards wait for their backward"):
        loss.backward()


def test_gates_switched_off_before_backward_are_on_in_the_recompute() -> None:
    expected = gated_gradients(Residual, "all")[1]
    net = frozen_statistics(made(Checkpointed))
    pruner = attached(net, lambda_=1e-2)
    with pruner.gating():
        loss = pruner.regularize(net, task_loss(net(net.images(seed=1))))
    loss.backward()
    assert_same_gradients(net, expected, atol=1e-6, rtol=1e-5)


def test_a_memory_in_use_can_be_copied_and_pickled(plain: Net) -> None:
    pruner = attached(frozen_statistics(plain))
    pruner.step()
    copies: list[nn.Module] = []
    plain.bn2.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(pruner._memory)) or None)
    plain(plain.images())
    for memory in (*copies, pickle.loads(pickle.dumps(pruner._memory))):
        assert (memory.tape, memory.running, memory.keep) == ([], None, {})
