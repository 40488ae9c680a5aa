"""Graphs that run: what was traced, once for every way to run its layers."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate.calls import Call
from isw_plugin.accelerate.execution import DenseConv, DenseLinear, GatedConv, can_skip
from isw_plugin.accelerate.fuse import fuse
from isw_plugin.accelerate.layers import Layer, Linear, conv, linear
from isw_plugin.accelerate.lower import Decision, lower, lower_all_kept, lower_dense
from isw_plugin.accelerate.replay import Replayed
from isw_plugin.accelerate.runtime import OnnxRuntime, is_installed
from isw_plugin.accelerate.simplify import constants_of, simplify
from isw_plugin.accelerate.trace import trace_call
from isw_plugin.accelerate.weights import Weights
from isw_plugin.sites import Site

__all__ = ["Outputs", "Plan", "Traced"]


@dataclass(frozen=True)
class Outputs:
    """How a graph's flat outputs lie."""

    count: int  # of the model's; what was decided follows
    packed: Any  # how they are packed; None: one tensor
    own: tuple[int, ...]  # places that the graph holds, or gives twice: a caller may change what it gets

    def pack(self, given: Sequence[Any]) -> Any:
        """As the model gives them."""
        if self.own:
            given = [each.clone() if place in self.own else each for place, each in enumerate(given)]
        return given[0] if self.packed is None else pytree.tree_unflatten(given[: self.count], self.packed)


@dataclass
class Plan:
    """One graph, for inputs of one form."""

    graph: fx.GraphModule
    outputs: Outputs
    decisions: list[Decision]
    guards: Callable[[Sequence[Any]], str] | None = None  # why the graph does not hold for flat inputs, or ""
    runtime: OnnxRuntime | None = None  # runs the same instead; under torch.compile the graph does

    def __post_init__(self) -> None:
        self.run: Callable[..., Sequence[Any]] = self.runtime or Replayed(self.graph)
        self.used = time.monotonic()
        self.example: Call | None = None  # what it was made for, without instances
        self.right_for: set[int] = set()  # instances, in contiguous tensors

    @property
    def alone(self) -> bool:
        """Whether it was seen to hold for one instance: export supposes that there are more."""
        return 1 in self.right_for

    def decided(self, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep masks and norms by site, from what the graph gave."""
        keep, norms, rest = {}, {}, list(given[self.outputs.count :])
        for decision in self.decisions:
            if decision.thresholds is None:
                keep[decision.site], norms[decision.site] = rest.pop(0), rest.pop(0)
            else:
                squares = rest.pop(0)
                keep[decision.site] = torch.ops.isw.keep_mask(squares, *decision.thresholds)
                norms[decision.site] = squares.sum(1).sqrt()
        return keep, norms


class Traced:
    """The simplified graph of a masked model, and how its flat outputs lie.

    Raises:
        UnsupportedError: The model cannot be exported.
    """

    def __init__(
        self,
        masked: nn.Module,
        sites: tuple[Site, ...],
        call: Call,
        weights: Weights,
    ) -> None:
        exported = trace_call(masked, sites, call.args, call.kwargs)
        self.weights = weights
        spec: Any = exported._out_spec
        packed = spec.child(0)
        count: int = packed.num_leaves
        self.sites: list[str] = spec.child(1).context
        self.guards = _guards_of(exported)
        traced = _given(exported)[:count]
        self.graph = simplify(exported)
        own = _own(traced, _given(self.graph)[:count])
        self.outputs = Outputs(count, None if packed.is_leaf() else packed, own)
        for name, buffer in list(self.graph.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            self.graph.get_submodule(parent)._buffers[leaf] = self.weights.shared(buffer)

    def gated(self, executions: dict[str, nn.Module], fused: bool = True) -> Plan:
        """``fused``: or every layer by itself, to be timed."""
        graph, decisions = lower(self.graph, executions, self.outputs.count, self.sites)
        return Plan(fuse(graph) if fused else graph, self.outputs, decisions, self.guards)

    def all_kept(self, executions: dict[str, nn.Module], fused: bool = True) -> Plan:
        """As ``gated``, with gates that drop nothing."""
        graph = lower_all_kept(self.graph, executions, self.outputs.count, self.sites)
        return Plan(fuse(graph) if fused else graph, self.outputs, [], self.guards)

    def dense(self, executions: dict[str, nn.Module], channels_last: bool = True) -> Plan:
        graph = lower_dense(self.graph, executions, self.outputs.count, channels_last)
        return Plan(graph, self.outputs, [], self.guards)

    def by_runtime(self, dense: Plan) -> Plan | None:
        """A dense plan by onnxruntime; None: that is not installed, or does not take the graph."""
        if not is_installed():
            return None
        try:
            runtime = OnnxRuntime(lower_dense(self.graph, {}, self.outputs.count, channels_last=False))
        except Exception:  # of any kind, onnxruntime's own too: one form less to compare
            return None
        return dataclasses.replace(dense, runtime=runtime)

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
        self.weights.share(executions.values())
        return executions

    def plan(self, execution: str, choices: dict[str, bool], instances: int, by_runtime: bool) -> Plan:
        """Without timing anything."""
        if execution == "dense":
            dense = self.dense(self.executions(instances, lambda name: False))
            return (self.by_runtime(dense) if by_runtime else None) or dense
        return self.gated(self.executions(instances, lambda name: choices.get(name, True)))


def _given(graph_module: fx.GraphModule) -> list[Any]:
    """What the graph gives, flat."""
    output: Any = next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")
    return list(output.args[0])


def _own(traced: Sequence[Any], given: Sequence[Any]) -> tuple[int, ...]:
    """Places of outputs that hang on no input, or that became the same as an input or as another."""
    places: list[int] = []
    for place, node in enumerate(given):
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor | None):
            continue
        became_input = node.op == "placeholder" and traced[place].op != "placeholder"
        alike = [k for k in range(place) if given[k] is node and k not in places]
        became_other = any(traced[k] is not traced[place] for k in alike)
        if became_input or became_other or not _hangs_on_inputs(node):
            places.append(place)
    return tuple(places)


def _hangs_on_inputs(node: fx.Node) -> bool:
    """By way of tensors: sizes are constants where calls are recorded."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return True
        for source in current.all_input_nodes:
            if source not in seen and isinstance(source.meta.get("val"), Tensor | list | tuple | None):
                seen.add(source)
                pending.append(source)
    return False


def _guards_of(exported: fx.GraphModule) -> Callable[[Sequence[Any]], str] | None:
    """None: the graph holds for any number of instances, but perhaps for one."""
    call: Any = next((node for node in exported.graph.nodes if node.op == "call_module"), None)
    if call is None or not exported.meta["guarded"]:
        return None
    guards = exported.get_submodule(call.target)

    def problem(flat: Sequence[Any]) -> str:
        try:
            guards(*flat)
        except Exception as error:
            return str(error)
        return ""

    return problem
