"""Parameters of gates: whose they are, and everything that a forward may run in."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isw_plugin import FBS, LCCL, InstanceWisePruner, calibrate, load_pretrained
from isw_plugin.errors import AttachError, PredictionError, SettingError, StateMismatchError, UnsupportedError
from isw_plugin.measure import latency_by_keep
from isw_plugin.measure.sweep import at_reference
from tests.conftest import Concat, Net, Preactivation, Residual, Tokens, hooks_of, made
from tests.predict.nets import Down, Grouped, Inverted, Stack

GATES = ["fbs", "channel_gating", "lccl"]


def attached(kind: type[Net], gate: object = "fbs", **settings: object) -> tuple[Net, InstanceWisePruner]:
    net = made(kind)
    pruner = InstanceWisePruner(net, net.images(1), 0.0, gate=gate, **settings)
    return net, pruner


def changed(pruner: InstanceWisePruner) -> None:
    for parameter in pruner.gate_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", [Stack, Residual, Down])
def test_the_model_is_its_own_again(kind: type[Net], gate: str) -> None:
    bare = made(kind)
    net = made(kind)
    hooks, images = hooks_of(net), net.images()
    pruner = InstanceWisePruner(net, images[:1], gate=gate)
    assert net.state_dict().keys() == bare.state_dict().keys()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert torch.equal(net(images), bare(images))
    pruner.step()
    assert not torch.equal(net(images), bare(images))
    pruner.disable()
    assert torch.equal(net(images), bare(images))
    pruner.remove()
    assert hooks_of(net) == hooks
    assert torch.equal(net(images), bare(images))
    with pytest.raises(AttachError):
        pruner.gate_parameters()


@pytest.mark.parametrize("gate", GATES)
def test_training_moves_the_parameters(gate: str) -> None:
    net, pruner = attached(Down, gate)
    pruner.step()
    net.train()
    before = [parameter.detach().clone() for parameter in pruner.gate_parameters()]
    optimizer = torch.optim.SGD([*net.parameters(), *pruner.gate_parameters()], 0.1)
    pruner.regularize(net, net(net.images(8)).square().mean()).backward()
    optimizer.step()
    assert all(not torch.equal(now, then) for now, then in zip(pruner.gate_parameters(), before, strict=True))


def test_parameters_start_the_same_everywhere_and_leave_the_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[nn.Parameter]] = []
    seeded: list[int] = []
    for seed in (0, 7):
        net = made(Down)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "manual_seed_all", seeded.append)
            found.append(InstanceWisePruner(net, net.images(1), gate="lccl").gate_parameters())
        assert torch.equal(torch.get_rng_state(), state)
    assert not seeded  # generators of devices
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("gate", GATES)
def test_a_copy_has_parameters_of_its_own(gate: str) -> None:
    net, pruner = attached(Stack, gate)
    pruner.step()
    images = net.images()
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        expected = net(images)
        assert torch.equal(copied(images), expected)
        changed(InstanceWisePruner.of(copied))
        assert not torch.equal(copied(images), expected)
        assert torch.equal(net(images), expected)


@pytest.mark.parametrize("gate", GATES)
def test_a_saved_gate_decides_as_before(gate: str, tmp_path: Path) -> None:
    net, pruner = attached(Stack, gate)
    pruner.step()
    changed(pruner)
    images = net.images()
    pruner.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, made(Stack, seed=1))
    assert loaded.gate == pruner.gate
    assert torch.equal(loaded.model(images), net(images))
    other, here = attached(Stack, gate)
    held = here.gate_parameters()
    here.load_state_dict(pruner.state_dict())
    assert all(now is then for now, then in zip(here.gate_parameters(), held, strict=True))
    assert torch.equal(other(images), net(images))


def test_a_state_changes_the_kind_of_gate() -> None:
    net, pruner = attached(Stack, "fbs")
    pruner.step()
    other = made(Stack)
    here = InstanceWisePruner(other, other.images(1))
    plain = here.state_dict()
    here.load_state_dict(pruner.state_dict())
    assert torch.equal(other(net.images()), net(net.images()))
    here.load_state_dict(plain)
    assert here.gate_parameters() == []
    assert torch.equal(other(net.images()), made(Stack)(net.images()))


def test_a_damaged_state_changes_nothing() -> None:
    net, pruner = attached(Stack, "fbs")
    state = pruner.state_dict()
    values = [parameter.detach().clone() for parameter in pruner.gate_parameters()]
    weight = state["learned"]["c2"]["weight"]
    for other in ({}, {"c2": state["learned"]["c2"]}, _with(state, weight[:2]), _with(state, weight * torch.nan), 3):
        with pytest.raises(StateMismatchError):
            pruner.load_state_dict(state | {"learned": other})
    with pytest.raises(StateMismatchError):
        InstanceWisePruner(made(Stack), net.images(1)).load_state_dict(
            InstanceWisePruner(made(Stack), net.images(1)).state_dict() | {"learned": state["learned"]}
        )
    assert all(map(torch.equal, pruner.gate_parameters(), values))


def _with(state: dict[str, dict[str, dict[str, Tensor]]], weight: Tensor) -> dict[str, dict[str, Tensor]]:
    return state["learned"] | {"c2": state["learned"]["c2"] | {"weight": weight}}


@pytest.mark.parametrize("gate", GATES)
def test_gates_train_under_autocast(gate: str) -> None:
    net, pruner = attached(Down, gate)
    pruner.step()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        output = net(net.images(8))
    pruner.regularize(net, output.float().square().mean()).backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in pruner.gate_parameters())


@pytest.mark.parametrize("gate", GATES)
def test_gates_take_double_models(gate: str) -> None:
    net, pruner = attached(Stack, gate)
    pruner.step()
    expected = net(net.images())
    net.double()
    torch.testing.assert_close(net(net.images().double()).float(), expected, atol=1e-5, rtol=1e-4)


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_block_has_the_same_gradients() -> None:
    found = []
    for kind in (Stack, Checkpointed):
        net, pruner = attached(kind, FBS(0.5, l1=0.1))
        pruner.step()
        net.train()
        pruner.regularize(net, net(net.images(8)).square().mean()).backward()
        found.append([parameter.grad for parameter in pruner.gate_parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_sites_that_a_gate_cannot_take_are_named() -> None:
    for kind, gate, site in (
        (Grouped, "channel_gating", "c2"),
        (Inverted, "lccl", "dw"),
        (Preactivation, "fbs", "bn1"),
    ):
        net = made(kind)
        hooks = hooks_of(net)
        with pytest.raises(SettingError, match=rf"exclude=.*'{site}'"):
            InstanceWisePruner(net, net.images(1), gate=gate)
        assert hooks_of(net) == hooks
    InstanceWisePruner(made(Grouped), Grouped().images(1), gate="channel_gating", exclude=["c2"])
    InstanceWisePruner(made(Preactivation), Preactivation().images(1), gate="fbs", exclude=["bn1", "bn3"])


def test_sites_may_be_known_at_the_first_forward() -> None:
    net = made(Stack)
    pruner = InstanceWisePruner(net, gate="fbs")
    with pytest.raises(AttachError, match="no sites"):
        pruner.gate_parameters()
    pruner.step()
    net(net.images())
    assert len(pruner.gate_parameters()) == 4
    assert pruner.keep["c2"].sum(1).tolist() == [3] * 4


def test_a_map_that_is_no_number_stays_none() -> None:
    for gate in GATES:
        net, pruner = attached(Stack, gate)
        pruner.step()
        assert net(net.images() * torch.nan).isnan().all()


@pytest.mark.parametrize("kind", [Concat, Tokens, Grouped, Inverted])
def test_fbs_takes_any_layer(kind: type[Net]) -> None:
    net, pruner = attached(kind, FBS(0.5))
    pruner.step()
    net(net.images(3))
    for site in pruner.sites:
        assert (pruner.keep[site.name].sum(1) <= -(-site.channels // 2)).all()


def test_what_does_not_go_together_is_refused() -> None:
    net = made(Stack)
    with pytest.raises(SettingError, match='scope="all"'):
        InstanceWisePruner(net, net.images(1), gate="fbs", scope="consumers")
    with pytest.raises(SettingError, match="min_keep=2"):
        InstanceWisePruner(net, net.images(1), gate="lccl", min_keep=2)
    pruner = InstanceWisePruner(net, net.images(1), gate="lccl")
    with pytest.raises(SettingError, match="branch='shared' at c1: it is fixed"):
        pruner.enable(branch="shared")
    assert pruner.gate == LCCL()
    with pytest.raises(PredictionError, match="parameters of its own"):
        pruner.fit_predictors([net.images(20)])
    with pytest.raises(UnsupportedError, match="learned parameters"):
        pruner.to_static([net.images(4)])


def test_fbs_skips_in_the_engine_and_gates_of_elements_say_why_not() -> None:
    net, pruner = attached(Stack, FBS(0.5))
    pruner.step()
    images = net.images()
    fast = pruner.accelerate(images)
    assert (fast.execution, fast.reason) == ("accelerated", "")
    torch.testing.assert_close(fast(images), net(images))
    with fast.recording() as record:
        fast(images)
    assert all(torch.equal(record.keep[name], keep) for name, keep in pruner.keep.items())
    with pytest.raises(SettingError, match="a part of the network"):
        pruner.accelerate(images, backend="dense")
    for gate in ("channel_gating", "lccl"):
        net, pruner = attached(Stack, gate)
        pruner.step()
        fast = pruner.accelerate(images)
        assert fast.execution == "masked"
        assert "drops single elements" in fast.reason
        assert torch.equal(fast(images), net(images))


def test_time_against_channels_starts_with_every_channel() -> None:
    net, pruner = attached(Stack, FBS(0.5))
    points = latency_by_keep(pruner, net.images(), [{"density": 0.5}], rounds=1)
    assert [(point.execution, point.keep_ratio) for point in points] == [("accelerated", 1.0), ("accelerated", 0.5)]


def test_densities_are_calibrated_against_every_channel() -> None:
    net, pruner = attached(Stack, FBS(0.5))
    images = net.images(32)
    with pruner.gating(density=1.0):
        labels = net(images).argmax(1)
    found = calibrate(pruner, [(images, labels)], max_drop=0.4)
    assert found.accuracy == 1.0
    assert pruner.gate.density == found.best.parameters["density"] < 1


def test_the_reference_is_the_same_whatever_was_calibrated_before() -> None:
    net, pruner = attached(Stack, FBS(0.5))
    images = net.images(32)
    with pruner.gating(density=1.0):
        labels = net(images).argmax(1)
    pruner.set_thresholds(per_site={"c2": {"density": 1 / 6, "l1": 0.5}})
    with pytest.warns(UserWarning, match="allows to lose"):
        found = calibrate(pruner, [(images, labels)], max_drop=1.0)
    assert found.accuracy == 1.0
    points = latency_by_keep(pruner, net.images(), [{"density": 0.5}], rounds=1)
    assert points[0].keep_ratio == 1.0
    net, pruner = attached(Stack, LCCL(margin=1e6), per_site={"c2": {"branch": "shared"}})
    with at_reference(pruner, pruner.gate):  # a branch cannot change
        assert pruner.gate.margin == 0
        assert pruner.per_site == {"c2": {"branch": "shared"}}


def test_single_sites_have_densities_of_their_own() -> None:
    net, pruner = attached(Stack, FBS(0.5), per_site={"c2": {"density": 1 / 6}})
    pruner.step()
    net(net.images(3))
    assert pruner.keep["c1"].sum(1).tolist() == [2, 2, 2]
    assert pruner.keep["c2"].sum(1).tolist() == [1, 1, 1]


def test_maps_that_changed_are_learned_anew() -> None:
    net, pruner = attached(Stack, "fbs")
    changed(pruner)
    first = pruner.learned["c1"]
    net.c2, net.bn2, net.fc = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Linear(5, 5)
    with pytest.warns(UserWarning, match="c2: what the gates had learned there went"):
        pruner.update_regularizer()
    assert pruner.learned["c1"] is first
    assert pruner.learned["c2"].weight.shape == (5, 4)


def test_a_part_that_was_called_alone_has_nothing_to_decide_on() -> None:
    net, pruner = attached(Stack, "fbs")
    pruner.step()
    with pytest.raises(UnsupportedError, match="call the whole model"):
        net.act1(torch.zeros(1, 4, 6, 6))
