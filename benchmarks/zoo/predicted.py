"""results/predicted.md, and the same as JSON: accelerated models whose norms are predicted, against masking."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.zoo.report import verdict

__all__ = ["page", "rows"]

_ABOUT = """\
# With norms predicted

`accelerate()` of the models of [the zoo](models.md), with heads of random numbers at every site whose norms can be
predicted, but that sites behind depthwise layers follow, and without where none can: does the copy decide and compute
what masking does, for two images, for one, and with every other layer dense? "apart": the largest difference of an
output from the masked model's, of the largest output. "skipped" is not counted as passed. Written by
`python -m benchmarks.zoo report`."""


def rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each record says, as plain values, in the order of the page."""
    return sorted(map(_row, records), key=lambda row: (row["model"].startswith("test_"), row["module"], row["model"]))


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    steps = record["steps"]
    heads, sites = steps.get("heads", "0 of 0 sites").removesuffix(" sites").split(" of ")
    word, note = verdict(record)
    if not note and not steps["execution"].startswith("accelerated"):
        note = f"runs {steps['execution']}"
    return {
        "module": record["module"],
        "model": record["model"],
        "heads": int(heads),
        "sites": int(sites),
        "apart": float(steps["apart"]) if "apart" in steps else None,
        "verdict": word,
        "note": note,
    }


def page(told: Sequence[Mapping[str, Any]], where: str) -> str:
    """The page as Markdown.

    Args:
        told: What ``rows`` gives.
        where: Versions, hardware and date.
    """
    modules = [row for row in told if not row["model"].startswith("test_")]
    words = Counter(row["verdict"] for row in modules)
    counts = ", ".join(f"{words[word]} {word}" for word in ("ok", "skipped", "no"))
    headed = [row for row in told if row["heads"]]
    worst = max((row for row in told if row["apart"] is not None), key=lambda row: row["apart"], default=None)
    lines = [
        _ABOUT,
        "",
        f"{where}.",
        "",
        f"- modules: {len(modules)}, of which {counts}",
        f"- models with heads: {len(headed)} of {len(told)}, {sum(row['heads'] for row in headed):,} heads",
        f"- largest difference: {worst['apart']:.1e}, {worst['model']}" if worst else "- no outputs were compared",
        "",
        "| module | model | heads | sites | apart | verdict | note |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, told), ""])


def _line(row: Mapping[str, Any]) -> str:
    apart = "" if row["apart"] is None else f"{row['apart']:.1e}"
    note = row["note"].replace("|", "/").replace("\n", " ")[:240]
    cells = (row["module"], row["model"], row["heads"], row["sites"], apart, row["verdict"], note)
    return f"| {' | '.join(map(str, cells))} |"
