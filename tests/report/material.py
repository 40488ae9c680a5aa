"""Records and reports made by hand, for the tests of the report."""

import torch
from torch import Tensor

from isw_plugin.measure import ClassReport, GateReport, Latency, Records, SiteReport

LATENCY = Latency(2.0, 1.5, 2.5, batch=4, batches=3, hardware="Some CPU", threads=2)


def made_records(ratios: list[float], scores: list[float], labels: list[int] | None = None) -> Records:
    """Images that drop ``ratios`` of ten channels at each of two sites."""
    dropped = torch.tensor(ratios, dtype=torch.float64)
    keep = torch.arange(10) >= (10 * dropped).round()[:, None]
    return Records(
        labels=torch.tensor(labels or [0] * len(ratios)),
        scores=torch.tensor(scores, dtype=torch.float64),
        prune_ratio=dropped,
        macs=100 * (1 - dropped),
        keep={"first": keep, "second": keep.flip(1)},
        cv={"first": dropped.float(), "second": 2 * dropped.float()},
    )


def made_report(records: Records | None) -> GateReport:
    """The report that these records are of, at 100 MACs an image."""
    assert records is not None
    ratio = records.prune_ratio
    site = SiteReport(1 - ratio.mean().item(), ratio.mean().item() / 2, ratio.mean().item())
    return GateReport(
        instances=len(ratio),
        accuracy=records.scores.mean().item(),
        prune_ratio=ratio.mean().item(),
        dense_macs=100.0,
        macs=records.macs.mean().item(),
        macs_saved=ratio.mean().item(),
        gate_macs=4,
        emptied=0,
        execution="masked",
        latency=LATENCY,
        per_site=dict.fromkeys(records.keep, site),
        per_class={int(label): _of_class(records, records.labels == label) for label in records.labels.unique()},
        records=records,
    )


def _of_class(records: Records, of: Tensor) -> ClassReport:
    ratio = records.prune_ratio[of].mean().item()
    return ClassReport(int(of.sum()), records.scores[of].mean().item(), ratio, ratio)
