"""Graphs that run: what was traced, once for every way to run its layers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate.execution import DenseConv, DenseLinear, GatedConv, can_skip
from isw_plugin.accelerate.layers import Layer, Linear, conv, linear
from isw_plugin.accelerate.lower import Decision, lower, lower_all_kept, lower_dense
from isw_plugin.accelerate.replay import Replayed
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace
from isw_plugin.sites import Inputs, Site

__all__ = ["Plan", "Traced", "form_of", "instances_of"]


@dataclass
class Plan:
    """One graph, for inputs of one shape but for the instances."""

    graph: fx.GraphModule
    outputs: Any  # how the flat outputs are packed
    count: int  # of them
    decisions: list[Decision]

    def __post_init__(self) -> None:
        self.run = Replayed(self.graph)

    def decided(self, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep masks and norms by site, from what the graph gives after its outputs."""
        keep, norms, rest = {}, {}, list(given)
        for decision in self.decisions:
            if decision.thresholds is None:
                keep[decision.site], norms[decision.site] = rest.pop(0), rest.pop(0)
            else:
                squares = rest.pop(0)
                keep[decision.site] = torch.ops.isw.keep_mask(squares, *decision.thresholds)
                norms[decision.site] = squares.sum(1).sqrt()
        return keep, norms


class Traced:
    """The simplified graph of a masked model, and how its flat outputs lie."""

    def __init__(self, masked: nn.Module, sites: tuple[Site, ...], inputs: Inputs) -> None:
        exported = trace(masked, sites, inputs)
        spec: Any = exported._out_spec
        packed = spec.child(0)
        self.sites: list[str] = spec.child(1).context
        self.count = packed.num_leaves
        self.outputs = None if packed.is_leaf() else packed
        self.graph = simplify(exported)

    def gated(self, executions: dict[str, nn.Module]) -> Plan:
        graph, decisions = lower(self.graph, executions, self.count, self.sites)
        return Plan(graph, self.outputs, self.count, decisions)

    def all_kept(self, executions: dict[str, nn.Module]) -> Plan:
        return Plan(lower_all_kept(self.graph, executions, self.count, self.sites), self.outputs, self.count, [])

    def dense(self, executions: dict[str, nn.Module], channels_last: bool = True) -> Plan:
        return Plan(lower_dense(self.graph, executions, self.count, channels_last), self.outputs, self.count, [])

    def executions(self, instances: int, skips: Callable[[str], bool]) -> dict[str, nn.Module]:
        """By node, a module for every layer: one that skips where it can and ``skips`` says so of its name."""
        executions: dict[str, nn.Module] = {}
        constants = constants_of(self.graph)
        for node in self.graph.graph.nodes:
            if node.target is conv and (layer := Layer.of(node, constants)):
                shape = (instances, *node.args[0].meta["val"].shape[1:])
                gated = skips(node.meta["layer"]) and can_skip(layer)
                executions[node.name] = GatedConv(layer) if gated else DenseConv(layer, shape)
            elif node.target is linear and (flat := Linear.of(node, constants)):
                tokens = [size for size in node.args[0].meta["val"].shape[1:-1] if isinstance(size, int)]
                executions[node.name] = DenseLinear(flat, instances * math.prod(tokens))
        return executions

    def plan(self, execution: str, choices: dict[str, bool], instances: int) -> Plan:
        """Without timing anything."""
        if execution == "dense":
            return self.dense(self.executions(instances, lambda name: False))
        return self.gated(self.executions(instances, lambda name: choices.get(name, True)))


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a graph is made for: the names of inputs and their shapes but for the instances."""
    flat = pytree.tree_leaves((args, kwargs))
    shapes = [(leaf.dtype, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in flat]
    return (len(args), *kwargs, *shapes)


def instances_of(flat: Sequence[Any]) -> int:
    return next((leaf.shape[0] for leaf in flat if isinstance(leaf, Tensor) and leaf.dim()), 0)
