import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import AttachError, NoSitesError, UnsupportedError
from tests.conftest import Net, Plain, hooks_of, made


class Wrapped(nn.Module):
    """Stands in for DistributedDataParallel, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch) -> None:
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def compiled_part(net: nn.Module) -> nn.Module:
    net.c2.compile(backend="eager")
    return net


def compiled_child(net: nn.Module) -> nn.Module:
    net.c2 = torch.compile(net.c2, backend="eager")
    return net


REFUSED = [
    (lambda net: torch.compile(net, backend="eager"), "compiled .*attach first, then compile"),
    (compiled_in_place, "compiled .*attach first, then compile"),
    (compiled_part, "compiled .*attach first, then compile"),
    (compiled_child, "compiled .*attach first, then compile"),
    (lambda net: Wrapped(torch.compile(net, backend="eager")), "compiled"),
    (nn.DataParallel, "DistributedDataParallel"),
    (lambda net: torch.jit.trace(net, net.images(1)), "scripted"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(("wrap", "said"), REFUSED)
def test_wrappers_that_gates_cannot_work_under_are_refused(plain: Net, wrap, said: str) -> None:
    model = wrap(plain)
    hooks = hooks_of(plain)
    with pytest.raises(UnsupportedError, match=said):
        InstanceWisePruner(model, plain.images(1))
    assert hooks_of(plain) == hooks


def test_a_data_parallel_replica_is_refused_when_it_runs(plain: Net) -> None:
    InstanceWisePruner(plain, plain.images(1))
    plain._is_replica = True
    with pytest.raises(UnsupportedError, match="DistributedDataParallel"):
        plain(plain.images())


@pytest.mark.parametrize("wrap", [Wrapped, lambda net: Wrapped(Wrapped(net))])
def test_distributed_wrappers_are_looked_through(plain: Net, wrap) -> None:
    pruner = InstanceWisePruner(wrap(plain), plain.images(1))
    assert pruner.model is plain
    assert InstanceWisePruner.of(wrap(plain)).model is plain


@pytest.mark.parametrize("wrap", [Wrapped, lambda net: torch.compile(net, backend="eager"), lambda net: net])
def test_regularize_takes_the_model_or_a_wrapper_of_it(plain: Net, wrap) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=1.0)
    plain.train()(plain.images())
    assert pruner.regularize(wrap(plain), torch.zeros(())) > 0


def test_regularize_refuses_another_model_and_keeps_the_record(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=1.0)
    plain.train()(plain.images())
    with pytest.raises(AttachError, match="another model"):
        pruner.regularize(made(Plain), torch.zeros(()))
    assert pruner.penalty() > 0


# -- wrappers that keep the model in an attribute ---------------------------------------------------


class Delegating(nn.Module):
    """As Opacus's GradSampleModule and DeepSpeed's engine: what it has not, the model inside has."""

    kept = "_module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.add_module(self.kept, module)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.kept), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._modules[self.kept](x)


class Engine(Delegating):
    kept = "module"


class Fabric(Delegating):
    """As _FabricModule: the model twice, and by a property."""

    kept = "_forward_module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._original_module = module

    @property
    def module(self) -> nn.Module:
        return self._original_module


class Holder(nn.Module):
    """A model of somebody's own that happens to call its only part so."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x).softmax(1)


WRAPPERS = [(Delegating, "_module"), (Engine, "module"), (Fabric, "module"), (AveragedModel, "module")]


@pytest.mark.parametrize(("wrap", "inner"), WRAPPERS)
def test_the_refusal_of_a_wrapper_names_the_model_inside(plain: Net, wrap, inner: str) -> None:
    model = wrap(plain)
    with pytest.raises(UnsupportedError, match=rf"{wrap.__name__} wraps .*pass that, model\.{inner}$"):
        InstanceWisePruner(model, plain.images(1))
    pruner = InstanceWisePruner(getattr(model, inner), plain.images(1))
    with pytest.raises(AttachError, match=rf"already has a pruner: InstanceWisePruner.of\(model\.{inner}\) gives it"):
        InstanceWisePruner(model, plain.images(1))
    assert InstanceWisePruner.of(getattr(model, inner)).sites == pruner.sites


@pytest.mark.parametrize("wrap", [Holder, nn.Sequential])
def test_a_model_with_one_part_is_no_wrapper(plain: Net, wrap) -> None:
    assert InstanceWisePruner(wrap(plain), plain.images(1)).sites


# -- layers without weights ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(4, 1), lambda: nn.Sequential(nn.LazyBatchNorm2d())])
def test_lazy_layers_must_have_run_once(lazy) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), lazy(), nn.ReLU(), nn.LazyConv2d(2, 1))
    with pytest.raises(UnsupportedError, match=r"lazy layers .*run it once on real inputs"):
        InstanceWisePruner(model)
    model(torch.zeros(1, 3, 4, 4))
    assert InstanceWisePruner(model, torch.zeros(1, 3, 4, 4)).sites


@pytest.mark.filterwarnings("ignore")  # torch moves its quantization out
def test_quantized_layers_are_said(plain: Net) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(NoSitesError, match=r"only quantized ones, which keep no weights .*before quantizing"):
        InstanceWisePruner(model, torch.zeros(1, 4))
