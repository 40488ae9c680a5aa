import copy
import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from isw_plugin import CVGate, InstanceWisePruner, MinNorm, RandomGate
from isw_plugin.errors import (
    AttachError,
    NoSitesError,
    PatternError,
    ProbeError,
    SettingError,
    StateMismatchError,
    UnsupportedError,
)
from isw_plugin.functional import channel_norm, coefficient_of_variation, keep_mask
from tests.conftest import Concat, Net, Plain, Residual, SqueezeExcite, hooks_of, made


def attached(net: nn.Module, **settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(net, net.images(1), **settings)


def margin(norms: Tensor, alpha: float, beta: float) -> float:
    """How far the nearest decision is from going the other way; under 1e-5 it is a near-tie."""
    mean = norms.mean(1, keepdim=True)
    return min(
        (coefficient_of_variation(norms) - alpha).abs().min().item(), ((norms - beta * mean) / mean).abs().min().item()
    )


def norm_above(feature: Tensor, norms: Tensor) -> Tensor:
    return norms > 2


@dataclass(frozen=True)
class Above:
    limit: float = 2.0

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        return norms > self.limit


# -- gates off, and beta = 0 -----------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("training", [False, True])
def test_gates_off_change_no_bit(net: Net, scope: str, training: bool) -> None:
    net.train(training)
    expected = copy.deepcopy(net)(net.images())
    pruner = attached(net, scope=scope)
    assert not pruner.enabled
    assert torch.equal(net(net.images()), expected)


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("gate", [CVGate(0.0, 0.0), MinNorm(0.0), RandomGate(0.0)])
def test_gates_that_keep_all_change_no_bit(net: Net, scope: str, gate: object) -> None:
    expected = net(net.images())
    attached(net, gate=gate, scope=scope).enable()
    assert torch.equal(net(net.images()), expected)


def test_gates_that_keep_all_report_that_they_do(plain: Net) -> None:
    pruner = attached(plain, beta=0.0)
    pruner.step()
    plain(plain.images())
    assert all(keep.all() for keep in pruner.keep.values())
    assert list(pruner.keep) == list(plain.sites)


# -- gates on, against networks masked by hand -----------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_gating_is_what_masking_by_hand_computes(net: Net, scope: str) -> None:
    bare, images = copy.deepcopy(net), net.images(8)
    pruner = attached(net, alpha=0.1, beta=1.1, scope=scope)
    pruner.step()
    gated = net(images)
    assert not all(keep.all() for keep in pruner.keep.values())
    torch.testing.assert_close(gated, bare.gated_by_hand(images, 0.1, 1.1, scope))


@pytest.mark.parametrize("kind", [Residual, SqueezeExcite])
def test_scopes_differ_where_others_see_the_map(kind: type[Net]) -> None:
    images = made(kind).images(8)
    outputs = []
    for scope in ("all", "consumers"):
        net = made(kind)
        attached(net, alpha=0.1, beta=1.1, scope=scope).step()
        outputs.append(net(images))
    assert not torch.allclose(*outputs)


def test_scope_changes_no_norm_of_the_first_site_and_no_penalty() -> None:
    penalties = []
    for scope in ("all", "consumers"):
        net = made(Residual)
        pruner = attached(net, scope=scope, lambda_=1.0)
        net.train()(net.images())
        penalties.append(pruner.penalty())
    assert torch.equal(*penalties)


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_decisions_are_the_gates_on_the_norms(net: Net, scope: str) -> None:
    pruner = attached(net, alpha=0.1, beta=1.1, scope=scope)
    pruner.step()
    net(net.images())
    assert all(torch.equal(keep, keep_mask(pruner.norms[name], 0.1, 1.1)) for name, keep in pruner.keep.items())


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_batch_equals_its_instances_one_by_one(net: Net, scope: str) -> None:
    images = net.images(6)
    pruner = attached(net, alpha=0.1, beta=1.1, scope=scope)
    pruner.step()
    together, keep = net(images), pruner.keep
    assert min(margin(norms, 0.1, 1.1) for norms in pruner.norms.values()) > 1e-5
    for n, image in enumerate(images.split(1)):
        torch.testing.assert_close(net(image), together[n : n + 1], atol=1e-5, rtol=1e-5)
        assert all(torch.equal(pruner.keep[name], keep[name][n : n + 1]) for name in keep)


@pytest.mark.parametrize("gate", [MinNorm(0.5), RandomGate(0.5, seed=1), norm_above, Above(2.5)])
def test_any_gate_decides(net: Net, gate: object) -> None:
    features = net.features(net.images())
    pruner = attached(net, gate=gate)
    pruner.enable()
    net(net.images())
    first = pruner.sites[0]
    norms = channel_norm(features[first.name], first.axis)
    assert torch.equal(pruner.keep[first.name], gate(features[first.name], norms))


@pytest.mark.parametrize(
    ("gate", "gave"),
    [
        (lambda feature, norms: (norms > 1).float(), r"torch\.float32 of shape \(4, 4\)"),
        (lambda feature, norms: norms[:, :1] > 1, r"torch\.bool of shape \(4, 1\)"),
        (lambda feature, norms: feature > 1, r"torch\.bool of shape \(4, 4, 6, 6\)"),
    ],
)
def test_a_gate_that_gives_something_else_is_refused(plain: Net, gate, gave: str) -> None:
    attached(plain, gate=gate).step()
    with pytest.raises(SettingError, match=f"{gave} at c1"):
        plain(plain.images())


def test_keep_and_norms_are_detached_and_in_site_order(net: Net) -> None:
    pruner = attached(net)
    pruner.step()
    net(net.images())
    for values in (pruner.keep, pruner.norms):
        assert list(values) == [site.name for site in pruner.sites]
        assert {name: value.shape for name, value in values.items()} == {
            site.name: (4, site.channels) for site in pruner.sites
        }
        assert not any(value.requires_grad for value in values.values())
    assert {keep.dtype for keep in pruner.keep.values()} == {torch.bool}


@pytest.mark.parametrize("min_keep", [1, 3, 100])
def test_min_keep_keeps_the_largest(plain: Net, min_keep: int) -> None:
    pruner = attached(plain, gate=MinNorm(0.9), min_keep=min_keep)
    pruner.enable()
    plain(plain.images())
    for name, keep in pruner.keep.items():
        largest = pruner.norms[name].topk(min(min_keep, keep.shape[1])).indices
        assert keep.gather(1, largest).all()
        assert (keep.sum(1) == max(keep.shape[1] - int(0.9 * keep.shape[1]), min(min_keep, keep.shape[1]))).all()


def test_channels_last_images_give_the_same(residual: Net) -> None:
    images = residual.images()
    pruner = attached(residual, alpha=0.1, beta=1.1)
    pruner.step()
    expected, keep = residual(images), pruner.keep
    output = residual.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(pruner.keep[name], keep[name]) for name in keep)


@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_a_timm_residual_network_gates_on_every_site(scope: str) -> None:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    pruner = InstanceWisePruner(model, alpha=0.1, scope=scope)
    with pruner.gating(), torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert len(pruner.keep) == len(pruner.sites) == 12


# -- on and off ------------------------------------------------------------------------------------


def test_step_and_enable_and_disable_switch(plain: Net) -> None:
    pruner = attached(plain)
    pruner.step()
    assert pruner.enabled
    pruner.disable()
    assert not pruner.enabled
    pruner.enable(alpha=0.2)
    assert pruner.enabled
    assert pruner.gate == CVGate(0.2, 1.0)


@pytest.mark.parametrize("enabled", [False, True])
def test_gating_restores_thresholds_and_on_off(plain: Net, enabled: bool) -> None:
    pruner = attached(plain, alpha=0.3, beta=0.7)
    if enabled:
        pruner.enable()
    before = plain(plain.images())
    with pruner.gating(alpha=0.0, beta=1.5):
        assert (pruner.gate, pruner.enabled) == (CVGate(0.0, 1.5), True)
        assert not torch.equal(plain(plain.images()), before)
    assert (pruner.gate, pruner.enabled) == (CVGate(0.3, 0.7), enabled)
    assert torch.equal(plain(plain.images()), before)


def test_gating_restores_after_an_error_and_when_nested(plain: Net) -> None:
    pruner = attached(plain)
    with pytest.raises(ZeroDivisionError), pruner.gating(alpha=0.0), pruner.gating(beta=0.1):
        raise ZeroDivisionError
    assert (pruner.gate, pruner.enabled) == (CVGate(), False)


# -- per site --------------------------------------------------------------------------------------


def test_per_site_parameters_override_the_gate(plain: Net) -> None:
    pruner = attached(plain, alpha=0.0, beta=1.2, per_site={"c1": {"beta": 0.0}})
    pruner.step()
    plain(plain.images())
    assert pruner.keep["c1"].all()
    assert torch.equal(pruner.keep["c2"], keep_mask(pruner.norms["c2"], 0.0, 1.2))


def test_per_site_parameters_outlive_enable(plain: Net) -> None:
    pruner = attached(plain, per_site={"c1": {"beta": 0.0}})
    pruner.enable(alpha=0.0, beta=1.5)
    plain(plain.images())
    assert pruner.keep["c1"].all()
    assert not pruner.keep["c2"].all()


def test_later_patterns_win(plain: Net) -> None:
    pruner = attached(plain, per_site={"*": {"beta": 0.0}, "c2": {"beta": 1.5, "alpha": 0.0}})
    pruner.step()
    plain(plain.images())
    assert torch.equal(pruner.keep["c2"], keep_mask(pruner.norms["c2"], 0.0, 1.5))
    assert not pruner.keep["c2"].all()


def test_per_site_lambda_weighs_that_sites_norms(plain: Net) -> None:
    pruner = attached(plain, lambda_=1.0, per_site={"c1": {"lambda_": 0.25}})
    plain.train()(plain.images())
    norms = {name: channel_norm(feature).sum() for name, feature in plain.features(plain.images()).items()}
    torch.testing.assert_close(pruner.penalty(), 0.25 * norms["c1"] + norms["c2"])


def test_lambda_is_writable(plain: Net) -> None:
    pruner = attached(plain, lambda_=1.0)
    plain.train()(plain.images())
    one = pruner.penalty()
    pruner.lambda_ = 0.5
    plain(plain.images())
    torch.testing.assert_close(pruner.penalty(), one / 2)
    pruner.lambda_ = 0
    plain(plain.images())
    assert pruner.penalty() == 0


# -- bad settings: a clear error, and nothing changed ----------------------------------------------

BAD_SETTINGS = [
    ({"lambda_": -1.0}, SettingError, "lambda_=-1.0"),
    ({"lambda_": float("nan")}, SettingError, "lambda_=nan"),
    ({"lambda_": float("inf")}, SettingError, "lambda_=inf"),
    ({"beta": 2.0}, SettingError, "beta=2.0"),
    ({"beta": -0.1}, SettingError, "beta=-0.1"),
    ({"alpha": float("nan")}, SettingError, "alpha=nan"),
    ({"gate": "min_norm"}, SettingError, "gate='min_norm'"),
    ({"gate": MinNorm}, SettingError, "MinNorm"),
    ({"gate": MinNorm(0.1), "beta": 1.0}, SettingError, "beta"),
    ({"gate": CVGate(), "alpha": 0.1}, SettingError, "alpha"),
    ({"scope": "readers"}, SettingError, "scope='readers'.*'all', 'consumers'"),
    ({"reduction": "max"}, SettingError, "reduction='max'.*'sum', 'mean'"),
    ({"min_keep": -1}, SettingError, "min_keep=-1"),
    ({"per_site": {"c1": {"gamma": 1}}}, SettingError, "gamma"),
    ({"per_site": {"c1": {"lambda_": -1}}}, SettingError, "lambda_=-1"),
    ({"per_site": {"c9": {"beta": 0.1}}}, PatternError, "per_site='c9' matches 0 of 2 layers"),
    ({"layers": "c9"}, PatternError, "c9.*Close names: c1|c2"),
    ({"exclude": "c9"}, PatternError, "c9"),
    ({"exclude": "*"}, PatternError, "leaves none"),
    ({"layers": "re:("}, PatternError, "no regular expression"),
    ({"layers": "fc"}, NoSitesError, "fc: the model's output"),
    ({"example_inputs": torch.zeros(1, 7, 8, 8)}, ProbeError, r"Plain .*shape \[\(1, 7, 8, 8\)\]"),
    ({"lambda_": "1e-6"}, SettingError, "lambda_='1e-6': .*a finite number.* not a str"),
    ({"lambda_": True}, SettingError, "lambda_=True"),
    ({"lambda_": None}, SettingError, "lambda_=None"),
    ({"lambda_": torch.ones(2)}, SettingError, "lambda_="),
    ({"lambda_": [0.1]}, SettingError, "lambda_="),
    ({"alpha": "0.5"}, SettingError, "alpha='0.5': a CV threshold"),
    ({"beta": [1.0]}, SettingError, r"beta=\[1.0\]: a drop threshold"),
    ({"beta": np.ones(3)}, SettingError, "beta="),
    ({"min_keep": 1.5}, SettingError, "min_keep=1.5: a number of channels is 0 or more, a whole number"),
    ({"min_keep": "all"}, SettingError, "min_keep='all'"),
    ({"min_keep": True}, SettingError, "min_keep=True"),
    ({"layers": 5}, PatternError, r"layers=5: a glob over layer names, a list of globs, or a function"),
    ({"exclude": [5]}, PatternError, r"exclude=\[5\]"),
    ({"layers": None}, PatternError, "layers=None"),
    ({"per_site": [("c1", {"beta": 0.1})]}, SettingError, r"per_site=.*patterns and what differs there"),
    ({"per_site": {"c1": 0.1}}, SettingError, "per_site="),
    ({"per_site": {"c1": {1: 0.1}}}, SettingError, "per_site="),
    ({"per_site": {"c1": {"beta": "0.1"}}}, SettingError, "beta='0.1'"),
    ({"per_site": {"c1": {"lambda_": None}}}, SettingError, "lambda_=None"),
    ({"example_inputs": (3, 8, 8)}, SettingError, r"is a shape: pass a tensor, such as torch\.zeros\(1, 3, 8, 8\)"),
    ({"example_inputs": torch.Size([4, 3, 8, 8])}, SettingError, r"torch\.zeros\(4, 3, 8, 8\)"),
    ({"example_inputs": np.zeros((1, 3, 8, 8))}, SettingError, r"hold a ndarray: .*torch\.from_numpy"),
    ({"example_inputs": {"x": np.zeros((1, 3, 8, 8))}}, SettingError, "hold a ndarray"),
    ({"example_inputs": 224}, SettingError, "hold a int"),
]


@pytest.mark.parametrize(("settings", "kind", "named"), BAD_SETTINGS)
def test_bad_settings_change_nothing(plain: Net, settings: dict, kind: type[Exception], named: str) -> None:
    hooks, state = hooks_of(plain), pickle.dumps(plain)
    with pytest.raises(kind, match=named):
        InstanceWisePruner(plain, **{"example_inputs": plain.images(1), **settings})
    assert hooks_of(plain) == hooks
    assert pickle.dumps(plain) == state


@pytest.mark.parametrize("make", [InstanceWisePruner, InstanceWisePruner.of])
def test_what_is_no_model_is_refused(make) -> None:
    with pytest.raises(SettingError, match=r"model='resnet18' is no .*Module.*timm\.create_model\('resnet18'\)"):
        make("resnet18")


@pytest.mark.parametrize(
    "number",
    [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor([0.25]), nn.Parameter(torch.tensor(0.25))],
)
def test_numbers_of_numpy_and_tensors_of_one_element_become_pythons(plain: Net, number: object) -> None:
    pruner = attached(
        plain, lambda_=number, alpha=number, beta=number, min_keep=np.int64(2), per_site={"c1": {"beta": number}}
    )
    state = json.loads(json.dumps(pruner.state_dict()))
    assert (state["lambda_"], state["gate"]["parameters"]) == (0.25, {"alpha": 0.25, "beta": 0.25})
    assert (state["min_keep"], state["per_site"]) == (2, {"c1": {"beta": 0.25}})
    assert type(pruner.lambda_) is type(pruner.gate.alpha) is float


@pytest.mark.parametrize("inputs", [None, torch.zeros(1, 3, 4)])
def test_a_model_without_layers_is_refused(inputs: Tensor | None) -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(NoSitesError, match="Sequential has no convolution or linear layer"):
        InstanceWisePruner(model, inputs)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "change",
    [
        lambda pruner: pruner.enable(beta=2.5),
        lambda pruner: pruner.enable(gamma=1),
        lambda pruner: pruner.gating(beta=2.5).__enter__(),
        lambda pruner: setattr(pruner, "lambda_", -1.0),
        lambda pruner: setattr(pruner, "lambda_", float("nan")),
        lambda pruner: setattr(pruner, "lambda_", "x"),
        lambda pruner: pruner.enable(alpha="x"),
        lambda pruner: pruner.enable(beta=None),
        lambda pruner: pruner.enable(per_site={"c1": 5}),
        lambda pruner: pruner.load_state_dict(pruner.state_dict() | {"min_keep": "all"}),
    ],
)
def test_bad_changes_change_nothing(plain: Net, change) -> None:
    pruner = attached(plain)
    before = pruner.state_dict()
    with pytest.raises(SettingError):
        change(pruner)
    assert pruner.state_dict() == before


# -- one pruner a model ----------------------------------------------------------------------------


def test_a_second_pruner_is_refused_and_the_first_goes_on(plain: Net) -> None:
    pruner = attached(plain, lambda_=1.0)
    hooks = hooks_of(plain)
    with pytest.raises(AttachError, match=r"Plain already has a pruner: InstanceWisePruner\.of"):
        attached(plain)
    assert hooks_of(plain) == hooks
    plain.train()(plain.images())
    assert pruner.penalty() > 0


def test_a_second_pruner_is_refused_before_the_first_forward_too(plain: Net) -> None:
    InstanceWisePruner(plain)
    with pytest.raises(AttachError):
        InstanceWisePruner(plain)


def test_a_pruner_on_a_part_or_the_whole_is_a_second(plain: Net) -> None:
    part = nn.Sequential(plain.c1, plain.act1, plain.c2)
    InstanceWisePruner(part, plain.images(1))
    with pytest.raises(AttachError, match="part"):
        attached(plain)


def test_a_part_has_no_pruner_of_its_own(residual: Net) -> None:
    attached(residual)
    with pytest.raises(AttachError, match="Block has no pruner"):
        InstanceWisePruner.of(residual.block)


def test_of_needs_a_pruner(plain: Net) -> None:
    with pytest.raises(AttachError, match="Plain has no pruner attached"):
        InstanceWisePruner.of(plain)


def test_all_pruners_of_a_model_are_one(plain: Net) -> None:
    pruner = attached(plain)
    other = InstanceWisePruner.of(plain)
    other.enable(alpha=0.25)
    assert (pruner.gate, pruner.enabled) == (CVGate(0.25), True)
    other.load_state_dict(other.state_dict() | {"lambda_": 0.5})
    assert pruner.lambda_ == 0.5


# -- remove ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "consumers"])
@pytest.mark.parametrize("lazily", [False, True])
def test_remove_leaves_the_model_byte_for_byte(net: Net, scope: str, lazily: bool) -> None:
    hooks, classes, state = hooks_of(net), [type(module) for module in net.modules()], pickle.dumps(net)
    names = list(net.state_dict())
    pruner = InstanceWisePruner(net, None if lazily else net.images(1), scope=scope)
    pruner.step()
    net(net.images())
    assert list(net.state_dict()) == names
    pruner.remove()
    assert hooks_of(net) == hooks
    assert [type(module) for module in net.modules()] == classes
    assert pickle.dumps(net) == state


def test_remove_before_the_first_forward(plain: Net) -> None:
    hooks = hooks_of(plain)
    InstanceWisePruner(plain).remove()
    assert hooks_of(plain) == hooks


def test_remove_leaves_the_hooks_of_others(plain: Net) -> None:
    plain.act1.register_forward_hook(lambda *_: None)
    plain.register_forward_pre_hook(lambda *_: None)
    hooks = hooks_of(plain)
    attached(plain).remove()
    assert hooks_of(plain) == hooks


def test_a_second_remove_does_nothing(plain: Net) -> None:
    hooks = hooks_of(plain)
    pruner = attached(plain)
    pruner.remove()
    pruner.remove()
    assert hooks_of(plain) == hooks


def test_a_second_remove_leaves_the_next_pruner_alone(plain: Net) -> None:
    first = attached(plain)
    first.remove()
    attached(plain)
    hooks = hooks_of(plain)
    first.remove()
    assert hooks_of(plain) == hooks


@pytest.mark.parametrize(
    "use",
    [
        lambda pruner: pruner.sites,
        lambda pruner: pruner.summary(),
        lambda pruner: pruner.keep,
        lambda pruner: pruner.step(),
        lambda pruner: pruner.state_dict(),
        lambda pruner: pruner.load_state_dict({}),
        lambda pruner: pruner.update_regularizer(),
    ],
)
def test_a_removed_pruner_says_so(plain: Net, use) -> None:
    pruner = attached(plain)
    pruner.remove()
    with pytest.raises(AttachError):
        use(pruner)


# -- copies ----------------------------------------------------------------------------------------

COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("lazily", [False, True])
def test_of_finds_the_pruner_of_a_copy(plain: Net, copied, lazily: bool) -> None:
    InstanceWisePruner(plain, None if lazily else plain.images(1), alpha=0.1, beta=1.2)
    other = copied(plain)
    pruner = InstanceWisePruner.of(other)
    pruner.step()
    other(other.images())
    assert torch.equal(pruner.keep["c1"], keep_mask(pruner.norms["c1"], 0.1, 1.2))


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_a_copy_is_independent(plain: Net, copied) -> None:
    pruner = attached(plain, lambda_=1.0)
    plain.train()
    other = copied(plain)
    theirs = InstanceWisePruner.of(other)
    theirs.enable(alpha=0.0, beta=1.5)
    theirs.lambda_ = 0.5
    other(other.images())
    assert (pruner.enabled, pruner.gate, pruner.lambda_) == (False, CVGate(), 1.0)
    assert pruner.keep == {}
    pruner.remove()
    assert theirs.penalty() > 0
    other(other.images())
    assert set(theirs.keep) == {"c1", "c2"}


def test_a_copy_of_the_pruner_has_a_copy_of_the_model(plain: Net) -> None:
    other = copy.deepcopy(attached(plain))
    other.step()
    assert other.model is not plain
    assert not InstanceWisePruner.of(plain).enabled


def test_a_pruner_of_functions_survives_deepcopy(plain: Net) -> None:
    attached(plain, layers=lambda name, module: name == "c2", gate=norm_above)
    other = InstanceWisePruner.of(pickle.loads(pickle.dumps(plain)))
    assert [site.name for site in other.sites] == ["c2"]
    other.update_regularizer()
    assert [site.name for site in other.sites] == ["c2"]


def test_hooks_registered_in_another_process_do_not_replace_ours(plain: Net, monkeypatch) -> None:
    attached(plain)
    saved = pickle.dumps(plain)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)  # as in a process that just started
    loaded = pickle.loads(saved)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in loaded.modules())
    for _ in range(hooks + 1000):
        loaded.act1.register_forward_hook(lambda *_: None)
    pruner = InstanceWisePruner.of(loaded)
    pruner.step()
    loaded(loaded.images())
    assert set(pruner.keep) == {"c1", "c2"}


# -- sites found at the first forward --------------------------------------------------------------


class Mixed(nn.Module):
    """A forward of every kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None, **extra: float) -> Tensor:
        hidden = self.act(self.a(x)) * scale
        return self.b(hidden) + (0 if shift is None else shift) + sum(extra.values())


X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, 2.0), {}),
        ((), {"x": X}),
        ((X,), {"scale": 2.0}),
        ((X, 2.0), {"shift": torch.ones(2)}),
        ((X,), {"shift": torch.ones(2), "extra_one": 1.0}),
    ],
)
def test_sites_are_found_at_the_first_forward(args: tuple, kwargs: dict) -> None:
    torch.manual_seed(0)
    model = Mixed()
    expected = model(*args, **kwargs)
    pruner = InstanceWisePruner(model)
    with pytest.raises(AttachError, match="first forward"):
        pruner.sites  # noqa: B018
    assert torch.equal(model(*args, **kwargs), expected)
    assert [site.name for site in pruner.sites] == ["a"]


def test_the_first_forward_already_counts(plain: Net) -> None:
    pruner = InstanceWisePruner(plain, lambda_=1.0, alpha=0.0)
    pruner.step()
    plain.train()(plain.images())
    assert pruner.penalty() > 0
    assert set(pruner.keep) == {"c1", "c2"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_first_forward_may_run_in_any_mode(plain: Net, mode) -> None:
    pruner = InstanceWisePruner(plain)
    with mode():
        plain(plain.images())
    assert len(pruner.sites) == 2


def test_an_error_at_the_first_forward_can_be_repeated() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    pruner = InstanceWisePruner(model)
    for _ in range(2):
        with pytest.raises(NoSitesError):
            model(torch.zeros(1, 4))
    pruner.remove()
    assert model(torch.zeros(1, 4)).shape == (1, 2)


@pytest.mark.parametrize(
    ("run", "kind", "named"),
    [
        (lambda net: net(torch.zeros(1, 7, 8, 8)), RuntimeError, "expected input.* to have 3 channels"),
        (lambda net: net("images"), Exception, "conv2d|str"),
        (lambda net: net(net.images(1), 5), TypeError, "positional argument"),
        (lambda net: net(images=net.images(1)), TypeError, "unexpected keyword argument 'images'"),
    ],
)
def test_the_users_own_error_at_the_first_forward_comes_as_itself(plain: Net, run, kind, named: str) -> None:
    pruner = InstanceWisePruner(plain, lambda_=1.0)
    hooks = hooks_of(plain)
    for _ in range(2):
        with pytest.raises(kind, match=named) as caught:
            run(plain)
        assert not isinstance(caught.value, ProbeError)
    assert hooks_of(plain) == hooks
    plain.train()(plain.images())
    assert pruner.penalty() > 0


class Once(nn.Module):
    """Cannot be copied, so it cannot be probed; it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def __deepcopy__(self, memo: object) -> "Once":
        raise ValueError("there is one")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_a_model_that_runs_and_cannot_be_probed_is_no_silent_success() -> None:
    model = Once()
    pruner = InstanceWisePruner(model)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="there is one"):
            model(torch.zeros(3, 4))
    pruner.remove()
    assert model(torch.zeros(3, 4)).shape == (3, 2)


def test_patterns_are_checked_at_the_first_forward(plain: Net) -> None:
    InstanceWisePruner(plain, layers="c9")
    with pytest.raises(PatternError, match="c9"):
        plain(plain.images())


# -- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.2, "beta": 0.9, "lambda_": 1e-3, "reduction": "mean", "min_keep": 2},
        {"gate": MinNorm(0.25)},
        {"gate": RandomGate(0.25, seed=7)},
        {"gate": Above(1.5)},
        {"gate": norm_above},
        {"alpha": float("inf")},
        {"per_site": {"c1": {"beta": 0.1, "lambda_": 0.0}}},
    ],
)
def test_state_dict_survives_json(settings: dict) -> None:
    pruner = attached(made(Plain), **settings)
    pruner.enable()
    state = json.loads(json.dumps(pruner.state_dict()))
    gate = settings.get("gate", "cv")
    other = attached(made(Plain), gate=Above() if isinstance(gate, Above) else gate if gate is norm_above else "cv")
    other.load_state_dict(state)
    assert other.state_dict() == pruner.state_dict()
    assert other.gate == pruner.gate
    images = made(Plain).images()
    assert torch.equal(other.model(images), pruner.model(images))


def test_a_loaded_state_reaches_the_hooks(plain: Net) -> None:
    state = attached(made(Plain), alpha=0.0, beta=1.5).state_dict()
    pruner = attached(plain, beta=0.0)
    pruner.load_state_dict(state)
    pruner.step()
    plain(plain.images())
    assert not pruner.keep["c2"].all()


MISMATCHES = [
    (lambda: attached(made(Residual)).state_dict(), "stem has no channels here and 4 there"),
    (lambda: attached(made(Plain), layers="c1").state_dict(), "c2 has 6 channels here and no there"),
    (lambda: attached(made(Plain), scope="consumers").state_dict(), "scope='consumers'"),
    (lambda: attached(made(Plain), gate=Above()).state_dict(), "gate Above"),
    (lambda: attached(made(Plain), gate=norm_above).state_dict(), "gate norm_above"),
    (lambda: attached(made(Plain)).state_dict() | {"version": 99}, "version 99"),
    (dict, "version None"),
    (lambda: {k: v for k, v in attached(made(Plain)).state_dict().items() if k != "gate"}, "gate"),
]


@pytest.mark.parametrize(("state", "named"), MISMATCHES)
def test_a_state_of_another_model_changes_nothing(plain: Net, state, named: str) -> None:
    pruner = attached(plain)
    before, hooks = pruner.state_dict(), hooks_of(plain)
    with pytest.raises(StateMismatchError, match=named):
        pruner.load_state_dict(state())
    assert pruner.state_dict() == before
    assert hooks_of(plain) == hooks


def test_there_is_no_state_before_the_sites_are_known(plain: Net) -> None:
    with pytest.raises(AttachError, match="first forward"):
        InstanceWisePruner(plain).state_dict()


def test_weights_load_across_attachment(plain: Net) -> None:
    state = made(Plain, seed=1).state_dict()
    attached(plain)
    plain.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


# -- summary ---------------------------------------------------------------------------------------


def test_summary_names_sites_readers_and_what_is_left_out() -> None:
    lines = attached(made(Concat)).summary().splitlines()
    assert lines[0].split() == ["layer", "channels", "gated", "at", "read", "by"]
    assert lines[1].split() == ["a", "4", "output", "of", "act_a", "c"]
    assert lines[-2].endswith("left out: the model's output")
    assert lines[-1] == "3 sites, 15 channels"


# -- beside a static pruner ------------------------------------------------------------------------


def statically_pruned(net: Net, ratio: float = 0.5) -> None:
    pruner = tp.pruner.MetaPruner(
        net, net.images(1), tp.importance.MagnitudeImportance(), pruning_ratio=ratio, ignored_layers=[net.fc]
    )
    pruner.step()


@pytest.mark.parametrize("kind", [Plain, Residual])
@pytest.mark.parametrize("enabled", [False, True])
def test_static_pruning_prunes_the_same_with_gates_attached(kind: type[Net], enabled: bool) -> None:
    bare, net = made(kind), made(kind)
    pruner = attached(net, alpha=0.1)
    if enabled:
        pruner.step()
    statically_pruned(bare)
    statically_pruned(net)
    assert [p.shape for p in net.parameters()] == [p.shape for p in bare.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("kind", [Plain, Residual])
@pytest.mark.parametrize("scope", ["all", "consumers"])
def test_sites_are_found_again_after_static_pruning(kind: type[Net], scope: str) -> None:
    net = made(kind)
    pruner = attached(net, alpha=0.1, beta=1.1, scope=scope)
    pruner.step()
    statically_pruned(net)
    pruner.update_regularizer()
    assert pruner.enabled
    assert {site.name: site.channels for site in pruner.sites} == {
        name: channels // 2 for name, (channels, _) in net.sites.items()
    }
    bare = copy.deepcopy(net)
    InstanceWisePruner.of(bare).remove()
    torch.testing.assert_close(net(net.images()), bare.gated_by_hand(net.images(), 0.1, 1.1, scope))


def test_static_pruning_moves_the_columns_of_a_concatenation() -> None:
    net = made(Concat)
    pruner = attached(net, alpha=0.1, beta=1.1, scope="consumers")
    tp.prune_conv_out_channels(net.a, [1])
    tp.prune_conv_in_channels(net.c, [1])
    pruner.update_regularizer()
    assert [consumer.start for site in pruner.sites for consumer in site.consumers] == [0, 6, 0]
    pruner.step()
    bare = copy.deepcopy(net)
    InstanceWisePruner.of(bare).remove()
    torch.testing.assert_close(net(net.images()), bare.gated_by_hand(net.images(), 0.1, 1.1, "consumers"))


def test_there_is_nothing_to_update_before_the_first_forward(plain: Net) -> None:
    with pytest.raises(AttachError, match="not been run"):
        InstanceWisePruner(plain).update_regularizer()


# -- accelerate ------------------------------------------------------------------------------------


def test_accelerate_skips_what_the_gates_drop(plain: Net) -> None:
    pruner = attached(plain, alpha=0.1, beta=1.1)
    pruner.enable()
    fast = pruner.accelerate(plain.images(), backend="gated")
    assert fast.execution == "accelerated"
    torch.testing.assert_close(fast(plain.images()), plain(plain.images()))
    assert not all(keep.all() for keep in pruner.keep.values())


def test_accelerate_can_do_without_inputs_after_a_gated_forward(plain: Net) -> None:
    pruner = attached(plain, alpha=0.1, beta=1.1)
    with pytest.raises(SettingError, match="accelerate needs example_inputs"):
        pruner.accelerate()
    pruner.enable()
    plain(plain.images(7))
    fast = pruner.accelerate(backend="gated")
    assert fast.fitted.instances == 7
    torch.testing.assert_close(fast(plain.images()), plain(plain.images()))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc1, self.act, self.fc2 = nn.Embedding(9, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.table(words))))


def test_noise_for_a_model_of_words_is_words() -> None:
    torch.manual_seed(0)
    net, words = Words().eval(), torch.arange(12).view(2, 6) % 9
    pruner = InstanceWisePruner(net, words, alpha=0.1, beta=1.1)
    pruner.enable()
    net(words)
    fast = pruner.accelerate(backend="gated")
    assert fast.execution == "accelerated"
    torch.testing.assert_close(fast(words), net(words))


def test_accelerate_refuses_what_it_cannot_do(plain: Net) -> None:
    pruner = attached(plain)
    with pytest.raises(SettingError, match="backend='fast': one of 'auto', 'gated', 'dense'"):
        pruner.accelerate(plain.images(), backend="fast")
    pruner.remove()
    with pytest.raises(AttachError, match="removed"):
        pruner.accelerate(plain.images())
    unknown = InstanceWisePruner(plain)
    with pytest.raises(AttachError):
        unknown.accelerate(plain.images())
