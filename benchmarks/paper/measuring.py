"""What a trained network does under a gate: measured once on all test images, kept in its run folder."""

import json
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.recipes import Recipe
from benchmarks.paper.training import Bench
from isw_plugin import CVGate, Gate, InstanceWisePruner, MinNorm, RandomGate, evaluate
from isw_plugin.measure import Records

__all__ = ["OFF", "Measurer", "key_of"]

OFF = CVGate(0.0, 0.0)  # drops nothing; its norms are recorded
Measured = dict[str, Any]


def key_of(gate: Gate) -> str:
    """A name of a gate for files."""
    if isinstance(gate, CVGate):
        return f"cv-{gate.alpha:g}-{gate.beta:g}"
    if isinstance(gate, MinNorm):
        return f"min-{gate.ratio:.4f}"
    assert isinstance(gate, RandomGate)
    return f"random-{gate.ratio:.4f}-{gate.seed}"


@dataclass(frozen=True)
class Measurer:
    """Measures the networks that are trained; None stands for those that are not.

    Args:
        bfloat16: Run networks under autocast, as those of this precision are trained.
        stored_only: Measure nothing that is not measured yet: None stands for that too.
    """

    bench: Bench
    recipes: list[Recipe]
    bfloat16: bool = False
    stored_only: bool = False

    def _file(self, gate: Gate) -> str:
        return f"{key_of(gate)}-{len(self.bench.splits.test)}-{'bfloat16' if self.bfloat16 else 'float32'}"

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs: Tensor = model(images)
        return outputs.float()

    def recipe(self, network: str, lambda_: float) -> Recipe | None:
        """The trained recipe of this network and lambda."""
        return next((r for r in self.trained() if (r.network, r.lambda_) == (network, lambda_)), None)

    def trained(self) -> list[Recipe]:
        return [recipe for recipe in self.recipes if self.bench.has(recipe)]

    def lambdas(self, network: str) -> list[float]:
        """Of the trained networks of this name, rising."""
        return sorted(recipe.lambda_ for recipe in self.trained() if recipe.network == network)

    def at(self, network: str, lambda_: float, gate: Gate) -> Measured | None:
        """Accuracy, prune ratio, share of MACs saved and CV by site on the test images, under a gate."""
        recipe = self.recipe(network, lambda_)
        if recipe is None:
            return None
        run, file = self.bench.run(recipe), f"measured-{self._file(gate)}.json"
        if not (run.path / file).exists():
            if self.stored_only:
                return None
            self._measure(recipe, gate, file)
        stored: Measured = json.loads((run.path / file).read_text())
        return stored

    def records(self, network: str, lambda_: float, gate: Gate) -> Records | None:
        """What was seen of every test image."""
        recipe = self.recipe(network, lambda_)
        if recipe is None:
            return None
        run, name = self.bench.run(recipe), f"records-{self._file(gate)}"
        if not run.has(name):
            if self.stored_only:
                return None
            self._measure(recipe, gate, f"measured-{self._file(gate)}.json", records=name)
        tensors, facts = run.load(name)
        keep = {site: tensors[f"keep.{site}"].bool() for site in facts["sites"]}
        cv = {site: tensors[f"cv.{site}"] for site in facts["sites"]}
        return Records(*(tensors[part] for part in _PARTS), keep, cv)

    def _measure(self, recipe: Recipe, gate: Gate, file: str, records: str | None = None) -> None:
        print(f"  {recipe.name}: {gate}", flush=True)
        model = self.bench.network(recipe)
        InstanceWisePruner(model, self.bench.inputs, gate=gate, scope=recipe.scope).step()
        report = evaluate(model, self.bench.batches("test"), forward=self._forward, records=records is not None)
        measured = {
            "gate": repr(gate),
            "accuracy": report.accuracy,
            "prune_ratio": report.prune_ratio,
            "macs_saved": report.macs_saved,
            "emptied": report.emptied,
            "instances": report.instances,
            "date": date.today().isoformat(),
            "cv": {name: site.cv for name, site in report.per_site.items()},
            "keep": {name: site.keep_ratio for name, site in report.per_site.items()},
        }
        run = self.bench.run(recipe)
        if records is not None and report.records is not None:
            run.save(records, _tensors(report.records), sites=list(report.records.keep))
        run.write(file, json.dumps(measured, indent=2))


_PARTS = ("labels", "scores", "prune_ratio", "macs")


def _tensors(records: Records) -> dict[str, Tensor]:
    tensors = {part: getattr(records, part) for part in _PARTS}
    tensors |= {f"keep.{site}": mask.to(torch.uint8) for site, mask in records.keep.items()}
    return tensors | {f"cv.{site}": values for site, values in records.cv.items()}
