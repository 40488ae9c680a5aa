"""Thresholds of single sites: the search, and that what it sets stays set."""

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from isw_plugin import Calibration, InstanceWisePruner, MinNorm, calibrate, evaluate, load_pretrained
from isw_plugin.calibrate.per_site import Corner, hull, path
from isw_plugin.errors import BudgetError, SettingError, StateMismatchError
from tests.calibrate.test_search import Graded
from tests.conftest import Plain, made

CHANNELS = 10


class Uneven(nn.Module):
    """Two maps whose channel c holds the image's value c + 1; of the first only channel 9 matters, of the
    second channel 2: without it, class 1 turns into class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act_a = nn.Conv2d(1, CHANNELS, 1, bias=False), nn.ReLU()
        self.b, self.act_b = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.ReLU()
        self.read = nn.Linear(CHANNELS, 2)
        values = torch.arange(1.0, CHANNELS + 1).view(-1, 1, 1, 1)
        with torch.no_grad():
            self.a.weight.copy_(values)
            self.b.weight.zero_()
            self.b.weight[:, 9:] = values / CHANNELS
            self.read.weight.zero_()
            self.read.weight[1, 2] = 1.0
            self.read.bias.copy_(torch.tensor([1.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.act_b(self.b(self.act_a(self.a(x)))).mean((2, 3)))
        return out


def held_out() -> list[tuple[Tensor, Tensor]]:
    labels = torch.tensor([0, 1] * 10)
    return [(torch.where(labels == 1, 1.0, 0.1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)]


def attached(**settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(Uneven(), torch.zeros(1, 1, 4, 4), **settings)  # type: ignore[arg-type]


@pytest.fixture
def calibrated() -> InstanceWisePruner:
    pruner = attached()
    calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    return pruner


# -- what is found ---------------------------------------------------------------------------------


def test_every_site_gets_what_it_bears() -> None:
    same, own = attached(), attached()
    everywhere = calibrate(same, held_out(), max_drop=0.0).best
    found = calibrate(own, held_out(), max_drop=0.0, per_site=True)
    assert found.best.accuracy == found.accuracy == 1.0
    assert found.best.macs_saved > everywhere.macs_saved
    assert found.best.at("a")["beta"] > 6 / 5.5  # six channels go, the most that the grid has
    assert 2 / 5.5 < found.best.at("b")["beta"] <= 3 / 5.5  # two, and not the third
    assert found.best in found.frontier
    assert own.gate.beta == found.best.parameters["beta"]  # type: ignore[attr-defined]
    assert {site: own.per_site[site] for site in "ab"} == found.best.per_site


def test_another_gate() -> None:
    found = calibrate(attached(gate=MinNorm(0.0)), held_out(), max_drop=0.0, per_site=True)
    assert 0.2 <= found.best.at("b")["ratio"] < 0.3
    assert found.best.at("a")["ratio"] > 0.7


def test_target_macs_takes_the_most_accurate_below() -> None:
    everywhere = calibrate(attached(), held_out(), max_drop=0.0).best
    found = calibrate(attached(), held_out(), target_macs=everywhere.macs - 100, per_site=True)
    assert found.best.accuracy == 1.0
    assert found.best.macs <= everywhere.macs - 100


def test_the_same_everywhere_is_tried_first_and_never_beaten_by_worse() -> None:
    found = calibrate(attached(), held_out(), max_drop=0.0, per_site=True)
    everywhere = [c for c in found.candidates if not c.per_site]
    assert found.candidates[: len(everywhere)] == tuple(everywhere)
    assert found.best.macs_saved >= max(c.macs_saved for c in everywhere if c.accuracy == 1)


def test_a_grid_is_tried_at_every_site() -> None:
    found = calibrate(attached(), held_out(), max_drop=0.0, grid={"beta": (0.5, 1.2)}, per_site=True)
    assert found.best.per_site == {"a": {"beta": 1.2}, "b": {"beta": 0.5}}


def test_what_the_user_set_for_a_site_stays() -> None:
    pruner = attached(per_site={"a": {"beta": 0.0, "lambda_": 0.25}})
    calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    assert pruner.per_site["a"] == {"beta": 0.0, "lambda_": 0.25}
    with pruner.gating():
        pruner.model.eval()(held_out()[0][0])
    assert pruner.keep["a"].all()
    assert not pruner.keep["b"].all()


def test_another_setting_of_a_site_leaves_its_thresholds_to_the_search() -> None:
    pruner = attached(per_site={"a": {"lambda_": 0.25}})
    calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    assert pruner.per_site["a"]["lambda_"] == 0.25
    assert pruner.per_site["a"]["beta"] > 1.0
    calibrate(pruner, held_out(), max_drop=0.0)
    assert pruner.per_site == {"a": {"lambda_": 0.25}}


def test_calibrating_again_starts_from_what_the_user_set(calibrated: InstanceWisePruner) -> None:
    again = calibrate(calibrated, held_out(), max_drop=0.0)
    assert calibrated.per_site == {}
    assert again.best == calibrate(attached(), held_out(), max_drop=0.0).best


def test_the_cost_is_as_documented() -> None:
    runs = []
    pruner = attached()
    pruner.model.register_forward_hook(lambda *_: runs.append(1))
    calibrate(pruner, held_out(), max_drop=0.0)
    everywhere = len(runs)
    runs.clear()
    calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    # evaluate runs the model once more than there are batches, to count MACs
    assert (len(runs) - everywhere) / 2 <= 9 * 2 + 2 + 15


@pytest.mark.parametrize("enabled", [True, False])
def test_on_or_off_stays_as_found(enabled: bool) -> None:
    pruner = attached()
    if enabled:
        pruner.step()
    calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    assert pruner.enabled is enabled


def test_an_error_changes_nothing() -> None:
    pruner = InstanceWisePruner(Graded(), torch.zeros(1, 1, 4, 4), gate=MinNorm(0.1), per_site={"make": {"ratio": 0.8}})
    before = pruner.state_dict()
    with pytest.raises(BudgetError, match="none of"):
        calibrate(pruner, held_out(), max_drop=0.0, per_site=True)
    with pytest.raises(SettingError, match="no parameter gamma"):
        calibrate(pruner, held_out(), grid={"gamma": (1.0,)}, per_site=True)
    assert pruner.state_dict() == before


# -- what is set stays set -------------------------------------------------------------------------


def kept(pruner: InstanceWisePruner) -> dict[str, list[list[bool]]]:
    with torch.no_grad():
        pruner.model.eval()(held_out()[0][0])
    return {name: keep.tolist() for name, keep in pruner.keep.items()}


def expected() -> dict[str, list[bool]]:
    return {"a": [False] * 6 + [True] * 4, "b": [False] * 2 + [True] * 8}


def through_enable(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    pruner.enable()
    pruner.disable()
    pruner.step()
    return pruner


def through_gating(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    with pruner.gating(alpha=0.3, per_site={"*": {"beta": 0.1}}):
        assert kept(pruner)["b"][0] != expected()["b"]
    with pruner.gating():
        assert kept(pruner)["b"][0] == expected()["b"]
    return pruner


def through_state_dict(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    other = attached()
    other.load_state_dict(json.loads(json.dumps(pruner.state_dict())))
    return other


def through_a_folder(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    pruner.save_pretrained(folder)
    return load_pretrained(folder, Uneven())


def through_a_copy(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    return InstanceWisePruner.of(copy.deepcopy(pruner.model))


def through_pickle(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    return InstanceWisePruner.of(pickle.loads(pickle.dumps(pruner.model)))


def through_new_sites(pruner: InstanceWisePruner, folder: Path) -> InstanceWisePruner:
    pruner.update_regularizer()
    return pruner


WAYS = [
    through_enable,
    through_gating,
    through_state_dict,
    through_a_folder,
    through_a_copy,
    through_pickle,
    through_new_sites,
]


@pytest.mark.parametrize("way", WAYS)
def test_the_thresholds_stay(
    calibrated: InstanceWisePruner, tmp_path: Path, way: Callable[[InstanceWisePruner, Path], InstanceWisePruner]
) -> None:
    pruner = way(calibrated, tmp_path)
    assert pruner.per_site == calibrated.per_site
    pruner.step()
    found = kept(pruner)
    assert all(found[name] == [expected()[name]] * 20 for name in "ab")


@pytest.mark.parametrize("way", WAYS)
def test_the_record_stays(
    calibrated: InstanceWisePruner, tmp_path: Path, way: Callable[[InstanceWisePruner, Path], InstanceWisePruner]
) -> None:
    before = Calibration.of(calibrated)
    assert before is not None
    assert Calibration.of(way(calibrated, tmp_path)) == before
    assert before.best.at("a") == calibrated.per_site["a"]


def test_an_accelerated_copy_has_them(calibrated: InstanceWisePruner) -> None:
    calibrated.step()
    images = held_out()[0][0]
    fast = calibrated.accelerate(images, backend="gated")
    with fast.recording() as record:
        fast(images)
    assert all(record.keep[name].tolist() == [expected()[name]] * 20 for name in "ab")


def test_static_pruning_takes_what_they_never_keep(calibrated: InstanceWisePruner) -> None:
    calibrated.step()
    before = calibrated.model(held_out()[0][0])
    conversion = calibrated.to_static(held_out())
    assert conversion.layers
    torch.testing.assert_close(calibrated.model(held_out()[0][0]), before)


def test_evaluate_measures_what_was_promised(calibrated: InstanceWisePruner) -> None:
    best = Calibration.of(calibrated).best  # type: ignore[union-attr]
    with calibrated.gating():
        report = evaluate(calibrated.model, held_out())
    assert (report.accuracy, report.macs, report.prune_ratio) == (best.accuracy, best.macs, best.prune_ratio)


def test_enable_can_put_others_in_their_place(calibrated: InstanceWisePruner) -> None:
    calibrated.enable(beta=0.3, per_site={})
    assert calibrated.per_site == {}
    assert kept(calibrated)["a"][0] == [False] + [True] * 9  # below 0.3 * 5.5


@pytest.mark.parametrize("per_site", [{"nowhere": {"beta": 0.1}}, {"a": {"gamma": 1}}, {"a": {"beta": 3}}])
def test_wrong_thresholds_change_nothing(calibrated: InstanceWisePruner, per_site: dict[str, dict[str, float]]) -> None:
    before = calibrated.state_dict()
    with pytest.raises(SettingError):
        calibrated.enable(beta=0.2, per_site=per_site)
    with pytest.raises(SettingError), calibrated.gating(per_site=per_site):
        pass
    assert calibrated.state_dict() == before


def test_thresholds_before_the_sites_are_known() -> None:
    pruner = InstanceWisePruner(Plain())
    with pruner.gating(per_site={"c1": {"beta": 0.0}}):
        pruner.model.eval()(made(Plain).images())
        assert pruner.per_site == {"c1": {"beta": 0.0}}
    assert pruner.per_site == {}
    assert [site.name for site in pruner.sites] == ["c1", "c2"]


def test_a_pruner_without_a_calibration_has_no_record() -> None:
    assert Calibration.of(attached()) is None


def test_a_damaged_record_is_refused() -> None:
    with pytest.raises(StateMismatchError, match="no stored calibration"):
        Calibration.from_dict({"best": {}})


# -- the path --------------------------------------------------------------------------------------

# Of plain numbers, since drawing is what takes the time.
corners = st.dictionaries(st.integers(-20, 20), st.integers(-20, 20), min_size=1, max_size=6).map(
    lambda losses: [Corner(float(saved), float(loss), {"beta": saved}) for saved, loss in losses.items()]
)


@given(corners)
def test_the_hull_is_convex_and_goes_up(found: list[Corner]) -> None:
    chain = hull(found)
    assert chain[0].loss == min(corner.loss for corner in found)
    assert chain[-1].saved == max(corner.saved for corner in found)
    slopes = [(b.loss - a.loss) / (b.saved - a.saved) for a, b in itertools.pairwise(chain)]
    assert all(slope > 0 for slope in slopes)
    assert all(steeper > slope for slope, steeper in itertools.pairwise(slopes))


@given(st.lists(corners, min_size=1, max_size=3), st.integers(0, 30).map(lambda price: price / 4))
def test_for_every_price_of_a_mac_the_best_choice_is_on_the_path(sites: list[list[Corner]], price: float) -> None:
    named = {str(index): found for index, found in enumerate(sites)}

    def cost(site: str, saved: float) -> float:
        return min(corner.loss for corner in named[site] if corner.saved == saved) - price * saved

    best = sum(min(cost(site, corner.saved) for corner in found) for site, found in named.items())
    costs = [sum(cost(site, chosen["beta"]) for site, chosen in step.items()) for step in path(named)]
    assert min(costs) == pytest.approx(best)


def test_a_path_goes_from_the_smallest_loss_to_the_fewest_macs_a_site_at_a_time() -> None:
    found = {
        "cheap": [Corner(0, 0, {"beta": 0}), Corner(10, 1, {"beta": 1})],
        "dear": [Corner(0, 0, {"beta": 0}), Corner(10, 5, {"beta": 1}), Corner(-10, -4, {"beta": -1})],
    }
    betas = [tuple(chosen["beta"] for chosen in step.values()) for step in path(found)]
    assert betas == [(0, -1), (1, -1), (1, 0), (1, 1)]


# -- channels instead of MACs ----------------------------------------------------------------------


class EitherOr(nn.Module):
    """Two maps of which one must keep a channel of .55 of the mean norm: ten dear ones to read, or twenty-one cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.act_few, self.dear = nn.Conv2d(1, 10, 1, bias=False), nn.ReLU(), nn.Conv2d(10, 1, 3, padding=1)
        self.many, self.act_many, self.cheap = nn.Conv2d(1, 21, 1, bias=False), nn.ReLU(), nn.Conv2d(21, 1, 1)
        with torch.no_grad():
            for layer, reader, channel in ((self.few, self.dear, 2), (self.many, self.cheap, 5)):
                layer.weight.copy_(torch.arange(1.0, len(layer.weight) + 1).view(-1, 1, 1, 1))
                for parameter in reader.parameters():
                    parameter.zero_()
                middle = reader.weight.shape[2] // 2
                reader.weight[0, channel, middle, middle] = 3.0 / (channel + 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.dear(self.act_few(self.few(x))) + self.cheap(self.act_many(self.many(x)))
        return torch.cat([torch.full((len(x), 1), 2.0), found.mean((2, 3))], 1)


@pytest.mark.parametrize("by_channels", [False, True])
def test_the_aim_is_macs_or_channels(by_channels: bool) -> None:
    pruner = InstanceWisePruner(EitherOr(), torch.zeros(1, 1, 4, 4))
    found = calibrate(pruner, held_out(), max_drop=0.0, per_site=True, by_channels=by_channels)
    assert found.best.accuracy == found.accuracy == 1.0
    model = pruner.model
    report = evaluate(model, held_out())
    pruner.enable()
    model(held_out()[0][0])
    kept = {"few": bool(pruner.keep["few"][:, 2].all()), "many": bool(pruner.keep["many"][:, 5].all())}
    assert kept == ({"few": True, "many": False} if by_channels else {"few": False, "many": True})
    within = [c for c in found.candidates if c.accuracy == 1.0 and not c.emptied]
    most = max(within, key=lambda c: c.prune_ratio if by_channels else c.macs_saved)
    assert (found.best.prune_ratio, found.best.macs_saved) == (most.prune_ratio, most.macs_saved)
    assert report.accuracy == 1.0


def test_channels_and_macs_cannot_both_be_aimed_at() -> None:
    with pytest.raises(SettingError, match="by_channels and target_macs"):
        calibrate(attached(), held_out(), target_macs=1.0, by_channels=True)
