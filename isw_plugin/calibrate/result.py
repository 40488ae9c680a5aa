"""What a calibration tried and found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from isw_plugin.errors import StateMismatchError
from isw_plugin.pruner import InstanceWisePruner

__all__ = ["Calibration", "Candidate", "Parameters"]

Parameters = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """Gate parameters and what they did on the held-out images (see ``GateReport``).

    Attributes:
        parameters: Of the gate.
        per_site: Site name -> what differs there; empty where all sites have the same.
    """

    parameters: Parameters
    accuracy: float
    prune_ratio: float
    macs: float
    macs_saved: float
    emptied: int
    per_site: dict[str, Parameters] = field(default_factory=dict)

    def at(self, site: str) -> Parameters:
        """The parameters at one site."""
        return self.parameters | self.per_site.get(site, {})

    def __str__(self) -> str:
        named = ", ".join(f"{name}={value:g}" for name, value in self.parameters.items())
        own = f", {len(self.per_site)} sites with their own" if self.per_site else ""
        return f"{named}{own}: accuracy {self.accuracy:.4f}, {self.macs_saved:.1%} of MACs saved"


@dataclass(frozen=True)
class Calibration:
    """All that was tried, and the winner.

    Attributes:
        best: The candidate whose parameters the pruner now has.
        candidates: Every candidate, in the order tried.
        accuracy: With gates off, on the same images.
        instances: How many images.

    Example:
        >>> from isw_plugin.calibrate import Calibration, Candidate
        >>> few = Candidate({"beta": 0.5}, accuracy=0.92, prune_ratio=0.2, macs=90.0, macs_saved=0.1, emptied=0)
        >>> many = Candidate({"beta": 1.0}, accuracy=0.91, prune_ratio=0.4, macs=80.0, macs_saved=0.2, emptied=0)
        >>> for candidate in Calibration(best=many, candidates=(few, many), accuracy=0.92, instances=1000).frontier:
        ...     print(candidate)
        beta=0.5: accuracy 0.9200, 10.0% of MACs saved
        beta=1: accuracy 0.9100, 20.0% of MACs saved
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    accuracy: float
    instances: int

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in both accuracy and MACs, from the most accurate on."""
        ordered = sorted(self.candidates, key=lambda c: (-c.accuracy, c.macs))
        fewest = [min((c.macs for c in ordered[:index]), default=float("inf")) for index in range(len(ordered))]
        return tuple(c for c, least in zip(ordered, fewest, strict=True) if c.macs < least)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self) | {"candidates": [asdict(candidate) for candidate in self.candidates]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave.

        Raises:
            StateMismatchError: It gave something else.
        """
        try:
            candidates = tuple(Candidate(**candidate) for candidate in stored["candidates"])
            return cls(Candidate(**stored["best"]), candidates, stored["accuracy"], stored["instances"])
        except (KeyError, TypeError) as error:
            raise StateMismatchError(f"no stored calibration: {error!r}") from error

    @classmethod
    def of(cls, pruner: InstanceWisePruner) -> Self | None:
        """The last calibration of a pruner, also of a loaded one; None where there was none.

        Thresholds that were set by hand since do not change it.
        """
        return cls.from_dict(pruner.calibration) if pruner.calibration else None
