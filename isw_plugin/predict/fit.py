"""From some thousand images to a head for every site that can have one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from isw_plugin.batches import Batches, batches_in, taken_apart
from isw_plugin.errors import NonFiniteFeatureError, PredictionError
from isw_plugin.gates import Gate, keeps_all
from isw_plugin.heads import UNSEEN, Head, Statistics, features
from isw_plugin.hooks import Memory
from isw_plugin.inputs import call, device_of, measuring, on_device
from isw_plugin.predict.report import HeadReport, Predictors
from isw_plugin.predict.ridge import ridge
from isw_plugin.sites import Site

__all__ = ["fit"]

_HELD_OUT = 5  # every fifth image judges
_LEAST_RECALL = 0.9
_SUPPOSED = 0.5  # share of channels kept, where the gate keeps all at present


@dataclass
class _Seen:
    """What was measured, on the CPU, by site; and by layer the MACs of one output channel."""

    norms: dict[str, list[Tensor]] = field(default_factory=dict)
    read: dict[str, list[Statistics]] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    images: int = 0

    def add(self, memory: Memory) -> None:
        """Take in the last call."""
        for name, norms in memory.norms.items():
            if not norms.isfinite().all():
                raise NonFiniteFeatureError(f"the feature map of {name} holds NaN or infinity: no head can be fitted")
            self.norms.setdefault(name, []).append(norms.cpu())
        for name, (statistics, positions) in memory.statistics.items():
            self.read.setdefault(name, []).append(Statistics(*(part.cpu() for part in statistics)))
            self.positions[name] = positions
        self.images += len(next(iter(memory.norms.values())))


def fit(
    model: nn.Module, memory: Memory, sites: Sequence[Site], batches: Batches, max_instances: int
) -> tuple[dict[str, Head], Predictors]:
    """See ``InstanceWisePruner.fit_predictors``; gates are on, and every site measures.

    Returns:
        The heads of the sites that shall be predicted, and what was found.
    """
    candidates = [site for site in sites if not site.making.reason]
    if not candidates:
        raise PredictionError(f"no site can be predicted; {sites[0].name}: {sites[0].making.reason}")
    for site in candidates:
        _require_norms_only(memory.gates[site.name], site)
    seen = _observed(model, memory, candidates, batches, max_instances)
    held_out = torch.arange(seen.images) % _HELD_OUT == _HELD_OUT - 1
    _require_enough(candidates, seen, int((~held_out).sum()))
    read = {
        name: Statistics(*(torch.cat(part) for part in zip(*parts, strict=True))) for name, parts in seen.read.items()
    }
    heads, reports = {}, {}
    for site in tqdm(candidates, desc="heads", disable=None, leave=False):
        norms = torch.cat(seen.norms[site.name])
        macs = sum(seen.macs[layer] for layer in site.making.layers)
        head, reports[site.name] = _fitted(
            site, memory.gates[site.name], norms, read, seen.positions[site.name], held_out, macs
        )
        if not reports[site.name].reason:
            heads[site.name] = head
    measured = {site.name: site.making.reason for site in sites if site.making.reason}
    return heads, Predictors(reports, measured, int((~held_out).sum()), int(held_out.sum()))


def _require_norms_only(gate: Gate, site: Site) -> None:
    gate(UNSEEN, torch.ones(1, site.channels))  # type: ignore[arg-type]  # raises where it is read


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
                inputs, _ = taken_apart(batch)
                call(model, on_device(inputs, device))
                before = seen.images
                seen.add(memory)
                bar.update(seen.images - before)
                if seen.images >= most:
                    break
    finally:
        memory.watched = frozenset()
    if not seen.images:
        raise PredictionError("the loader gave no images: heads cannot be fitted")
    return seen


@contextmanager
def _layers_counted(model: nn.Module, sites: Sequence[Site], macs: dict[str, float]) -> Iterator[None]:
    """Fill in the MACs of one output channel of the layers that make these sites."""

    def counter(name: str, site: Site) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight: Any = module.weight
            macs[name] = output[0].numel() / site.channels * weight.numel() / len(weight)

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


def _require_enough(sites: Sequence[Site], seen: _Seen, fitted: int) -> None:
    for site in sites:
        inputs = 2 * sum(seen.read[source][0].rms.shape[1] for source in site.making.sources)
        if fitted <= inputs:
            needed = -(-(inputs + 1) * _HELD_OUT // (_HELD_OUT - 1))
            raise PredictionError(
                f"the head of {site.name} has {inputs} inputs, and {fitted} images would fit it (every fifth of "
                f"{seen.images} is held out): give {needed} images or more, and max_instances as many"
            )
        if not any(norms.any() for norms in seen.norms[site.name]):
            raise PredictionError(f"{site.name} is zero for all {seen.images} images: there is nothing to predict")


def _fitted(
    site: Site,
    gate: Gate,
    norms: Tensor,
    read: Mapping[str, Statistics],
    positions: int,
    held_out: Tensor,
    macs: float,
) -> tuple[Head, HeadReport]:
    phi, rms = features(read, site.making.sources), norms / positions**0.5
    found = ridge(phi[~held_out], rms[~held_out], (phi[held_out], rms[held_out]))
    head = Head(site.making.sources, found.weight, found.bias)
    shown = {name: Statistics(*(part[held_out] for part in read[name])) for name in site.making.sources}
    measured = gate(UNSEEN, norms[held_out])  # type: ignore[arg-type]
    keep = gate(UNSEEN, head.norms(shown, positions))  # type: ignore[arg-type]
    recall = (keep & measured).sum().item() / max(1, measured.sum().item())
    density = _SUPPOSED if keeps_all(gate) else keep.float().mean().item()
    saved = (1 - density) * site.channels * macs
    reason = ""
    if recall < _LEAST_RECALL:
        reason = f"its head finds {recall:.2f} of the channels that measuring keeps"
    elif saved <= head.macs:
        reason = f"its head takes {head.macs:,} MACs and saves {saved:,.0f}"
    report = HeadReport(
        found.r_squared, recall, keep.float().mean().item(), measured.float().mean().item(), head.macs, saved, reason
    )
    return head, report
