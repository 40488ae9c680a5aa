"""Thresholds of all sites under one budget of MACs."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, count_macs, load_pretrained, steer_thresholds, steering
from isw_plugin.budget import Budget, _Work
from isw_plugin.errors import BudgetError, NothingRecordedError, SettingError
from tests.conftest import Plain

IMAGE = torch.zeros(1, 3, 8, 8)


def images(seed: int, count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).add(0.3)


def chain(seed: int = 0) -> nn.Sequential:
    """Four sites that read each other, so that three of them can be predicted."""
    torch.manual_seed(seed)
    widths = (3, 12, 16, 16, 8)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def attached(model: nn.Module, **settings: Any) -> InstanceWisePruner:
    pruner = InstanceWisePruner(model, IMAGE, 0.0, alpha=0.0, beta=0.0, **settings)
    pruner.step()
    return pruner


def steered(pruner: InstanceWisePruner, steps: int, **settings: Any) -> float:
    left = math.nan
    for step in range(steps):
        with torch.no_grad():
            pruner.model(images(step))
        left = steer_thresholds(pruner, **settings)
    return left


def left_on_others(pruner: InstanceWisePruner) -> float:
    return 1 - count_macs(pruner.model, images(999, 400)).saved.mean().item()


@pytest.mark.parametrize("budget", [0.8, 0.55])
@pytest.mark.parametrize("model", [chain, Plain], ids=["chain", "plain"])
def test_the_budget_is_met_as_macs_are_counted(model: Any, budget: float) -> None:
    torch.manual_seed(0)
    pruner = attached(model().eval())
    least = steered(pruner, 60, macs_left=budget, rate=0.2)
    assert left_on_others(pruner) == pytest.approx(budget, abs=0.01)
    assert least == pytest.approx(budget, abs=0.03)  # one batch of 64


@pytest.mark.parametrize("budget", [0.7, 0.4])
def test_outputs_and_heads_are_counted_where_norms_are_predicted(budget: float) -> None:
    pruner = attached(chain())
    steered(pruner, 20, macs_left=0.8, rate=0.3)
    pruner.fit_predictors([images(seed) for seed in range(20)])
    assert pruner.predicted
    steered(pruner, 60, macs_left=budget, rate=0.2)
    assert left_on_others(pruner) == pytest.approx(budget, abs=0.01)


def test_what_is_measured_is_what_count_macs_counts() -> None:
    pruner = attached(chain())
    steered(pruner, 5, macs_left=0.6)
    batch = images(7)
    pruner.model(batch)
    counted = 1 - count_macs(pruner.model, batch).saved.mean().item()
    assert steer_thresholds(pruner, macs_left=0.6) == pytest.approx(counted)


def test_the_last_channel_costs_as_much_energy_for_a_mac_at_every_site() -> None:
    """energy of a channel at the threshold / energy of the map, over the MACs that a channel saves, by hand."""
    pruner = attached(chain())
    steered(pruner, 1, macs_left=0.97)
    macs = {"0": 12 * 16 * 9 * 64, "2": 16 * 16 * 9 * 64, "4": 16 * 8 * 9 * 64, "6": 8 * 5}  # of the readers
    costs = []
    for site, norms in pruner.norms.items():
        beta, channels = pruner.per_site[site]["beta"], norms.shape[1]
        spread = (norms.square().mean(1) / norms.mean(1).square()).mean().item()
        costs.append(beta**2 / (channels * spread) / (macs[site] / channels))
    assert costs == pytest.approx([costs[0]] * 4, rel=1e-4)


def test_an_expensive_map_gives_up_more_than_a_cheap_one_like_it() -> None:
    pruner = attached(chain())
    steered(pruner, 20, macs_left=0.6, rate=0.3)
    assert pruner.per_site["2"]["beta"] > pruner.per_site["6"]["beta"]


def test_a_ramp_falls_from_one_and_goes_on_from_the_state() -> None:
    whole, half = attached(chain()), attached(chain())
    steered(half, 10, macs_left=0.5, ramp=20)
    assert half.state_dict()["budget"] == pytest.approx(0.75)
    state = json.loads(json.dumps(half.state_dict()))
    again = attached(chain())
    again.load_state_dict(state)
    for pruner, steps in ((whole, range(20)), (again, range(10, 20))):
        for step in steps:
            pruner.model(images(step))
            steer_thresholds(pruner, macs_left=0.5, ramp=20)
    assert again.state_dict()["budget"] == pytest.approx(0.5)
    for site, override in whole.per_site.items():
        assert again.per_site[site]["beta"] == pytest.approx(override["beta"], rel=1e-3)


def test_a_saved_folder_keeps_the_budget(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    pruner = InstanceWisePruner(model, torch.zeros(1, 3, 32, 32), alpha=0.0, beta=0.0)
    pruner.step()
    model(torch.randn(4, 3, 32, 32))
    steer_thresholds(pruner, macs_left=0.8, ramp=4)
    pruner.save_pretrained(tmp_path)
    restored = load_pretrained(tmp_path, timm.create_model("test_resnet", num_classes=10))
    assert restored.state_dict()["budget"] == pytest.approx(0.95)
    assert restored.per_site == pruner.per_site


def test_older_states_have_no_budget() -> None:
    pruner = attached(chain())
    steered(pruner, 1, macs_left=0.9)
    older = {key: value for key, value in pruner.state_dict().items() if key != "budget"}
    pruner.load_state_dict(older)
    assert pruner.state_dict()["budget"] is None


def test_macs_are_counted_anew_where_sites_were_found_anew() -> None:
    model = chain()
    pruner = attached(model)
    steered(pruner, 3, macs_left=0.8)
    model[2], model[4] = nn.Conv2d(12, 40, 3, padding=1), nn.Conv2d(40, 16, 3, padding=1)
    pruner.update_regularizer()
    steered(pruner, 60, macs_left=0.6, rate=0.2)
    assert left_on_others(pruner) == pytest.approx(0.6, abs=0.01)


def test_ranks_take_the_mean_of_what_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = attached(chain())
    steered(pruner, 1, macs_left=0.8)
    mine = {site: override["beta"] for site, override in pruner.per_site.items()}

    def two(value: Any) -> list[Any]:
        return [value, {site: beta / 2 for site, beta in value.items()}] if isinstance(value, dict) else [value]

    monkeypatch.setattr(steering, "of_all_ranks", two)
    other = attached(chain())
    steered(other, 1, macs_left=0.8)
    for site, beta in mine.items():
        assert other.per_site[site]["beta"] == pytest.approx(0.75 * beta)


def test_training_mode_and_random_numbers_stay_as_they_were() -> None:
    model = chain().train()
    pruner = attached(model)
    model(images(0))
    before = torch.get_rng_state()
    steer_thresholds(pruner, macs_left=0.8)
    assert model.training
    assert pruner.enabled
    assert torch.equal(torch.get_rng_state(), before)


def test_maps_of_zeros_and_nan_move_nothing_to_nan() -> None:
    model = chain()
    pruner = attached(model)
    model(torch.full((4, 3, 8, 8), math.nan))
    steer_thresholds(pruner, macs_left=0.8)
    assert pruner.per_site == {}
    nn.init.zeros_(model[4].weight), nn.init.zeros_(model[4].bias)
    model(images(0))
    steer_thresholds(pruner, macs_left=0.8)
    assert all(math.isfinite(override["beta"]) for override in pruner.per_site.values())


def test_a_budget_below_what_gates_reach_is_refused_before_anything_changes() -> None:
    pruner = attached(chain())
    pruner.model(images(0))
    before = pruner.state_dict()
    with pytest.raises(BudgetError, match=r"macs_left=0.01: 0\.\d+ of the MACs are left.*fit_predictors"):
        steer_thresholds(pruner, macs_left=0.01)
    assert pruner.state_dict() == before


def test_channels_that_must_stay_are_left() -> None:
    pruner = attached(chain(), min_keep=16)
    pruner.model(images(0))
    with pytest.raises(BudgetError, match=r"1\.000 of the MACs are left"):
        steer_thresholds(pruner, macs_left=0.8)
    pruner = attached(chain(), min_keep=10)
    steered(pruner, 60, macs_left=0.8, rate=0.2)
    assert left_on_others(pruner) == pytest.approx(0.8, abs=0.01)


def test_thresholds_that_a_user_sets_start_a_ramp_anew() -> None:
    pruner = attached(chain())
    steered(pruner, 2, macs_left=0.8, ramp=2)
    with pruner.gating(beta=0.3):
        assert pruner.state_dict()["budget"] is None
    pruner.disable()
    pruner.step()
    assert pruner.state_dict()["budget"] == pytest.approx(0.8)
    pruner.enable(per_site={})
    assert steered(pruner, 1, macs_left=0.8, ramp=2) == 1.0
    assert pruner.state_dict()["budget"] == pytest.approx(0.9)


def test_a_site_that_saves_nothing_stays_as_it_is() -> None:
    shares = next(s for s in itertools.permutations([0.1, 0.2, 0.3, 0.15, 0.25]) if sum(s) > 1)
    work = _Work(1.0, dict(zip("abcde", shares, strict=True)), None)
    assert work.kept_in(dict.fromkeys("abcde", 0.0)) == 0.0
    pruner = attached(chain())
    pruner.model(images(0))
    betas = Budget(pruner)._betas(-1.0, {"0": 0.0, "2": 1e-17, "4": 0.25})
    assert betas == pytest.approx({"2": math.exp(-0.5) * 1e-17**0.5, "4": math.exp(-0.5) / 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs_left": 0}, r"macs_left=0 the share of the dense MACs to leave"),
        ({"macs_left": 1.2}, r"macs_left=1.2"),
        ({"macs_left": 45}, r"macs_left=45"),
        ({"macs_left": "0.5"}, r"macs_left='0.5'"),
        ({"macs_left": True}, r"macs_left=True"),
        ({"macs_left": math.nan}, r"macs_left=nan"),
        ({"macs_left": 0.5, "ramp": -1}, r"ramp=-1"),
        ({"macs_left": 0.5, "ramp": 0.5}, r"ramp=0.5"),
        ({"macs_left": 0.5, "rate": 0}, r"rate=0"),
        ({"macs_left": 0.5, "keep": {"0": 0.5}}, r"macs_left=.* or keep="),
        ({"keep": {"0": 0.5}, "ramp": 3}, r"ramp=3 is of macs_left"),
        ({}, r"macs_left=.* or keep="),
    ],
)
def test_wrong_values_say_what_is_right(settings: dict[str, Any], message: str) -> None:
    pruner = attached(chain())
    pruner.model(images(0))
    before = pruner.state_dict()
    with pytest.raises(SettingError, match=message):
        steer_thresholds(pruner, **settings)
    assert pruner.state_dict() == before


def test_without_a_gated_forward_there_is_nothing_to_follow() -> None:
    with pytest.raises(NothingRecordedError, match="gates on"):
        steer_thresholds(attached(chain()), macs_left=0.5)
