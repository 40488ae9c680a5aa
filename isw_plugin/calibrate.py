"""Choose gate parameters on held-out images, within a budget of accuracy or of MACs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from isw_plugin.errors import BudgetError, SettingError
from isw_plugin.gates import with_parameters
from isw_plugin.measure.evaluate import Batches, evaluate
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["Calibration", "Candidate", "calibrate"]

Parameters = dict[str, float]

_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "CVGate": {"alpha": (0.0, 0.25, 0.5, 1.0, 2.0), "beta": (0.25, 0.5, 0.75, 1.0)},
    "MinNorm": {"ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "RandomGate": {"ratio": (0.05, 0.1, 0.15, 0.2, 0.3)},
}


@dataclass(frozen=True)
class Candidate:
    """Gate parameters and what they did on the held-out images (see ``GateReport``)."""

    parameters: Parameters
    accuracy: float
    prune_ratio: float
    macs: float
    macs_saved: float
    emptied: int

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        return f"{named}: accuracy {self.accuracy:.4f}, {self.macs_saved:.1%} of MACs saved"


@dataclass(frozen=True)
class Calibration:
    """All that was tried, and the winner.

    Attributes:
        best: The candidate whose parameters the pruner now has.
        candidates: Every candidate, in the order tried.
        accuracy: With gates off, on the same images.
        instances: How many images.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    accuracy: float
    instances: int

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in both accuracy and MACs, from the most accurate on."""
        ordered = sorted(self.candidates, key=lambda c: (-c.accuracy, c.macs))
        fewest = [min((c.macs for c in ordered[:index]), default=float("inf")) for index in range(len(ordered))]
        return tuple(c for c, least in zip(ordered, fewest, strict=True) if c.macs < least)


def calibrate(
    pruner: InstanceWisePruner,
    loader: Batches,
    *,
    max_drop: float = 0.01,
    target_macs: float | None = None,
    grid: Mapping[str, Sequence[float]] | None = None,
    max_instances: int = 2000,
    across_ranks: bool = True,
) -> Calibration:
    """Try a grid of gate parameters, then the neighbourhood of the best, and set the winner's.

    The winner saves the most MACs among the candidates within ``max_drop``; with ``target_macs``, it is
    the most accurate among those within both. Candidates that empty a site for some image are rejected.
    Whether gates are on stays as found.

    Args:
        pruner: Its gate's parameters are set; unchanged on any error.
        loader: Held-out (images, labels), in random order: its first ``max_instances`` images are used,
            and kept in memory. Images that the model was trained on make the loss look too small.
        max_drop: Accuracy that may be lost against gates off, a fraction (0.01 is one point).
        target_macs: MACs an image may take at most.
        grid: Gate parameter -> values to try, instead of the gate's own grid and its refinement.
        max_instances: Images to use at most, of each rank's loader, >= 1.
        across_ranks: Under torch.distributed, judge candidates by what all ranks have seen, each its part of
            the images, so that all choose the same; every rank must call this then.

    Raises:
        BudgetError: No candidate is within the budget; says the best that was found.
        SettingError: An unknown parameter or value in ``grid``, a negative budget, an empty loader.
    """
    if not max_drop >= 0:
        raise SettingError(f"max_drop={max_drop}: a loss of accuracy is 0 or more")
    if target_macs is not None and not target_macs > 0:
        raise SettingError(f"target_macs={target_macs}: a number of MACs is more than 0")
    values = _grid(pruner, grid)
    batches = list(_first(loader, max_instances))
    with tqdm(desc="calibrating", unit="candidate", leave=False) as progress:
        trial = _Trial(pruner, batches, progress, across_ranks)
        accuracy, instances = trial.reference()
        candidates = trial.run(itertools.product(*values.values()), list(values))
        choice = _Choice(accuracy, max_drop, target_macs)
        if grid is None:
            for halvings in (1, 2):
                around = _neighbours(choice.nearest(candidates).parameters, values, 2**halvings, candidates)
                candidates += trial.run(around, list(values))
    best = choice.best(candidates)
    enabled = pruner.enabled
    pruner.enable(**best.parameters)
    if not enabled:
        pruner.disable()
    return Calibration(best, tuple(candidates), accuracy, instances)


@dataclass(frozen=True)
class _Choice:
    accuracy: float
    max_drop: float
    target_macs: float | None

    def within(self, candidate: Candidate) -> bool:
        # A hair of tolerance: 0.97 - 0.96 is a little more than 0.01 in binary.
        fits = candidate.accuracy >= self.accuracy - self.max_drop - 1e-9 and not candidate.emptied
        reached = self.target_macs is None or candidate.macs <= self.target_macs
        return fits and reached and candidate.macs_saved > 0

    def merit(self, candidate: Candidate) -> tuple[float, float]:
        if self.target_macs is None:
            return candidate.macs_saved, candidate.accuracy
        return candidate.accuracy, candidate.macs_saved

    def nearest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best within the budget, or the one to look around for some."""
        inside = [c for c in candidates if self.within(c)]
        if inside:
            return max(inside, key=self.merit)
        if self.target_macs is None:
            return max(candidates, key=lambda c: (c.macs_saved > 0, not c.emptied, c.accuracy))
        reached = [c for c in candidates if c.macs <= self.target_macs and not c.emptied]
        return max(reached, key=lambda c: c.accuracy) if reached else min(candidates, key=lambda c: c.macs)

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best within the budget; BudgetError where there is none."""
        best = self.nearest(candidates)
        if self.within(best):
            return best
        wanted = f"and loses at most {self.max_drop:g} of the accuracy with gates off, {self.accuracy:.4f}"
        if self.target_macs is not None:
            wanted += f", with at most {self.target_macs:,.0f} MACs"
        raise BudgetError(
            f"none of {len(candidates)} candidates saves MACs {wanted}. The best found: {best} "
            f"({best.macs:,.0f} MACs, {best.emptied} maps emptied)"
        )


class _Trial:
    def __init__(
        self, pruner: InstanceWisePruner, batches: list[tuple[Tensor, Tensor]], progress: Any, across_ranks: bool
    ) -> None:
        self.pruner = pruner
        self.across_ranks = across_ranks
        self.batches = batches
        self.progress = progress

    def reference(self) -> tuple[float, int]:
        """Accuracy with gates off, and the number of images."""
        enabled = self.pruner.enabled
        self.pruner.disable()
        try:
            report = evaluate(self.pruner.model, self.batches, across_ranks=self.across_ranks)
        finally:
            if enabled:
                self.pruner.enable()
        return report.accuracy, report.instances

    def run(self, points: Iterable[tuple[float, ...]], names: list[str]) -> list[Candidate]:
        """What the gate does at each point of the parameters."""
        candidates = []
        for point in points:
            parameters = dict(zip(names, point, strict=True))
            with self.pruner.gating(**parameters):
                report = evaluate(self.pruner.model, self.batches, across_ranks=self.across_ranks)
            candidates.append(
                Candidate(
                    parameters, report.accuracy, report.prune_ratio, report.macs, report.macs_saved, report.emptied
                )
            )
            self.progress.update()
            self.progress.set_postfix_str(str(candidates[-1]))
        return candidates


def _grid(pruner: InstanceWisePruner, grid: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, ...]]:
    gate = pruner.gate
    values = grid if grid is not None else _GRIDS.get(type(gate).__name__)
    if values is None:
        raise SettingError(f"{type(gate).__name__} has no grid of its own: pass grid={{parameter: values}}")
    if not values or not all(values.values()):
        raise SettingError(f"grid={grid}: every parameter needs a value to try")
    for point in itertools.product(*values.values()):
        with_parameters(gate, **dict(zip(values, point, strict=True)))  # raises before anything is tried
    return {name: tuple(found) for name, found in values.items()}


def _first(loader: Batches, instances: int) -> Iterable[tuple[Tensor, Tensor]]:
    if instances < 1:
        raise SettingError(f"max_instances={instances}: at least 1 image is needed")
    left = instances
    for images, labels in loader:
        yield images[:left], labels[:left]
        left -= len(labels)
        if left <= 0:
            return


def _neighbours(
    centre: Parameters, grid: Mapping[str, Sequence[float]], divisor: int, tried: Sequence[Candidate]
) -> list[tuple[float, ...]]:
    """The points around ``centre`` at a part of the grid's step, inside the grid's reach, not tried yet."""
    axes = []
    for name, values in grid.items():
        step = (values[1] - values[0]) / divisor if len(values) > 1 else 0.0
        near = {centre[name] - step, centre[name], centre[name] + step}
        axes.append(sorted(value for value in near if min(values) / 2 <= value <= max(values) + step))
    seen = {tuple(candidate.parameters.values()) for candidate in tried}
    return [point for point in itertools.product(*axes) if point not in seen]
