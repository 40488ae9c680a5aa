"""Wall-clock time, never without the machine it was taken on."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from isw_plugin.machine import hardware

__all__ = ["Latency", "compare", "hardware", "summarize", "timed"]

T = TypeVar("T")

_REST = 0.05  # seconds before each run: idle threads of the one before look for work, onnxruntime's for 40 ms


@dataclass(frozen=True)
class Latency:
    """Time of one image in milliseconds: the median over batches, and the quartiles.

    Attributes:
        batch: Images a batch.
        batches: How many were timed.
        hardware: Processor or GPU.
        threads: CPU threads of torch.
    """

    ms_per_image: float
    low: float
    high: float
    batch: int
    batches: int
    hardware: str
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.ms_per_image:.3f} ms/image ({self.low:.3f} to {self.high:.3f}; {self.batches} batches of "
            f"{self.batch}, {self.hardware}, {self.threads} threads)"
        )


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of ``run`` and the seconds it took on its device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def summarize(seconds: Sequence[float], sizes: Sequence[int], device: torch.device) -> Latency:
    """Latency over the batches of full size; the first, which warms caches up, is left out where there are others.

    Args:
        seconds: Time of each batch.
        sizes: Images in each batch.
    """
    full = max(sizes)
    per_image = [1000 * s / n for s, n in zip(seconds, sizes, strict=True) if n == full]
    per_image = per_image[1:] or per_image
    low, middle, high = (
        statistics.quantiles(per_image, n=4, method="inclusive") if len(per_image) > 1 else per_image * 3
    )
    return Latency(middle, low, high, full, len(per_image), hardware(device), torch.get_num_threads())


def compare(
    runs: Mapping[str, Callable[[], object]], images: int, rounds: int, device: torch.device
) -> dict[str, Latency]:
    """Time several ways to do one thing in turn, round by round, so that a machine's drift hits all alike.

    The first call of each turn is not counted: threads that slept can take ten times a small network's time to wake.

    Args:
        runs: Name -> what to time; each handles the same ``images`` images.
        rounds: Timed rounds, after one that warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rest = _REST if torch.get_num_threads() > 1 else 0.0
    for _ in range(rounds + 1):
        for name, run in runs.items():
            time.sleep(rest)
            run()
            seconds[name].append(timed(run, device)[1])
    return {name: summarize(taken, [images] * len(taken), device) for name, taken in seconds.items()}
