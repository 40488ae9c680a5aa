"""How the channels of a map lie in what later operations hand on.

Each rule says where channel c of a map is found in an operation's outputs, for operations that keep
channels apart and zeros zero. Anything else ends a path.
"""

from math import prod

from isw_plugin.sites.graph import Graph, Node
from isw_plugin.sites.operations import BLANKS, CLAMPS, PASSES, POOLS, REDUCTIONS, VIEWS
from isw_plugin.sites.places import MOVES, OTHER, Path, Rule, without

__all__ = ["Path", "by_channel", "follow", "is_scale", "keeps_zeros"]


def follow(graph: Graph, node: Node, path: Path) -> list[Path]:
    """Where the channels lie in the node's outputs; empty where they cannot be told apart there."""
    rule = _RULES.get(node.kind)
    folded = graph.shapes[path.value][0] != path.instances
    found = rule(graph, node, path) if rule and (not folded or node.kind in VIEWS | PASSES) else []
    return [behind for behind in found if any(channel != OTHER for channel in behind.channels)]


def is_scale(graph: Graph, node: Node, value: int, axis: int | None = None) -> bool:
    """Whether the node multiplies ``value`` by one number a channel (squeeze-excite, LayerScale) or in all.

    ``axis``: where the channels lie; None: 1 or the last.
    """
    if not _multiplies(graph, node, value):
        return False
    shape = graph.shapes[value]
    others = [_unexpanded(graph, other) for other in node.inputs if other != value]
    axes = (1, len(shape) - 1) if axis is None else (axis,)
    return any(all(by_channel(other, shape, axis) for other in others) for axis in axes)


def keeps_zeros(graph: Graph, node: Node, value: int, axis: int) -> bool:
    """Whether the node multiplies ``value`` by what is no map of its size: a scale, or attention over places."""
    others = (_unexpanded(graph, other) for other in node.inputs if other != value)
    return is_scale(graph, node, value, axis) or (
        _multiplies(graph, node, value) and all(prod(other) < prod(graph.shapes[value]) for other in others)
    )


def by_channel(scale: tuple[int, ...], shape: tuple[int, ...], axis: int) -> bool:
    """Whether a tensor has one number a channel, or a channel and instance."""
    if len(scale) != len(shape):
        return False
    return all(size == 1 or at == 0 or (at == axis and size == shape[at]) for at, size in enumerate(scale))


def _multiplies(graph: Graph, node: Node, value: int) -> bool:
    if node.kind not in ("mul", "div") or (node.kind == "div" and node.inputs[:1] != (value,)):
        return False
    return graph.shapes[node.outputs[0]] == graph.shapes[value]


def _unexpanded(graph: Graph, value: int) -> tuple[int, ...]:
    """The shape of a value before it was expanded to that of the map it scales."""
    producer = graph.producers.get(value)
    return graph.shapes[producer.inputs[0] if producer and producer.kind == "expand" else value]


def _same(graph: Graph, node: Node, path: Path) -> list[Path]:
    return [path.to(node.outputs[0])]


def _pool(graph: Graph, node: Node, path: Path) -> list[Path]:
    before, after = graph.shapes[path.value], graph.shapes[node.outputs[0]]
    return _same(graph, node, path) if len(before) == len(after) and before[:2] == after[:2] and path.axis == 1 else []


def _reduction(graph: Graph, node: Node, path: Path) -> list[Path]:
    dims = node.args[1] if len(node.args) > 1 else None
    return without(graph, node, path, dims if isinstance(dims, list | tuple) else [dims])


def _scale(graph: Graph, node: Node, path: Path) -> list[Path]:
    return _same(graph, node, path) if keeps_zeros(graph, node, path.value, path.axis) else []


def _blur(graph: Graph, node: Node, path: Path) -> list[Path]:
    """A convolution that is no module's (BlurPool): one kernel a channel, and nothing added."""
    channels, bias, groups = graph.shapes[path.value][1], node.args[2], node.args[-1]
    alone = node.inputs[0] == path.value and groups == channels == graph.shapes[node.outputs[0]][1] and bias is None
    return _same(graph, node, path) if alone and path.axis == 1 else []


def _write(graph: Graph, node: Node, path: Path) -> list[Path]:
    """A map written into a blank tensor, or parts of it copied within (circular padding)."""
    if len(node.inputs) < 3 or len(node.outputs) < 2:
        return []  # not a part of a tensor
    view, source, base = node.inputs[:3]
    shapes = [graph.shapes[value] for value in (view, source, base)]
    if any(len(shape) != len(shapes[0]) or shape[at] != shapes[0][at] for shape in shapes for at in (0, path.axis)):
        return []
    maker, part = graph.producers.get(base), graph.producers.get(source)
    blank = path.value == source and maker is not None and maker.kind in BLANKS
    within = path.value == base and part is not None and part.kind == "slice" and part.inputs[0] == base
    return [path.to(node.outputs[1])] if blank or within else []


def _generalised_mean(graph: Graph, node: Node, path: Path) -> list[Path]:
    """GeM does not keep zeros, so that it is looked through as a whole: the map is what it reads."""
    found = []
    for root in graph.nodes:
        pool = graph.producers.get(root.inputs[0]) if root.kind == "pow" else None
        if pool and _base(graph, pool) == path.value:
            pooled = follow(graph, pool, path.to(pool.inputs[0]))
            found += [behind.to(root.outputs[0]) for behind in pooled]
    return found


def _base(graph: Graph, pool: Node) -> int | None:
    """What powers are pooled of, behind a clamp or not."""
    power = graph.producers.get(pool.inputs[0]) if pool.kind in POOLS | REDUCTIONS else None
    if power is None or power.kind != "pow":
        return None
    clamp = graph.producers.get(power.inputs[0])
    return clamp.inputs[0] if clamp and clamp.kind in CLAMPS else power.inputs[0]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(PASSES, _same),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **MOVES,
    "pow": _generalised_mean,
    **dict.fromkeys(CLAMPS, _generalised_mean),
    "mul": _scale,
    "div": _scale,
    "convolution": _blur,
    "copy": _write,
}
