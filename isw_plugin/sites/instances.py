"""Which axes count instances: those that follow their number from one run to another.

Two runs with different numbers become one graph, whose shapes hold ``INSTANCES`` for the number. No constant of
a model is near it, so that no size of a map is taken for it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from isw_plugin.sites.graph import Call, Graph, Node

__all__ = ["INSTANCES", "merged", "mixing", "why_not"]

INSTANCES = 1 << 40
_UNSTEADY = -1  # on axis 0 of a value that the runs do not make or use alike

_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
_PRODUCTS = ("bmm", "baddbmm", "mm", "addmm")

_T = TypeVar("_T", Node, Call)


def why_not(shape: tuple[int, ...]) -> str:
    """Why a map of this shape has no instances on axis 0, and there alone; "" where it has."""
    if shape[0] == _UNSTEADY:
        return "what is computed of it depends on the number of instances"
    if shape[0] != INSTANCES:
        folded = shape[0] > INSTANCES // 2
        return "instance axis folded into another" if folded else "its axis 0 is not the instance axis"
    another = any(size > INSTANCES // 2 for size in shape[1:])
    return "another axis than the instance axis follows the number of instances" if another else ""


def merged(few: Graph, many: Graph, numbers: tuple[int, int]) -> Graph:
    """The graph of the run with fewer instances, with shapes that hold for any number."""
    alike = few.nodes == many.nodes and few.calls == many.calls
    pairs = {value: value for value in range(len(few.shapes))} if alike else _steady(few, many)
    for value, shape in enumerate(few.shapes):
        other = many.shapes[pairs[value]] if value in pairs else ()
        few.shapes[value] = _for_any(shape, other, numbers)
    if not alike:
        before, after = few.call_counts(), many.call_counts()
        few.more.update({name: 1 for name in before if before[name] != after[name]})
    few.own |= many.own
    return few


def _for_any(shape: tuple[int, ...], other: tuple[int, ...], numbers: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) != len(other):
        return (_UNSTEADY, *shape[1:]) if shape else ()
    few, many = numbers
    return tuple(
        size + (INSTANCES - few) * (more - size) // (many - few) for size, more in zip(shape, other, strict=True)
    )


def _steady(few: Graph, many: Graph) -> dict[int, int]:
    """Values that both runs make and use alike: where modules run operations as often, in the same order."""
    nodes = _paired(few.nodes, many.nodes, lambda node: (node.kind, node.name, node.callers))
    calls = _paired(few.calls, many.calls, lambda call: (call.name, len(call.inputs), len(call.named)))
    pairs: dict[int, int] = {}
    for call, other in calls:
        pairs |= dict(zip(call.tensors(), other.tensors(), strict=False))
    for node, same in nodes:
        pairs |= dict(zip(node.outputs, same.outputs, strict=False))
    twins = {id(node): id(same) for node, same in nodes}
    used, used_there = few.users(), many.users()
    return {
        value: twin
        for value, twin in pairs.items()
        if [twins.get(id(user)) for user in used[value]] == [id(user) for user in used_there[twin]]
    }


def _paired(few: Iterable[_T], many: Iterable[_T], key: Callable[[_T], Hashable]) -> list[tuple[_T, _T]]:
    groups: dict[Hashable, tuple[list[_T], list[_T]]] = defaultdict(lambda: ([], []))
    for side, items in enumerate((few, many)):
        for item in items:
            groups[key(item)][side].append(item)
    equal = (group for group in groups.values() if len(group[0]) == len(group[1]))
    return [pair for group in equal for pair in zip(*group, strict=True)]


# -- what reads across instances -------------------------------------------------------------------


def mixing(graph: Graph) -> str:
    """What reads along the axis that follows the number of instances, so that they are steps of one; "" if nothing."""
    alike: set[int] = set()  # values that are the same for every instance, whatever the inputs
    for node in graph.nodes:
        if not node.inputs:
            continue
        harmless = alike.issuperset(node.inputs)
        if _mixes(graph, node) and not (harmless and _averages(graph, node)):
            where = node.name or (node.callers[-1] if node.callers else "")
            kind = type(graph.modules[node.name]).__name__ if node.name else node.kind
            return f"{where} ({kind})" if where else kind
        if harmless or _forgets(graph, node):
            alike.update(node.outputs)
    return ""


def _forgets(graph: Graph, node: Node) -> bool:
    """Whether a layer norm takes each number for itself, so that its bias is all that it gives (CSATv2)."""
    size: tuple[int, ...] = ()
    if node.kind == "native_layer_norm":
        size = tuple(node.args[1])
    elif node.kind == "norm" and isinstance(norm := graph.modules[node.name], nn.LayerNorm):
        size = norm.normalized_shape
    return len(node.inputs) == 1 and len(size) > 0 and math.prod(size) == 1


def _averages(graph: Graph, node: Node) -> bool:
    """Whether a product is a mean, which is the same over any number of equal values."""
    maker = graph.producers.get(node.inputs[-2]) if node.kind in _PRODUCTS else None
    return node.kind.startswith(_ATTENTION) or (maker is not None and maker.kind == "_softmax")


def _mixes(graph: Graph, node: Node) -> bool:
    shapes = [graph.shapes[value] for value in node.inputs]
    if node.kind == "recurrent":
        batch_first = getattr(graph.modules[node.name], "batch_first", False) and len(shapes[0]) == 3
        return shapes[0][1 if batch_first else 0] == INSTANCES
    if node.kind == "layer" and isinstance(graph.modules[node.name], _ConvNd):
        return INSTANCES in shapes[0][2:]
    if node.kind.startswith(_ATTENTION):
        return INSTANCES in (shapes[0][-2:-1] + shapes[1][-2:-1] if len(shapes) > 1 else shapes[0][-2:-1])
    if node.kind in _PRODUCTS and len(shapes) > 1:
        return shapes[-2][-1] == INSTANCES and INSTANCES in graph.shapes[node.outputs[0]]
    return False
