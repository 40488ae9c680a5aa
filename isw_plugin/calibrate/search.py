"""The search: a grid, its refinement, and then every site for itself."""

import itertools
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from isw_plugin.calibrate.choice import Choice
from isw_plugin.calibrate.per_site import refined
from isw_plugin.calibrate.record import Calibration, Candidate, Parameters
from isw_plugin.calibrate.trial import Trial, first
from isw_plugin.errors import SettingError
from isw_plugin.gates import with_parameters
from isw_plugin.measure.evaluate import Batches
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["calibrate"]

Grid = Mapping[str, Sequence[float]]

_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "CVGate": {"alpha": (0.0, 0.25, 0.5, 1.0, 2.0), "beta": (0.25, 0.5, 0.75, 1.0)},
    "MinNorm": {"ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "RandomGate": {"ratio": (0.05, 0.1, 0.15, 0.2, 0.3)},
}
_SITE_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "CVGate": {"beta": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)},
    "MinNorm": {"ratio": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
    "RandomGate": {"ratio": (0.0, 0.1, 0.2, 0.3)},
}


def calibrate(
    pruner: InstanceWisePruner,
    loader: Batches,
    *,
    max_drop: float = 0.01,
    target_macs: float | None = None,
    grid: Grid | None = None,
    max_instances: int = 2000,
    across_ranks: bool = True,
    per_site: bool = False,
    by_channels: bool = False,
) -> Calibration:
    """Try a grid of gate parameters, then the neighbourhood of the best, and set the winner's.

    The winner saves the most MACs among the candidates within ``max_drop``; with ``target_macs``, it is
    the most accurate among those within both. Candidates that empty a site for some image are rejected.
    Whether gates are on stays as found. Sites that differ by the user's ``per_site`` go on differing;
    thresholds of an earlier calibration go.

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
        per_site: Go on from there with thresholds of each site's own, those that save the most MACs for the
            loss they cost (``isw_plugin.calibrate.per_site``). Takes about 4 passes of 500 images a site and
            value more, for the CV gate 9 a site, and 15 of all images.
        by_channels: The winner drops the most channels, which is what the paper counts, not the most MACs.

    Raises:
        BudgetError: No candidate is within the budget; says the best that was found.
        SettingError: An unknown parameter or value in ``grid``, a negative budget, an empty loader, ``by_channels``
            with ``target_macs``.
    """
    if not max_drop >= 0:
        raise SettingError(f"max_drop={max_drop}: a loss of accuracy is 0 or more")
    if target_macs is not None and not target_macs > 0:
        raise SettingError(f"target_macs={target_macs}: a number of MACs is more than 0")
    if by_channels and target_macs is not None:
        raise SettingError("by_channels and target_macs: aim at channels or at MACs")
    values = _grid(pruner, grid)
    with tqdm(desc="calibrating", unit="candidate", leave=False) as progress:
        trial = Trial(pruner, list(first(loader, max_instances)), progress, across_ranks)
        accuracy, instances = trial.reference()
        choice = Choice(accuracy, max_drop, target_macs, by_channels)
        candidates = _same_everywhere(trial, choice, values, refine=grid is None)
        if per_site:
            own = grid or _SITE_GRIDS[type(pruner.gate).__name__]
            candidates += refined(trial, choice, choice.nearest(candidates), own)
    calibration = Calibration(choice.best(candidates), tuple(candidates), accuracy, instances)
    _set(pruner, trial, calibration)
    return calibration


def _same_everywhere(trial: Trial, choice: Choice, values: Grid, refine: bool) -> list[Candidate]:
    """Candidates with the same parameters at all sites: the paper's form."""
    candidates = trial.run(dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()))
    for halvings in (1, 2) if refine else ():
        centre = choice.nearest(candidates).parameters
        candidates += trial.run(_neighbours(centre, values, 2**halvings, candidates))
    return candidates


def _set(pruner: InstanceWisePruner, trial: Trial, calibration: Calibration) -> None:
    best, enabled = calibration.best, pruner.enabled
    pruner.enable(per_site=trial.overlaid(best.per_site), **best.parameters)
    if not enabled:
        pruner.disable()
    pruner.calibration = calibration.to_dict()


def _grid(pruner: InstanceWisePruner, grid: Grid | None) -> dict[str, tuple[float, ...]]:
    gate = pruner.gate
    values = grid if grid is not None else _GRIDS.get(type(gate).__name__)
    if values is None:
        raise SettingError(f"{type(gate).__name__} has no grid of its own: pass grid={{parameter: values}}")
    if not values or not all(values.values()):
        raise SettingError(f"grid={grid}: every parameter needs a value to try")
    for point in itertools.product(*values.values()):
        with_parameters(gate, **dict(zip(values, point, strict=True)))  # raises before anything is tried
    return {name: tuple(found) for name, found in values.items()}


def _neighbours(centre: Parameters, grid: Grid, divisor: int, tried: Sequence[Candidate]) -> list[Parameters]:
    """The points around ``centre`` at a part of the grid's step, inside the grid's reach, not tried yet."""
    axes = []
    for name, values in grid.items():
        step = (values[1] - values[0]) / divisor if len(values) > 1 else 0.0
        near = {centre[name] - step, centre[name], centre[name] + step}
        axes.append(sorted(value for value in near if min(values) / 2 <= value <= max(values) + step))
    points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*axes))
    seen = [candidate.parameters for candidate in tried]
    return [point for point in points if point not in seen]
