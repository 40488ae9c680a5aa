"""What a trained row is worth: error, channels, MACs, time and parameters."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.lab.images import Images, normalise
from benchmarks.rivals.rivals import RIVALS
from benchmarks.rivals.training import Bench
from isw_plugin import InstanceWisePruner, evaluate
from isw_plugin.measure.latency import timed

__all__ = ["BATCHES", "measure"]

BATCHES = (1, 32)  # images, timed


def measure(bench: Bench, name: str, row: str) -> dict[str, Any]:
    """One row of a network's table, as plain values."""
    pruner = bench.trained(name, row)
    model = pruner.model.eval()
    report = evaluate(model, bench.batches("test"))
    gated = RIVALS[row].gate is not None
    own = sum(parameter.numel() for parameter in pruner.gate_parameters())
    heads = sum(head.weight.numel() + head.bias.numel() for head in pruner.heads.values())
    found = {
        "error": 100 * (1 - report.accuracy),
        "prune_ratio": report.prune_ratio if gated else 0.0,
        "macs_saved": report.macs_saved if gated else 0.0,
        "macs": report.macs,
        "instances": report.instances,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "extra_parameters": own + heads,
        "predicted_sites": len(pruner.predicted),
    }
    if bench.scale.rounds:
        found["ms"] = {str(batch): _ms(bench, pruner, batch, gated) for batch in BATCHES}
    return found


def _ms(bench: Bench, pruner: InstanceWisePruner, batch: int, gated: bool) -> dict[str, Any]:
    """Milliseconds of a batch of test images: a median, the quartiles, and what ran, chosen on training images."""
    with _one_thread():
        fast = pruner.accelerate(_some(bench, bench.splits.train, batch), backend="auto" if gated else "dense")
        images = _some(bench, bench.splits.test, batch)
        seconds = sorted(_seconds(lambda: fast(images), bench))
        low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
        about = {"threads": torch.get_num_threads(), "runs": fast.execution, "why": fast.reason}
    return {"ms": middle, "low": low, "high": high, **about}


def _some(bench: Bench, images: Images, count: int) -> Tensor:
    """Spread over the set, which is sorted by class."""
    places = torch.linspace(0, len(images) - 1, count).round().long()
    return normalise(images.at(places).pixels.to(bench.device), bench.splits)


def _seconds(run: Callable[[], Tensor], bench: Bench) -> list[float]:
    for _ in range(3):
        run()
    return [timed(run, bench.device)[1] for _ in range(bench.scale.rounds)]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
