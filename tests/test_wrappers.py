import pytest
import torch
from conftest import Net, Plain, hooks_of, made
from torch import nn

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import AttachError, UnsupportedError


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
    assert pruner.regularize(wrap(plain), torch.zeros((), requires_grad=True)) > 0


def test_regularize_refuses_another_model_and_keeps_the_record(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, plain.images(1), lambda_=1.0)
    plain.train()(plain.images())
    with pytest.raises(AttachError, match="another model"):
        pruner.regularize(made(Plain), torch.zeros((), requires_grad=True))
    assert pruner.penalty() > 0
