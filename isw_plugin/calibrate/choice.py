"""Which candidate is within the budget, and which is the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from isw_plugin.calibrate.result import Candidate
from isw_plugin.errors import BudgetError

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """A budget: accuracy with gates off, what may be lost of it, and MACs, if they are the aim.

    ``by_channels``: the more channels are dropped the better, whatever MACs they save.
    """

    accuracy: float
    max_drop: float
    target_macs: float | None
    by_channels: bool = False

    def saved(self, candidate: Candidate) -> float:
        """What the candidate saves, a share."""
        return candidate.prune_ratio if self.by_channels else candidate.macs_saved

    def within(self, candidate: Candidate) -> bool:
        """Whether it saves something within the budget."""
        reached = self.target_macs is None or candidate.macs <= self.target_macs
        return self._fits(candidate) and reached and self.saved(candidate) > 0

    def may_go_on(self, candidate: Candidate) -> bool:
        """Whether the best, on a path of ever fewer MACs, lies behind this candidate."""
        if self.target_macs is None:
            return self._fits(candidate)
        return candidate.macs > self.target_macs

    def too_much(self, candidate: Candidate) -> bool:
        """Whether none that drops more is expected within the budget."""
        return not self._fits(candidate)

    def too_little(self, candidate: Candidate) -> bool:
        """Whether none that drops less is expected to win."""
        return self._fits(candidate) if self.target_macs is None else candidate.macs > self.target_macs

    def _fits(self, candidate: Candidate) -> bool:
        # A hair of tolerance: 0.97 - 0.96 is a little more than 0.01 in binary.
        return candidate.accuracy >= self.accuracy - self.max_drop - 1e-9 and not candidate.emptied

    def merit(self, candidate: Candidate) -> tuple[float, float]:
        """What is to be the largest among those within."""
        if self.target_macs is None:
            return self.saved(candidate), candidate.accuracy
        return candidate.accuracy, candidate.macs_saved

    def nearest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best within the budget, or the one to look around for some."""
        inside = [c for c in candidates if self.within(c)]
        if inside:
            return max(inside, key=self.merit)
        if self.target_macs is None:
            return max(candidates, key=lambda c: (self.saved(c) > 0, not c.emptied, c.accuracy))
        reached = [c for c in candidates if c.macs <= self.target_macs and not c.emptied]
        return max(reached, key=lambda c: c.accuracy) if reached else min(candidates, key=lambda c: c.macs)

    def best(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best within the budget; BudgetError where there is none."""
        best = self.nearest(candidates)
        if self.within(best):
            return best
        wanted = f"and loses at most {self.max_drop:g} of the accuracy with gates off, {self.accuracy:.4f}"
        if self.target_macs is not None:
            wanted += f", with at most {self.target_macs:,.0f} MACs"
        raise BudgetError(
            f"none of {len(candidates)} candidates saves MACs {wanted}. The best found: {best} "
            f"({best.macs:,.0f} MACs, {best.emptied} maps emptied)"
        )
