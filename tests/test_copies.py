import copy
import functools
import pickle
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from isw_plugin import InstanceWisePruner
from isw_plugin.accelerate.trace import trace
from isw_plugin.copies import Untouched, copy_of, without_process_hooks
from isw_plugin.errors import UnsupportedError
from tests.conftest import Net, hooks_of


def calling(held: nn.Module) -> None:
    old = held.forward
    held.forward = lambda *args: old(*args)


def by_partial(held: nn.Module) -> None:
    old = held.forward
    held.forward = functools.partial(lambda run, *args: (old, run(*args))[1], old)


def by_default(held: nn.Module) -> None:
    held.forward = lambda *args, run=held.forward: run(*args)


def wrapped(held: nn.Module) -> None:
    """As mixed precision of accelerate, where forward was replaced before."""

    class Converted:
        def __init__(self, run: Callable) -> None:
            self.run = run

        def __call__(self, *args: Tensor) -> Tensor:
            return self.run(*args).float()

    converted = Converted(held.forward)

    def forward(*args: Tensor) -> Tensor:
        return converted(*args)

    held.forward = functools.wraps(held.forward)(forward)


def of_another(held: nn.Module) -> None:
    """A method of an object that keeps the model in a closure."""

    class Runner:
        def __init__(self, run: Callable) -> None:
            self.run = lambda *args: run(*args)

        def forward(self, *args: Tensor) -> Tensor:
            return self.run(*args)

    held.forward = Runner(held.forward).forward


def by_global(held: nn.Module) -> None:
    namespace = {"old": held.forward}
    exec("def forward(*args): return old(*args)", namespace)
    held.forward = namespace["forward"]


def untouched(model: nn.Module) -> list[object]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return [state, [module.training for module in model.modules()], hooks_of(model), torch.get_rng_state()]


def require_same(before: list[object], after: list[object]) -> None:
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


REPLACED = [calling, by_partial, by_default, wrapped, of_another, by_global]


@pytest.mark.parametrize("part", ["", "bn1", "c2"])
@pytest.mark.parametrize("replace", REPLACED)
def test_a_forward_that_holds_the_model_is_refused_before_it_runs(plain: Net, replace, part: str) -> None:
    replace(plain.get_submodule(part))
    plain.train()
    before = untouched(plain)
    with pytest.raises(UnsupportedError, match=rf"run the model itself: {part}.*forward .*del module.forward"):
        InstanceWisePruner(plain, plain.images(1))
    require_same(before, untouched(plain))
    with pytest.raises(UnsupportedError, match="run the model itself"):
        copy_of(plain)


@pytest.mark.parametrize("held", ["attribute", "class"])
def test_a_module_held_elsewhere_is_refused_before_it_changes(plain: Net, held: str) -> None:
    """No operation of the copy may take a weight of the model, however it comes by it."""

    class Round(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain
            if held == "attribute":
                self.run = lambda x: plain.bn1(plain.c1(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + (self.run(x) if held == "attribute" else plain.bn1(plain.c1(x))).sum()

    model = Round().train()
    before = untouched(model)
    with pytest.raises(UnsupportedError, match="run the model itself: something outside its modules holds inner"):
        InstanceWisePruner(model, plain.images(1))
    require_same(before, untouched(model))


@pytest.mark.parametrize("held", ["closure", "default", "list"])
def test_a_buffer_outside_the_model_is_not_changed(held: str) -> None:
    norm = nn.BatchNorm1d(4)
    norms = [norm]

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, other: nn.Module = norm) -> Tensor:
            return {"closure": norm, "default": other, "list": norms[0]}[held](self.b(F.relu(self.a(x))))

    model = Outside()
    before = untouched(norm)
    with pytest.raises(UnsupportedError, match="changes a buffer of a BatchNorm1d that is no part of the model"):
        InstanceWisePruner(model, torch.zeros(1, 4))
    require_same(before, untouched(norm))
    norm.eval()
    assert InstanceWisePruner(model, torch.zeros(1, 4)).sites


def methods_of(model: nn.Module) -> None:
    model.forward = types.MethodType(type(model).forward, model)


def as_accelerate(model: nn.Module) -> None:
    """As its hooks: partial(new_forward, module), which deepcopy takes along."""

    def new_forward(module: nn.Module, *args: Tensor) -> Tensor:
        return module._old_forward(*args)

    model._old_forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(new_forward, model), model._old_forward)


def under_autocast(model: nn.Module) -> None:
    """As accelerate's prepare_model: a function of the class's forward, bound to the model."""
    run = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model._original_forward = model.forward
    model.forward = types.MethodType(run, model)


@pytest.mark.parametrize("replace", [methods_of, as_accelerate, under_autocast])
def test_a_forward_that_is_copied_with_the_model_is_none_of_these(plain: Net, replace) -> None:
    names = [site.name for site in InstanceWisePruner(copy.deepcopy(plain), plain.images(1)).sites]
    replace(plain)
    before = untouched(plain.train())
    assert [site.name for site in InstanceWisePruner(plain, plain.images(1)).sites] == names
    assert before[0].keys() == plain.state_dict().keys()
    twin = copy_of(plain)
    with torch.no_grad():
        twin.c1.weight.zero_()
        assert not torch.equal(twin.eval()(plain.images()), plain.eval()(plain.images()))


def test_a_function_that_forward_does_not_call_does_no_harm(plain: Net) -> None:
    plain.predict = lambda x: plain(x).argmax(1)
    assert InstanceWisePruner(plain, plain.images(1)).sites


def test_other_threads_may_run_the_model_meanwhile(plain: Net) -> None:
    x, seen, stop = plain.images(), [], threading.Event()
    expected = plain(x)

    def serve() -> None:
        while not stop.is_set():
            seen.append(torch.equal(plain(x), expected))

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(3):
        InstanceWisePruner(plain, plain.images(1)).remove()
    stop.set()
    thread.join()
    assert seen
    assert all(seen)


def test_operations_of_a_copy_pass_and_those_of_the_model_do_not(plain: Net) -> None:
    twin = copy_of(plain)
    with Untouched(plain):
        twin(plain.images())
        with pytest.raises(UnsupportedError, match=r"holds c1\.weight"):
            plain(plain.images())


# -- what cannot be copied -------------------------------------------------------------------------


class Broken:
    def __deepcopy__(self, memo: dict) -> "Broken":
        raise ValueError("one of a kind")


@pytest.mark.parametrize("value", [threading.Lock(), torch.Generator, sys.stdout, (i for i in ()), Broken()])
def test_what_cannot_be_copied_is_named(plain: Net, value: object) -> None:
    plain.bn1.kept = value() if value is torch.Generator else value
    try:
        pickle.dumps(copy.deepcopy(plain.bn1.kept))
    except Exception:
        with pytest.raises(UnsupportedError, match=r"Plain cannot be copied, for its bn1\.kept: .*before that is set"):
            InstanceWisePruner(plain, plain.images(1))
    else:
        assert InstanceWisePruner(plain, plain.images(1)).sites


def test_a_module_that_copies_as_itself_is_refused(plain: Net) -> None:
    class Frozen(nn.BatchNorm2d):
        def __deepcopy__(self, memo: dict) -> "Frozen":
            return self

    plain.bn1 = Frozen(4)
    with pytest.raises(UnsupportedError, match="its bn1 is not copied by __deepcopy__"):
        InstanceWisePruner(plain.train(), plain.images(1))
    assert plain.bn1.num_batches_tracked == 0
    assert plain.bn1.training


# -- users' hooks ----------------------------------------------------------------------------------


class Observer:
    """Counts calls, and cannot be copied."""

    def __init__(self) -> None:
        self.calls, self.lock = 0, threading.Lock()

    def see(self, *args: object) -> None:
        self.calls += 1


class Counter:
    calls = 0

    def __call__(self, *args: object) -> None:
        self.calls += 1


def test_users_hooks_do_not_run_in_the_probe(plain: Net) -> None:
    seen: list[object] = []
    observer, counter = Observer(), Counter()
    for hook in (lambda *a: seen.append(1), functools.partial(seen.append), observer.see, counter):
        plain.c2.register_forward_hook(hook)
        plain.register_forward_pre_hook(hook)
    plain.c1.register_forward_hook(lambda *a, **k: seen.append(2), with_kwargs=True, always_call=True)
    plain.c1.register_full_backward_hook(lambda *a: seen.append(3))
    hooks = hooks_of(plain)
    found = InstanceWisePruner(plain, plain.images(1))
    found.remove()
    assert (seen, observer.calls, counter.calls) == ([], 0, 0)
    assert hooks_of(plain) == hooks
    twin = copy_of(plain, {id(observer): observer}, observed=False)
    assert [len(twin.c2._forward_hooks), len(twin.c1._forward_hooks_with_kwargs)] == [1, 0]  # the counter


def test_hooks_of_the_process_run_in_the_users_forwards_alone(plain: Net) -> None:
    seen: list[nn.Module] = []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda module, *_: seen.append(module)),
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
    ]
    try:
        pruner = InstanceWisePruner(plain, plain.images(1))
        with pruner.gating():
            trace(plain, pruner.sites, plain.images())
        assert not seen
        with without_process_hooks(), ThreadPoolExecutor(1) as other:
            other.submit(plain, plain.images()).result()
            plain(plain.images())
        once = len(seen)
        plain(plain.images())
        assert len(seen) == 2 * once > 0
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
    ],
)
def test_hooks_that_make_a_weight_stay(plain: Net, wrap) -> None:
    wrap(plain.c2)
    assert [site.name for site in InstanceWisePruner(plain, plain.images(1)).sites] == ["c1", "c2"]
    twin = copy_of(plain, observed=False)
    assert torch.equal(twin(plain.images()), plain(plain.images()))


def test_a_models_own_method_as_a_hook_stays() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 4), nn.Linear(4, 2)
            self.register_forward_pre_hook(self.flatten)

        @staticmethod
        def flat(x: Tensor) -> Tensor:
            return x.flatten(1)

        def flatten(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
            return self.flat(*args)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    assert [site.name for site in InstanceWisePruner(Flat(), torch.zeros(1, 3, 4)).sites] == ["a"]
