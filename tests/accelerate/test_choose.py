"""What is chosen, and when it is sure."""

from collections.abc import Callable
from typing import Any

import pytest

from isw_plugin.accelerate import choose, fit
from tests.accelerate.nets import attached, clock
from tests.conftest import Plain, made

Rounds = list[list[float]]


@pytest.mark.parametrize(
    ("votes", "agreed"),
    [
        ("+++++++", True),
        ("-------", False),
        ("++++++", None),  # a fair coin gives six alike in one of 32
        ("+++++++-", None),
        ("++++++++++-", True),
        (20 * "+" + 5 * "-", True),
        (20 * "+" + 12 * "-", None),
        (12 * "+" + 32 * "-", False),
        ("", None),
    ],
)
def test_rounds_agree_where_chance_would_not(votes: str, agreed: bool | None) -> None:
    assert choose._agreed([vote == "+" for vote in votes]) is agreed


FASTER, SLOWER, RISKY = [1.0, 2.0, 2.0, 3.0], [2.5, 2.0, 2.0, 3.0], [1.0, 2.4, 2.0, 3.0]


@pytest.mark.parametrize(
    ("rounds", "gains"),
    [
        (7 * [FASTER], True),
        (7 * [SLOWER], False),
        (7 * [RISKY], False),
        (10 * [FASTER] + [SLOWER], True),
        (4 * [FASTER] + 3 * [SLOWER], None),
        (4 * [FASTER] + 3 * [RISKY], None),
    ],
)
def test_gates_gain_where_they_are_faster_and_bearable(rounds: Rounds, gains: bool | None) -> None:
    assert choose._gains(rounds) is gains


class Turning:
    """Gives these rounds, the last one for good, each a second long."""

    def __init__(self, *rounds: list[float]) -> None:
        self.rounds = list(rounds)
        self.taken = 0

    def monotonic(self) -> float:
        return float(self.taken)

    def __call__(self, runs: Any, least: float, enough: Callable[[Rounds], bool], rest: float) -> Rounds:
        given: Rounds = []
        while not enough(given):
            given.append(self.rounds[min(self.taken, len(self.rounds) - 1)][: len(runs)])
            self.taken += 1
        return given


def timed(monkeypatch: pytest.MonkeyPatch, *rounds: list[float], limit: float = 1e9) -> int:
    turning = Turning(*rounds)
    monkeypatch.setattr(choose, "take_turns", turning)
    monkeypatch.setattr(choose, "time", turning)
    plans: Any = [lambda: None] * 4
    for plan in range(4):
        plans[plan] = type("Run", (), {"run": staticmethod(lambda *_: None), "runtime": None})
    return len(choose._timed(plans, [], limit, choose._is_settled))


def test_it_is_timed_until_rounds_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, FASTER) == 7
    assert timed(monkeypatch, SLOWER) == 14  # other programs slow the engine down by more
    assert timed(monkeypatch, *(5 * [SLOWER]), FASTER) == 22
    assert timed(monkeypatch, *(20 * [FASTER, SLOWER])) == 41
    assert timed(monkeypatch, *(20 * [FASTER, SLOWER]), limit=25.0) == 26
    assert timed(monkeypatch, *(20 * [FASTER, SLOWER]), limit=0.0) == 7


@pytest.mark.parametrize("disturbed", [range(0), range(5), range(2, 6), range(6, 11)])
def test_a_load_that_passes_changes_no_choice(disturbed: range, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [[3.0, 5.0, 2.2, 3.3] if k in disturbed else FASTER for k in range(12)]
    monkeypatch.setattr(fit, "seconds_in_place", clock("gated"))
    monkeypatch.setattr(choose, "take_turns", Turning(*rounds))
    fast = attached(made(Plain), made(Plain).images()).accelerate(made(Plain).images())
    assert fast.execution == "accelerated"
    assert fast.fitted.gains is True


def test_where_rounds_contradict_each_other_it_is_dense_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "seconds_in_place", clock("gated"))
    monkeypatch.setattr(choose, "take_turns", Turning(*(30 * [FASTER, SLOWER])))
    pruner = attached(made(Plain), made(Plain).images())
    fast = pruner.accelerate(made(Plain).images())
    assert (fast.execution, fast.fitted.gains, fast.fitted.wins, fast.fitted.rounds) == ("dense", None, False, 41)
    assert fast.summary().endswith("; not sure which is the faster, after 41 rounds)")


def test_its_progress_is_shown_at_a_terminal_only(capfd: pytest.CaptureFixture[str]) -> None:
    net = made(Plain)
    attached(net, net.images()).accelerate(net.images(), backend="dense")
    assert capfd.readouterr().err == ""
