"""One pass over a loader: accuracy, prune ratio, MACs saved and time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isw_plugin.accelerate import Accelerated, Record
from isw_plugin.errors import NonFiniteFeatureError, SettingError
from isw_plugin.functional import coefficient_of_variation
from isw_plugin.measure.latency import Latency, summarize, timed
from isw_plugin.measure.macs import DenseMacs, count_dense, decisions, gated_pruner, saved_by_site
from isw_plugin.measure.modes import measuring
from isw_plugin.ranks import of_all_ranks
from isw_plugin.wrappers import unwrapped

__all__ = ["ClassReport", "GateReport", "Records", "SiteReport", "evaluate"]

Batches = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[nn.Module, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SiteReport:
    """Means over instances: share of channels kept, share of all MACs saved by this site, CV (Eq. 6)."""

    keep_ratio: float
    macs_saved: float
    cv: float


@dataclass(frozen=True)
class ClassReport:
    """Means over the instances of one class."""

    instances: int
    accuracy: float
    prune_ratio: float
    macs_saved: float


@dataclass(frozen=True)
class Records:
    """What was seen of every instance, in the loader's order, rank by rank.

    Attributes:
        labels: (N,) int64.
        scores: (N,) float, the metric of each instance (1 where right).
        prune_ratio: (N,) share of channels dropped.
        macs: (N,) multiply-adds.
        keep: Site name -> (N, C) bool.
        cv: Site name -> (N,).
    """

    labels: Tensor
    scores: Tensor
    prune_ratio: Tensor
    macs: Tensor
    keep: dict[str, Tensor]
    cv: dict[str, Tensor]


@dataclass(frozen=True)
class GateReport:
    """What a model did on a data set.

    Attributes:
        accuracy: Mean of the metric.
        prune_ratio: Dropped / all channels over all sites, mean over instances.
        dense_macs, macs: Multiply-adds of an image with every channel, and as gated (means).
        macs_saved: 1 - macs / dense_macs.
        gate_macs: The gates' own multiply-adds for an image, in neither.
        emptied: (instance, site) pairs that lost every channel.
        execution: "dense"; "masked": dropped channels were zeroed, not skipped; "accelerated": skipped.
        per_site: By site name.
        per_class: By label.
        records: Per instance, if asked for.
    """

    instances: int
    accuracy: float
    prune_ratio: float
    dense_macs: float
    macs: float
    macs_saved: float
    gate_macs: int
    emptied: int
    execution: str
    latency: Latency
    per_site: dict[str, SiteReport]
    per_class: dict[int, ClassReport]
    records: Records | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records, as plain JSON values."""
        values = {name: value for name, value in self.__dict__.items() if name != "records"}
        nested = {name: {str(k): asdict(v) for k, v in values[name].items()} for name in ("per_site", "per_class")}
        return values | nested | {"latency": asdict(self.latency)}

    def __str__(self) -> str:
        return (
            f"{self.instances} instances: accuracy {self.accuracy:.4f}, prune ratio {self.prune_ratio:.3f}, "
            f"{self.macs / 1e6:.2f} of {self.dense_macs / 1e6:.2f} MMACs ({self.macs_saved:.1%} saved), "
            f"{self.emptied} emptied; {self.execution}: {self.latency}"
        )


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    forward: Forward | None = None,
    metric: Metric | None = None,
    device: torch.device | str | None = None,
    records: bool = False,
    across_ranks: bool = True,
) -> GateReport:
    """Run a model over labelled images with its gates as they are.

    Args:
        model: A bare, an attached or an accelerated model; run in eval mode, flags restored.
        loader: Gives (images, labels); labels (N,).
        forward: ``forward(model, images) -> outputs``; ``model(images)`` if None.
        metric: ``metric(outputs, labels) -> (N,)`` score of each instance; 1 where the largest output is
            the label's, if None.
        device: Where the images go; the model's own device if None.
        records: Keep what was seen of every instance.
        across_ranks: Under torch.distributed, report on what all ranks have seen, each its part of the
            images; every rank must call this then. False: on this rank's loader alone. Images that a
            sampler repeats to fill a rank up count twice. Latency is always this rank's.

    Raises:
        NonFiniteFeatureError: A gated map holds NaN or infinity; names the first such site.
        SettingError: The loader is empty, or ``forward`` does not run the model once on the whole batch.
        AttachError: The pruner is attached to a part of the model.
    """
    call = forward or _call
    tally = _Tally(model, call)
    score = metric or _top1
    place = torch.device(device) if device is not None else next(model.parameters(), torch.empty(0)).device
    with measuring(model):
        for images, labels in loader:
            images = images.to(place, non_blocking=True)
            with decisions(model) as decided:
                outputs, seconds = timed(lambda batch=images: call(model, batch), place)  # type: ignore[misc]
            tally.add(images, labels.cpu(), score(outputs, labels.to(place)).double().cpu(), decided, seconds)
    return tally.report(place, records, across_ranks)


def _call(model: nn.Module, images: Tensor) -> Tensor:
    outputs: Tensor = model(images)
    return outputs


def _top1(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.argmax(1) == labels


class _Tally:
    """Collects batches; holds a few numbers an instance, and its keep bits."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model = model
        self.forward = forward
        self.pruner = gated_pruner(model)
        self.dense: dict[tuple[int, ...], DenseMacs] = {}  # by image shape
        self.rows: dict[str, list[Tensor]] = {}
        self.keep: dict[str, list[Tensor]] = {}
        self.cv: dict[str, list[Tensor]] = {}
        self.saved: dict[str, list[Tensor]] = {}
        self.seconds: list[float] = []

    def add(self, images: Tensor, labels: Tensor, scores: Tensor, decided: Record, seconds: float) -> None:
        """Take in a batch that has just run, and what its gates decided."""
        self.seconds.append(seconds)
        count = len(labels)
        keep, norms = decided.keep, decided.norms
        _require_finite(norms)
        self._require_whole(keep, count)
        dense = self._dense(images)
        saved = saved_by_site(self.pruner.sites, keep, dense) if self.pruner else {}
        for name in keep:
            self.keep.setdefault(name, []).append(keep[name].cpu())
            self.cv.setdefault(name, []).append(coefficient_of_variation(norms[name]).cpu())
            self.saved.setdefault(name, []).append(saved[name])
        total = torch.full((count,), float(dense.total), dtype=torch.float64)
        row = {"labels": labels, "scores": scores, "dense": total, "macs": total - sum(saved.values())}
        for name, values in row.items():
            self.rows.setdefault(name, []).append(values)

    def _require_whole(self, keep: dict[str, Tensor], instances: int) -> None:
        """One decision for every image at every site, or the means would be of something else."""
        for site in self.pruner.sites if self.pruner else ():
            decided = len(keep[site.name]) if site.name in keep else 0
            if decided != instances:
                raise SettingError(
                    f"{site.name} decided for {decided} instances of a batch of {instances}: forward must run the "
                    "model once, on the whole batch, through every site"
                )

    def _dense(self, images: Tensor) -> DenseMacs:
        shape = tuple(images.shape[1:])
        if shape not in self.dense:
            self.dense[shape] = count_dense(self.model, images[:1], self.forward)
        return self.dense[shape]

    def report(self, device: torch.device, with_records: bool, across_ranks: bool) -> GateReport:
        """The means over all that was taken in."""
        rows, keep, cv, saved = self._joined(across_ranks)
        if not self.rows:
            raise SettingError("the loader gave no batch: there is nothing to evaluate")
        dropped = _dropped_share(keep, len(rows["labels"]))
        records = Records(rows["labels"], rows["scores"], dropped, rows["macs"], keep, cv)
        dense, macs = rows["dense"].mean().item(), rows["macs"].mean().item()
        return GateReport(
            instances=len(dropped),
            accuracy=rows["scores"].mean().item(),
            prune_ratio=dropped.mean().item(),
            dense_macs=dense,
            macs=macs,
            macs_saved=1 - macs / dense,
            gate_macs=next(iter(self.dense.values())).gate,
            emptied=sum(int((~mask.any(1)).sum()) for mask in keep.values()),
            execution=self._execution(),
            latency=summarize(self.seconds, [len(labels) for labels in self.rows["labels"]], device),
            per_site={name: _site(keep[name], cv[name], saved[name], dense) for name in keep},
            per_class=_by_class(records, rows["dense"]),
            records=records if with_records else None,
        )

    def _execution(self) -> str:
        model = unwrapped(self.model)
        if isinstance(model, Accelerated):
            return model.execution
        return "masked" if self.pruner else "dense"

    def _joined(self, across_ranks: bool) -> list[dict[str, Tensor]]:
        """Rows, keep, CV and saved MACs of all instances."""
        tables = (self.rows, self.keep, self.cv, self.saved)
        mine = [{name: torch.cat(values) for name, values in table.items()} for table in tables]
        ranks = of_all_ranks(mine) if across_ranks else [mine]
        return [_concatenated(same) for same in zip(*ranks, strict=True)]


def _concatenated(tables: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tables of the same columns, one below the other; a rank without images has none."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: torch.cat([table[name] for table in tables if name in table]) for name in names}


def _site(keep: Tensor, cv: Tensor, saved: Tensor, dense: float) -> SiteReport:
    return SiteReport(keep.double().mean().item(), saved.mean().item() / dense, cv.double().mean().item())


def _require_finite(norms: dict[str, Tensor]) -> None:
    if not norms:
        return
    finite = torch.stack([norm.isfinite().all() for norm in norms.values()])
    if not finite.all():
        first = list(norms)[int(finite.int().argmin())]
        raise NonFiniteFeatureError(f"the feature map of {first} holds NaN or infinity: its gate is undefined there")


def _dropped_share(keep: dict[str, Tensor], instances: int) -> Tensor:
    """Dropped / all channels of each instance, (N,) float64."""
    if not keep:
        return torch.zeros(instances, dtype=torch.float64)
    dropped = torch.stack([(~mask).sum(1) for mask in keep.values()]).sum(0)
    return dropped.double() / sum(mask.shape[1] for mask in keep.values())


def _by_class(records: Records, dense: Tensor) -> dict[int, ClassReport]:
    saved = 1 - records.macs / dense
    reports = {}
    for label in torch.unique(records.labels).tolist():
        of_class = records.labels == label
        means = [values[of_class].mean().item() for values in (records.scores, records.prune_ratio, saved)]
        reports[int(label)] = ClassReport(int(of_class.sum()), *means)
    return reports
