"""How the channels of a map lie in what later operations hand on.

Each rule says where channel c of a map is found in an operation's output, for operations that keep
channels apart and zeros zero. Anything else ends a path.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from isw_plugin.sites.probe import Graph, Node

__all__ = ["ACTIVATIONS", "JOINS", "PASSES", "SPLITS", "VIEWS", "Path", "follow", "is_scale"]

ACTIVATIONS = frozenset(
    (
        "relu",
        "gelu",
        "silu",
        "hardswish",
        "hardtanh",
        "hardsigmoid",
        "leaky_relu",
        "mish",
        "elu",
        "celu",
        "selu",
        "softplus",
        "sigmoid",
        "tanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "prelu",
        "_prelu_kernel",
        "rrelu",
        "rrelu_with_noise",
        "threshold",
        "hardshrink",
        "softshrink",
        "relu6",
        "pow",
        "abs",
        "exp",
        "neg",
    )
)
PASSES = frozenset(
    (
        "alias",
        "detach",
        "clone",
        "contiguous",
        "_to_copy",
        "dropout",
        "native_dropout",
        "lift_fresh",
    )
)
JOINS = frozenset(["add", "sub"])
SPLITS = frozenset(["split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk"])
_POOLS = frozenset(
    (
        "max_pool2d_with_indices",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "_adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "max_pool1d",
        "avg_pool1d",
        "adaptive_avg_pool1d",
        "max_pool3d_with_indices",
        "avg_pool3d",
        "_adaptive_avg_pool3d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "constant_pad_nd",
        "reflection_pad2d",
        "replication_pad2d",
    )
)
_REDUCTIONS = frozenset(["mean", "amax", "sum"])
_CLAMPS = ("clamp", "clamp_min")
VIEWS = frozenset(
    (
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "squeeze",
        "unsqueeze",
    )
)


@dataclass(frozen=True)
class Path:
    """Channel c lies at ``start + c * repeat`` and the ``repeat - 1`` after it, on ``axis``."""

    value: int
    axis: int
    start: int = 0
    repeat: int = 1


def follow(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Where the channels lie in the node's first output; empty where they cannot be told apart there."""
    rule = _rule(graph, node)
    if rule is None:
        return []
    return [found for found in rule(graph, node, replace(path, value=node.outputs[0]), path.value) if found]


def is_scale(graph: Graph, node: Node, value: int, axis: int | None = None) -> bool:
    """Whether the node multiplies ``value`` by one number a channel (squeeze-excite, LayerScale) or in all.

    ``axis``: where the channels lie; None: 1 or the last.
    """
    if node.kind not in ("mul", "div") or (node.kind == "div" and node.inputs[:1] != (value,)):
        return False
    shape = graph.shapes[value]
    if graph.shapes[node.outputs[0]] != shape:
        return False
    others = [_unexpanded(graph, other) for other in node.inputs if other != value]
    axes = (1, len(shape) - 1) if axis is None else (axis,)
    return any(all(_by_channel(other, shape, axis) for other in others) for axis in axes)


def _by_channel(scale: tuple[int, ...], shape: tuple[int, ...], axis: int) -> bool:
    if len(scale) != len(shape):
        return False
    return all(size == 1 or at == 0 or (at == axis and size == shape[at]) for at, size in enumerate(scale))


def _unexpanded(graph: Graph, value: int) -> tuple[int, ...]:
    """The shape of a value before it was expanded to that of the map it scales."""
    producer = graph.producers.get(value)
    return graph.shapes[producer.inputs[0] if producer and producer.kind == "expand" else value]


_Rule = Callable[[Graph, Node, Path, int], list[Path | None]]


def _rule(graph: Graph, node: Node) -> _Rule | None:
    if node.kind in _POOLS:
        return _pool
    if node.kind in _REDUCTIONS:
        return _reduction
    if node.kind in VIEWS:
        return _view
    return _RULES.get(node.kind, _same if node.kind in PASSES else None)


def _same(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    return [path]


def _pool(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    before, after = graph.shapes[source], graph.shapes[path.value]
    return [path if len(before) == len(after) and before[:2] == after[:2] and path.axis == 1 else None]


def _reduction(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    rank = len(graph.shapes[source])
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, list | tuple):
        return [None]
    reduced = {dim % rank for dim in dims}
    if not reduced or {0, path.axis} & reduced:
        return [None]
    kept = len(graph.shapes[path.value]) == rank
    return [path if kept else replace(path, axis=path.axis - sum(dim < path.axis for dim in reduced))]


def _view(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    before, after = graph.shapes[source], graph.shapes[path.value]
    if path.axis == len(before) - 1 and after[-1:] == before[-1:] and after[0] == before[0]:
        return [replace(path, axis=len(after) - 1)]
    if path.axis != 1 or len(after) < 2 or after[0] != before[0]:
        return [None]
    if after[1] == before[1]:
        return [path]
    wide = prod(before[2:])
    if after[1:] != (before[1] * wide,):
        return [None]
    return [replace(path, start=path.start * wide, repeat=path.repeat * wide)]


def _permute(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    rank = len(graph.shapes[source])
    order = [dim % rank for dim in node.args[1]]
    return [replace(path, axis=order.index(path.axis)) if order[0] == 0 else None]


def _transpose(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    rank = len(graph.shapes[source])
    first, second = (dim % rank for dim in node.args[1:3])
    swapped = {first: second, second: first}
    return [replace(path, axis=swapped.get(path.axis, path.axis)) if 0 not in swapped else None]


def _cat(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    dim = node.args[1] if len(node.args) > 1 else 0
    rank = len(graph.shapes[source])
    if dim % rank != path.axis or path.repeat != 1:
        return [None]
    offset, paths = 0, []
    for part in node.inputs:
        if part == source:
            paths.append(replace(path, start=path.start + offset))
        offset += graph.shapes[part][path.axis]
    return list(paths)


def _scale(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    return [path if is_scale(graph, node, source, path.axis) else None]


def _blur(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    """A convolution that is no module's (BlurPool): one kernel a channel, and nothing added."""
    channels, bias, groups = graph.shapes[source][1], node.args[2], node.args[-1]
    alone = node.inputs[0] == source and groups == channels == graph.shapes[path.value][1] and bias is None
    return [path if alone and path.axis == 1 else None]


def _generalised_mean(graph: Graph, node: Node, path: Path, source: int) -> list[Path | None]:
    """GeM does not keep zeros, so that it is looked through as a whole: the map is what it reads."""
    found: list[Path | None] = []
    for root in graph.nodes:
        pool = graph.producers.get(root.inputs[0]) if root.kind == "pow" else None
        if pool and _base(graph, pool) == source:
            pooled = follow(graph, pool, replace(path, value=pool.inputs[0]))
            found += [replace(behind, value=root.outputs[0]) for behind in pooled]
    return found


def _base(graph: Graph, pool: Node) -> int | None:
    """What powers are pooled of, behind a clamp or not."""
    power = graph.producers.get(pool.inputs[0]) if pool.kind in _POOLS | _REDUCTIONS else None
    if power is None or power.kind != "pow":
        return None
    clamp = graph.producers.get(power.inputs[0])
    return clamp.inputs[0] if clamp and clamp.kind in _CLAMPS else power.inputs[0]


_RULES: dict[str, _Rule] = {
    "pow": _generalised_mean,
    **dict.fromkeys(_CLAMPS, _generalised_mean),
    "permute": _permute,
    "transpose": _transpose,
    "cat": _cat,
    "mul": _scale,
    "div": _scale,
    "convolution": _blur,
}
