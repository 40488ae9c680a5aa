"""Heads that follow a network while it trains with gates on: exponentially weighted least squares.

Dropped outputs are computed in training and then masked, so the norms that a head should have predicted are known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from isw_plugin.errors import NothingRecordedError, PredictionError, SettingError
from isw_plugin.heads import Head, Lesson, features
from isw_plugin.hooks import Memory
from isw_plugin.predict.ridge import moments, solved
from isw_plugin.ranks import averaged, on_all_ranks, ranks
from isw_plugin.values import as_count, as_number

__all__ = ["follow"]

_MEANING = "the weight of the past at each call lies in [0, 1)"
_PENALTY = 1e-3  # a row, for inputs of unit deviation
_IMAGES = 2  # for every input of a head, before it is solved for anew


def follow(heads: Mapping[str, Head], memory: Memory, decay: float, every: int) -> dict[str, Head]:
    """See ``InstanceWisePruner.follow_predictors``: the heads after the last forward."""
    decay = as_number("decay", decay, _MEANING)
    if not 0 <= decay < 1:
        raise SettingError(f"decay={decay}: {_MEANING}")
    every = as_count("every", every, "the calls from one solution to the next", least=1)
    if not heads:
        raise PredictionError("there are no heads to follow the network: fit_predictors first")
    lessons = on_all_ranks(lambda: _lessons(heads, memory, decay))
    later = {}
    with torch.no_grad():
        for name, head in heads.items():
            held = _taught(head, memory.heads[name].weight.device, lessons.get(name, ()), decay)
            head = replace(head, moments=held, followed=head.followed + 1)
            later[name] = head if head.followed % every else _solved(head, averaged(held))
    return later


def _lessons(heads: Mapping[str, Head], memory: Memory, decay: float) -> dict[str, list[Lesson]]:
    """What the last forward has shown; at the first one, whether enough of such are remembered."""
    lessons = memory.take_lessons()
    if not lessons.keys() & heads.keys():
        raise NothingRecordedError(
            "heads follow the last training forward with gates on, which never ran or was taken already: call the "
            "model in training mode, with gradients and after step(), before each call"
        )
    for name, head in heads.items():
        if not head.followed:
            images = sum(len(rms) for _, rms in lessons.get(name, ())) * ranks()
            _require_memory(name, images / (1 - decay), decay, _IMAGES * head.inputs)
    return lessons


def _taught(head: Head, device: torch.device, seen: Sequence[Lesson], decay: float) -> Tensor:
    """The moments of all that it has seen."""
    outputs, inputs = len(head.weight), head.inputs
    if head.moments is None:
        held = torch.zeros(1 + inputs, 1 + inputs + outputs, dtype=torch.float64, device=device)
    else:
        held = head.moments.to(device) * decay
    for known, rms in seen:
        phi = features(known, head.sources)
        finite = phi.isfinite().all() & rms.isfinite().all()  # a step that overflows is no lesson
        held += moments(torch.where(finite, phi, 0), torch.where(finite, rms, 0)) * finite
    return held


def _solved(head: Head, held: Tensor) -> Head:
    """Fitted anew to these moments of all ranks, if they hold enough."""
    if held[0, 0].item() * ranks() < _IMAGES * head.inputs:
        return replace(head, moments=held)
    rank = None if head.basis is None else len(head.basis)
    return replace(head, moments=held, **solved(held, _PENALTY, rank)._asdict())


def _require_memory(name: str, remembered: float, decay: float, needed: int) -> None:
    if 0 < remembered < needed:
        raise SettingError(
            f"decay={decay:g} remembers about {remembered:,.0f} images of this size of batch, and the head of {name} "
            f"needs {needed:,}: decay={1 - (1 - decay) * remembered / needed / 2:.6g} remembers enough"
        )
