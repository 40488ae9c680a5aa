"""What an accelerated model says of itself in one sentence."""

from types import SimpleNamespace
from typing import Any

import pytest

from isw_plugin.accelerate import Fitted
from isw_plugin.accelerate.summary import verdict

WHERE = "(batch 8, 2 threads)"


def fast(execution: str, reason: str = "", **seconds: Any) -> Any:
    return SimpleNamespace(execution=execution, reason=reason, fitted=Fitted(8, 2, **seconds))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            fast("accelerated", gated=2e-3, dense=3e-3, all_kept=3.1e-3, gains=True),
            f"1.50 times as fast as the best dense form: 2.00 ms, not 3.00 ms {WHERE}",
        ),
        (
            fast("dense", gated=4e-3, dense=3e-3, all_kept=5e-3, gains=False),
            f"not faster because skipping takes 4.00 ms and the best dense form 3.00 ms {WHERE}: it runs dense",
        ),
        (
            fast("dense", gated=2e-3, dense=3e-3, all_kept=5e-3, gains=False),
            "not faster because images that keep every channel would take 5.00 ms, and the best dense form takes "
            f"3.00 ms {WHERE}: it runs dense, though these images take 2.00 ms gated",
        ),
        (
            fast("dense", gated=2e-3, dense=3e-3, all_kept=3e-3),
            f"not faster for sure: rounds contradict each other, about 2.00 ms gated and 3.00 ms dense {WHERE}",
        ),
        (fast("dense", dense=3e-3), f"runs dense, as was asked; gates were not timed {WHERE}"),
        (fast("masked", "it branches"), f"not faster because it runs masked: it branches {WHERE}"),
    ],
)
def test_how_fast_or_why_not(model: Any, said: str) -> None:
    assert verdict(model) == said
