import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from isw_plugin import InstanceWisePruner, MinNorm, calibrate
from isw_plugin.calibrate import Calibration, Candidate
from isw_plugin.errors import BudgetError, SettingError

CHANNELS = 10


class Graded(nn.Module):
    """Channel c of the map holds the image's value c + 1; class 1 needs channel 6, class 0 none.

    Dropping channels 0 to 5 costs nothing, dropping channel 6 turns every image into class 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Conv2d(1, CHANNELS, 1, bias=False)
        self.act = nn.ReLU()
        self.read = nn.Linear(CHANNELS, 2)
        with torch.no_grad():
            self.make.weight.copy_(torch.arange(1.0, CHANNELS + 1).view(-1, 1, 1, 1))
            self.read.weight.zero_()
            self.read.weight[1, 6] = 1.0
            self.read.bias.copy_(torch.tensor([3.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.act(self.make(x)).mean((2, 3)))
        return out


def pruner(**settings: object) -> InstanceWisePruner:
    return InstanceWisePruner(Graded(), torch.zeros(1, 1, 4, 4), **settings)  # type: ignore[arg-type]


def held_out() -> list[tuple[Tensor, Tensor]]:
    """Class 1 has value 1 (7 at channel 6, over 3.5), class 0 has 0.1."""
    labels = torch.tensor([0, 1] * 10)
    return [(torch.where(labels == 1, 1.0, 0.1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4), labels)]


def test_saves_the_most_within_the_budget() -> None:
    subject = pruner(gate=MinNorm(0.0))
    found = calibrate(subject, held_out(), max_drop=0.0, grid={"ratio": (0.2, 0.4, 0.6, 0.7, 0.8)})
    assert found.best.parameters == {"ratio": 0.6}
    assert found.best.accuracy == found.accuracy == 1.0
    assert [c.accuracy for c in found.candidates] == [1, 1, 1, 0.5, 0.5]
    assert subject.gate == MinNorm(0.6)


def test_target_macs_takes_the_most_accurate_below() -> None:
    subject = pruner(gate=MinNorm(0.0))
    dense = 10 * 16 + 20
    grid = {"ratio": (0.2, 0.4, 0.6)}
    found = calibrate(subject, held_out(), target_macs=dense - 2 * 4, grid=grid)
    assert found.best.parameters == {"ratio": 0.6}  # equally accurate as 0.4, and saves more
    assert found.best.macs <= dense - 2 * 4


def test_the_grid_is_refined() -> None:
    subject = pruner()
    found = calibrate(subject, held_out(), max_drop=0.0)
    betas = {c.parameters["beta"] for c in found.candidates}
    assert betas > {0.25, 0.5, 0.75, 1.0}
    assert found.best.macs_saved == max(c.macs_saved for c in found.candidates if c.accuracy == 1)
    # mean norm is 5.5 units: beta in (6/5.5, 7/5.5] is best, which is under no grid value
    assert 6 / 5.5 < found.best.parameters["beta"] <= 7 / 5.5


@pytest.mark.parametrize("enabled", [True, False])
def test_on_or_off_stays_as_found(enabled: bool) -> None:
    subject = pruner()
    if enabled:
        subject.step()
    calibrate(subject, held_out(), max_drop=0.0)
    assert subject.enabled is enabled


def test_candidates_that_empty_a_map_are_rejected() -> None:
    subject = pruner(gate=MinNorm(0.0))
    images = torch.zeros(4, 1, 4, 4)  # nothing to keep: every norm is 0
    subject_all = pruner()
    found = calibrate(subject, [(images, torch.zeros(4).long())], max_drop=0.49, grid={"ratio": (0.5, 0.9)})
    assert found.best.parameters == {"ratio": 0.9}
    assert found.best.emptied == 0
    with pytest.raises(BudgetError, match="none of"):
        calibrate(subject_all, [(images, torch.zeros(4).long())], max_drop=0.49)  # CV 0: nothing is ever dropped


def test_emptying_loses_to_a_smaller_saving() -> None:
    @dataclass(frozen=True)
    class Threshold:
        level: float

        def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
            return norms >= self.level

    subject = pruner(gate=Threshold(0.0))
    found = calibrate(subject, held_out(), max_drop=0.49, grid={"level": (1.0, 1e9)})
    assert found.best.parameters == {"level": 1.0}
    assert found.candidates[1].emptied == 20


def test_a_budget_that_cannot_be_met_says_the_best_found() -> None:
    subject = pruner(gate=MinNorm(0.1))
    with pytest.raises(BudgetError, match=r"ratio=0\.8: accuracy 0\.5000, 8\.9% of MACs saved"):
        calibrate(subject, held_out(), max_drop=0.0, grid={"ratio": (0.8,)})
    assert subject.gate == MinNorm(0.1)
    with pytest.raises(BudgetError, match="with at most 10 MACs"):
        calibrate(subject, held_out(), target_macs=10, grid={"ratio": (0.2, 0.4)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": {"gamma": (1.0,)}}, "no parameter gamma"),
        ({"grid": {"beta": (2.5,)}}, "beta=2.5"),
        ({"grid": {"beta": ()}}, "needs a value"),
        ({"target_macs": -1}, "target_macs"),
        ({"target_macs": float("nan")}, "target_macs"),
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_drop": float("nan")}, "max_drop"),
        ({"max_drop": 1.5}, r"one point is 0\.01"),
        ({"max_drop": 5}, r"one point is 0\.01"),
        ({"max_drop": "0.01"}, "max_drop"),
        ({"max_drop": None}, "max_drop"),
        ({"max_drop": -1.0, "metric": lambda outputs, labels: labels}, "loss of the metric"),
        ({"target_macs": "half"}, "target_macs"),
        ({"target_macs": 0.5}, r"0\.5 of this model's 180 is target_macs=90"),
        ({"max_instances": 0}, "max_instances"),
        ({"max_instances": "all"}, "max_instances"),
        ({"max_instances": None}, "max_instances"),
        ({"grid": {}}, "a dict of parameter"),
        ({"grid": [0.5]}, "a dict of parameter"),
        ({"grid": {"beta": 0.5}}, "needs a value"),
        ({"grid": {"beta": "0.5"}}, "needs a value"),
        ({"grid": {"beta": ("0.5",)}}, "needs a value"),
        ({"metric": lambda outputs, labels: 0.5}, "for 20 instances"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, object], message: str) -> None:
    subject = pruner(alpha=0.3)
    before = subject.state_dict()
    with pytest.raises(SettingError, match=message):
        calibrate(subject, held_out(), **arguments)  # type: ignore[arg-type]
    assert subject.state_dict() == before


def test_only_the_first_instances_are_used() -> None:
    loader = held_out() * 3
    assert calibrate(pruner(), loader, max_drop=0.49, max_instances=25).instances == 25


def test_frontier_is_what_no_other_beats() -> None:
    def candidate(accuracy: float, macs: float) -> Candidate:
        return Candidate({"beta": macs}, accuracy, 0.0, macs, 0.0, 0)

    good, dominated, small = candidate(0.9, 100), candidate(0.8, 120), candidate(0.7, 50)
    assert Calibration(good, (small, dominated, good), 0.9, 1).frontier == (good, small)


@pytest.mark.parametrize("max_drop", [0.5, 1])
def test_a_budget_in_points_is_warned_of(max_drop: float) -> None:
    with pytest.warns(UserWarning, match=r"points of accuracy: one point is 0\.01"):
        calibrate(pruner(), held_out(), max_drop=max_drop)
    calibrate(pruner(), held_out(), max_drop=1.0, target_macs=170)  # any accuracy, on purpose


def test_a_model_is_not_calibrated() -> None:
    subject = pruner()
    with pytest.raises(SettingError, match=r"InstanceWisePruner\.of\(model\)"):
        calibrate(subject.model, held_out())  # type: ignore[arg-type]
    fast = subject.accelerate(held_out()[0][0], backend="dense")
    with pytest.raises(SettingError, match="the pruner that made it"):
        calibrate(fast, held_out())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (held_out()[0], "one batch and not batches"),
        (held_out()[0][0], "one batch and not batches"),
        ([], "no batch"),
        ([(held_out()[0][0], torch.full((20,), 2))], "label 2 is none of the 2 classes"),
        ([(held_out()[0][0], torch.full((20,), -100))], "label -100"),
    ],
)
@pytest.mark.parametrize("per_site", [False, True])
def test_what_cannot_be_judged_changes_nothing(loader: object, message: str, per_site: bool) -> None:
    subject = pruner()
    before = subject.state_dict()
    with pytest.raises(SettingError, match=message):
        calibrate(subject, loader, max_drop=0.0, per_site=per_site)  # type: ignore[arg-type]
    assert subject.state_dict() == before


@pytest.mark.parametrize("per_site", [False, True])
def test_metric_and_forward_judge_as_accuracy_does(per_site: bool) -> None:
    subject, other = pruner(), pruner()
    expected = calibrate(subject, held_out(), max_drop=0.0)
    images, labels = held_out()[0]
    found = calibrate(
        other,
        [{"x": images, "labels": labels.view(-1, 1).float()}],
        max_drop=0.0,
        forward=lambda model, inputs: {"scores": model(inputs["x"])},
        metric=lambda outputs, labels: 100.0 * (outputs["scores"].argmax(1) == labels[:, 0]),
        per_site=per_site,
    )
    assert (expected.accuracy, found.accuracy) == (1.0, 100.0)
    assert found.best.macs == expected.best.macs


def test_only_part_of_a_batch_is_taken_from_any_form() -> None:
    images, labels = held_out()[0]
    assert calibrate(pruner(), [{"x": images, "labels": labels.tolist()}] * 2, max_instances=25).instances == 25


# -- what is not run -------------------------------------------------------------------------------


def passes(subject: InstanceWisePruner, **settings: object) -> tuple[int, Calibration]:
    """Forwards of the whole batch (a single image is run to count MACs), gates off among them."""
    runs: list[int] = []
    handle = subject.model.register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    found = calibrate(subject, held_out(), max_drop=0.0, **settings)  # type: ignore[arg-type]
    handle.remove()
    return runs.count(20), found


def every_candidate(subject: InstanceWisePruner) -> list[Candidate]:
    grid = {"alpha": (0.0, 0.25, 0.5, 1.0, 2.0), "beta": (0.25, 0.5, 0.75, 1.0)}
    return list(passes(subject, grid=grid)[1].candidates)


def test_own_grid_takes_half_of_the_passes_for_the_same_best() -> None:
    count, found = passes(pruner())
    assert count <= 18
    assert all(c.macs >= found.best.macs for c in every_candidate(pruner()) if c.accuracy == 1)


def test_what_a_grid_of_the_users_holds_is_tried_but_for_what_is_sure() -> None:
    grid = {"alpha": (0.0, 0.25, 1.0, 2.0), "beta": (0.5, 1.0)}  # CV is .52 everywhere
    count, found = passes(pruner(), grid=grid)
    assert count == 1 + 2  # gates off; alpha 0; 0.25 decides alike, and 1 and 2 drop nothing
    assert len(found.candidates) == 8
    alone = [passes(pruner(), grid={n: (v,) for n, v in c.parameters.items()}) for c in found.candidates[:4]]
    assert [c for _, each in alone for c in each.candidates] == list(found.candidates[:4])
    assert all(c.prune_ratio == 0 and c.macs == 180 and c.accuracy == 1 for c in found.candidates[4:])


def test_thresholds_of_the_users_own_count_in_what_is_sure() -> None:
    _, found = passes(pruner(per_site={"make": {"alpha": 0.0}}), grid={"alpha": (2.0,), "beta": (1.0,)})
    assert found.candidates[0].prune_ratio > 0
    _, found = passes(pruner(per_site={"make": {"beta": 1.0}}), grid={"alpha": (0.0, 2.0), "beta": (0.5,)})
    assert [c.prune_ratio > 0 for c in found.candidates] == [True, False]


def test_progress_shows_a_total_where_somebody_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(pruner(), held_out(), max_drop=0.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    calibrate(pruner(), held_out(), max_drop=0.0)
    assert "0/36" in capsys.readouterr().err
