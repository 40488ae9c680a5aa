"""`isw gate` and `isw report`: from a model and images to thresholds, a page, and a fast model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from isw_cli.data import keep_preparation
from isw_cli.errors import InputError
from isw_cli.look import loaded
from isw_cli.models import attached
from isw_cli.output import Tracked, as_json, folder_for, table, tell
from isw_plugin import calibrate, evaluate
from isw_plugin.accelerate import Accelerated

__all__ = ["gate_model", "write_report"]


def gate_model(
    name: str,
    data: Path,
    out: Path,
    max_drop: float,
    size: int | None,
    batch: int,
    limit: int,
    pretrained: bool,
    weights: Path | None,
    force: bool,
    json: bool,
) -> None:
    from isw_plugin.report import write  # says at once that matplotlib is missing

    with folder_for(out, force) as draft:
        found, held_out, images = loaded(name, data, size, batch, limit, pretrained, weights)
        inputs, _ = next(iter(images))
        pruner = attached(found, inputs)
        choice = calibrate(pruner, Tracked(held_out, "reading"), max_drop=max_drop, max_instances=limit)
        pruner.disable()
        off = evaluate(pruner.model, Tracked(images, "gates off"))
        pruner.step()
        on = evaluate(pruner.model, Tracked(images, "gates on"), records=True)
        fast = pruner.accelerate(inputs)
        reason = fast.verdict()
        write(
            on,
            draft / "report",
            classes=images.classes,
            calibration=choice,
            title=f"{name}, gated",
            caption=f"{name} on {data}",
            off=off,
            speed=reason,
        )
        pruner.save_pretrained(draft / "gated")
        keep_preparation(draft / "gated", images.prepare)
        if fast.execution != "masked":
            fast.save_pretrained(draft / "fast")
            keep_preparation(draft / "fast", images.prepare)
        facts = {
            "model": name,
            "images": on.instances,
            "thresholds": choice.best.parameters,
            "accuracy_off": off.accuracy,
            "accuracy": on.accuracy,
            "prune_ratio": on.prune_ratio,
            "macs_saved": on.macs_saved,
            "execution": fast.execution,
            "verdict": reason,
            "seconds": {
                key: asdict(fast.fitted)[key] for key in ("dense", "gated", "all_kept", "instances", "threads")
            },
            "out": str(out),
        }
    as_json(facts) if json else _show(facts, fast)


def _show(facts: dict[str, Any], fast: Accelerated) -> None:
    thresholds = ", ".join(f"{key} {value:g}" for key, value in facts["thresholds"].items())
    rows = [
        ("thresholds", thresholds),
        ("accuracy, gates off", f"{facts['accuracy_off']:.2%}"),
        ("accuracy, gates on", f"{facts['accuracy']:.2%}"),
        ("channels dropped", f"{facts['prune_ratio']:.1%}"),
        ("MACs saved", f"{facts['macs_saved']:.1%}"),
    ]
    table(f"{facts['model']}, {facts['images']:,} images", ("", ""), rows)
    tell(facts["verdict"])
    places = ["report/index.html", "gated"] + ["fast"] * (fast.execution != "masked")
    tell("wrote " + ", ".join(f"{facts['out']}/{place}" for place in places))


def write_report(
    name: str, data: Path, out: Path, size: int | None, batch: int, limit: int, force: bool, json: bool
) -> None:
    from isw_plugin.report import write

    with folder_for(out, force) as draft:
        found, _, images = loaded(name, data, size, batch, limit, False, None)
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
