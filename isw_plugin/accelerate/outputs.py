"""Decisions that are made before a layer runs, handed to that layer: what they drop need not be computed.

A decision comes first where nothing that it is made of hangs on the layer's map, as where norms are predicted. All
who read the map must drop what it drops.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from isw_plugin.accelerate.layers import conv, mask

__all__ = ["skip_outputs"]


def skip_outputs(graph: fx.Graph, goes_through: Callable[[Any], bool]) -> None:
    """Give layers the decisions on their maps, and take the masks away that these make needless.

    Args:
        goes_through: Whether an operation keeps channels apart and zeros zero.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for layer in reversed([node for node in graph.nodes if node.target is conv]):
        keeps = _keeps(layer, goes_through)
        keep = keeps.pop() if len(keeps) == 1 else None
        if keep is None:
            continue
        needed = _ancestors(keep)
        if layer in needed:
            continue
        for node in sorted((node for node in needed if order[node] > order[layer]), key=order.__getitem__):
            layer.prepend(node)
        order = {node: place for place, node in enumerate(graph.nodes)}
        layer.args = (*layer.args, keep)
        _drop_masks(layer)


def _keeps(value: Any, goes_through: Callable[[Any], bool]) -> set[Any]:
    """The decisions by which a map is read; None among them: somebody reads all of it."""
    found: set[Any] = set()
    for user in value.users:
        if user.target is mask and user.args[0] is value and user.args[2] == 1:
            found.add(user.args[1])
        elif user.target is conv:
            found |= _keeps_of_layer(user, value)
        elif goes_through(user) and user.args[0] is value:
            found |= _keeps(user, goes_through)
        else:
            found.add(None)
    return found


def _keeps_of_layer(layer: Any, value: Any) -> set[Any]:
    """A residual without a decision of its own is needed where the sum is."""
    x, _, _, residual, keep, residual_keep = layer.args[:6]
    if value not in (x, residual):
        return {None}
    out_keep = layer.args[11] if len(layer.args) > 11 else None
    read = {keep} if value is x else set()
    return read | ({residual_keep or out_keep} if value is residual else set())


def _ancestors(node: Any) -> set[Any]:
    """It and all that it is made of."""
    found, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def _drop_masks(value: Any) -> None:
    """Of a map, and of what operations that leave zeros zero make of it."""
    for user in list(value.users):
        if user.target is mask and user.args[0] is value:
            user.replace_all_uses_with(value)
            user.graph.erase_node(user)
        elif user.target is not conv:
            _drop_masks(user)
