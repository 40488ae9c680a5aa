"""When two runs agree: to rounding, which may turn decisions that are near-ties."""

from typing import Any

import pytest
import torch
from torch import Tensor

from isw_plugin import CVGate, MinNorm
from isw_plugin.accelerate.agreement import Outcome, difference, tolerance_of

NORMS = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
KEEP = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
GATES = {"a": CVGate(0.1, 0.8), "b": CVGate(0.1, 0.8)}


def apart(found: Any, wanted: Any, tolerance: float = 1e-4) -> str:
    return difference(Outcome(found), Outcome(wanted), {}, tolerance)


@pytest.mark.parametrize(
    ("found", "wanted", "reason"),
    [
        (torch.tensor([1.0, 1000.05]), torch.tensor([1.04, 1000.0]), ""),
        (torch.tensor([1.0, 1000.2]), torch.tensor([1.0, 1000.0]), "2.0e-04 of its largest value off"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "off"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), ""),  # zeros times weights that are never read
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf]), ""),
        (torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, torch.inf]), "off"),
        (torch.tensor([1e-9]), torch.zeros(1), "off"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ""),
        (torch.zeros(4), torch.zeros(1, 4), r"torch.float32 (4,), not torch.float32 (1, 4)"),
        (torch.zeros(4), torch.zeros(4).double(), "not torch.float64"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "whole numbers"),
        ((torch.zeros(1), 1), (torch.zeros(1), 1), ""),
        ((torch.zeros(1), 1), (torch.zeros(1), 1.0), "1, not 1.0"),
        ({"a": None}, {"a": None}, ""),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, "packed otherwise"),
        ((torch.zeros(1),), [torch.zeros(1)], "packed otherwise"),
    ],
)
def test_outputs(found: Any, wanted: Any, reason: str) -> None:
    told = apart(found, wanted)
    assert reason in told
    assert bool(told) is bool(reason)


def turned(*places: tuple[int, int]) -> Tensor:
    keep = KEEP.clone()
    for place in places:
        keep[place] = ~keep[place]
    return keep


def decided(keep: Tensor, norms: Tensor = NORMS, output: Tensor | None = None, **others: Tensor) -> Outcome:
    output = torch.ones(3, 2) if output is None else output
    return Outcome(output, {"a": keep} | others, {"a": norms} | dict.fromkeys(others, NORMS))


def test_decisions_that_are_no_ties_must_agree() -> None:
    assert difference(decided(KEEP), decided(KEEP), GATES, 1e-4) == ""
    for place in ((0, 1), (1, 2), (2, 0)):
        told = difference(decided(turned(place)), decided(KEEP), GATES, 1e-4)
        assert told == "1 of 3 instances decide otherwise at a"
    assert "decided for (3, 2) of (3, 3)" in difference(decided(KEEP[:, :2]), decided(KEEP), GATES, 1e-4)
    assert "a decided for None" in difference(Outcome(torch.ones(3, 2)), decided(KEEP), GATES, 1e-4)


def test_a_near_tie_may_turn_and_what_follows_in_that_instance_is_another() -> None:
    near = NORMS.clone()
    near[0] = torch.tensor([1.0, 2.0, 0.8 * 3.8 / 2.2 + 1e-6])  # 0.8 of the mean, next to exactly
    near[0, 2] = 0.8 * 3.0 / (3 - 0.8)
    wanted = decided(KEEP, near, b=KEEP)
    output = torch.ones(3, 2)
    output[0] = 9.0
    assert difference(decided(turned((0, 2)), near, output, b=turned((0, 0))), wanted, GATES, 1e-4) == ""
    # The other instances are still compared, and the tie needs equal norms.
    assert "b" in difference(decided(turned((0, 2)), near, b=turned((1, 0))), wanted, GATES, 1e-4)
    output[1] = 9.0
    assert "off" in difference(decided(turned((0, 2)), near, output, b=KEEP), wanted, GATES, 1e-4)
    assert "at a" in difference(decided(turned((0, 2)), near * 1.01, b=KEEP), wanted, GATES, 1e-4)


def test_a_variation_near_the_threshold_turns_a_whole_instance() -> None:
    norms = torch.tensor([[1.0, 2.0, 0.5]])
    variation = float(norms.std(1, correction=0) / norms.mean(1))
    gates = {"a": CVGate(variation, 0.8)}
    keep = torch.tensor([[True, True, False]])
    alone = [Outcome(torch.zeros(1, 2), {"a": k}, {"a": norms}) for k in (keep, torch.ones_like(keep))]
    assert difference(*alone, gates, 1e-4) == ""
    assert difference(*alone, {"a": CVGate(variation / 2, 0.8)}, 1e-4) == "1 of 1 instances decide otherwise at a"


def test_other_gates_may_turn_where_norms_agree() -> None:
    gates = {"a": MinNorm(0.5)}
    assert difference(decided(turned((0, 1))), decided(KEEP), gates, 1e-4) == ""
    assert "at a" in difference(decided(turned((0, 1)), 1.1 * NORMS), decided(KEEP), gates, 1e-4)


def test_coarser_types_have_a_wider_tolerance() -> None:
    assert tolerance_of([torch.float32, torch.float64, torch.int64, None]) == 1e-4
    assert tolerance_of([]) == 1e-4
    assert 1e-4 < tolerance_of([torch.float16]) < tolerance_of([torch.float32, torch.bfloat16]) < 0.1
