"""Commands that look at a model: sites, accuracy, time; and files for other runtimes."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from isw_cli.data import Images, images_in, preparation
from isw_cli.errors import InputError, line
from isw_cli.models import Subject, attached, subject
from isw_cli.output import Tracked, as_json, errors, tell
from isw_cli.request import Request
from isw_plugin import CVGate, InstanceWisePruner, evaluate, export
from isw_plugin.accelerate import LoadedModel
from isw_plugin.measure.scores import _logits, top1

__all__ = ["example", "loaded", "show_evaluation", "show_sites", "show_times", "write_export"]


def loaded(request: Request) -> tuple[Subject, Images, Images]:
    """The model, and images to choose on and to report on; a timm model gets as many outputs as there are classes."""
    any_size = preparation(nn.Identity(), request.size)
    classes = images_in(request.data, any_size, request.batch, request.limit)[0].classes
    found = subject(request, len(classes))
    prepare = preparation(found.model, request.size, Path(request.model))
    first, second = images_in(request.data, prepare, request.batch, request.limit)
    if found.random and not isinstance(found.model, LoadedModel):
        errors.print(f"warning: {request.model} has random weights: pass --pretrained, or --weights FILE", markup=False)
    _require_own_classes(found, second, request.data)
    return found, first, second


def _require_own_classes(found: Subject, images: Images, data: Path) -> None:
    """Outputs have to be those of the images' classes, in number, and by name where names are known."""
    known = images.prepare.classes
    if known is not None and tuple(known) != images.classes:
        other = sorted(set(known) ^ set(images.classes)) or ["the order"]
        raise InputError(
            f"{found.name} was gated on other classes than {data} holds ({', '.join(other[:3])} differ): name images "
            f"of its own, {', '.join(known[:5])}"
        )
    inputs, _ = next(iter(images))
    try:
        with torch.no_grad():
            outputs = _logits(found.model(inputs)).shape
    except Exception as error:  # whatever a model raises
        side = images.prepare.size
        raise InputError(
            f"{found.name} does not run on images of {side} x {side}: {line(error)}. --size sets their side"
        ) from error
    if len(outputs) != 2 or outputs[1] != len(images.classes):
        raise InputError(
            f"{found.name} has {outputs[1] if len(outputs) == 2 else tuple(outputs)} outputs and {data} "
            f"{len(images.classes)} classes: name images of its own classes, or train the model on these and pass "
            "--weights"
        )


def example(found: Subject, request: Request) -> torch.Tensor:
    """Noise."""
    declared = preparation(found.model, request.size, Path(request.model))
    return torch.randn(request.batch, declared.channels, declared.size, declared.size)


def show_sites(request: Request, json: bool) -> None:
    found = subject(request)
    pruner = attached(found, example(found, request))
    left_out = pruner._found.left_out
    if json:
        sites = {s.name: {"channels": s.channels, "readers": [c.layer for c in s.consumers]} for s in pruner.sites}
        as_json({"model": request.model, "sites": sites, "left_out": left_out})
        return
    tell(pruner.summary())


def show_evaluation(request: Request, json: bool) -> None:
    found, _, images = loaded(request)
    if isinstance(found.model, LoadedModel):
        right = sum(int(top1(found.model(x), y).sum()) for x, y in Tracked(images, "evaluating"))
        facts = {
            "instances": len(images.files),
            "accuracy": right / len(images.files),
            "execution": found.model.execution,
        }
        as_json(facts) if json else tell(f"{len(images.files)} images: accuracy {facts['accuracy']:.4f}")
        return
    report = evaluate(found.model, Tracked(images, "evaluating"))
    as_json(report.to_dict()) if json else tell(str(report))


def show_times(request: Request, alpha: float | None, beta: float | None, json: bool) -> None:
    found = subject(request)
    inputs = example(found, request)
    if isinstance(found.model, LoadedModel):
        raise InputError(f"{found.name} is a fast model, timed when it was made: name the gated model's folder")
    given = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    if found.pruner is not None and given:
        _set(found.pruner, given)
    fast = attached(found, inputs, given.get("alpha", 0.0), given.get("beta", 1.0)).accelerate(inputs)
    if json:
        as_json({"execution": fast.execution, "verdict": fast.verdict(), **asdict(fast.fitted)})
        return
    tell(fast.summary())
    tell(fast.verdict())


def _set(pruner: InstanceWisePruner, given: dict[str, float]) -> None:
    """At every site, also where a site had its own."""
    if not isinstance(pruner.gate, CVGate):
        options = " ".join(f"--{name}" for name in given)
        raise InputError(f"{options}: the model's gates are {pruner.gate}, which has none: leave them out")
    others = {
        name: {key: value for key, value in own.items() if key not in given} for name, own in pruner.per_site.items()
    }
    pruner.set_thresholds(per_site={name: own for name, own in others.items() if own}, **given)


def write_export(request: Request, to: Path, force: bool, json: bool) -> None:
    writers = {".onnx": export.onnx, ".xml": export.openvino}
    if to.suffix not in writers:
        raise InputError(f"--to {to}: a file that ends in .onnx, or in .xml for OpenVINO")
    if to.exists() and not force:
        raise InputError(f"--to {to} exists: name another file, or pass --force to replace it")
    found = subject(request)
    fast = found.model if isinstance(found.model, LoadedModel) else None
    source = fast or found.pruner
    if source is None:
        raise InputError(f"{found.name} has no gates: name a folder of `isw gate` (OUT/gated) or of save_pretrained")
    inputs = None if request.size is None or fast else example(found, request)
    path = writers[to.suffix](source, to, inputs)
    gates = "no gates" if fast else "gates act by zeros"
    as_json({"file": str(path)}) if json else tell(f"wrote {path}: {gates}, dropped channels are computed")
