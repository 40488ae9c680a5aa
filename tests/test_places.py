"""Half a set of hooks is never silent: modules that were replaced, and graphs that were made from an attached model."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

from isw_plugin import InstanceWisePruner
from isw_plugin.errors import AttachError, ISWError, NothingRecordedError, UnsupportedError
from tests.conftest import Net, Plain, Residual, hooks_of, made

SETTINGS = {"alpha": 0.1, "beta": 1.1, "lambda_": 1.0}


def attached(net: Net, **settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(net, net.images(1), **{**SETTINGS, **settings})


class Adapted(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * 2


def swapped(name: str, new: object):
    def change(net: Net) -> None:
        net.set_submodule(name, new(net.get_submodule(name)))

    return change


# -- a module replaced -----------------------------------------------------------------------------

CHANGES = [
    (Plain, "all", "act1", swapped("act1", lambda old: nn.GELU())),
    (Plain, "all", "act1", swapped("act1", lambda old: Adapted(old))),
    (Plain, "consumers", "c2", swapped("c2", Adapted)),
    (Plain, "consumers", "fc", swapped("fc", lambda old: nn.Linear(6, 5))),
    (Residual, "all", "block", swapped("block", copy.deepcopy)),
    (Residual, "all", "block.c2", swapped("block.c2", Adapted)),
]


@pytest.mark.parametrize(("kind", "scope", "named", "change"), CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_module_is_named_and_the_pruner_can_be_mended(kind, scope, named, change, training) -> None:
    net = made(kind)
    pruner = attached(net, scope=scope)
    net.train(training)
    if not training:
        pruner.step()
    net(net.images())
    departed = list(net.modules())
    change(net)
    with pytest.raises(AttachError, match=rf"{named} was replaced .*pruner\.update_regularizer\(\)"):
        net(net.images())
    pruner.update_regularizer()
    held = {id(module) for module in net.modules()}
    assert not any(hooks_of(module)[""][0] or hooks_of(module)[""][1] for module in departed if id(module) not in held)
    fresh = copy.deepcopy(net)
    InstanceWisePruner.of(fresh).remove()
    expected = attached(fresh, scope=scope)
    if training:
        net(net.images())
        fresh(net.images())
        assert torch.equal(pruner.penalty(), expected.penalty())
    else:
        expected.step()
        assert torch.equal(net(net.images()), fresh(net.images()))


def test_nothing_is_said_while_gates_are_off_and_nothing_is_recorded(plain: Net) -> None:
    attached(plain)
    plain.act1 = nn.GELU()
    assert plain(plain.images()).isfinite().all()


def test_a_converted_norm_is_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)).train()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), lambda_=1.0)
    assert str(pruner.sites[0].taps[0]) == "output of 1"
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(AttachError, match="1 was replaced"):
        model(torch.randn(2, 3, 8, 8))


def test_remove_also_cleans_modules_that_have_left_the_model(plain: Net) -> None:
    pruner, old = attached(plain), plain.act1
    plain.act1 = nn.GELU()
    pruner.remove()
    assert not old._forward_hooks
    again = attached(nn.ModuleDict({"a": plain})["a"])
    plain.train()(plain.images())
    assert again.penalty() > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # of dynamo's inputs
def test_a_part_that_is_compiled_in_its_place_is_the_same_part(residual: Net) -> None:
    pruner = attached(residual)
    pruner.step()
    expected = residual(residual.images())
    residual.block = torch.compile(residual.block, backend="eager")
    torch.testing.assert_close(residual(residual.images()), expected)
    torch._dynamo.reset()


# -- graphs that were made from an attached model --------------------------------------------------


class Straight(nn.Module):
    """A functional map after a block, so that a hook sits on a module that tracers look through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = torch.relu(self.block(x) + x[:, :, 1:-1, 1:-1])
        return self.head(x)


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def straight(**settings: object) -> tuple[Straight, InstanceWisePruner]:
    torch.manual_seed(0)
    model = Straight().eval()
    return model, InstanceWisePruner(model, IMAGES, **{**SETTINGS, **settings})


TRACES = [
    lambda model: create_feature_extractor(model, ["head"]),
    lambda model: create_feature_extractor(model, {"act": "map"}),
    fx.symbolic_trace,
]


@pytest.mark.parametrize("traced", TRACES)
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_graph_made_of_an_attached_model_refuses_gates(traced, scope: str) -> None:
    model, pruner = straight(scope=scope)
    graph = traced(model)
    graph(IMAGES)  # bare, as the model is
    with (
        pruner.gating(),
        pytest.raises(AttachError, match=r"has lost some of the pruner's hooks. Make it from the bare"),
    ):
        graph(IMAGES)
    graph.train()(IMAGES)
    with pytest.raises(NothingRecordedError, match="feature extractor"):
        pruner.penalty()


@pytest.mark.parametrize("traced", TRACES)
def test_no_graph_is_traced_with_gates_on(traced) -> None:
    model, pruner = straight()
    pruner.step()
    try:
        graph = traced(model)
    except ISWError:
        return
    with pytest.raises(ISWError):
        graph(IMAGES)


def test_an_extractor_made_first_can_be_attached_to() -> None:
    torch.manual_seed(0)
    graph = create_feature_extractor(Straight().eval(), ["head"])
    pruner = InstanceWisePruner(graph, IMAGES, **SETTINGS)
    model, other = straight()
    pruner.step()
    other.step()
    assert torch.equal(graph(IMAGES)["head"], model(IMAGES))


def test_a_copied_graph_says_that_it_lost_its_pruner_and_gets_it_back() -> None:
    torch.manual_seed(0)
    graph = fx.symbolic_trace(Straight().eval())
    pruner = InstanceWisePruner(graph, IMAGES, **SETTINGS)
    pruner.step()
    expected = graph(IMAGES)
    copied = copy.deepcopy(graph)
    with pytest.raises(AttachError, match=r"InstanceWisePruner\.of\(copy\) puts them back"):
        copied(IMAGES)
    theirs = InstanceWisePruner.of(copied)
    assert theirs.enabled
    assert torch.equal(copied(IMAGES), expected)
    theirs.remove()
    assert torch.equal(graph(IMAGES), expected)
    assert not torch.equal(copied(IMAGES), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_scripting_says_what_to_do(plain: Net) -> None:
    attached(plain)
    with pytest.raises(UnsupportedError, match=r"script the bare model"):
        torch.jit.script(nn.Sequential(*plain.children()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_gated_model_can_be_traced_and_the_trace_saved(residual: Net, scope: str, tmp_path) -> None:
    attached(residual, scope=scope).step()
    traced = torch.jit.trace(residual, residual.images(3))
    traced.save(tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for images in (residual.images(3, seed=1), residual.images(5, seed=2)):
        torch.testing.assert_close(loaded(images), residual(images))
