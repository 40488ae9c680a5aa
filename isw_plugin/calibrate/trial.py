"""Candidates are run on held-out images, which are kept in memory so that all see the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from isw_plugin.batches import Batch, Batches, batches_in
from isw_plugin.calibrate.result import Candidate, Parameters
from isw_plugin.gates import CVGate, LearnedGate
from isw_plugin.measure.evaluate import Forward, GateReport, evaluate
from isw_plugin.measure.scores import Metric, cross_entropy
from isw_plugin.measure.sweep import at_reference
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["Measured", "Trial", "first"]


@dataclass(frozen=True)
class Measured:
    """How a model is run and judged on held-out images (see ``evaluate``)."""

    batches: Sequence[Batch]
    forward: Forward | None
    metric: Metric | None
    across_ranks: bool

    def evaluate(self, pruner: InstanceWisePruner, **settings: Any) -> GateReport:
        """The report on all images, with its gates as they are."""
        run = {"forward": self.forward, "metric": self.metric, "across_ranks": self.across_ranks}
        return evaluate(pruner.model, self.batches, **run | settings)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """What shows how much single sites bear, (N,): cross entropy, or less the metric where one is given."""
        return cross_entropy(outputs, labels) if self.metric is None else -torch.as_tensor(self.metric(outputs, labels))

    def first(self, instances: int) -> "Measured":
        """On the first images alone."""
        return replace(self, batches=list(first(self.batches, instances)))


class Trial:
    """Runs candidates; leaves the pruner's thresholds and on / off as they were.

    Candidates that are sure to do what another did are not run. Two reasons are known, both of the CV gate: an alpha
    that no map's CV exceeds drops nothing, and two alphas between which no CV lies decide alike. Sites decide one
    after the other, so what holds for the first one's decisions holds for the next one's map.
    """

    def __init__(self, pruner: InstanceWisePruner, measured: Measured, progress: Any) -> None:
        self.pruner = pruner
        self.measured = measured
        self.progress = progress
        self.earlier: dict[str, Parameters] = pruner.calibration["best"]["per_site"] if pruner.calibration else {}
        self.off: GateReport | None = None
        self.cv: dict[str, Tensor] = {}  # of the maps with gates off
        self.seen: list[tuple[Candidate, dict[str, Tensor]]] = []  # the same everywhere, and their CVs

    def expect(self, candidates: int) -> None:
        """Show that so many are to come."""
        self.progress.total = (self.progress.total or 0) + candidates
        self.progress.refresh()

    def reference(self) -> GateReport:
        """With gates off; of a gate with parameters, at its reference."""
        if isinstance(self.pruner.gate, CVGate):
            with self.pruner.gating(per_site={}, beta=0.0):  # hands maps on as they are, and sees them
                self.off = self.measured.evaluate(self.pruner, records=True)
            assert self.off.records is not None
            self.cv = self.off.records.cv
            return self.off
        if isinstance(self.pruner.gate, LearnedGate):  # without it the network is another
            with at_reference(self.pruner, self.pruner.gate):
                return self.measured.evaluate(self.pruner)
        enabled = self.pruner.enabled
        self.pruner.disable()
        try:
            return self.measured.evaluate(self.pruner)
        finally:
            if enabled:
                self.pruner.enable()

    def candidate(self, parameters: Parameters, per_site: Mapping[str, Parameters]) -> Candidate:
        """What the gate does with these parameters, on all images."""
        known = None if per_site else self._known(parameters)
        if known is None:
            report = self._run(self.measured, parameters, per_site, records=not per_site)
            known = _as_candidate(report, parameters, per_site)
            if report.records is not None:
                self.seen.append((known, report.records.cv))
        self.progress.update()
        self.progress.set_postfix_str(str(known))
        return known

    def shown(self, images: Measured, parameters: Parameters, per_site: Mapping[str, Parameters]) -> Candidate:
        """The same on these images, with the mean loss as accuracy."""
        self.progress.update()
        return _as_candidate(self._run(images, parameters, per_site, metric=images.loss), parameters, per_site)

    def _run(
        self, measured: Measured, parameters: Parameters, per_site: Mapping[str, Parameters], **settings: Any
    ) -> GateReport:
        with self.pruner.gating(per_site=self.overlaid(per_site), **parameters):
            return measured.evaluate(self.pruner, **settings)

    def _known(self, parameters: Parameters) -> Candidate | None:
        """What these parameters, the same everywhere, are sure to do."""
        if not isinstance(self.pruner.gate, CVGate):
            return None
        if self.off is not None and self._keeps_all(parameters):
            return _as_candidate(self.off, parameters, {})
        alike = (done for done, cv in self.seen if self._alike(done.parameters, parameters, cv))
        return next((replace(done, parameters=parameters) for done in alike), None)

    def _keeps_all(self, parameters: Parameters) -> bool:
        held = {site: self._held(site, parameters) for site in self.cv}
        return all(beta == 0 or not (self.cv[site] > alpha).any() for site, (alpha, beta) in held.items())

    def _alike(self, one: Parameters, other: Parameters, cv: Mapping[str, Tensor]) -> bool:
        """Whether two choices decide alike on maps of these CVs, which one of them saw."""
        for site, of_site in cv.items():
            (low, beta), (high, other_beta) = sorted((self._held(site, one), self._held(site, other)))
            if beta != other_beta or ((of_site > low) & (of_site <= high)).any():
                return False
        return True

    def _held(self, site: str, parameters: Parameters) -> tuple[float, float]:
        """Alpha and beta of a site."""
        held = vars(self.pruner.gate) | parameters | self.own.get(site, {})
        return held["alpha"], held["beta"]

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """What the user wants to differ, by site: all that an earlier calibration did not set."""
        found = {site: _without(differs, self.earlier.get(site, {})) for site, differs in self.pruner.per_site.items()}
        return {site: differs for site, differs in found.items() if differs}

    def overlaid(self, per_site: Mapping[str, Parameters]) -> dict[str, dict[str, Any]] | None:
        """Thresholds of single sites and what the user wants to differ; None: as it is."""
        if not per_site and not self.earlier:
            return None
        own = self.own
        return own | {site: dict(chosen) | own.get(site, {}) for site, chosen in per_site.items()}


def _as_candidate(report: GateReport, parameters: Parameters, per_site: Mapping[str, Parameters]) -> Candidate:
    found = (report.accuracy, report.prune_ratio, report.macs, report.macs_saved, report.emptied)
    return Candidate(parameters, *found, dict(per_site))


def _without(override: Mapping[str, Any], calibrated: Parameters) -> dict[str, Any]:
    return {name: value for name, value in override.items() if (name, value) not in calibrated.items()}


def first(loader: Batches, instances: int) -> Iterator[Batch]:
    """The first instances of a loader."""
    left = instances
    for given in batches_in(loader):
        batch = Batch.of(given).first(left)
        yield batch
        left -= batch.instances
        if left <= 0:
            return
