"""What heads are worth: how well they predict, what they keep, and what they cost."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["HeadReport", "Predictors"]


@dataclass(frozen=True)
class HeadReport:
    """One site's head on images that it was not fitted on, at the thresholds of the fit; or a site that follows.

    Attributes:
        r_squared: Share of the variance of the norms that it explains; None of a site that follows.
        recall: Of the channels that measuring keeps, the share that it keeps.
        density: Share of all channels that it keeps.
        measured: Share of all channels that measuring keeps.
        macs: Its own, for one image.
        saved: MACs that its dropped channels save in the layers that make them, where these read whole maps; mean
            over images. Where the gate keeps all at present, half of the channels are supposed to be dropped.
        reason: Why the site goes on measuring; "" where it is predicted.
        follows: The site whose decision it takes over, and whose head predicts its norms; "" where it has one. Recall,
            density and measured of both are those of the last map, at the thresholds of the one that decides.
    """

    r_squared: float | None
    recall: float
    density: float
    measured: float
    macs: int
    saved: float
    reason: str = ""
    follows: str = ""


@dataclass(frozen=True)
class Predictors:
    """What ``fit_predictors`` found.

    Attributes:
        sites: By name, of every site that a head was fitted for, or that follows.
        measured: By name, why the other sites go on measuring.
        fitted, held_out: Images.
    """

    sites: dict[str, HeadReport]
    measured: dict[str, str]
    fitted: int
    held_out: int

    @property
    def predicted(self) -> tuple[str, ...]:
        """The sites that are predicted."""
        return tuple(name for name, head in self.sites.items() if not head.reason)

    @property
    def followers(self) -> dict[str, str]:
        """Those of them that follow, and whom."""
        return {name: head.follows for name, head in self.sites.items() if head.follows}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("site", "R2", "recall", "kept", "measured keeps", "")]
        for name, head in self.sites.items():
            r_squared = "-" if head.r_squared is None else f"{head.r_squared:.3f}"
            figures = (f"{figure:.3f}" for figure in (head.recall, head.density, head.measured))
            verdict = f"follows {head.follows}" if head.follows else "predicted"
            rows.append((name, r_squared, *figures, f"measured: {head.reason}" if head.reason else verdict))
        rows += [(name, "", "", "", "", f"measured: {reason}") for name, reason in self.measured.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[5]]) for row in rows]
        return "\n".join([*lines, f"{len(self.predicted)} sites predicted, from {self.fitted} images"])
