"""The search: a grid, its refinement, and then every site for itself.

Of the gates' own grids, candidates are left out that are not expected to win: all that drop more than one which failed
the budget, and all that drop less than one within it. A gate drops more the smaller its alpha and the larger its beta
or ratio are. That is certain for the first site; the maps of later ones change with what was dropped before, and
accuracy may rise by chance, so this is a rule of the search and no theorem. A grid that is passed is tried in full.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import nn
from tqdm import tqdm

from isw_plugin.accelerate import Accelerated
from isw_plugin.batches import Batches
from isw_plugin.calibrate.choice import Choice
from isw_plugin.calibrate.per_site import refined
from isw_plugin.calibrate.result import Calibration, Candidate, Parameters
from isw_plugin.calibrate.trial import Measured, Trial, first
from isw_plugin.errors import SettingError
from isw_plugin.gates import with_parameters
from isw_plugin.measure.evaluate import Forward
from isw_plugin.measure.scores import Metric
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.values import as_count

__all__ = ["calibrate"]

Grid = Mapping[str, Sequence[float]]
_Budget = tuple[float, float | None, bool]  # max_drop, target_macs, by_channels

_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "CVGate": {"alpha": (0.0, 0.25, 0.5, 1.0, 2.0), "beta": (0.25, 0.5, 0.75, 1.0)},
    "MinNorm": {"ratio": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "RandomGate": {"ratio": (0.05, 0.1, 0.15, 0.2, 0.3)},
    "FBS": {"density": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)},
    "ChannelGating": {"margin": (0.0, 0.25, 0.5, 1.0, 2.0)},
    "LCCL": {"margin": (0.0, 0.05, 0.1, 0.2, 0.5)},
}
_WARNED = 0.5  # a max_drop that is rather meant in points
_DROPS_MORE = {"alpha": -1, "beta": 1, "ratio": 1, "density": -1, "margin": 1}  # which way
_SITE_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "CVGate": {"beta": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)},
    "MinNorm": {"ratio": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
    "RandomGate": {"ratio": (0.0, 0.1, 0.2, 0.3)},
    "FBS": {"density": (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)},
    "ChannelGating": {"margin": (0.0, 0.5, 1.0, 2.0)},
    "LCCL": {"margin": (0.0, 0.1, 0.2, 0.5)},
}


def calibrate(
    pruner: InstanceWisePruner,
    loader: Batches,
    *,
    max_drop: float = 0.01,
    target_macs: float | None = None,
    grid: Grid | None = None,
    forward: Forward | None = None,
    metric: Metric | None = None,
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
        loader: Held-out batches, in any form that ``evaluate`` takes, in random order: the first ``max_instances``
            images are used, and kept in memory. Images that the model was trained on make the loss look too small.
        max_drop: Accuracy that may be lost against gates off (against the ``reference`` of a gate with parameters), a
            fraction in [0, 1] (0.01 is one point); with ``metric``, in its own unit.
        target_macs: MACs an image may take at most.
        grid: Gate parameter -> values to try, instead of the gate's own grid and its refinement. The own grid is not
            tried in full (see ``isw_plugin.calibrate.search``).
        forward, metric: As in ``evaluate``; the mean of the metric stands for accuracy.
        max_instances: Images to use at most, of each rank's loader, >= 1.
        across_ranks: Under torch.distributed, choose by what all ranks have seen; every rank must call this then.
        per_site: Go on from there with thresholds of each site's own, those that save the most MACs for the loss they
            cost: cross entropy, or less the metric. ``isw_plugin.calibrate.per_site`` says how, and what it takes.
        by_channels: The winner drops the most channels, which is what the paper counts, not the most MACs.

    Raises:
        BudgetError: No candidate is within the budget; says the best that was found.
        SettingError: No pruner, an unknown parameter or value in ``grid``, a budget or number of images outside its
            range, an empty loader, ``by_channels`` with ``target_macs``, and what ``evaluate`` refuses.
        ProbeError: The model fails on the first batch, called without ``forward``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, calibrate
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(8, 3, 8, 8)
        >>> found = calibrate(InstanceWisePruner(model, images), [(images, model(images).argmax(1))], max_drop=0.25)
        >>> found.accuracy, found.best.accuracy >= 0.75
        (1.0, True)
    """
    _require_pruner(pruner)
    _check_budget(max_drop, target_macs, by_channels, metric)
    images = as_count("max_instances", max_instances, "a number of images", least=1)
    values = _grid(pruner, grid)
    measured = Measured(list(first(loader, images)), forward, metric, across_ranks)
    return _searched(pruner, measured, (max_drop, target_macs, by_channels), values, grid is None, per_site)


def _require_pruner(pruner: Any) -> None:
    if isinstance(pruner, InstanceWisePruner):
        return
    hint = ""
    if isinstance(pruner, Accelerated):
        hint = ". This model is a copy with fixed thresholds: calibrate the pruner that made it, and accelerate anew"
    elif isinstance(pruner, nn.Module):
        hint = ": InstanceWisePruner.of(model) gives that of an attached model, InstanceWisePruner(model) attaches one"
    raise SettingError(f"calibrate sets the thresholds of a pruner, and this is a {type(pruner).__name__}{hint}")


def _check_budget(max_drop: float, target_macs: float | None, by_channels: bool, metric: Metric | None) -> None:
    most = 1.0 if metric is None else math.inf
    if not _is_number(max_drop) or not 0 <= max_drop <= most:
        raise SettingError(
            f"max_drop={max_drop!r}: a loss of accuracy is a fraction in [0, 1], and one point is 0.01"
            if metric is None
            else f"max_drop={max_drop!r}: a loss of the metric is a number, 0 or more"
        )
    if target_macs is not None and (not _is_number(target_macs) or not target_macs > 0):
        raise SettingError(f"target_macs={target_macs!r}: a number of MACs is more than 0")
    if by_channels and target_macs is not None:
        raise SettingError("by_channels and target_macs: aim at channels or at MACs")
    if max_drop >= _WARNED and metric is None and target_macs is None:
        warnings.warn(
            f"max_drop={max_drop} allows to lose {100 * max_drop:g} points of accuracy: one point is 0.01", stacklevel=3
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_share(share: float, dense: float) -> None:
    raise SettingError(
        f"target_macs={share:g} is a share, and a number of MACs is wanted: {share:g} of this model's {dense:,.0f} is "
        f"target_macs={share * dense:.0f}"
    )


def _searched(
    pruner: InstanceWisePruner, measured: Measured, budget: _Budget, values: Grid, refine: bool, per_site: bool
) -> Calibration:
    _, target_macs, _ = budget
    if target_macs is not None and target_macs <= 1:
        _refuse_share(target_macs, measured.first(1).evaluate(pruner).dense_macs)
    with tqdm(desc="calibrating", unit="candidate", leave=False, disable=None) as progress:
        trial = Trial(pruner, measured, progress)
        off = trial.reference()
        choice = Choice(off.accuracy, *budget)
        candidates = _same_everywhere(trial, choice, values, refine)
        if per_site:
            own = _SITE_GRIDS[type(pruner.gate).__name__] if refine else values
            candidates += refined(trial, choice, choice.nearest(candidates), own)
    calibration = Calibration(choice.best(candidates), tuple(candidates), off.accuracy, off.instances)
    _set(pruner, trial, calibration)
    return calibration


def _same_everywhere(trial: Trial, choice: Choice, values: Grid, refine: bool) -> list[Candidate]:
    """Candidates with the same parameters at all sites: the paper's form."""
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    if not refine:
        trial.expect(len(points))
        return [trial.candidate(point, {}) for point in points]
    around = 3 ** len(values) - 1
    trial.expect(len(points) + 2 * around)
    candidates = _promising(trial, choice, points, [])
    for divisor in (2, 4):
        points = _neighbours(choice.nearest(candidates).parameters, values, divisor, candidates)
        trial.progress.update(around - len(points))
        candidates = _promising(trial, choice, points, candidates)
    return candidates


def _promising(
    trial: Trial, choice: Choice, points: Iterable[Parameters], candidates: list[Candidate]
) -> list[Candidate]:
    """The candidates, and those of the points that none of them rules out."""
    for point in points:
        if any(_rules_out(candidate, point, choice) for candidate in candidates):
            trial.progress.update()
        else:
            candidates = [*candidates, trial.candidate(point, {})]
    return candidates


def _rules_out(candidate: Candidate, point: Parameters, choice: Choice) -> bool:
    """See above: the point drops more than too much, or less than what is within."""
    more = [_DROPS_MORE[name] * (value - candidate.parameters[name]) for name, value in point.items()]
    return (choice.too_much(candidate) and min(more) >= 0) or (choice.too_little(candidate) and max(more) <= 0)


def _set(pruner: InstanceWisePruner, trial: Trial, calibration: Calibration) -> None:
    best = calibration.best
    pruner.set_thresholds(per_site=trial.overlaid(best.per_site), **best.parameters)
    pruner.calibration = calibration.to_dict()


def _grid(pruner: InstanceWisePruner, grid: Grid | None) -> dict[str, tuple[float, ...]]:
    gate = pruner.gate
    values = grid if grid is not None else _GRIDS.get(type(gate).__name__)
    if values is None:
        raise SettingError(f"{type(gate).__name__} has no grid of its own: pass grid={{parameter: values}}")
    if not isinstance(values, Mapping) or not values:
        raise SettingError(f"grid={grid!r}: a dict of parameter -> values to try")
    found = {name: _numbers(name, tried) for name, tried in values.items()}
    for point in itertools.product(*found.values()):
        with_parameters(gate, **dict(zip(found, point, strict=True)))  # raises before anything is tried
    return found


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """The values of a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    found = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else ()
    if not found or not all(map(_is_number, found)):
        raise SettingError(f"grid: {name}={values!r}, and every parameter needs a value to try: a list of numbers")
    return found


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
