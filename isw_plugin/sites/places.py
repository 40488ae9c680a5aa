"""Where operations that only move elements put the channels of a map."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isw_plugin.sites.graph import Graph, Node
from isw_plugin.sites.operations import PASSES, SPLITS, VIEWS

__all__ = ["MOVES", "OTHER", "Path", "Rule", "without"]

OTHER = -1  # a place that holds none of the map's channels


@dataclass(frozen=True)
class Path:
    """Place i of ``axis`` holds channel ``channels[i]`` of the map, or none of its where that is -1."""

    value: int
    axis: int
    channels: tuple[int, ...]
    instances: int = 0  # length of axis 0 where they are kept apart

    @classmethod
    def whole(cls, graph: Graph, value: int, axis: int) -> "Path":
        """A map itself."""
        shape = graph.shapes[value]
        return cls(value, axis, tuple(range(shape[axis])), shape[0])

    @property
    def is_whole(self) -> bool:
        return self.channels == tuple(range(len(self.channels)))

    @property
    def is_apart(self) -> bool:
        """Whether every place holds a channel of its own."""
        return OTHER not in self.channels and len(set(self.channels)) == len(self.channels)

    def to(self, value: int, axis: int | None = None, channels: Iterable[int] | None = None) -> "Path":
        """The path's next place."""
        moved = replace(self, value=value, axis=self.axis if axis is None else axis)
        return moved if channels is None else replace(moved, channels=tuple(channels))


Rule = Callable[[Graph, Node, Path], list[Path]]


def _pad(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Zeros around; a negative width crops."""
    shape = graph.shapes[path.value]
    if len(node.args) > 2 and node.args[2]:
        return []
    ends = list(reversed([tuple(node.args[1][at : at + 2]) for at in range(0, len(node.args[1]), 2)]))
    widths = dict(zip(range(len(shape) - len(ends), len(shape)), ends, strict=True))
    if any(widths.get(0, ())):
        return []
    before, after = widths.get(path.axis, (0, 0))
    kept = path.channels[max(-before, 0) : len(path.channels) - max(-after, 0)]
    return [path.to(node.outputs[0], channels=(OTHER,) * max(before, 0) + kept + (OTHER,) * max(after, 0))]


def without(graph: Graph, node: Node, path: Path, dims: Sequence[object]) -> list[Path]:
    """Behind an operation that gives up these axes, or leaves one place on each."""
    rank = len(graph.shapes[path.value])
    gone = {dim % rank for dim in dims if isinstance(dim, int)}
    if len(gone) < len(dims) or not gone or {0, path.axis} & gone:
        return []
    kept = len(graph.shapes[node.outputs[0]]) == rank
    axis = path.axis if kept else path.axis - sum(dim < path.axis for dim in gone)
    outputs = node.outputs if node.kind == "unbind" else node.outputs[:1]
    return [path.to(value, axis) for value in outputs]


def _select(graph: Graph, node: Node, path: Path) -> list[Path]:
    return without(graph, node, path, node.args[1:2])


def _slice(graph: Graph, node: Node, path: Path) -> list[Path]:
    given = list(node.args[1:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    dim %= len(graph.shapes[path.value])
    if dim == path.axis:
        return [path.to(node.outputs[0], channels=path.channels[slice(start, end, step)])]
    whole = graph.shapes[path.value][0] == graph.shapes[node.outputs[0]][0]
    return [path.to(node.outputs[0])] if dim or whole else []


def _split(graph: Graph, node: Node, path: Path) -> list[Path]:
    dim = node.args[2] if len(node.args) > 2 else 0
    if node.kind == "unbind":
        return without(graph, node, path, [node.args[1] if len(node.args) > 1 else 0])
    if dim % len(graph.shapes[path.value]) != path.axis:
        return [path.to(value) for value in node.outputs] if dim else []
    start, paths = 0, []
    for value in node.outputs:
        size = graph.shapes[value][path.axis]
        paths.append(path.to(value, channels=path.channels[start : start + size]))
        start += size
    return paths


def _view(graph: Graph, node: Node, path: Path) -> list[Path]:
    before, after = graph.shapes[path.value], graph.shapes[node.outputs[0]]
    if path.axis == len(before) - 1 and after[-1] == before[-1] and len(after) > 1:
        return [path.to(node.outputs[0], len(after) - 1)]  # instances and places may lie on one axis for a while
    if len(after) < 2 or after[0] != before[0]:
        return []
    if path.axis == 1 and after[1] == before[1]:
        return [path.to(node.outputs[0])]
    return _rearranged(graph, node, path, torch.tensor(path.channels, device="cpu"))


def _rearranged(graph: Graph, node: Node, path: Path, channels: Tensor) -> list[Path]:
    """Behind a view that splits or merges the channels' axis, or behind what puts them on one axis again.

    So channels are shuffled, or pixels folded into them. ``channels``: of every element of an instance.
    """
    shape = graph.shapes[path.value][1:]
    spread = channels.view([-1 if at + 1 == path.axis else 1 for at in range(len(shape))]).expand(shape)
    paths, places = [], [(node, spread)]
    while places:
        node, spread = places.pop()
        moved = _moved(graph, node, spread)
        if moved is None:
            continue
        value = node.outputs[0]
        axes = [at for at in range(moved.dim()) if not bool((moved == moved.narrow(at, 0, 1)).all())]
        if len(axes) == 1 or moved.dim() == 1:
            axis = axes[0] if axes else 0
            places_of = moved.movedim(axis, 0).flatten(1)[:, 0] if moved.dim() > 1 else moved
            paths.append(path.to(value, axis + 1, places_of.tolist()))
        elif axes:
            places += [(user, moved) for user in graph.nodes if value in user.inputs]
    return paths


def _moved(graph: Graph, node: Node, spread: Tensor) -> Tensor | None:
    """One instance's elements behind an operation that only moves them."""
    after = graph.shapes[node.outputs[0]]
    if node.kind in VIEWS and after[0] == graph.shapes[node.inputs[0]][0]:
        return spread.reshape(after[1:])
    if node.kind in PASSES:
        return spread
    order = _order(node, len(after))
    return spread.permute([dim - 1 for dim in order[1:]]) if order and order[0] == 0 else None


def _order(node: Node, rank: int) -> list[int]:
    """The axes of a permuted tensor, by where they were; empty for other operations."""
    if node.kind == "permute":
        return [dim % rank for dim in node.args[1]]
    if node.kind != "transpose":
        return []
    order = list(range(rank))
    first, second = (dim % rank for dim in node.args[1:3])
    order[first], order[second] = second, first
    return order


def _permute(graph: Graph, node: Node, path: Path) -> list[Path]:
    order = _order(node, len(graph.shapes[path.value]))
    return [path.to(node.outputs[0], order.index(path.axis))] if order[0] == 0 else []


def _cat(graph: Graph, node: Node, path: Path) -> list[Path]:
    dim = node.args[1] if len(node.args) > 1 else 0
    if dim % len(graph.shapes[path.value]) != path.axis:
        return []
    total, offset, paths = graph.shapes[node.outputs[0]][path.axis], 0, []
    for part in node.inputs:
        size = graph.shapes[part][path.axis]
        if part == path.value:
            around = (OTHER,) * offset, (OTHER,) * (total - offset - size)
            paths.append(path.to(node.outputs[0], channels=(*around[0], *path.channels, *around[1])))
        offset += size
    return paths


def _turned(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Places moved along other axes (flip, roll)."""
    rank = len(graph.shapes[path.value])
    dims = node.args[-1] if isinstance(node.args[-1], list | tuple) else [0]
    return [] if {0, path.axis} & {dim % rank for dim in dims} else [path.to(node.outputs[0])]


def _shuffle(graph: Graph, node: Node, path: Path) -> list[Path]:
    size = len(path.channels) // node.args[1]  # of a group
    shuffled = [channel for first in range(size) for channel in path.channels[first::size]]
    return [path.to(node.outputs[0], channels=shuffled)] if path.axis == 1 else []


def _unshuffle(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Pixels folded into channels."""
    if path.axis != len(graph.shapes[path.value]) - 3:
        return []
    return [path.to(node.outputs[0], channels=(c for c in path.channels for _ in range(node.args[1] ** 2)))]


def _index(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Places taken by number; which channels would be taken, shapes do not tell."""
    if node.kind == "index_select":
        return [path.to(node.outputs[0])] if node.args[1] % len(graph.shapes[path.value]) not in (0, path.axis) else []
    used = [at for at, index in enumerate(node.args[1]) if index is not None]
    same = len(graph.shapes[path.value]) == len(graph.shapes[node.outputs[0]])
    return [path.to(node.outputs[0])] if same and len(used) == 1 and not {0, path.axis} & set(used) else []


MOVES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(SPLITS, _split),
    "constant_pad_nd": _pad,
    "permute": _permute,
    "transpose": _permute,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "index_select": _index,
    "cat": _cat,
    "flip": _turned,
    "roll": _turned,
    "channel_shuffle": _shuffle,
    "native_channel_shuffle": _shuffle,
    "pixel_unshuffle": _unshuffle,
}
