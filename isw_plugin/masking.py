"""Masks: from decisions on sites to the columns that a reader of several of them sees as zeros."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isw_plugin.errors import SettingError, UnsupportedError
from isw_plugin.functional import is_tracing
from isw_plugin.gates import Gate
from isw_plugin.sites import Consumer, Site

__all__ = ["Part", "column_keep", "reader_parts", "require_instances", "require_map", "require_mask", "size"]


@dataclass(frozen=True)
class Part:
    """Columns of a reader's input that a site's channels fill (see ``Consumer``)."""

    site: str
    start: int
    repeat: int
    channels: tuple[int, ...] | None = None


def reader_parts(sites: Sequence[Site]) -> dict[str, tuple[Part, ...]]:
    """For every layer that reads sites, which site fills which of its input columns."""
    parts: dict[str, tuple[Part, ...]] = {}
    for site in sites:
        for consumer in site.consumers:
            part = Part(site.name, consumer.start, consumer.repeat, consumer.channels)
            parts[consumer.layer] = (*parts.get(consumer.layer, ()), part)
    return parts


def column_keep(parts: Sequence[Part], keep: dict[str, Tensor], columns: int) -> Tensor:
    """Which input columns of a reader are kept, (N, columns): its sites' decisions, True between them."""
    if any(part.channels for part in parts):
        return _cut_keep(parts, keep, columns)
    pieces: list[Tensor] = []
    filled = 0
    for part in sorted(parts, key=lambda part: part.start):
        kept = keep[part.site] if part.repeat == 1 else keep[part.site].repeat_interleave(part.repeat, dim=1)
        pieces += [*_ungated(kept, part.start - filled), kept]
        filled = part.start + size(kept, 1)
    pieces += _ungated(pieces[0], columns - filled)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _cut_keep(parts: Sequence[Part], keep: dict[str, Tensor], columns: int) -> Tensor:
    """Where maps were cut or their channels shuffled: in runs that are slices, since an index would be copied anew."""
    held: list[tuple[str, int]] = [("", at) for at in range(columns)]
    for part in parts:
        reader = Consumer("", part.start, part.repeat, part.channels)
        for column, channel in reader.columns(size(keep[part.site], 1)):
            held[column] = (part.site, channel)
    first = keep[parts[0].site]
    known = keep | {"": first.new_ones(first.shape[0], columns)}
    return torch.cat([known[name][:, start:stop:step] for name, start, stop, step in _runs(held)], dim=1)


def _runs(held: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Columns as slices of their sites' channels: site, start, stop, step."""
    at = 0
    while at < len(held):
        (name, start), end = held[at], at + 1
        step = held[end][1] - start if end < len(held) and held[end][0] == name else 0
        while step > 0 and end < len(held) and held[end] == (name, start + step * (end - at)):
            end += 1
        yield name, start, start + max(step, 1) * (end - at - 1) + 1, max(step, 1)
        at = end


def _ungated(keep: Tensor, columns: int) -> list[Tensor]:
    return [keep.new_ones(keep.shape[0], columns)] if columns else []


def size(tensor: Tensor, axis: int) -> int:
    """Of an axis, as a number also under torch.jit.trace."""
    if not is_tracing():
        return tensor.shape[axis]
    with warnings.catch_warnings(action="ignore"):  # the number of channels is a constant of the model
        return int(tensor.shape[axis])


def require_mask(keep: Any, gate: Gate, norms: Tensor, name: str) -> None:
    """Raise SettingError unless a gate gave a mask for these norms (N, C)."""
    dense = isinstance(keep, Tensor) and keep.layout is torch.strided and keep.dtype is torch.bool
    if dense and (is_tracing() or (keep.shape == norms.shape and keep.device == norms.device)):
        return
    what = type(keep).__name__
    if isinstance(keep, Tensor):
        layout = "" if keep.layout is torch.strided else f" {keep.layout}"
        where = "" if keep.device == norms.device else f" on {keep.device}"
        what = f"{keep.dtype}{layout} of shape {tuple(keep.shape)}{where}"
    raise SettingError(
        f"{gate} gave {what} at {name}: a gate gives a dense bool tensor of shape {tuple(norms.shape)} on "
        f"{norms.device}, True where the channel is kept"
    )


def require_map(feature: Any, site: Site) -> None:
    """Raise UnsupportedError unless a map is as the probe saw it, or the instances' axis would be another."""
    if not isinstance(feature, Tensor):
        raise UnsupportedError(f"{site.name} is a {type(feature).__name__} here: no feature map that can be gated")
    if feature.is_nested or not feature.is_floating_point():
        nested = "nested, pass enable_nested_tensor=False to nn.TransformerEncoder" if feature.is_nested else ""
        raise UnsupportedError(
            f"the feature map of {site.name} is {nested or feature.dtype}: norms are of dense real maps; exclude it"
        )
    if is_tracing():
        return  # sizes are no numbers there
    if feature.dim() != len(site.shape) + 1 or feature.shape[site.axis] != site.channels:
        axes = [str(size) for size in site.shape]
        raise UnsupportedError(
            f"the feature map of {site.name} has shape {tuple(feature.shape)}, and (N, {', '.join(axes)}) when the "
            f"sites were found, {site.channels} channels on axis {site.axis}: pass batches (x.unsqueeze(0) for one "
            "instance), keep the instance axis in forward (no bare .squeeze()), or exclude the site. After a change "
            "of the model call pruner.update_regularizer()"
        )


def require_instances(known: Mapping[str, Tensor], feature: Tensor, site: Site) -> None:
    """Raise UnsupportedError unless what is known of other sites, (N, C) each, is of these instances."""
    for source, of_map in known.items():
        if not is_tracing() and of_map.shape[0] != feature.shape[0]:
            raise UnsupportedError(
                f"{site.name} runs on {feature.shape[0]} instances, and {source}, by which it is predicted, ran on "
                f"{of_map.shape[0]}: pruner.drop_predictors() measures again"
            )
