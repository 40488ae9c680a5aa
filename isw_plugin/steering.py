"""Thresholds that follow a budget, or a share of kept channels, while a network trains with gates on.

A threshold is relative to an image's mean norm. Training with gates on lets the norms of dropped channels fall, and the
mean of the others rise, so that fixed thresholds drop more and more; these do not.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, overload

from torch import Tensor

from isw_plugin.budget import Budget, next_target, relative_norms
from isw_plugin.errors import AttachError, BudgetError, NothingRecordedError, SettingError
from isw_plugin.followers import root
from isw_plugin.gates import CVGate
from isw_plugin.hooks import Memory, memory_of
from isw_plugin.pruner import InstanceWisePruner
from isw_plugin.ranks import of_all_ranks, on_all_ranks
from isw_plugin.settings import Settings
from isw_plugin.values import as_count

__all__ = ["checked_budget", "steer_thresholds"]

_LARGEST = math.nextafter(2.0, 0.0)
_SMALLEST = 1e-6  # drops channels that are zero


@overload
def steer_thresholds(pruner: InstanceWisePruner, keep: Mapping[str, float], *, rate: float = 0.05) -> None: ...


@overload
def steer_thresholds(pruner: InstanceWisePruner, *, macs_left: float, ramp: int = 0, rate: float = 0.05) -> float: ...


def steer_thresholds(
    pruner: InstanceWisePruner,
    keep: Mapping[str, float] | None = None,
    *,
    macs_left: float | None = None,
    ramp: int = 0,
    rate: float = 0.05,
) -> float | None:
    """Move the beta of each site towards the one under which its gate would have met a budget in the last batch.

    Called after every training step with gates on: a running mean of such betas holds for many images together, and
    each image goes on having its own channels. The budget is one number, ``macs_left``: the last channel dropped costs
    as much for the MACs that it saves at every site (docs/calibrating.md), and what gates left in truth is fed back. Or
    it is a share of channels for each site, ``keep``. Where channels are zero anyway, or beta reaches 2, fewer or more
    are kept than wanted. A batch with NaN or infinity moves nothing.

    ``state_dict`` has the thresholds and how far a ramp has come. Under torch.distributed every rank must call this,
    and all take the mean of what they want. A compiled model is compiled anew whenever thresholds change: call it
    rarely there. Where activations are checkpointed, call it after backward, which decides again.

    Args:
        pruner: With the CV gate, after a gated forward. A site's alpha stays: instances of smaller CV drop nothing.
        keep: Site name -> share of (instance, channel) pairs to keep, in (0, 1]; sites that are not named stay.
        macs_left: Share of the dense MACs to leave, in (0, 1], as ``count_macs`` counts them at the size that the sites
            were found on: inputs, outputs of predicted sites and heads.
        ramp: Calls in which the budget falls from 1 to ``macs_left``; 0: it holds at once. How far it has come is
            forgotten where gate parameters or ``per_site`` are set (``enable``, ``set_thresholds``).
        rate: How far to move, in (0, 1]; the first call with a budget goes the whole way.

    Returns:
        With a budget, the share of the MACs that the last gated forward left, of this rank.

    Raises:
        SettingError: No pruner, another gate, no or an unknown site, a share or rate outside its range, keep beside
            macs_left or none of them.
        NothingRecordedError: No gated forward before. Raised on all ranks where one had none.
        BudgetError: More is left where every site drops all that it can. Thresholds stay.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, count_macs, steer_thresholds
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
        >>> images = torch.rand(8, 3, 8, 8)
        >>> pruner = InstanceWisePruner(model, images, alpha=0.0, beta=0.0)
        >>> pruner.step()
        >>> for _ in range(12):  # training steps
        ...     _ = model(images)
        ...     _ = steer_thresholds(pruner, macs_left=0.7, rate=0.5)
        >>> round(1 - count_macs(model, images).saved.mean().item(), 1)
        0.7
    """
    memory, settings = _attached(pruner)
    _check_rate(rate)
    if (keep is None) == (macs_left is None):
        raise SettingError("thresholds follow macs_left=, a share of the MACs, or keep=, shares of channels by site")
    if macs_left is not None:
        budget = checked_budget(macs_left, ramp, rate)
        return _steered(pruner, settings, budget, ramp, rate)
    shares = _checked_shares(pruner, keep)
    if ramp:
        raise SettingError(f"ramp={ramp!r} is of macs_left; with keep=, let the shares fall from call to call")
    norms = on_all_ranks(lambda: _recorded(pruner))
    held = {site: _alpha(pruner, site) for site in shares if site in norms}
    wanted = {site: _wanted(norms[site], alpha, shares[site], memory.min_keep) for site, alpha in held.items()}
    _move(pruner, wanted, rate)
    return None


def checked_budget(macs_left: float, ramp: int, rate: float) -> float:
    """The share of the MACs to leave, as a float; SettingError unless thresholds can follow it so."""
    as_count("ramp", ramp, "a number of calls")
    _check_rate(rate)
    return _share("macs_left", macs_left, "the share of the dense MACs to leave,")


def _steered(pruner: InstanceWisePruner, settings: Settings, macs_left: float, ramp: int, rate: float) -> float:
    budget = on_all_ranks(lambda: _budget(pruner))
    least = max(of_all_ranks(budget.least() if budget.finite else 0.0))
    if least > macs_left:
        raise BudgetError(
            f"macs_left={macs_left:g}: {least:.3f} of the MACs are left where every site drops all that thresholds can "
            "make it. Aim higher, gate more layers, or predict (pruner.fit_predictors), which leaves outputs undone"
        )
    target = next_target(settings.budget, macs_left, ramp)
    _move(pruner, budget.wanted(target) if budget.finite else {}, rate if settings.budget is not None else 1.0)
    settings.budget = target
    return budget.measured


def _budget(pruner: InstanceWisePruner) -> Budget:
    _recorded(pruner)
    return Budget(pruner)


def _move(pruner: InstanceWisePruner, mine: Mapping[str, float], rate: float) -> None:
    """Each site's beta a part of the way to the mean of what the ranks want; NaN wants nothing."""
    per_site, ranks = pruner.per_site, of_all_ranks(dict(mine))
    for site in dict.fromkeys(site for rank_wants in ranks for site in rank_wants):
        wanted = [rank_wants[site] for rank_wants in ranks if math.isfinite(rank_wants.get(site, math.nan))]
        if wanted:
            present = per_site.get(site, {})
            before = present.get("beta", vars(pruner.gate)["beta"])
            per_site[site] = present | {"beta": before + rate * (sum(wanted) / len(wanted) - before)}
    pruner.set_thresholds(per_site=per_site)


def _wanted(norms: Tensor, alpha: float, keep: float, min_keep: int) -> float:
    """The beta that drops all but this share of a batch's channels, norms (N, C); NaN where none may be dropped."""
    dropped = round((1 - keep) * norms.numel())
    relative = relative_norms(norms, alpha, min_keep)
    if not dropped or not len(relative):
        return math.nan if dropped else 0.0
    smallest_kept = relative.kthvalue(min(dropped + 1, len(relative))).values.item()
    return min(max(smallest_kept, _SMALLEST), _LARGEST)


def _alpha(pruner: InstanceWisePruner, site: str) -> float:
    alpha: float = (dataclasses.asdict(pruner.gate) | pruner.per_site.get(site, {}))["alpha"]  # type: ignore[call-overload]  # a CVGate
    return alpha


def _attached(pruner: Any) -> tuple[Memory, Settings]:
    """Of a pruner that can be steered."""
    if not isinstance(pruner, InstanceWisePruner):
        raise SettingError(f"a pruner is steered, and this is a {type(pruner).__name__}: InstanceWisePruner.of(model)")
    if not isinstance(pruner.gate, CVGate):
        raise SettingError(f"gate={pruner.gate!r}: beta is a threshold of the CV gate")
    memory = memory_of(pruner.model)
    if memory is None or memory.settings is None:
        raise AttachError("this pruner was removed from its model: attach another")
    return memory, memory.settings


def _check_rate(rate: Any) -> None:
    if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 < float(rate) <= 1:
        raise SettingError(f"rate={rate!r}: how far to move lies in (0, 1]")


def _recorded(pruner: InstanceWisePruner) -> dict[str, Tensor]:
    norms = pruner.norms
    if not norms:
        raise NothingRecordedError("thresholds follow the last forward with gates on: there was none")
    return norms


def _checked_shares(pruner: InstanceWisePruner, keep: Any) -> dict[str, float]:
    if not isinstance(keep, Mapping) or not keep:
        raise SettingError(f"keep={keep!r}: a dict of site name -> share of channels to keep, for one site or more")
    for site in pruner.followers.keys() & keep.keys():
        raise SettingError(
            f"keep has {site!r}, which has no threshold: it keeps what {pruner.followers[site]} keeps. Name "
            f"{root(pruner.followers, site)!r}"
        )
    sites = [site.name for site in pruner.sites]
    unknown = [site for site in keep if site not in sites]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), sites, n=3, cutoff=0.3) or sites[:3]
        raise SettingError(f"keep has {unknown[0]!r}, which is no site. Close names: {', '.join(close)}")
    return {site: _share("keep", share, f"at {site}: the share of channels to keep") for site, share in keep.items()}


def _share(name: str, share: Any, meaning: str) -> float:
    if not isinstance(share, Real) or isinstance(share, bool) or not 0 < float(share) <= 1:
        raise SettingError(f"{name}={share!r} {meaning} lies in (0, 1]")
    return float(share)
