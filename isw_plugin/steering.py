"""Thresholds that follow a wanted share of kept channels while a network trains with gates on.

A threshold is relative to an image's mean norm. Training with gates on lets the norms of dropped channels fall, and the
mean of the others rise, so that fixed thresholds drop more and more; these do not.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from numbers import Real

from torch import Tensor

from isw_plugin.errors import NothingRecordedError, SettingError
from isw_plugin.functional import coefficient_of_variation, mean_norm
from isw_plugin.gates import CVGate
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.ranks import of_all_ranks

__all__ = ["steer_thresholds"]

_LARGEST = math.nextafter(2.0, 0.0)
_SMALLEST = 1e-6  # drops channels that are zero


def steer_thresholds(pruner: InstanceWisePruner, keep: Mapping[str, float], *, rate: float = 0.05) -> None:
    """Move the beta of each site towards the one under which its gate would have kept a share of the last batch.

    Called after every training step with gates on, beta is a running mean of the quantile of norm / mean norm
    over instances and channels, so the share holds for many images together, and each image goes on having its
    own. Where channels are zero anyway, or beta reaches 2, fewer or more are kept than wanted. Thresholds are in
    ``per_site``, and so in ``state_dict``: training that goes on later goes on with them. Under torch.distributed
    every rank must call this, and all take the mean of what they want. A compiled model is compiled anew
    whenever thresholds change: call it rarely there. Where activations are checkpointed, call it after backward, which
    decides again.

    Args:
        pruner: With the CV gate, after a gated forward. A site's alpha stays: instances of smaller CV drop nothing.
        keep: Site name -> share of (instance, channel) pairs to keep, in (0, 1]; sites that are not named stay.
        rate: How far to move, in (0, 1].

    Raises:
        SettingError: No pruner, another gate, no or an unknown site, a share or rate outside its range.
        NothingRecordedError: No gated forward before.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, steer_thresholds
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images = torch.rand(8, 3, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, alpha=0.0, beta=0.0)
        >>> pruner.step()
        >>> for _ in range(12):  # training steps
        ...     _ = model(images)
        ...     steer_thresholds(pruner, {"0": 0.5}, rate=0.5)
        >>> round(pruner.keep["0"].float().mean().item(), 1)
        0.5
    """
    if not isinstance(pruner, InstanceWisePruner):
        raise SettingError(f"a pruner is steered, and this is a {type(pruner).__name__}: InstanceWisePruner.of(model)")
    gate = pruner.gate
    if not isinstance(gate, CVGate):
        raise SettingError(f"gate={gate!r}: beta is a threshold of the CV gate")
    _check(pruner, keep, rate)
    norms, per_site = pruner.norms, pruner.per_site
    if not norms:
        raise NothingRecordedError("thresholds follow the last forward with gates on: there was none")
    present = {site: dataclasses.asdict(gate) | per_site.get(site, {}) for site in keep}
    mine = {site: _wanted(norms[site], present[site]["alpha"], keep[site]) for site in keep if site in norms}
    ranks = of_all_ranks(mine)
    for site, parameters in present.items():
        wanted = [rank[site] for rank in ranks if math.isfinite(rank.get(site, math.nan))]
        if wanted:
            beta = parameters["beta"] + rate * (sum(wanted) / len(wanted) - parameters["beta"])
            per_site[site] = per_site.get(site, {}) | {"beta": beta}
    pruner.set_thresholds(per_site=per_site)


def _wanted(norms: Tensor, alpha: float, keep: float) -> float:
    """The beta that drops all but this share of a batch's channels, norms (N, C); NaN where none may be dropped."""
    dropped = round((1 - keep) * norms.numel())
    prunable = norms[coefficient_of_variation(norms) > alpha]
    if not dropped or not len(prunable):
        return math.nan if dropped else 0.0
    relative = (prunable / mean_norm(prunable)).flatten()
    smallest_kept = relative.kthvalue(min(dropped + 1, len(relative))).values.item()
    return min(max(smallest_kept, _SMALLEST), _LARGEST)


def _check(pruner: InstanceWisePruner, keep: Mapping[str, float], rate: float) -> None:
    if not isinstance(keep, Mapping) or not keep:
        raise SettingError(f"keep={keep!r}: a dict of site name -> share of channels to keep, for one site or more")
    sites = [site.name for site in pruner.sites]
    unknown = [site for site in keep if site not in sites]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), sites, n=3, cutoff=0.3) or sites[:3]
        raise SettingError(f"keep has {unknown[0]!r}, which is no site. Close names: {', '.join(close)}")
    for site, share in keep.items():
        if not isinstance(share, Real) or not 0 < share <= 1:
            raise SettingError(f"keep={share!r} at {site}: the share of channels to keep lies in (0, 1]")
    if not isinstance(rate, Real) or not 0 < rate <= 1:
        raise SettingError(f"rate={rate!r}: how far to move lies in (0, 1]")
