"""Thresholds of single sites, by MACs (or channels) saved for loss that they cost.

In a round, every site in turn tries other values while the rest stays as it is, on some of the images:
what does the loss rise, and how many MACs are saved? Added up over the sites, that predicts the best
choice for any price of a MAC: each site takes its value of smallest loss + price * MACs left, which is a corner
of the lower convex hull of its (MACs saved, loss). As the price rises from nothing, the choices form a
path; how far the budget reaches on it is found by bisection, with all images. The next round starts
there, with finer steps.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isw_plugin.calibrate.choice import Choice
from isw_plugin.calibrate.result import Candidate, Parameters
from isw_plugin.calibrate.trial import Trial

__all__ = ["Corner", "bisected", "hull", "path", "refined"]

_ROUNDS = 2
_INSTANCES = 500  # that show a site's loss; all images judge the candidates

Choices = dict[str, Parameters]  # by site


@dataclass(frozen=True)
class Corner:
    """A value that a site may take: share saved and loss, against the site's present value."""

    saved: float
    loss: float
    parameters: Parameters


def refined(trial: Trial, choice: Choice, start: Candidate, values: Mapping[str, Sequence[float]]) -> list[Candidate]:
    """Candidates with thresholds of single sites, from ``start`` on; sites that the user set keep theirs, and those
    that follow others have none.

    Evaluations: in each round, one of ``_INSTANCES`` images for a site and value, and one of all images for
    every halving of the path. That is about 9 a site for the CV gate, and 15 of all images.
    """
    found: list[Candidate] = []
    own, follow = trial.own, trial.pruner.followers
    free = [site.name for site in trial.pruner.sites if not own.get(site.name, {}).keys() & values.keys()]
    sites = [site for site in free if site not in follow]
    for halvings in range(_ROUNDS if sites else 0):
        options = {site: _options(trial, start.at(site), values, 2**halvings) for site in sites}
        steps = path(_corners(trial, choice, start, options))
        found += bisected(trial, choice, start.parameters, steps)
        start = choice.nearest([start, *found])
    return found


def bisected(trial: Trial, choice: Choice, parameters: Parameters, steps: Sequence[Choices]) -> list[Candidate]:
    """The candidates met while looking for the last step of a path that the budget allows."""
    found = []
    low, high = 0, len(steps)
    trial.expect(high.bit_length())
    while low < high:
        middle = (low + high) // 2
        found.append(trial.candidate(parameters, steps[middle]))
        if choice.may_go_on(found[-1]):
            low = middle + 1
        else:
            high = middle
    return found


def path(corners: Mapping[str, Sequence[Corner]]) -> list[Choices]:
    """The best choices for every price of a MAC, from all sites at their smallest loss on.

    Args:
        corners: By site, in no order.
    """
    hulls = {site: hull(found) for site, found in corners.items()}
    steps = [
        ((there.loss - here.loss) / (there.saved - here.saved), site, there)
        for site, found in hulls.items()
        for here, there in itertools.pairwise(found)
    ]
    choices = [{site: found[0].parameters for site, found in hulls.items()}]
    for _, site, corner in sorted(steps, key=lambda step: step[0]):
        choices.append(choices[-1] | {site: corner.parameters})
    return choices


def hull(corners: Sequence[Corner]) -> list[Corner]:
    """The lower convex hull, from the smallest loss to the most saved."""
    chain: list[Corner] = []
    for corner in sorted(corners, key=lambda corner: (corner.saved, -corner.loss)):
        while chain and (chain[-1].loss >= corner.loss or _bends_down(chain, corner)):
            chain.pop()
        chain.append(corner)
    return chain


def _bends_down(chain: Sequence[Corner], corner: Corner) -> bool:
    if len(chain) < 2:
        return False
    a, b = chain[-2:]
    return (b.loss - a.loss) * (corner.saved - a.saved) >= (corner.loss - a.loss) * (b.saved - a.saved)


def _corners(
    trial: Trial, choice: Choice, start: Candidate, options: Mapping[str, Sequence[Parameters]]
) -> dict[str, list[Corner]]:
    """What each option does alone; options that empty a map where the start does not are left out."""
    images = trial.measured.first(_INSTANCES)
    trial.expect(1 + sum(map(len, options.values())))
    present = trial.shown(images, start.parameters, start.per_site)
    corners = {site: [Corner(0.0, 0.0, start.at(site))] for site in options}
    for site, tried in options.items():
        for option in tried:
            found = trial.shown(images, start.parameters, start.per_site | {site: option})
            if found.emptied <= present.emptied:
                saved = choice.saved(found) - choice.saved(present)
                corners[site].append(Corner(saved, found.accuracy - present.accuracy, option))
        trial.progress.set_postfix_str(f"sensitivity of {site}")
    return corners


def _options(trial: Trial, here: Parameters, values: Mapping[str, Sequence[float]], divisor: int) -> list[Parameters]:
    """All values at first, later those around the present one, one parameter at a time."""
    options = []
    for name, grid in values.items():
        step = (grid[1] - grid[0]) / divisor if len(grid) > 1 else 0.0
        around = [here[name] + k * step for k in (-2, -1, 1, 2)]
        near = grid if divisor == 1 else [v for v in around if min(grid) <= v <= max(grid)]
        options += [here | {name: value} for value in near if value != here[name]]
    return options
