"""Pairs of layers that run as one in a lowered graph: what expands a map and the depthwise layer that reads it."""

import operator
from typing import Any

from torch import fx

from isw_plugin.accelerate.execution import ExpandDepthwise, GatedConv

__all__ = ["fuse"]


def fuse(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph, its pairs replaced by one call each; nothing that it gives changes."""
    for call in list(graph_module.graph.nodes):
        if (pair := _pair_at(graph_module, call)) is not None:
            _replace(graph_module, call, *pair)
    graph_module.recompile()
    return graph_module


def _pair_at(graph_module: fx.GraphModule, call: Any) -> tuple[Any, ExpandDepthwise] | None:
    """The call of what makes the map that ``call`` filters, and the module for both."""
    depthwise = _layer(graph_module, call)
    if depthwise is None or not depthwise.depthwise:
        return None
    x, keep, _, _, *_, out_keep, _, _ = call.args
    if keep is not out_keep or x.target is not operator.getitem or x.args[1] != 0 or len(x.users) > 1:
        return None
    made = x.args[0]
    expand = _layer(graph_module, made)
    if expand is None or not expand.is_pointwise or made.args[4] is not None or made.args[8] is not keep:
        return None
    return (made, ExpandDepthwise(expand, depthwise)) if set(made.users) == {x} else None


def _layer(graph_module: fx.GraphModule, call: Any) -> GatedConv | None:
    module = graph_module.get_submodule(call.target) if call.op == "call_module" else None
    return module if isinstance(module, GatedConv) else None


def _replace(graph_module: fx.GraphModule, call: Any, made: Any, both: ExpandDepthwise) -> None:
    x = call.args[0]
    graph_module.add_module(call.target, both)
    call.args = (*made.args[:4], *call.args[8:])
    for node in (x, made):
        graph_module.graph.erase_node(node)
    graph_module.delete_submodule(made.target)
