"""Calls a graph again without Python between its operators, which take longer to call than small layers to compute."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import isw_plugin.ops.cpu as cpu

__all__ = ["Replayed"]

_SIZES = 64  # whose calls are held, the latest


class Replayed:
    """A function of tensors that calls the same operators whenever inputs have the same shapes, strides and dtypes.

    The first call with such inputs writes down what it calls; later ones do that. A function that cannot be repeated,
    since it draws random numbers or changes a tensor that is not its own, is called every time. A copy begins anew.
    """

    def __init__(self, function: Callable[..., Sequence[Any]]) -> None:
        self.function = function
        self._tapes: dict[Any, Any] = {}  # None: its calls cannot be repeated

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """What the function gives."""
        if not (all(type(each) is Tensor and each.is_cpu for each in inputs) and cpu.load()):
            return self.function(*inputs)
        size = tuple((each.shape, each.stride(), each.dtype) for each in inputs)
        if size in self._tapes:
            tape = self._tapes[size]
            given: Sequence[Any] = self.function(*inputs) if tape is None else tape.run(inputs)
            return given
        apart = len({id(each) for each in inputs}) == len(inputs)  # or a tape would take them for one in every call
        if not apart:
            return self.function(*inputs)
        for oldest in list(self._tapes)[: max(0, len(self._tapes) - _SIZES + 1)]:
            self._tapes.pop(oldest, None)
        return self._recorded(size, inputs)

    def _recorded(self, size: Any, inputs: Sequence[Tensor]) -> Sequence[Any]:
        tape = torch.classes.isw.Tape()
        tensors: list[Tensor] = []
        try:
            started = tape.start(inputs)  # False within the recording of another graph, which takes these calls
            outputs = self.function(*inputs)
            tensors += [output for output in outputs if type(output) is Tensor]
        finally:
            complete = tape.stop(tensors)
        if started:
            self._tapes[size] = tape if complete and len(tensors) == len(outputs) else None
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tapes": {}}
