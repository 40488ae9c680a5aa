"""`isw gate` and `isw report`: from a model and images to thresholds, a page, and a fast model."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from isw_cli.data import Images, keep_preparation
from isw_cli.errors import InputError
from isw_cli.look import loaded
from isw_cli.models import attached
from isw_cli.output import Tracked, as_json, folder_for, table, tell
from isw_cli.request import Request
from isw_cli.rival import faster_by_openvino
from isw_plugin import calibrate, evaluate, export
from isw_plugin.accelerate import Accelerated
from isw_plugin.errors import UnsupportedError

__all__ = ["gate_model", "write_report"]

_WRITTEN = ("gated", "fast", "dense.onnx", "dense.xml")


def gate_model(request: Request, out: Path, max_drop: float, force: bool, json: bool) -> None:
    from isw_plugin.report import write  # says at once that matplotlib is missing

    name = request.model
    with folder_for(out, force) as draft:
        found, held_out, images = loaded(request)
        inputs, _ = next(iter(held_out))  # what is reported on chooses nothing
        pruner = attached(found, inputs)
        choice = calibrate(pruner, Tracked(held_out, "reading"), max_drop=max_drop, max_instances=request.limit)
        pruner.disable()
        off = evaluate(pruner.model, Tracked(images, "gates off"))
        pruner.step()
        on = evaluate(pruner.model, Tracked(images, "gates on"), records=True)
        fast = pruner.accelerate(inputs)
        pruner.save_pretrained(draft / "gated")
        keep_preparation(draft / "gated", images)
        verdict = fast.verdict() + _saved(fast, draft / "fast", images)
        verdict += faster_by_openvino(pruner, fast, inputs, draft / "dense.xml") or _onnx(fast, draft / "dense.onnx")
        shown: dict[str, Any] = {"title": f"{name}, gated", "caption": f"{name} on {request.data}", "speed": verdict}
        write(on, draft / "report", classes=images.classes, calibration=choice, off=off, **shown)
        facts = {
            "model": name,
            "images": on.instances,
            "thresholds": choice.best.parameters,
            "accuracy_off": off.accuracy,
            "accuracy": on.accuracy,
            "prune_ratio": on.prune_ratio,
            "macs_saved": on.macs_saved,
            "execution": fast.execution,
            "verdict": verdict,
            "seconds": {
                key: asdict(fast.fitted)[key] for key in ("dense", "gated", "all_kept", "instances", "threads")
            },
            "wrote": ["report/index.html", *(name for name in _WRITTEN if (draft / name).exists())],
            "out": str(out),
        }
    as_json(facts) if json else _show(facts)


def _saved(fast: Accelerated, folder: Path, images: Images) -> str:
    """Saves a fast model with how images are prepared; says why where it cannot be saved."""
    if fast.execution == "masked":
        return ""
    try:
        fast.save_pretrained(folder)
    except UnsupportedError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return f"; it was not saved: {error}"
    keep_preparation(folder, images)
    return ""


def _onnx(fast: Accelerated, file: Path) -> str:
    """The file where onnxruntime is the fastest, and what to say of it."""
    if fast.execution != "dense" or fast.fitted.runtime != "onnxruntime" or fast.part:
        return ""
    export.onnx(fast, file)
    return f". Without gates onnxruntime is the fastest here: {file.name} is what it runs"


def _show(facts: dict[str, Any]) -> None:
    thresholds = ", ".join(f"{key} {value:g}" for key, value in facts["thresholds"].items())
    rows = [
        ("thresholds", thresholds),
        ("accuracy, gates off", f"{facts['accuracy_off']:.2%}"),
        ("accuracy, gates on", f"{facts['accuracy']:.2%}"),
        ("channels dropped", f"{facts['prune_ratio']:.1%}"),
        ("MACs saved", f"{facts['macs_saved']:.1%}"),
    ]
    table(rows, f"{facts['model']}, {facts['images']:,} images")
    tell(facts["verdict"])
    tell("wrote " + ", ".join(f"{facts['out']}/{place}" for place in facts["wrote"]))


def write_report(request: Request, out: Path, force: bool, json: bool) -> None:
    from isw_plugin.report import write

    name, data = request.model, request.data
    with folder_for(out, force) as draft:
        found, _, images = loaded(request)
        if found.pruner is None:
            raise InputError(
                f"{name} has no gates: `isw gate {name} --data {data}` chooses thresholds and writes a page"
            )
        found.pruner.disable()
        off = evaluate(found.pruner.model, Tracked(images, "gates off"))
        found.pruner.step()
        with torch.no_grad():
            on = evaluate(found.pruner.model, Tracked(images, "gates on"), records=True)
        write(on, draft, classes=images.classes, title=f"{name}, gated", caption=f"{name} on {data}", off=off)
    as_json({"out": str(out)}) if json else tell(f"wrote {out}/index.html")
