"""Candidates are run on held-out images, which are kept in memory so that all see the same."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from isw_plugin.calibrate.record import Candidate, Parameters
from isw_plugin.errors import SettingError
from isw_plugin.measure.evaluate import Batches, Metric, evaluate
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["Trial", "first"]


class Trial:
    """Runs candidates; leaves the pruner's thresholds and on / off as they were."""

    def __init__(
        self, pruner: InstanceWisePruner, batches: list[tuple[Tensor, Tensor]], progress: Any, across_ranks: bool
    ) -> None:
        self.pruner = pruner
        self.across_ranks = across_ranks
        self.batches = batches
        self.progress = progress
        self.earlier: dict[str, Parameters] = pruner.calibration["best"]["per_site"] if pruner.calibration else {}

    def reference(self) -> tuple[float, int]:
        """Accuracy with gates off, and the number of images."""
        enabled = self.pruner.enabled
        self.pruner.disable()
        try:
            report = evaluate(self.pruner.model, self.batches, across_ranks=self.across_ranks)
        finally:
            if enabled:
                self.pruner.enable()
        return report.accuracy, report.instances

    def run(self, points: Iterable[Parameters]) -> list[Candidate]:
        """What the gate does with each choice of parameters, the same at all sites."""
        return [self.candidate(point, {}) for point in points]

    def candidate(self, parameters: Parameters, per_site: Mapping[str, Parameters]) -> Candidate:
        """What the gate does with these parameters, on all images."""
        candidate = self._run(self.batches, parameters, per_site)
        self.progress.update()
        self.progress.set_postfix_str(str(candidate))
        return candidate

    def shown(
        self, parameters: Parameters, per_site: Mapping[str, Parameters], metric: Metric, instances: int
    ) -> Candidate:
        """The same on the first images alone, with the mean of the metric as accuracy."""
        return self._run(list(first(self.batches, instances)), parameters, per_site, metric)

    def _run(
        self, batches: Batches, parameters: Parameters, per_site: Mapping[str, Parameters], metric: Metric | None = None
    ) -> Candidate:
        with self.pruner.gating(per_site=self.overlaid(per_site), **parameters):
            report = evaluate(self.pruner.model, batches, metric=metric, across_ranks=self.across_ranks)
        found = (report.accuracy, report.prune_ratio, report.macs, report.macs_saved, report.emptied)
        return Candidate(parameters, *found, dict(per_site))

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


def _without(override: Mapping[str, Any], calibrated: Parameters) -> dict[str, Any]:
    return {name: value for name, value in override.items() if (name, value) not in calibrated.items()}


def first(loader: Batches, instances: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The first images of a loader.

    Raises:
        SettingError: None are asked for.
    """
    if instances < 1:
        raise SettingError(f"max_instances={instances}: at least 1 image is needed")
    left = instances
    for images, labels in loader:
        yield images[:left], labels[:left]
        left -= len(labels)
        if left <= 0:
            return
