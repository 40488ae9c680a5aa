"""How a gate decides on the channels that are left, as it did on all of them.

A gate compares a channel's norm with statistics over all channels, and pruned channels no longer count
there. Where their norms are a fixed share of the mean of the others (0 for dead ones), other thresholds on
the rest give the same decisions; these are computed here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isw_plugin.gates import CVGate, Gate, MinNorm, keeps_all, with_parameters

__all__ = ["changed_decisions", "is_known", "parameters_on_rest"]

_BELOW_2 = math.nextafter(2.0, 0.0)


def is_known(gate: Gate) -> bool:
    """Whether it is known how this gate decides on fewer channels."""
    return keeps_all(gate) or isinstance(gate, CVGate | MinNorm)


def parameters_on_rest(gate: Gate, norms: Tensor, pruned: Sequence[int]) -> dict[str, Any]:
    """Parameters with which the gate decides on the rest as on all; none where the gate is not known.

    Args:
        gate: As it decided.
        norms: Channel norms of the images seen, (N, C).
        pruned: Channels that go, fewer than C.
    """
    if keeps_all(gate) or not pruned:
        return {}
    if isinstance(gate, CVGate):
        return _cv_on_rest(gate, norms, pruned)
    return _ratio_on_rest(gate, norms.shape[1], len(pruned)) if isinstance(gate, MinNorm) else {}


def changed_decisions(gate: Gate, norms: Tensor, pruned: Sequence[int], min_keep: int = 0) -> int:
    """How many (instance, channel) decisions on the rest differ with ``parameters_on_rest``."""
    rest = _rest(norms, pruned)
    before = _decide(gate, norms, min_keep)[:, rest]
    after = _decide(with_parameters(gate, **parameters_on_rest(gate, norms, pruned)), norms[:, rest], min_keep)
    return int((before != after).sum())


def _cv_on_rest(gate: CVGate, norms: Tensor, pruned: Sequence[int]) -> dict[str, Any]:
    rest = _rest(norms, pruned)
    count, left = norms.shape[1], len(rest)
    mean = norms[:, rest].double().mean(1, keepdim=True)
    shares = torch.where(mean == 0, 0.0, norms[:, list(pruned)].double() / mean).mean(0)
    # With norms shares * mean beside the rest: the mean of all is weight * mean / count, and so on for squares.
    weight = left + shares.sum().item()
    squares = ((gate.alpha**2 + 1) * weight**2 / count - shares.square().sum().item()) / left - 1
    # Channels that go along with others may have been large; such thresholds may lie outside a gate's range.
    return {"alpha": math.sqrt(max(squares, 0.0)), "beta": min(gate.beta * weight / count, _BELOW_2)}


def _ratio_on_rest(gate: MinNorm, count: int, pruned: int) -> dict[str, Any]:
    dropped = max(math.floor(gate.ratio * count) - pruned, 0)
    left = count - pruned
    ratio = dropped / left
    # floor(ratio * left) must give the number back, which division does not promise.
    return {"ratio": ratio if math.floor(ratio * left) == dropped else (dropped + 0.5) / left}


def _decide(gate: Gate, norms: Tensor, min_keep: int) -> Tensor:
    if keeps_all(gate):
        return torch.ones_like(norms, dtype=torch.bool)
    keep = gate(norms, norms)  # the gates that are known look at norms alone
    largest = norms.topk(min(min_keep, norms.shape[1]), dim=1).indices
    return keep.scatter(1, largest, True)


def _rest(norms: Tensor, pruned: Sequence[int]) -> list[int]:
    gone = set(pruned)
    return [channel for channel in range(norms.shape[1]) if channel not in gone]
