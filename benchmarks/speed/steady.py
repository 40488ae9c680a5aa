"""Rounds of timing that nothing seems to disturb.

A shared machine is slow for seconds or minutes at a time, and not for all code alike: the engine's kernels by a
quarter or more, oneDNN's by a tenth. Ratios move with that. A layer of either, timed between rounds, tells some of it.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.speed.apart import Apart, seconds_of_each
from isw_plugin.accelerate.execution import DenseConv, GatedConv
from isw_plugin.accelerate.fit import Turns
from isw_plugin.accelerate.layers import Layer

__all__ = ["Probe", "taken_rounds"]

_SLOWER = 1.1  # times the best time of a probe
_CALLS = 9
_REST = 0.05  # seconds before a turn: threads of the one before look for work, onnxruntime's for 40 ms


class Probe:
    """One layer by the engine and by oneDNN; knows the best times so far."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, generator=generator) for size in ((8, 128, 16, 16), (128, 128, 3, 3)))
        layer = Layer(weight, torch.zeros(128), (1, 1), (1, 1), (1, 1), 1, "relu")
        gated, dense = GatedConv(layer), DenseConv(layer, x.shape)
        keep = torch.ones(8, 128, dtype=torch.bool)
        self.runs: list[Callable[[], object]] = [
            lambda: gated(x, keep, 0.0, 0.0, None, None, 0.0, 0.0),
            lambda: dense(x, None, None, None),
        ]
        self.best = [float("inf")] * len(self.runs)

    def is_steady(self) -> bool:
        """Whether both take what they took at best, to a tenth."""
        with torch.inference_mode():
            seconds = [_median(run) for run in self.runs]
        self.best = [min(pair) for pair in zip(self.best, seconds, strict=True)]
        return all(taken <= _SLOWER * best for taken, best in zip(seconds, self.best, strict=True))

    def wait(self, seconds: float) -> None:
        """Until it is steady, so long at most."""
        until = time.monotonic() + seconds
        while not self.is_steady() and time.monotonic() < until:
            time.sleep(0.5)


class _Turns(Turns):
    """Some take theirs in processes of their own, whose clocks count."""

    def __init__(self, runs: Sequence[Callable[[], object]], least: float, rest: float) -> None:
        for run in runs:
            run()  # the first call of a process prepares for the second
        super().__init__(runs, least, rest)

    def turn(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of the middle one of so many calls: the system's own work stretches single ones."""
        time.sleep(self.rest)
        return statistics.median(run.seconds(repeats) if isinstance(run, Apart) else seconds_of_each(run, repeats))


def _median(run: Callable[[], object]) -> float:
    return statistics.median(seconds_of_each(run, _CALLS))


def taken_rounds(
    runs: Sequence[Callable[[], object]], rounds: int, least: float, is_steady: Callable[[], bool]
) -> tuple[list[list[float]], list[bool]]:
    """Seconds of each run in every round, until ``rounds`` of them were steady, or three times as many were taken.

    Args:
        least: Seconds that a timing should take.
        is_steady: Asked between rounds; a round is steady where both answers around it were.

    Returns:
        Rounds, after one that warms up, and whether each was steady.
    """
    turns = _Turns(runs, least, _REST)
    turns.round()
    taken: list[list[float]] = []
    steady: list[bool] = []
    before = is_steady()
    while sum(steady) < rounds and len(taken) < 3 * rounds:
        taken.append(turns.round())
        after = is_steady()
        steady.append(before and after)
        before = after
    return taken, steady
