"""Replaying a graph: what Python called is called again, on other values, with nothing of the first call in it."""

import copy
import gc
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from isw_plugin.accelerate.replay import Replayed
from isw_plugin.ops import cpu
from tests.accelerate.nets import Downsampled, Inverted, Patches, attached, images_for, seeded

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler")

WEIGHT = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Counted:
    """A function that counts how often Python runs it."""

    def __init__(self, function: Callable[..., Sequence[object]]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Sequence[object]:
        self.calls += 1
        return self.function(*inputs)


FUNCTIONS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "operators": lambda x: [torch.relu(x @ WEIGHT) * 2.5],
    "several outputs": lambda x: (x + 1, x.sum(1), torch.sort(x, dim=1).values),
    "an output twice": lambda x: [y := x.exp(), y],
    "an input as output": lambda x: [x, x + 1],
    "a constant as output": lambda x: [WEIGHT, x],
    "indexing": lambda x: [x[:, 1:3, None].flatten(1), x[:, 0]],
    "a list taken": lambda x: [torch.cat([x, WEIGHT.T, x + 1])],
    "a list given": lambda x: [part * 2 for part in x.split(1)],
    "indices, some missing": lambda x: [x[:, torch.tensor([0, 2])], x[torch.tensor([1, 0])]],
    "in place": lambda x: [x.clone().add_(1).mul_(x)],
    "in place on a view": lambda x: [y := x.clone(), y[:, 0].zero_()],
    "what nobody reads": lambda x: [(x.exp(), x.sigmoid())[1]],
    "constants made on the way": lambda x: [x + torch.tensor([1.0] * 5), x @ WEIGHT.exp().add_(torch.ones(4))],
    "composite": lambda x: [nn.functional.softmax(x, 1), nn.functional.layer_norm(x, (5,))],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_values_give_what_the_function_gives(name: str) -> None:
    function = Counted(FUNCTIONS[name])
    replayed = Replayed(function)
    with torch.no_grad():
        for seed in range(3):
            x = random(3, 5, seed=seed)
            for found, wanted in zip(replayed(x), FUNCTIONS[name](x), strict=True):
                assert torch.equal(found, wanted)
    assert function.calls == 1


def test_two_inputs_keep_their_order() -> None:
    replayed = Replayed(lambda x, y: [x - y])
    for seed in range(2):
        x, y = random(2, 3, seed=seed), random(2, 3, seed=seed + 9)
        assert torch.equal(replayed(x, y)[0], x - y)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    replayed = Replayed(lambda x, y: [x - y])
    x, y = random(2, 3, seed=0), random(2, 3, seed=1)
    for one, other in ((x, x), (x, y), (y, y), (y, x)):
        assert torch.equal(replayed(one, other)[0], one - other)


@pytest.mark.parametrize("kind", [Downsampled, Inverted, Patches])
def test_accelerated_networks_are_replayed(kind: Callable[[], nn.Module]) -> None:
    net = seeded(kind)
    images = images_for(net)
    fast = attached(net, images).accelerate(images, backend="gated")
    (plan,) = fast.plans.values()
    assert len(plan.run._tapes) == 1
    for seed, instances in ((1, 6), (2, 3), (3, 3)):
        other = images_for(net, instances, seed=seed)
        for found, wanted in zip(plan.run(other), plan.graph(other), strict=True):
            assert torch.equal(found, wanted)
    assert len(plan.run._tapes) == 2


def test_every_shape_and_dtype_is_recorded_by_itself() -> None:
    function = Counted(lambda x: [x.reshape(x.shape[0], -1) * x.shape[0]])
    replayed = Replayed(function)
    inputs = [random(2, 3, 2, seed=0), random(3, 3, 2, seed=1), random(2, 3, 2, seed=2).double()]
    for x in inputs * 2:
        assert torch.equal(replayed(x)[0], x.flatten(1) * len(x))
    assert function.calls == 3


def test_layouts_are_recorded_by_themselves() -> None:
    replayed = Replayed(lambda x: [x.contiguous().view(-1) + 1])
    x = random(2, 3, 4, 4, seed=0)
    for each in (x, x.to(memory_format=torch.channels_last), x.mT):
        assert torch.equal(replayed(each)[0], each.reshape(-1) + 1)
    assert len(replayed._tapes) == 3


def test_the_latest_sizes_are_recorded() -> None:
    replayed = Replayed(lambda x: [x * 2])
    for size in range(1, 80):
        assert torch.equal(replayed(torch.ones(size))[0], torch.full((size,), 2.0))
    assert [shape for ((shape, *_),) in replayed._tapes] == [(size,) for size in range(16, 80)]


def test_maps_of_the_first_call_are_freed() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> list[Tensor]:
        between = x + 1
        alive.append(weakref.ref(between))
        return [torch.cat([between * 2, between])]

    replayed = Replayed(function)
    x = random(2, 2, seed=0)
    alive += [weakref.ref(replayed(x)[0]), weakref.ref(x)]
    del x
    gc.collect()
    assert [each() for each in alive] == [None] * 3


def test_an_error_while_recording_leaves_the_next_call_as_it_was() -> None:
    fails = [True]

    def function(x: Tensor) -> list[Tensor]:
        y = x + 1
        if fails.pop() if fails else False:
            raise RuntimeError("on the way")
        return [y]

    replayed = Replayed(function)
    with pytest.raises(RuntimeError, match="on the way"):
        replayed(torch.ones(2))
    for value in (1.0, 5.0):
        assert replayed(torch.full((2,), value))[0].tolist() == [value + 1] * 2


def test_an_operators_error_is_raised() -> None:
    weights = torch.ones(3, 3)
    replayed = Replayed(lambda x: [x @ weights])
    replayed(torch.ones(1, 3))
    weights.resize_(2, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        replayed(torch.ones(1, 3))


def test_what_is_not_a_tensor_is_not_recorded() -> None:
    function = Counted(lambda x, factor: [x * factor, factor])
    replayed = Replayed(function)
    assert replayed(torch.ones(1), 3) == [torch.full((1,), 3.0), 3]
    function = Counted(lambda x: [x * 2, None])
    replayed = Replayed(function)
    for _ in range(2):
        assert replayed(torch.ones(1))[1] is None
    assert function.calls == 2


@pytest.mark.parametrize(
    "function", [lambda x: [x + torch.rand(2)], lambda x: [torch.zeros(2).add_(x)], lambda x: [WEIGHT[0, :2].mul_(x)]]
)
def test_what_would_not_be_the_same_is_not_recorded(function: Callable[[Tensor], Sequence[Tensor]]) -> None:
    counted = Counted(function)
    replayed = Replayed(counted)
    for _ in range(3):
        replayed(torch.ones(2))
    assert counted.calls == 3
    assert list(replayed._tapes.values()) == [None]  # and is not tried again


def test_autocast_is_that_of_the_call() -> None:
    replayed = Replayed(lambda x: [x @ WEIGHT])
    x = random(3, 5, seed=0)
    wide = replayed(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = replayed(x)[0]
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(narrow, x.bfloat16() @ WEIGHT.bfloat16())


def test_threads_record_and_replay_at_once() -> None:
    replayed = Replayed(lambda x: [torch.cat([x * 2, x + 1]).flatten()])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(20):
            x = random(1 + turn % 3, 4, seed=seed * 100 + turn)
            if not torch.equal(replayed(x)[0], torch.cat([x * 2, x + 1]).flatten()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def double(x: Tensor) -> list[Tensor]:
    return [x * 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_begins_anew(copied: Callable[[Replayed], Replayed]) -> None:
    replayed = Replayed(double)
    replayed(torch.ones(2))
    other = copied(replayed)
    assert (len(replayed._tapes), len(other._tapes)) == (1, 0)
    for _ in range(2):
        assert other(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert len(other._tapes) == 1


def test_modes_see_the_operators() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    replayed = Replayed(lambda x: [x @ WEIGHT])
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            replayed(random(3, 5, seed=0))
        counts.append(counter.get_total_flops())
    assert counts == [2 * 3 * 5 * 4] * 2


def test_a_tape_says_what_is_wrong() -> None:
    tape, other = torch.classes.isw.Tape(), torch.classes.isw.Tape()
    assert not tape.stop([])
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        tape.run([])
    assert tape.start([torch.ones(1)])
    assert not other.start([])  # its operators go onto the first
    assert tape.stop([])
    with pytest.raises(RuntimeError, match="recorded once"):
        tape.start([])
    with pytest.raises(ValueError, match="expected 1 tensors, got 2"):
        tape.run([torch.ones(1)] * 2)


def test_a_recorded_function_may_call_another() -> None:
    inner = Replayed(lambda x: [x * 2])
    outer = Replayed(lambda x: [inner(x + 1)[0] - x])
    for value in (1.0, 5.0):
        x = torch.full((2,), value)
        assert outer(x)[0].tolist() == [value + 2] * 2
    assert len(outer._tapes) == 1
    assert inner._tapes == {}
    assert inner(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert len(inner._tapes) == 1


def test_an_error_that_the_function_catches_is_not_repeated() -> None:
    def function(x: Tensor) -> list[Tensor]:
        try:
            return [x @ WEIGHT.T]
        except RuntimeError:
            return [x + 1]

    counted = Counted(function)
    replayed = Replayed(counted)
    for value in (1.0, 5.0):
        assert replayed(torch.full((2, 3), value))[0].eq(value + 1).all()
    assert counted.calls == 2


def test_a_tape_that_was_dropped_while_it_recorded_harms_nobody() -> None:
    tape = torch.classes.isw.Tape()
    x = torch.ones(3)
    tape.start([x])
    del tape
    gc.collect()
    assert (x + 1).sum() == 6
    replayed = Replayed(double)
    for value in (1.0, 2.0):
        assert replayed(torch.full((4,), value))[0].tolist() == [2 * value] * 4
    assert len(replayed._tapes) == 1


def test_a_tape_dropped_by_another_thread_harms_nobody() -> None:
    tapes = [torch.classes.isw.Tape()]
    tapes[0].start([torch.ones(3)])
    thread = threading.Thread(target=tapes.clear)
    thread.start()
    thread.join()
    replayed = Replayed(double)
    assert replayed(torch.ones(4))[0].tolist() == [2.0] * 4
    assert len(replayed._tapes) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some fall into a destructor
def test_interrupts_at_any_moment_change_no_later_call() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    caught = 0
    try:
        for turn in range(150):
            replayed = Replayed(lambda x: [torch.cat([x * 2, x + 1])])
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 4e-6 * turn)
                for size in range(1, 17):
                    replayed(torch.ones(size))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
            x = random(20, seed=turn)
            for _ in range(2):
                assert torch.equal(replayed(x)[0], torch.cat([x * 2, x + 1]))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught
    assert Replayed(double)(torch.ones(5))[0].tolist() == [2.0] * 5
    last = Replayed(double)
    last(torch.ones(6))
    assert len(last._tapes) == 1  # nothing of the interrupted calls is being recorded
