"""Rounds of timing that count, with probes that the tests answer for."""

from collections.abc import Callable

import pytest

from benchmarks.speed import steady
from benchmarks.speed.steady import Probe, taken_rounds


def answers(*given: bool) -> Callable[[], bool]:
    left = list(given)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((True,), [True, True]),
        ((True, False, True), [False, False, True, True]),  # the rounds before and after it
        ((False, True), [False, True, True]),
        ((False,), [False] * 6),
    ],
)
def test_rounds_go_on_until_enough_are_steady(given: tuple[bool, ...], wanted: list[bool]) -> None:
    calls: list[str] = []
    taken, found = taken_rounds([lambda: calls.append("a"), lambda: calls.append("b")], 2, 0.0, answers(*given))
    assert found == wanted
    assert [len(seconds) for seconds in taken] == [2] * len(wanted)
    assert "".join(calls) == "abab" + (1 + len(wanted)) * "aabb"  # ready, how long, a round to warm up, the rounds


def test_a_probe_is_steady_near_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe()
    times = iter([2.0, 4.0, 1.0, 4.0, 1.09, 4.39, 1.11, 4.0, 1.0, 4.41])
    monkeypatch.setattr(steady, "_median", lambda run: next(times))
    assert [probe.is_steady() for _ in range(5)] == [True, True, True, False, False]
    assert probe.best == [1.0, 4.0]


def test_a_probe_times_layers_of_both() -> None:
    probe = Probe()
    assert probe.is_steady()  # the first time is the best so far
    assert all(0 < best < 60 for best in probe.best)


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, slept = Probe(), []
    monkeypatch.setattr(steady.time, "sleep", slept.append)
    monkeypatch.setattr(Probe, "is_steady", lambda probe: len(slept) == 3)
    probe.wait(60)
    assert len(slept) == 3
    monkeypatch.setattr(Probe, "is_steady", lambda probe: False)
    probe.wait(0)
    assert len(slept) == 3
