"""From some thousand images to a head for every site that can have one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from tqdm import tqdm

from isw_plugin.batches import Batches, batches_in, fitting, taken_apart
from isw_plugin.errors import ISWError, NonFiniteFeatureError, PredictionError
from isw_plugin.followers import following, last, root
from isw_plugin.gates import Gate, keeps_all
from isw_plugin.heads import UNSEEN, Head, Statistics, features, require_norms_only
from isw_plugin.hooks import Memory
from isw_plugin.inputs import call, device_of, instances_in, measuring, on_device
from isw_plugin.predict.report import HeadReport, Predictors
from isw_plugin.predict.ridge import ridge
from isw_plugin.ranks import of_all_ranks
from isw_plugin.sites import Site

__all__ = ["fit"]

_HELD_OUT = 5  # every fifth image judges
_LEAST_RECALL = 0.9
_SUPPOSED = 0.5  # share of channels kept, where the gate keeps all at present


class _Rows(NamedTuple):
    """What was measured at one site, a row for every image, on the CPU.

    ``norms`` are those that its gate decided on, ``scale`` is the root of the positions of the image's map; the others
    are statistics after the mask.
    """

    norms: Tensor
    scale: Tensor
    rms: Tensor
    mean: Tensor

    @classmethod
    def joined(cls, parts: Sequence["_Rows"]) -> "_Rows":
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass
class _Seen:
    """What was measured, by site, and the MACs of one output channel, by layer."""

    rows: dict[str, list[_Rows]] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    images: int = 0

    def add(self, memory: Memory, instances: int, most: int) -> None:
        """Take in the last call, but no more than ``most`` images."""
        norms, kept = memory.norms, min(instances, most)
        for name, of_site in norms.items():
            if len(of_site) != instances:
                raise PredictionError(
                    f"{name} decided for {len(of_site)} instances of a batch of {instances}: the model must run once, "
                    "on the whole batch, through every site"
                )
            if not of_site.isfinite().all():
                raise NonFiniteFeatureError(f"the feature map of {name} holds NaN or infinity: no head can be fitted")
        for name, found in memory.statistics.items():
            scale = torch.full((instances, 1), found.positions**0.5)
            rows = (part[:kept].cpu() for part in (norms[name], scale, found.rms, found.mean))
            self.rows.setdefault(name, []).append(_Rows(*rows))
        self.images += kept

    def table(self) -> dict[str, _Rows]:
        """All rows of every site."""
        return {name: _Rows.joined(parts) for name, parts in self.rows.items()}


def fit(
    model: nn.Module,
    memory: Memory,
    sites: Sequence[Site],
    batches: Batches,
    max_instances: int,
    may_follow: Mapping[str, str],
) -> tuple[dict[str, Head], Predictors]:
    """See ``InstanceWisePruner.fit_predictors``; gates are on, and every site measures.

    Args:
        may_follow: Sites that take over the decision of another, where that is predicted.

    Returns:
        The heads of the sites that shall be predicted, and what was found.
    """
    candidates = [site for site in sites if not site.making.reason]
    if not candidates:
        raise PredictionError(f"no site can be predicted; {sites[0].name}: {sites[0].making.reason}")
    predictable = {site.name for site in candidates}
    may_follow = {name: source for name, source in may_follow.items() if source in predictable}
    for site in candidates:
        require_norms_only(memory.gates[site.name], site)
    ranks = _of_all_ranks(lambda: _observed(model, memory, candidates, batches, max_instances))
    seen = _together(ranks)
    table = seen.table()
    held_out = torch.arange(seen.images) % _HELD_OUT == _HELD_OUT - 1
    fitted = int((~held_out).sum())
    _require_enough(sites, [site for site in candidates if site.name not in may_follow], seen.images, fitted)
    _require_alive(candidates, table, seen.images)
    macs = {site.name: sum(seen.macs[layer] for layer in site.making.layers) for site in candidates}
    fits = _Fits(memory.gates, table, held_out, macs, may_follow)
    for site in tqdm(candidates, desc="heads", disable=None, leave=False):
        if may_follow.get(site.name) in fits.keep:
            fits.follow(site)
        else:
            _require_enough(sites, [site], seen.images, fitted)
            fits.fit(site)
    measured = {site.name: site.making.reason for site in sites if site.making.reason}
    return of_all_ranks((fits.heads, Predictors(fits.reports, measured, fitted, seen.images - fitted)))[0]


def _of_all_ranks(observe: Callable[[], _Seen]) -> list[_Seen]:
    """What every rank has seen; what one raises, all raise, so that none waits for another."""
    try:
        mine: _Seen | ISWError = observe()
    except Exception as error:  # whatever a loader or a model raises
        of_all_ranks(error if isinstance(error, ISWError) else PredictionError(f"another rank failed: {error!r}"))
        raise
    ranks = of_all_ranks(mine)
    for found in ranks:
        if isinstance(found, ISWError):
            raise found
    return [found for found in ranks if isinstance(found, _Seen)]


def _observed(model: nn.Module, memory: Memory, sites: Sequence[Site], batches: Batches, most: int) -> _Seen:
    seen, device = _Seen(), device_of(model)
    memory.watched = frozenset(name for site in sites for name in (site.name, *site.making.sources))
    try:
        with (
            measuring(model),
            _layers_counted(model, sites, seen.macs),
            tqdm(total=most, unit="image", disable=None, leave=False) as bar,
        ):
            for batch in batches_in(batches):
                inputs = fitting(taken_apart(batch)[0], model)
                call(model, on_device(inputs, device))
                before = seen.images
                seen.add(memory, instances_in(inputs), most - before)
                bar.update(seen.images - before)
                if seen.images >= most:
                    break
    finally:
        memory.watched = frozenset()
    return seen


@contextmanager
def _layers_counted(model: nn.Module, sites: Sequence[Site], macs: dict[str, float]) -> Iterator[None]:
    """Fill in the MACs of one output channel of the layers that make these sites."""

    def counter(name: str, site: Site) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight: Any = module.weight
            spread: Tensor = args[0] if isinstance(module, _ConvTransposeNd) else output
            macs[name] = spread[0].numel() / site.channels * weight.numel() / len(weight)

        return count

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(counter(name, site)) for site in sites for name in site.making.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _together(ranks: Sequence[_Seen]) -> _Seen:
    """What all ranks have seen, in their order."""
    seen = _Seen(macs=next((rank.macs for rank in ranks if rank.macs), {}), images=sum(rank.images for rank in ranks))
    for rank in ranks:
        for name, parts in rank.rows.items():
            seen.rows.setdefault(name, []).extend(parts)
    return seen


def _require_enough(sites: Sequence[Site], candidates: Sequence[Site], images: int, fitted: int) -> None:
    """Images for every head."""
    channels = {site.name: site.channels for site in sites}
    inputs = {site.name: 2 * sum(channels[source] for source in site.making.sources) for site in candidates}
    widest = max(inputs, key=inputs.__getitem__)
    if fitted <= inputs[widest]:
        needed = -(-(inputs[widest] + 1) * _HELD_OUT // (_HELD_OUT - 1))
        raise PredictionError(
            f"the head of {widest} has {inputs[widest]} inputs, and {fitted} of {images} images would fit it (every "
            f"fifth judges): give {needed} images or more, and max_instances as many"
        )


def _require_alive(candidates: Sequence[Site], table: Mapping[str, _Rows], images: int) -> None:
    """Something to predict."""
    for site in candidates:
        if site.name not in table or not table[site.name].norms.any():
            raise PredictionError(
                f"{site.name} is zero for all {images} images, so there is nothing to predict: exclude it, or lower "
                "the thresholds before it"
            )


@dataclass
class _Fits:
    """Sites one after the other: their heads, what is said of them, and what predicted ones keep of held-out images.

    Args:
        macs: Of one channel in the layers that make a site, by site.
    """

    gates: Mapping[str, Gate]
    table: Mapping[str, _Rows]
    held_out: Tensor
    macs: Mapping[str, float]
    may_follow: Mapping[str, str]
    heads: dict[str, Head] = field(default_factory=dict)
    reports: dict[str, HeadReport] = field(default_factory=dict)
    keep: dict[str, Tensor] = field(default_factory=dict)

    def follow(self, site: Site) -> None:
        """Let a site keep what the one before it keeps."""
        source = self.may_follow[site.name]
        keep = self.keep[site.name] = self.keep[source]
        self.reports[site.name] = self._report(site, keep, follows=source)

    def fit(self, site: Site) -> None:
        """Fit a head, which is taken if it pays."""
        read = {name: Statistics(self.table[name].rms, self.table[name].mean, 1) for name in site.making.sources}
        rows, held_out = self.table[self._judged(site)], self.held_out
        phi, rms = features(read, site.making.sources), rows.norms / rows.scale
        found, explained = ridge(phi[~held_out], rms[~held_out], (phi[held_out], rms[held_out]))
        head = Head(site.making.sources, *found)
        keep = self.gates[site.name](UNSEEN, (head.norms(read, 1) * rows.scale)[held_out])
        report = self._report(site, keep, r_squared=explained, macs=head.macs)
        reason = self._refusal(site, head, report)
        self.reports[site.name] = replace(report, reason=reason)
        if not reason:
            self.heads[site.name], self.keep[site.name] = head, keep

    def _report(
        self, site: Site, keep: Tensor, r_squared: float | None = None, macs: int = 0, follows: str = ""
    ) -> HeadReport:
        gate = self.gates[root(self.may_follow, site.name) if follows else site.name]
        measured = gate(UNSEEN, self.table[self._judged(site)].norms[self.held_out])
        recall = (keep & measured).sum().item() / max(1, measured.sum().item())
        density = keep.float().mean().item()
        saved = (1 - (_SUPPOSED if keeps_all(gate) else density)) * site.channels * self.macs[site.name]
        return HeadReport(r_squared, recall, density, measured.float().mean().item(), macs, saved, follows=follows)

    def _judged(self, site: Site) -> str:
        """The site whose norms decide: the last that follows, as nothing else reads the maps before it."""
        return last(self.may_follow, site.name)

    def _refusal(self, site: Site, head: Head, report: HeadReport) -> str:
        """Why a head does not pay, together with the sites that follow it; "" where it does."""
        chain = sum(self.macs[name] for name in following(self.may_follow, site.name))
        saved = report.saved * chain / self.macs[site.name]
        if report.recall < _LEAST_RECALL:
            return f"its head finds {report.recall:.2f} of the channels that measuring keeps"
        return f"its head takes {head.macs:,} MACs and saves {saved:,.0f}" if saved <= head.macs else ""
