"""What an accelerated model says of itself."""

from collections.abc import Mapping

from isw_plugin.accelerate.choose import Fitted

__all__ = ["summary"]

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
