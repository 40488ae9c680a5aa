"""What a channel norm weighs in the penalty, under each reduction.

"sum" is Eq. 5, lambda times the sum over the batch. "mean" divides it by the batch. "relative" takes norms in
units of what they were when training began, site by site: lambda times the mean over sites, instances and
channels of norm / reference, which is lambda at the start for any network, map size and batch.

A site that runs several times in one forward (an encoder on two views) counts every time: "sum" adds, the others take
the mean over all its instances. One that does not run (layer drop) adds nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from isw_plugin.ranks import of_all_ranks

__all__ = ["REDUCTIONS", "decay", "first_norms", "relative_weights"]

REDUCTIONS = ("sum", "mean", "relative")


def decay(norms: Mapping[str, Sequence[Tensor]], weights: Mapping[str, float], reduction: str) -> Tensor:
    """The penalty of one forward.

    Args:
        norms: Site name -> channel norms (N, C) of every time that the site ran; batches may differ.
        weights: Site name -> weight of each norm.
        reduction: "sum" over all instances of all times, or anything else for their mean, at each site.

    Returns:
        A scalar in the graph.
    """
    terms = []
    for name, times in norms.items():
        instances = 1 if reduction == "sum" else max(1, sum(norm.shape[0] for norm in times))
        terms += [(weights[name] / instances) * norm.sum() for norm in times]
    return torch.stack(terms).sum()


def relative_weights(
    lambdas: Mapping[str, float], channels: Mapping[str, int], references: Mapping[str, float]
) -> dict[str, float]:
    """Weights under which the mean penalty is the mean over sites of lambda * mean norm / reference.

    Args:
        lambdas: Site name -> weight of the site.
        channels: Site name -> number of channels.
        references: Site name -> mean norm at the start; sites without one weigh nothing yet.
    """
    decaying = sum(lambda_ > 0 for lambda_ in lambdas.values())
    return {
        name: lambda_ / (decaying * channels[name] * references[name]) if lambda_ and name in references else 0.0
        for name, lambda_ in lambdas.items()
    }


def first_norms(norms: Mapping[str, Sequence[Tensor]], sites: Iterable[str]) -> dict[str, float]:
    """The mean norm of sites over the instances of all ranks, to be their references.

    Sites that were not recorded, or whose maps are all zero or not finite, are left out. Under
    torch.distributed every rank must call this, with the same ``sites``.
    """
    seen = {name: torch.cat(tuple(norms[name])) for name in sites if name in norms}
    mine = {name: (len(norm), norm.mean().item()) for name, norm in seen.items()}
    ranks = of_all_ranks(mine)
    found = {}
    for name in sites:
        counted = [rank[name] for rank in ranks if name in rank]
        mean = sum(count * mean for count, mean in counted) / max(1, sum(count for count, _ in counted))
        if mean > 0 and math.isfinite(mean):
            found[name] = mean
    return found
