"""Thresholds that follow a share of kept channels."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, MinNorm, evaluate, ranks, steering
from isw_plugin.errors import NothingRecordedError, SettingError
from isw_plugin.steering import steer_thresholds
from tests.conftest import Plain


class OneMap(nn.Module):
    """One site, whose map is the image itself, one pixel a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.act, self.read = nn.Conv2d(channels, channels, 1, bias=False), nn.ReLU(), nn.Linear(channels, 2)
        nn.init.dirac_(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.act(self.a(x)).flatten(1))
        return out


def gated(norms: Tensor, **settings: float) -> InstanceWisePruner:
    """A pruner of one site, after a gated forward in which it saw these norms."""
    pruner = InstanceWisePruner(OneMap(norms.shape[1]), torch.zeros(1, norms.shape[1], 1, 1), **settings)
    pruner.step()
    see(pruner, norms)
    return pruner


def see(pruner: InstanceWisePruner, norms: Tensor) -> None:
    with torch.no_grad():
        pruner.model(norms[:, :, None, None])


def kept(pruner: InstanceWisePruner, norms: Tensor) -> float:
    see(pruner, norms)
    return pruner.keep["a"].float().mean().item()


def beta(pruner: InstanceWisePruner) -> float:
    found: float = pruner.per_site["a"]["beta"]
    return found


def norms_of(seed: int, instances: int = 16, channels: int = 32) -> Tensor:
    return torch.rand(instances, channels, generator=torch.Generator().manual_seed(seed)) + 0.01


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 1.0))
def test_the_share_of_the_batch_is_kept(seed: int, share: float) -> None:
    norms = norms_of(seed)
    pruner = gated(norms, alpha=0.0)
    steer_thresholds(pruner, {"a": share}, rate=1.0)
    if beta(pruner) < 1.99:
        assert kept(pruner, norms) == pytest.approx(share, abs=2 / norms.numel())  # rounding, and a near-tie


def test_instances_go_on_differing() -> None:
    even, uneven = torch.linspace(0.98, 1.02, 20), torch.linspace(0.1, 1.9, 20)
    norms = torch.stack([even, uneven])
    pruner = gated(norms, alpha=0.0)
    steer_thresholds(pruner, {"a": 0.75}, rate=1.0)
    see(pruner, norms)
    assert pruner.keep["a"].sum(1).tolist() == [20, 10]


def test_a_part_of_the_way_at_a_time() -> None:
    norms = norms_of(0)
    pruner = gated(norms, alpha=0.0, beta=1.0)
    steer_thresholds(pruner, {"a": 0.5}, rate=1.0)
    wanted = beta(pruner)
    pruner.enable(per_site={"a": {"beta": 1.0}})
    steer_thresholds(pruner, {"a": 0.5}, rate=0.25)
    assert beta(pruner) == pytest.approx(1.0 + 0.25 * (wanted - 1.0))


def test_the_share_holds_while_norms_move() -> None:
    pruner = gated(norms_of(0), alpha=0.0, beta=0.0)
    for step in range(60):
        norms = norms_of(step).pow(1 + step / 30)  # ever more uneven: a fixed threshold would drop ever more
        see(pruner, norms)
        steer_thresholds(pruner, {"a": 0.6}, rate=0.2)
    assert kept(pruner, norms) == pytest.approx(0.6, abs=0.05)


def test_everything_kept_is_beta_zero() -> None:
    pruner = gated(norms_of(0), alpha=0.0, beta=0.7)
    steer_thresholds(pruner, {"a": 1.0}, rate=1.0)
    assert beta(pruner) == 0.0


def test_zeros_go_and_no_other_channel_where_they_are_enough() -> None:
    norms = norms_of(0, channels=8)
    norms[:, :6] = 0
    pruner = gated(norms, alpha=0.0)
    steer_thresholds(pruner, {"a": 0.5}, rate=1.0)
    assert kept(pruner, norms) == 0.25


def test_beta_stays_within_what_the_gate_takes() -> None:
    norms = torch.full((4, 16), 1e-3)
    norms[:, :2] = 1.0
    norms[:, 2:5] = 0.9
    pruner = gated(norms, alpha=0.0)
    steer_thresholds(pruner, {"a": 0.15}, rate=1.0)  # the rest has 2.9 times the mean
    assert 1.99 < beta(pruner) < 2


def test_alpha_stays_and_bounds_what_may_go() -> None:
    even, uneven = torch.ones(10), torch.cat([torch.full((5,), 0.1), torch.ones(5)])
    norms = torch.stack([even, uneven])
    pruner = gated(norms, alpha=0.3)
    steer_thresholds(pruner, {"a": 0.75}, rate=1.0)
    see(pruner, norms)
    assert pruner.keep["a"].sum(1).tolist() == [10, 5]


@pytest.mark.parametrize("norms", [torch.ones(4, 6), torch.full((4, 6), math.nan)], ids=["even", "nan"])
def test_maps_that_say_nothing_move_nothing(norms: Tensor) -> None:
    pruner = gated(norms, alpha=0.0, beta=0.7)
    steer_thresholds(pruner, {"a": 0.5})
    assert pruner.per_site == {}


def test_what_else_differs_at_sites_stays() -> None:
    torch.manual_seed(0)
    model = Plain()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 8, 8), alpha=0.0)
    first, second = (site.name for site in pruner.sites[:2])
    pruner.enable(per_site={first: {"lambda_": 0.5, "beta": 0.2}, second: {"beta": 0.3}})
    model(torch.randn(4, 3, 8, 8))
    steer_thresholds(pruner, {first: 0.5})
    assert pruner.per_site[first]["lambda_"] == 0.5
    assert pruner.per_site[first]["beta"] != 0.2
    assert pruner.per_site[second] == {"beta": 0.3}


def test_gates_stay_off_where_they_are() -> None:
    pruner = gated(norms_of(0), alpha=0.0)
    pruner.disable()
    steer_thresholds(pruner, {"a": 0.5})
    assert not pruner.enabled


def test_training_goes_on_from_the_state() -> None:
    norms = norms_of(0)
    pruner = gated(norms, alpha=0.0)
    steer_thresholds(pruner, {"a": 0.5})
    state = json.loads(json.dumps(pruner.state_dict()))
    again = gated(norms)
    again.load_state_dict(state)
    for each in (pruner, again):
        see(each, norms)
        steer_thresholds(each, {"a": 0.5})
    assert again.per_site == pruner.per_site


def test_a_network_learns_at_a_held_share() -> None:
    """Half of all channels from the first step on, and still every class is told apart."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(8)
    images = torch.randn(4, 3, 8, 8)[labels] + 0.1 * torch.randn(32, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
    )
    pruner = InstanceWisePruner(model, images[:1], 0.0, alpha=0.0, beta=0.0)
    pruner.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steer_thresholds(pruner, {site.name: 0.5 for site in pruner.sites}, rate=0.2)
    model.eval()
    report = evaluate(model, [(images, labels)])
    assert report.accuracy == 1.0
    assert report.prune_ratio == pytest.approx(0.5, abs=0.05)


def test_ranks_take_the_mean_of_what_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = gated(norms_of(0), alpha=0.0)
    monkeypatch.setattr(steering, "of_all_ranks", lambda mine: [{"a": 0.4}, {"a": 0.8}, {}, {"a": math.nan}])
    steer_thresholds(pruner, {"a": 0.5}, rate=1.0)
    assert beta(pruner) == pytest.approx(0.6)


@pytest.mark.parametrize("wanted", [{"keep": {"a": 0.5}}, {"macs_left": 0.5}], ids=["keep", "macs"])
def test_what_one_rank_raises_all_raise(monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]) -> None:
    pruner = gated(norms_of(0), alpha=0.0)
    monkeypatch.setattr(ranks, "of_all_ranks", lambda mine: [mine, NothingRecordedError("of the other")])
    with pytest.raises(NothingRecordedError, match="of the other"):
        steer_thresholds(pruner, **wanted)
    assert pruner.per_site == {}


def test_channels_that_must_stay_are_not_counted_on() -> None:
    norms = norms_of(0, channels=8)
    pruner = InstanceWisePruner(OneMap(8), torch.zeros(1, 8, 1, 1), alpha=0.0, beta=0.7, min_keep=6)
    pruner.step()
    see(pruner, norms)
    steer_thresholds(pruner, {"a": 0.85}, rate=1.0)
    assert kept(pruner, norms) == pytest.approx(0.85, abs=0.01)
    assert beta(pruner) < 1


@pytest.mark.parametrize(
    ("keep", "rate", "message"),
    [
        ({"a": 0.0}, 0.1, r"keep=0.0 at a: the share"),
        ({"a": 1.1}, 0.1, r"keep=1.1 at a"),
        ({"a": math.nan}, 0.1, r"keep=nan at a"),
        ({"b": 0.5}, 0.1, r"'b', which is no site. Close names: a"),
        ({"a": 0.5}, 0.0, r"rate=0.0"),
        ({"a": 0.5}, 1.5, r"rate=1.5"),
        ({"a": 0.5}, True, r"rate=True"),
    ],
)
def test_wrong_values_say_what_is_right(keep: dict[str, float], rate: float, message: str) -> None:
    pruner = gated(norms_of(0), alpha=0.0)
    with pytest.raises(SettingError, match=message):
        steer_thresholds(pruner, keep, rate=rate)
    assert pruner.per_site == {}


def test_other_gates_have_no_beta() -> None:
    pruner = InstanceWisePruner(OneMap(4), torch.zeros(1, 4, 1, 1), gate=MinNorm(0.5))
    with pytest.raises(SettingError, match="CV gate"):
        steer_thresholds(pruner, {"a": 0.5})


def test_without_a_gated_forward_there_is_nothing_to_follow() -> None:
    pruner = InstanceWisePruner(OneMap(4), torch.zeros(1, 4, 1, 1))
    with pytest.raises(NothingRecordedError, match="gates on"):
        steer_thresholds(pruner, {"a": 0.5})


@pytest.mark.parametrize("keep", [{}, None, "a", 0.5, {"a": "0.5"}, {"a": None}, {0: 0.5}])
def test_a_share_is_a_number_of_a_site(keep: object) -> None:
    pruner = gated(norms_of(0))
    before = pruner.state_dict()
    with pytest.raises(SettingError, match="keep"):
        steer_thresholds(pruner, keep)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="rate='fast'"):
        steer_thresholds(pruner, {"a": 0.5}, rate="fast")  # type: ignore[arg-type]
    assert pruner.state_dict() == before


def test_a_model_is_not_steered() -> None:
    with pytest.raises(SettingError, match=r"InstanceWisePruner\.of\(model\)"):
        steer_thresholds(OneMap(4), {"a": 0.5})  # type: ignore[arg-type]
