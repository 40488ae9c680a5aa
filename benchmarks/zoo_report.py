"""docs/zoo.md from the records of the zoo."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

__all__ = ["page", "verdict"]

Record = Mapping[str, Any]
_LEGEND = """\
The member with the fewest parameters of every timm module, and the tiny test models (last), with random norms and
biases and scaled filters. "gated": attached, bit-identical with gates off and at beta 0, a finite penalty with
gradients where sites are and none behind them, gates that drop 5-95 % and change the output, zeros in the columns
of every reader, a batch equal to its images alone, the same under `scope="consumers"`, and restored by `remove()`.
"engine": `accelerate()` decides and computes what masking does; the note says where it does not skip. "graphs":
exported and compiled (aot_eager). "pruned first": torch-pruning takes half of the channels, then all of "gated".
"skipped" is not counted as passed."""
_PARTS = {"gates": "gated", "engine": "engine", "graphs": "graphs", "pruned": "pruned first"}


def page(records: Mapping[str, Sequence[Record]], hardware: str = "") -> str:
    """The page as Markdown.

    Args:
        records: Part ("sites", "gates", "engine", "graphs", "pruned") -> its records; a part may be missing.
        hardware: What the seconds were taken on.
    """
    sites = records.get("sites", [])
    by_part = {part: {record["model"]: record for record in records.get(part, [])} for part in ("sites", *_PARTS)}
    names = [record["model"] for record in records.get("gates", [])]
    names.sort(key=lambda name: (name.startswith("test_"), by_part["gates"][name]["module"], name))
    return "\n".join(
        [
            "# The zoo",
            "",
            f"timm {version('timm')}, torch {version('torch')}, torch-pruning {version('torch-pruning')}. Written by",
            "`python -m benchmarks.zoo report`; the other parts of the same command make the records.",
            "",
            "## Sites of every entry point",
            "",
            *_sites(sites, hardware),
            "",
            "## Gated for real",
            "",
            *_intro(by_part),
            "",
            "| module | model | layers | sites | " + " | ".join(_PARTS.values()) + " | note |",
            "|---|---|---|---|" + "---|" * len(_PARTS) + "---|",
            *(_row(name, by_part) for name in names),
            "",
        ]
    )


def verdict(record: Record | None) -> tuple[str, str]:
    """What a record says in a word ("ok", "skipped", "no", or "" where there is none), and why."""
    if record is None:
        return "", ""
    steps = {step: result for step, result in record["steps"].items() if step != "execution"}
    failed = {step: result for step, result in steps.items() if result != "ok" and not result.startswith("skipped: ")}
    skipped = [result for result in steps.values() if result.startswith("skipped: ")]
    if failed:
        return "no", "; ".join(f"{step}: {result}" for step, result in failed.items())
    return ("skipped", skipped[0].removeprefix("skipped: ")) if skipped else ("ok", "")


def _sites(records: Sequence[Record], hardware: str) -> list[str]:
    built = [record for record in records if record["built"]]
    good = [record for record in built if not record["error"]]
    if not good:
        return ["Not run."]
    layers = sum(record["layers"] for record in good)
    missed = sum(len(record["unaccounted"]) for record in good)
    seconds = statistics.median(record["seconds"] for record in good)
    reasons = Counter[str]()
    for record in good:
        reasons.update(record["reasons"])
    return [
        f"{len(records)} entry points, {len(built)} that timm builds on `meta`; sites found in {len(good)} "
        f"({len(good) / len(built):.1%}). {layers:,} convolutions and linear layers: {1 - missed / layers:.2%} are "
        f"part of a site or left out for a reason, {sum(r['in_sites'] for r in good) / layers:.1%} are part of a site. "
        f"Input columns said to be filled by two sites: in {sum(bool(r['filled_twice']) for r in good)} models. "
        f"Median {seconds:.2f} s a model{f' ({hardware})' if hardware else ''}.",
        "",
        *(f"- {record['model']}: {record['error']}" for record in records if record["error"]),
        "",
        "Why layers are left out, most frequent first:",
        "",
        *(f"- {count:,}: {reason}" for reason, count in reasons.most_common(15)),
    ]


def _intro(by_part: Mapping[str, Mapping[str, Record]]) -> list[str]:
    lines = [_LEGEND, ""]
    for part, title in _PARTS.items():
        records = [record for name, record in by_part[part].items() if not name.startswith("test_")]
        counts = Counter(verdict(record)[0] for record in records)
        modules = len({record["module"] for record in records})
        told = ", ".join(f"{counts[word]} {word}" for word in ("ok", "skipped", "no"))
        lines.append(f"- {title}: {told}; of {modules} modules" if records else f"- {title}: not run")
    return lines


def _row(name: str, by_part: Mapping[str, Mapping[str, Record]]) -> str:
    verdicts = {title: verdict(by_part[part].get(name)) for part, title in _PARTS.items()}
    notes = [f"{title}: {why}" for title, (_, why) in verdicts.items() if why]
    execution = by_part["engine"].get(name, {"steps": {}})["steps"].get("execution", "")
    notes += [f"runs {execution}"] if execution and not execution.startswith("accelerated") else []
    sites = by_part["sites"].get(name, {})
    cells = [by_part["gates"][name]["module"], name, str(sites.get("layers", "")), str(sites.get("sites", ""))]
    note = "; ".join(notes).replace("|", "/").replace("\n", " ")[:240]
    return "| " + " | ".join([*cells, *(word for word, _ in verdicts.values()), note]) + " |"
