"""results/models.md, and the same as JSON, from the records of the zoo."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import timm

from benchmarks.zoo.models import smallest
from benchmarks.zoo.sites import module_of

__all__ = ["page", "summary", "verdict"]

Record = Mapping[str, Any]
_LEGEND = """\
The member with the fewest parameters of every timm module, and the tiny test models (last), with random norms and
biases and scaled filters. "gated": attached, bit-identical with gates off and at beta 0, a finite penalty with
gradients where sites are and none behind them, gates that drop 5-95 % and change the output, zeros in the columns
of every reader, a batch equal to its images alone, the same under `scope="consumers"`, and restored by `remove()`.
"engine": `accelerate()` decides and computes what masking does; the note says where it does not skip. "graphs":
exported and compiled (aot_eager). "pruned first": torch-pruning takes half of the channels of all layers or, where it
cannot, of those that share their channels with no other layer (the note says where); then all of "gated".
"skipped" is not counted as passed."""
_PARTS = {"gates": "gated", "engine": "engine", "graphs": "graphs", "pruned": "pruned first"}
_SAID = ("execution", "heads", "apart", "pruned")  # what a record tells beside its steps
_WORDS = ("ok", "skipped", "no", "not run")


def summary(records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """All that the page says, as plain values.

    Args:
        records: Part ("sites" and those of the table) -> its records; a part may be missing.
    """
    sites = {record["model"]: record for record in records.get("sites", [])}
    by_part = {part: {record["model"]: record for record in records.get(part, [])} for part in _PARTS}
    run = {name: record["module"] for part in by_part.values() for name, record in part.items()}
    others = [name for name in smallest(records.get("sites", [])) if sites[name]["module"] not in run.values()]
    names = {*run, *others}
    models = [_model(name, sites.get(name, {}), by_part) for name in names]
    return {
        "versions": {name: version(name) for name in ("timm", "torch", "torch-pruning")},
        "sites": _sites(list(sites.values())),
        "unlisted": sorted(set(map(module_of, timm.list_models())) - {model["module"] for model in models}),
        "models": sorted(
            models, key=lambda model: (model["model"].startswith("test_"), model["module"], model["model"])
        ),
    }


def verdict(record: Record | None) -> tuple[str, str]:
    """What a record says in a word ("ok", "skipped", "no", or "not run" where there is none), and why."""
    if record is None:
        return "not run", ""
    steps = {step: result for step, result in record["steps"].items() if step not in _SAID}
    failed = {step: result for step, result in steps.items() if result != "ok" and not result.startswith("skipped: ")}
    skipped = [result for result in steps.values() if result.startswith("skipped: ")]
    if failed:
        return "no", "; ".join(f"{step}: {result}" for step, result in failed.items())
    return ("skipped", skipped[0].removeprefix("skipped: ")) if skipped else ("ok", "")


def _model(name: str, sites: Record, by_part: Mapping[str, Mapping[str, Record]]) -> dict[str, Any]:
    held = [part[name] for part in by_part.values() if name in part]
    module = sites.get("module") or held[0]["module"]
    verdicts = {part: verdict(records.get(name)) for part, records in by_part.items()}
    notes = [f"{_PARTS[part]}: {why}" for part, (_, why) in verdicts.items() if why]
    execution = by_part["engine"].get(name, {"steps": {}})["steps"].get("execution", "")
    notes += [f"runs {execution}"] if execution and not execution.startswith("accelerated") else []
    which = by_part["pruned"].get(name, {"steps": {}})["steps"].get("pruned", "all layers")
    notes += [f"pruned: {which}"] if which != "all layers" else []
    counts = {"layers": sites.get("layers"), "sites": sites.get("sites")}
    words = {part: word for part, (word, _) in verdicts.items()}
    return {"module": module, "model": name, **counts, **words, "note": "; ".join(notes)}


def _sites(records: Sequence[Record]) -> dict[str, Any]:
    """Counts over entry points; empty where none was found to have sites."""
    built = [record for record in records if record["built"]]
    good = [record for record in built if not record["error"]]
    if not good:
        return {}
    reasons = Counter[str]()
    for record in good:
        reasons.update(record["reasons"])
    return {
        "entry_points": len(timm.list_models()),
        "run": len(records),
        "built": len(built),
        "found": len(good),
        "layers": sum(record["layers"] for record in good),
        "unaccounted": sum(len(record["unaccounted"]) for record in good),
        "in_sites": sum(record["in_sites"] for record in good),
        "models_with_columns_filled_twice": sum(bool(record["filled_twice"]) for record in good),
        "median_seconds": statistics.median(record["seconds"] for record in good),
        "median_cpu_seconds": statistics.median(record["cpu_seconds"] for record in good),
        "errors": {record["model"]: record["error"] for record in records if record["error"]},
        "reasons": dict(reasons.most_common(15)),
    }


def page(told: Mapping[str, Any], hardware: str = "") -> str:
    """The page as Markdown.

    Args:
        told: What ``summary`` gives.
        hardware: What the seconds were taken on.
    """
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    return "\n".join(
        [
            "# The zoo",
            "",
            "Every timm model: are its sites found, and does gating one do what it should? Written by",
            "`python -m benchmarks.zoo report`; the other parts of the same command make the records.",
            f"{versions}{f'; {hardware}' if hardware else ''}.",
            "",
            "| asked | bar | seen |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in _bars(told)),
            "",
            "## Sites of every entry point",
            "",
            *(_about_sites(told["sites"]) if told["sites"] else ["Not run."]),
            "",
            "## Gated for real",
            "",
            _LEGEND,
            "",
            *(_count(told["models"], part) for part in _PARTS),
            *_about_unlisted(told["unlisted"]),
            "",
            "| module | model | layers | sites | " + " | ".join(_PARTS.values()) + " | note |",
            "|---|---|---|---|" + "---|" * len(_PARTS) + "---|",
            *map(_row, told["models"]),
            "",
        ]
    )


def _bars(told: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    modules = [model for model in told["models"] if not model["model"].startswith("test_")]
    pruned = Counter(model["pruned"] for model in modules)
    return [
        *(_site_bars(told["sites"]) if told["sites"] else []),
        ("modules that pass gated, engine and graphs", ">= 96", _listed(Counter(map(_all_of_b, modules)))),
        (
            "modules that pass after torch-pruning",
            "all that it prunes",
            f"{pruned['ok']} of {pruned['ok'] + pruned['no']}; {_listed(pruned)}",
        ),
    ]


def _site_bars(sites: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found, built, layers = sites["found"], sites["built"], sites["layers"]
    return [
        (
            "entry points that timm builds on `meta` and whose sites are found",
            ">= 99.5 %",
            f"{found} of {built} ({found / built:.1%}); {sites['run']} of {sites['entry_points']:,} were run",
        ),
        (
            "convolutions and linear layers in a site or left out for a reason",
            "100 %",
            f"{1 - sites['unaccounted'] / layers:.2%} of {layers:,}",
        ),
        (
            "time to find a model's sites, median",
            "<= 0.5 s",
            f"{sites['median_cpu_seconds']:.2f} s of processor time; {sites['median_seconds']:.2f} s on the clock, "
            "other jobs of the machine included",
        ),
    ]


def _all_of_b(model: Mapping[str, Any]) -> str:
    """The worst word of the parts."""
    words = {model[part] for part in ("gates", "engine", "graphs")}
    return next(word for word in ("no", "not run", "skipped", "ok") if word in words)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in _WORDS)


def _about_sites(sites: Mapping[str, Any]) -> list[str]:
    return [
        f"{sites['in_sites'] / sites['layers']:.1%} of the layers are part of a site. Input columns said to be filled "
        f"by two sites: in {sites['models_with_columns_filled_twice']} models.",
        "",
        *(f"- {model}: {error}\n" for model, error in sites["errors"].items()),
        "Why layers are left out, most frequent first:",
        "",
        *(f"- {count:,}: {reason}" for reason, count in sites["reasons"].items()),
    ]


def _count(models: Sequence[Mapping[str, Any]], part: str) -> str:
    counts = Counter(model[part] for model in models if not model["model"].startswith("test_"))
    if set(counts) <= {"not run"}:
        return f"- {_PARTS[part]}: not run"
    return f"- {_PARTS[part]}: {_listed(counts)}; of {counts.total()} modules"


def _about_unlisted(modules: Sequence[str]) -> list[str]:
    return [f"- nothing was run yet of {len(modules)} more modules: {', '.join(modules)}"] if modules else []


def _row(model: Mapping[str, Any]) -> str:
    counts = ["" if model[key] is None else str(model[key]) for key in ("layers", "sites")]
    note = model["note"].replace("|", "/").replace("\n", " ")[:240]
    cells = [model["module"], model["model"], *counts, *(model[part] for part in _PARTS), note]
    return "| " + " | ".join(cells) + " |"
