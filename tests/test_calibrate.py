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
        ({"max_instances": 0}, "max_instances"),
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
