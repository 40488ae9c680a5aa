"""What a channel norm weighs in the penalty, under each reduction.

"sum" is Eq. 5, lambda times the sum over the batch. "mean" divides it by the batch. "relative" takes norms in
units of what they were when training began, site by site: lambda times the mean over sites, instances and
channels of norm / reference, which is lambda at the start for any network, map size and batch.
"""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from isw_plugin.functional import instance_penalty
from isw_plugin.ranks import of_all_ranks

__all__ = ["REDUCTIONS", "decay", "first_norms", "relative_weights"]

REDUCTIONS = ("sum", "mean", "relative")


def decay(norms: Mapping[str, Tensor], weights: Mapping[str, float], reduction: str) -> Tensor:
    """The penalty of one forward.

    Args:
        norms: Site name -> channel norms (N, C).
        weights: Site name -> weight of each norm.
        reduction: "sum" over instances, or anything else for their mean.

    Returns:
        A scalar in the graph.
    """
    instances = instance_penalty(weights[name] * norm for name, norm in norms.items())
    return instances.sum() if reduction == "sum" else instances.mean()


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


def first_norms(norms: Mapping[str, Tensor], sites: Iterable[str]) -> dict[str, float]:
    """The mean norm of sites over the instances of all ranks, to be their references.

    Sites that were not recorded, or whose maps are all zero or not finite, are left out. Under
    torch.distributed every rank must call this, with the same ``sites``.
    """
    mine = {name: (len(norms[name]), norms[name].mean().item()) for name in sites if name in norms}
    ranks = of_all_ranks(mine)
    found = {}
    for name in sites:
        seen = [rank[name] for rank in ranks if name in rank]
        mean = sum(count * mean for count, mean in seen) / max(1, sum(count for count, _ in seen))
        if mean > 0 and math.isfinite(mean):
            found[name] = mean
    return found
