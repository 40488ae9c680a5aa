"""What an accelerated model's calls decided."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["Record", "Recording"]


class Record:
    """What calls of an accelerated model decided, joined over the calls.

    Attributes:
        keep: Site name -> bool (N, C), True where the channel was kept.
        norms: Site name -> float (N, C), the channel norms (Eq. 3).
    """

    def __init__(self) -> None:
        self.keep: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}

    @property
    def keep_ratio(self) -> float:
        """Kept / all channels over all sites and instances; 1 where nothing was recorded."""
        kept = sum(int(mask.sum()) for mask in self.keep.values())
        return kept / max(1, sum(mask.numel() for mask in self.keep.values())) if self.keep else 1.0

    def add(self, keep: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Take in one call."""
        for held, new in ((self.keep, keep), (self.norms, norms)):
            for name, values in new.items():
                held[name] = torch.cat([held[name], values]) if name in held else values


_recording: ContextVar[tuple[tuple[Any, Record], ...]] = ContextVar("isw_recording", default=())


class Recording:
    """A model whose calls can be recorded."""

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Collect the decisions of this thread's calls inside the block."""
        record = Record()
        token = _recording.set((*_recording.get(), (self, record)))
        try:
            yield record
        finally:
            _recording.reset(token)

    def _record(self) -> Record | None:
        return next((record for model, record in reversed(_recording.get()) if model is self), None)
