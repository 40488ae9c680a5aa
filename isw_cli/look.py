"""Commands that look at a model: sites, accuracy, time; and files for other runtimes."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from isw_cli.data import images_in, preparation
from isw_cli.errors import InputError
from isw_cli.models import Subject, attached, subject
from isw_cli.output import Tracked, as_json, errors, tell
from isw_plugin import InstanceWisePruner, evaluate, export
from isw_plugin.accelerate import LoadedModel

__all__ = ["example", "loaded", "show_evaluation", "show_sites", "show_times", "write_export"]


def loaded(
    name: str, data: Path, size: int | None, batch: int, limit: int, pretrained: bool, weights: Path | None
) -> tuple[Subject, Any, Any]:
    """The model, and images to choose on and to report on; a timm model gets as many outputs as there are classes."""
    any_size = preparation(torch.nn.Identity(), size)
    classes = len(images_in(data, any_size, batch, limit)[0].classes)
    found = subject(name, classes=classes, pretrained=pretrained, weights=weights)
    first, second = images_in(data, preparation(found.model, size, Path(name)), batch, limit)
    if found.random and not isinstance(found.model, LoadedModel):
        errors.print(f"warning: {name} has random weights: pass --pretrained, or --weights FILE", markup=False)
    outputs = getattr(found.model, "num_classes", None)
    if isinstance(outputs, int) and outputs != classes:
        raise InputError(
            f"{name} has {outputs} outputs and {data} {classes} classes: name images of its own classes, or train "
            "the model on these and pass --weights"
        )
    return found, first, second


def example(found: Subject, size: int | None, batch: int) -> torch.Tensor:
    """Noise."""
    declared = preparation(found.model, size, Path(found.name))
    return torch.randn(batch, declared.channels, declared.size, declared.size)


def show_sites(name: str, size: int | None, json: bool) -> None:
    found = subject(name)
    pruner = attached(found, example(found, size, 2))
    left_out = pruner._found.left_out
    if json:
        sites = {s.name: {"channels": s.channels, "readers": [c.layer for c in s.consumers]} for s in pruner.sites}
        as_json({"model": name, "sites": sites, "left_out": left_out})
        return
    tell(pruner.summary())


def show_evaluation(
    name: str,
    data: Path,
    size: int | None,
    batch: int,
    limit: int,
    pretrained: bool,
    weights: Path | None,
    json: bool,
) -> None:
    found, _, images = loaded(name, data, size, batch, limit, pretrained, weights)
    if isinstance(found.model, LoadedModel):
        right = sum(int((found.model(x).argmax(1) == y).sum()) for x, y in Tracked(images, "evaluating"))
        facts = {
            "instances": len(images.files),
            "accuracy": right / len(images.files),
            "execution": found.model.execution,
        }
        as_json(facts) if json else tell(f"{len(images.files)} images: accuracy {facts['accuracy']:.4f}")
        return
    report = evaluate(found.model, Tracked(images, "evaluating"))
    as_json(report.to_dict()) if json else tell(str(report))


def show_times(name: str, size: int | None, batch: int, alpha: float, beta: float, json: bool) -> None:
    found = subject(name)
    inputs = example(found, size, batch)
    if isinstance(found.model, LoadedModel):
        raise InputError(f"{name} is a fast model, timed when it was made: name the gated model's folder")
    fast = attached(found, inputs, alpha, beta).accelerate(inputs)
    if json:
        as_json({"execution": fast.execution, "verdict": fast.verdict(), **asdict(fast.fitted)})
        return
    tell(fast.summary())
    tell(fast.verdict())


def write_export(name: str, to: Path, size: int | None, force: bool, json: bool) -> None:
    writers = {".onnx": export.onnx, ".xml": export.openvino}
    if to.suffix not in writers:
        raise InputError(f"--to {to}: a file that ends in .onnx, or in .xml for OpenVINO")
    if to.exists() and not force:
        raise InputError(f"--to {to} exists: name another file, or pass --force to replace it")
    found = subject(name)
    if not isinstance(found.pruner, InstanceWisePruner):
        raise InputError(f"{name} has no gates: name a folder of `isw gate` (OUT/gated) or of save_pretrained")
    inputs = None if size is None else example(found, size, 2)
    path = writers[to.suffix](found.pruner, to, inputs)
    as_json({"file": str(path)}) if json else tell(
        f"wrote {path}: gates act in it by zeros, dropped channels are computed"
    )
