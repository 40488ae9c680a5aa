"""Masks: from decisions on sites to the columns that a reader of several of them sees as zeros."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isw_plugin.functional import is_tracing
from isw_plugin.sites import Site

__all__ = ["Part", "column_keep", "masked", "reader_parts", "size"]


@dataclass(frozen=True)
class Part:
    """Columns of a reader's input that a site's channels fill (see ``Consumer``)."""

    site: str
    start: int
    repeat: int


def reader_parts(sites: Sequence[Site]) -> dict[str, tuple[Part, ...]]:
    """For every layer that reads sites, which site fills which of its input columns."""
    parts: dict[str, tuple[Part, ...]] = {}
    for site in sites:
        for consumer in site.consumers:
            part = Part(site.name, consumer.start, consumer.repeat)
            parts[consumer.layer] = (*parts.get(consumer.layer, ()), part)
    return parts


def column_keep(parts: Sequence[Part], keep: dict[str, Tensor], columns: int) -> Tensor:
    """Which input columns of a reader survive, (N, columns): its sites' decisions, True between them."""
    pieces: list[Tensor] = []
    filled = 0
    for part in sorted(parts, key=lambda part: part.start):
        kept = keep[part.site] if part.repeat == 1 else keep[part.site].repeat_interleave(part.repeat, dim=1)
        pieces += [*_ungated(kept, part.start - filled), kept]
        filled = part.start + size(kept, 1)
    pieces += _ungated(pieces[0], columns - filled)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _ungated(keep: Tensor, columns: int) -> list[Tensor]:
    return [keep.new_ones(keep.shape[0], columns)] if columns else []


def size(tensor: Tensor, axis: int) -> int:
    if not is_tracing():
        return tensor.shape[axis]
    with warnings.catch_warnings(action="ignore"):  # the number of channels is a constant of the model
        return int(tensor.shape[axis])


def masked(feature: Tensor, keep: Tensor, axis: int) -> Tensor:
    shape = [keep.shape[0]] + [1] * (feature.dim() - 1)  # len() would make it a constant for torch.export
    shape[axis] = keep.shape[1]
    return torch.where(keep.view(shape), feature, 0)  # masked_fill would make channels_last maps contiguous
