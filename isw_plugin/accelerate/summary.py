"""What an accelerated model says of itself."""

from collections.abc import Mapping
from typing import Protocol

from isw_plugin.accelerate.choose import Fitted

__all__ = ["Fast", "summary", "verdict"]

_SHOWN = 8  # sizes that run masked


def summary(
    execution: str, reason: str, fitted: Fitted, choices: Mapping[str, bool], refused: Mapping[str, str]
) -> str:
    """A table of layers, what each cost and what was chosen; sizes that run masked; the model as a whole."""
    rows: list[tuple[str, ...]] = [("layer", "keep", "dense us", "gated us", "all kept us", "runs")]
    for cost in fitted.costs:
        gated = [f"{1e6 * t:.0f}" if t is not None else "-" for t in (cost.gated, cost.gated_all)]
        runs = "gated" if choices.get(cost.layer) else "dense"
        rows.append((cost.layer, f"{cost.keep_ratio:.2f}", f"{1e6 * cost.dense:.0f}", *gated, runs))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"masked at {inputs}: {why}" for inputs, why in list(refused.items())[:_SHOWN]]
    lines += [f"and at {len(refused) - _SHOWN} others"] if len(refused) > _SHOWN else []
    return "\n".join([*lines, _conclusion(execution, reason, fitted)])


def _conclusion(execution: str, reason: str, fitted: Fitted) -> str:
    where = f"batch {fitted.instances}, {fitted.threads} threads"
    best = "best dense form" if fitted.runtime == "PyTorch" else f"best dense form, by {fitted.runtime},"
    seconds = {"gated": fitted.gated, "with all channels kept": fitted.all_kept, best: fitted.dense}
    if reason or None in seconds.values():
        return f"{execution}{': ' if reason else ''}{reason} ({where})"
    times = ", ".join(f"{form} {1e3 * taken:.2f} ms" for form, taken in seconds.items() if taken is not None)
    unsure = f"; not sure which is the faster, after {fitted.rounds} rounds" if fitted.gains is None else ""
    return f"{execution}: {times} ({where}{unsure})"


class Fast(Protocol):
    """What an accelerated model says of how it was chosen."""

    execution: str
    reason: str
    fitted: Fitted


def verdict(fast: Fast) -> str:
    """In a sentence: how much faster than the best dense form, or why not."""
    fitted = fast.fitted
    where = f"batch {fitted.instances}, {fitted.threads} threads"
    if fast.execution == "masked":
        return f"not faster because it runs masked: {fast.reason} ({where})"
    if fitted.gated is None or fitted.dense is None or fitted.all_kept is None:
        return f"runs dense, as was asked; gates were not timed ({where})"
    gated, dense, kept = (f"{1e3 * each:.2f} ms" for each in (fitted.gated, fitted.dense, fitted.all_kept))
    dense += "" if fitted.runtime == "PyTorch" else f" by {fitted.runtime}"
    if fast.execution == "accelerated":
        ratio = fitted.dense / fitted.gated
        return f"{ratio:.2f} times as fast as the best dense form: {gated}, not {dense} ({where})"
    if fitted.gains is None:
        return f"not faster for sure: rounds contradict each other, about {gated} gated and {dense} dense ({where})"
    if fitted.gated >= fitted.dense:
        return f"not faster because skipping takes {gated} and the best dense form {dense} ({where}): it runs dense"
    return (
        f"not faster because images that keep every channel would take {kept}, and the best dense form takes {dense} "
        f"({where}): it runs dense, though these images take {gated} gated"
    )
