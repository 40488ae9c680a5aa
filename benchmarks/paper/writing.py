"""Write tables, figures, keep decisions and the slimmed network, each with what it is from."""

import json
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from benchmarks.lab import decisions
from benchmarks.lab.circumstances import command
from benchmarks.lab.networks import vgg16
from benchmarks.paper.figures import FIGURES, subject
from benchmarks.paper.measuring import Measurer, key_of
from benchmarks.paper.tables import TABLES, markdown
from isw_plugin import CVGate
from isw_plugin.measure import hardware

__all__ = ["Writer", "load_slimmed"]

DECISIONS = 256  # images
GATES = {  # at which keep decisions are stored
    "vgg16": CVGate(0.5, 0.5),
    "resnet18": CVGate(0.5, 0.5),
    "resnet18-pooled": CVGate(0.5, 0.5),
    "mobilenetv2": CVGate(1.0, 0.5),
    "vgg16-bn-l1": CVGate(0.5, 0.5),
    "slimmed-vgg16": CVGate(0.7, 0.7),
    "mobilenetv2-imagenet": CVGate(0.8, 0.3),
}
ABOUT = (
    "Ours, and in brackets the paper's (Liu et al., 2019; its own training schedules, lossless images). "
    "acc: accuracy, pr: prune ratio, the share of channels dropped. alpha, beta as in the paper; a dropped map is "
    'zero for all its users (scope="all").'
)


@dataclass(frozen=True)
class Writer:
    """Writes into ``out`` what the measurer finds.

    Args:
        data: What the images are, in words.
        scale: The scale's name.
        earlier: A folder of tables of an earlier run: what they have and this run has not is taken over.
    """

    measurer: Measurer
    out: Path
    data: str
    scale: str
    earlier: Path | None = None

    def provenance(self) -> dict[str, Any]:
        """Where numbers are from: command, machine, versions, images, and every trained network's recipe."""
        bench = self.measurer.bench
        networks = {
            recipe.name: recipe.settings() | {"origin": bench.facts(recipe)["origin"]}
            for recipe in self.measurer.trained()
        }
        return {
            "command": command("benchmarks.paper"),
            "scale": self.scale,
            "data": self.data,
            "images": {part: len(getattr(bench.splits, part)) for part in ("train", "held_out", "test")},
            "hardware": f"{hardware(bench.device)}, {torch.get_num_threads()} CPU threads",
            "versions": {name: version(name) for name in ("torch", "timm", "torch-pruning", "isw_plugin")},
            "precision": "bfloat16 autocast" if self.measurer.bfloat16 else "float32",
            "date": date.today().isoformat(),
            "networks": networks,
        }

    def write(self, names: list[str]) -> None:
        """Keep decisions, then figures and tables by name, and with Table 6 the slimmed network."""
        self.decisions()  # these first: what is recorded of every image is measured as well
        for name in sorted(names, key=lambda name: name in TABLES):
            print(name, flush=True)
            (self.table if name in TABLES else self.figure)(name)
        if "table6" in names:
            self.slimmed()

    def table(self, name: str) -> None:
        """``name``.json and ``name``.md."""
        table, provenance = TABLES[name](self.measurer), self.provenance()
        stored = self._stored(name)
        if stored and (merged := table.with_stored(stored)) is not table:
            table, provenance = merged, provenance | {"earlier": _other_runs(provenance, stored["provenance"])}
        self._json(name, table.to_dict() | {"provenance": provenance})
        words = "\n\nOf an earlier run: ".join(map(_words, [provenance, *provenance.get("earlier", [])]))
        head = f"# Table {name.removeprefix('table')}: {table.title}\n\n{words}\n\n{ABOUT}\n\n"
        self._text(f"{name}.md", head + markdown(table))

    def _stored(self, name: str) -> dict[str, Any] | None:
        file = self.earlier and self.earlier / f"{name}.json"
        return json.loads(file.read_text()) if file and file.exists() else None

    def figure(self, name: str) -> None:
        """``name``.png and ``name``.json; the latter alone, saying so, where no network is trained."""
        figure = FIGURES[name]
        found = subject(self.measurer, figure.networks, figure.gate, self.data)
        numbers: dict[str, Any] = {"title": figure.title, "run": found is not None}
        if found is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            numbers |= {
                "network": found.network,
                "lambda": found.lambda_,
                "gate": repr(found.gate),
                "caption": found.caption,
            }
            numbers |= figure.draw(found, self.out / f"{name}.png")
        self._json(name, numbers | {"provenance": self.provenance()})

    def decisions(self) -> None:
        """decisions/RECIPE.npz: what every trained network keeps of 256 test images, spread over the test set."""
        for recipe in self.measurer.trained():
            gate = GATES[recipe.network]
            records = self.measurer.records(recipe.network, recipe.lambda_, gate)
            if records is None:
                continue
            count = len(records.labels)
            images = torch.linspace(0, count - 1, min(DECISIONS, count)).round().long()
            keep = {name: mask[images] for name, mask in records.keep.items()}
            facts = {"recipe": recipe.settings(), "gate": key_of(gate), "data": self.data, "images": images.tolist()}
            decisions.save(self.out / "decisions" / f"{recipe.name}.npz", keep, **facts)

    def slimmed(self) -> None:
        """slimmed-vgg16-LAMBDA.safetensors: the fine-tuned slimmed VGG16 of the smallest lambda above 0, in float16."""
        lambdas = [value for value in self.measurer.lambdas("slimmed-vgg16") if value]
        recipe = self.measurer.recipe("slimmed-vgg16", lambdas[0]) if lambdas else None
        if recipe is None:
            return
        bench = self.measurer.bench
        weights, facts = bench.run(recipe).load("trained")
        half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        splits = bench.splits
        stored = facts | {
            "classes": list(splits.classes),
            "mean": splits.mean.tolist(),
            "std": splits.std.tolist(),
            "data": self.data,
            "recipe": recipe.settings(),
        }
        path = self.out / f"{recipe.name}.safetensors"
        path.write_bytes(save(half, metadata={"facts": json.dumps(stored)}))

    def _json(self, name: str, values: dict[str, Any]) -> None:
        self._text(f"{name}.json", json.dumps(values, indent=1) + "\n")

    def _text(self, name: str, text: str) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_text(text)


def load_slimmed(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The slimmed VGG16 that ``Writer.slimmed`` stored, as float32 in eval mode, and the facts beside it.

    Images go in as (pixels - mean) / std, pixels 0 to 255.
    """
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = vgg16(tuple(facts["widths"]), len(facts["classes"]))
    model.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return model.eval(), facts


def _other_runs(new: dict[str, Any], stored: dict[str, Any]) -> list[dict[str, Any]]:
    """Provenance of the stored networks that are not of the new run, run by run."""
    runs = [{name: value for name, value in stored.items() if name != "earlier"}, *stored.get("earlier", [])]
    left = [
        run | {"networks": {name: of for name, of in run["networks"].items() if name not in new["networks"]}}
        for run in runs
    ]
    return [run for run in left if run["networks"]]


def _words(provenance: dict[str, Any]) -> str:
    images = provenance["images"]
    versions = ", ".join(f"{name} {number}" for name, number in provenance["versions"].items())
    networks = [
        f"- {name}: {facts['origin']} (batch {facts['batch']}, {facts['precision']}, seed {facts['seed']})"
        for name, facts in provenance["networks"].items()
    ]
    counts = ", ".join(f"{count} {part.replace('_', '-')}" for part, count in images.items())
    trained = "\n".join(networks) or "Nothing is trained."
    parts = [
        f"{provenance['data']}: {counts} images" if networks else provenance["data"],
        f"scale `{provenance['scale']}`",
        f"measured in {provenance['precision']}",
        provenance["hardware"],
        versions,
        provenance["date"],
    ]
    return f"{'; '.join(parts)}:\n\n    {provenance['command']}\n\n{trained}"
