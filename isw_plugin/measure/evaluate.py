"""One pass over a loader: accuracy, prune ratio, MACs saved and time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isw_plugin.accelerate import Accelerated, Record
from isw_plugin.batches import Batch, Batches, batches_in, fitting
from isw_plugin.errors import ISWError, NonFiniteFeatureError, ProbeError, SettingError
from isw_plugin.functional import coefficient_of_variation
from isw_plugin.inputs import arguments, call, device_of, is_list_of_images, measuring, on_device
from isw_plugin.measure.latency import Latency, summarize, timed
from isw_plugin.measure.macs import (
    DenseMacs,
    bare,
    count_dense,
    decisions,
    gated_pruner,
    require_decided,
    saved_by_site,
)
from isw_plugin.measure.scores import Metric, class_labels, scored, top1
from isw_plugin.ranks import of_all_ranks
from isw_plugin.wrappers import unwrapped

__all__ = ["ClassReport", "GateReport", "Records", "SiteReport", "evaluate"]

Forward = Callable[[nn.Module, Any], Any]

_NO_CLASS = -1


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
        labels: (N,) int64; -1 where a metric takes labels that are not the number of a class.
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
        per_class: By label, where labels are classes.
        records: Per instance, if asked for.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import evaluate
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> report = evaluate(model, [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))])
        >>> report.instances, report.execution, report.dense_macs
        (2, 'dense', 10656.0)
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
        loader: Gives batches: (inputs, labels), or mappings, dataclasses or named tuples with a field "labels",
            "label", "targets", "target" or "y", whose other fields are inputs by name. Inputs are a tensor, a tuple of
            arguments, a dict of them by name, or a list of images (C, H, W).
        forward: ``forward(model, inputs) -> outputs``; the model's own call if None, on those named inputs that its
            forward takes.
        metric: ``metric(outputs, labels) -> (N,)`` finite score of each instance, from outputs and labels as they
            are. If None, 1 where the largest of (N, classes) outputs is the label's, of labels (N,); outputs may
            be held in a tuple, first, or in a field ``logits``.
        device: Where inputs and labels go; the model's own device if None.
        records: Keep what was seen of every instance.
        across_ranks: Under torch.distributed, report on what all ranks have seen, each its part of the
            images; every rank must call this then. False: on this rank's loader alone. Images that a
            sampler repeats to fill a rank up count twice. Latency is always this rank's.

    Raises:
        NonFiniteFeatureError: A gated map holds NaN or infinity; names the first such site.
        SettingError: The loader is empty or one batch, a batch has no labels, labels or outputs do not fit the
            metric, the metric is not one finite score of each instance, or ``forward`` does not run the model once on
            the whole batch.
        ProbeError: The model fails on the first batch, called without ``forward``.
        AttachError: The pruner is attached to a part of the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from isw_plugin import InstanceWisePruner, MinNorm, evaluate
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
        >>> pruner = InstanceWisePruner(model, images, gate=MinNorm(0.5))
        >>> with pruner.gating():
        ...     report = evaluate(model, [(images, labels)])  # a loader, or a list of batches
        >>> report.prune_ratio, round(report.macs_saved, 3)
        (0.5, 0.135)
    """
    tally = _Tally(model, forward or call)
    place = torch.device(device) if device is not None else device_of(model)
    with measuring(model):
        for given in batches_in(loader):
            batch = Batch.of(given)
            inputs = on_device(batch.inputs if forward else fitting(batch.inputs, bare(model)), place)
            first = forward is None and not tally.seconds
            with decisions(model) as decided, _explained(model, inputs) if first else nullcontext():
                outputs, seconds = timed(lambda given=inputs: tally.forward(model, given), place)  # type: ignore[misc]
            scores = scored(metric or top1, outputs, on_device(batch.labels, place), batch.instances)
            tally.add(replace(batch, inputs=inputs), scores, decided, seconds)
    return tally.report(place, records, across_ranks)


@contextmanager
def _explained(model: nn.Module, inputs: Any) -> Iterator[None]:
    """What fails in a model's first call is said with how it was called."""
    try:
        yield
    except (ISWError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        args, kwargs = arguments(inputs)
        given = ", ".join([*(_shape(arg) for arg in args), *(f"{name}={_shape(arg)}" for name, arg in kwargs.items())])
        raise ProbeError(
            f"{type(model).__name__} could not be called as model({given}), as the loader's first batch was "
            f"understood: {error!r}. If it is meant otherwise, pass forward=lambda model, inputs: ..."
        ) from error


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return f"[{', '.join(map(_shape, value))}]" if isinstance(value, list | tuple) else type(value).__name__


class _Tally:
    """Collects batches; holds a few numbers an instance, and its keep bits."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.model = model
        self.forward = forward
        self.pruner = gated_pruner(model)
        self.dense: dict[Any, DenseMacs] = {}  # by the inputs' shapes
        self.rows: dict[str, list[Tensor]] = {}
        self.keep: dict[str, list[Tensor]] = {}
        self.cv: dict[str, list[Tensor]] = {}
        self.saved: dict[str, list[Tensor]] = {}
        self.seconds: list[float] = []

    def add(self, batch: Batch, scores: Tensor, decided: Record, seconds: float) -> None:
        """Take in a batch that has just run, and what its gates decided."""
        self.seconds.append(seconds)
        keep, norms = decided.keep, decided.norms
        _require_finite(norms)
        sites = self.pruner.sites if self.pruner else ()
        require_decided(sites, keep, batch.instances)
        dense = self._dense(batch)
        saved = saved_by_site(self.pruner, keep, norms, dense) if self.pruner else {}
        for name in keep:
            self.keep.setdefault(name, []).append(keep[name].cpu())
            self.cv.setdefault(name, []).append(coefficient_of_variation(norms[name]).cpu())
            self.saved.setdefault(name, []).append(saved[name])
        total = torch.full((batch.instances,), float(dense.total), dtype=torch.float64)
        classes = class_labels(batch.labels)
        labels = torch.full((batch.instances,), _NO_CLASS) if classes is None else classes.cpu()
        row = {"labels": labels, "scores": scores, "dense": total, "macs": total - sum(saved.values())}
        for name, values in row.items():
            self.rows.setdefault(name, []).append(values)

    def _dense(self, batch: Batch) -> DenseMacs:
        """Of one instance: of the first, or where images of several sizes make one list, of the mean."""
        if not is_list_of_images(batch.inputs):
            batch = batch.first(1)
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch.inputs) if isinstance(leaf, Tensor)]
        key = (batch.instances, *shapes)
        if key not in self.dense:
            self.dense[key] = count_dense(self.model, batch.inputs, self.forward, batch.instances)
        return self.dense[key]

    def report(self, device: torch.device, with_records: bool, across_ranks: bool) -> GateReport:
        """The means over all that was taken in."""
        rows, keep, cv, saved = self._joined(across_ranks)
        if not self.rows:
            raise SettingError(
                "the loader gave no batch: there is nothing to evaluate. A generator gives its batches once: pass a "
                "DataLoader or a list"
            )
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
    for label in torch.unique(records.labels[records.labels != _NO_CLASS]).tolist():
        of_class = records.labels == label
        means = [values[of_class].mean().item() for values in (records.scores, records.prune_ratio, saved)]
        reports[int(label)] = ClassReport(int(of_class.sum()), *means)
    return reports
