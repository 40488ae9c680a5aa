"""The masked model as a graph: a copy with its gates on is exported, decisions and masks become nodes.

What the graph computes is by construction what the hooks compute. Only norms, masks and a CV gate without ``min_keep``
are put in as one node each (``isw_plugin.ops.gating``), which later steps know how to take from a producer's
statistics and hand to readers; any other gate is traced into the operations that it runs.
"""

import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_map, tree_map_only

from isw_plugin.copies import copy_of, has_observers, without_process_hooks
from isw_plugin.errors import UnsupportedError
from isw_plugin.gates import CVGate, Gate
from isw_plugin.hooks import Memory, memory_of
from isw_plugin.inputs import arguments, is_list_of_images
from isw_plugin.ops.gating import channel_norm, decide, mask
from isw_plugin.sites import Inputs, Site

__all__ = ["TRACED_INSTANCES", "trace", "trace_call"]

TRACED_INSTANCES = 2  # export takes a batch of 1 for a constant

_aten = torch.ops.aten


@dataclass(frozen=True)
class _OneNode:
    """A CV gate that is traced as one node."""

    gate: CVGate

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        keep: Tensor = decide(norms, self.gate.alpha, self.gate.beta)
        return keep


class _WithDecisions(nn.Module):
    """The model, whose outputs are joined by every site's keep mask and norms."""

    def __init__(self, model: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.model = model
        self.memory = memory

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.model(*args, **kwargs)
        return output, dict(self.memory.keep), dict(self.memory.norms)


def trace(model: nn.Module, sites: tuple[Site, ...], inputs: Inputs) -> fx.GraphModule:
    """``trace_call`` for example inputs."""
    return trace_call(model, sites, *arguments(inputs))


def trace_call(
    model: nn.Module, sites: tuple[Site, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.GraphModule:
    """The graph of an attached model with its gates on, for any number of instances where the model allows.

    Args:
        model: In eval mode; run, not changed. Its hooks are those of ``isw_plugin.hooks``.
        sites: What is gated.
        args, kwargs: What its forward takes; shapes but for the instances become constants.

    Returns:
        A graph of ATen operators without in-place ones. It gives (outputs, keep by site, norms by site). Its guards,
        a module that it calls, tell for which numbers of instances above 1 it holds.

    Raises:
        UnsupportedError: torch.export cannot trace the model, or what a call does is more than what it gives.
    """
    if has_observers(model):  # what users' hooks write to must not see fake tensors; the check finds what they change
        model = copy_of(model, observed=False)
    memory = memory_of(model)
    if memory is None:
        raise UnsupportedError(f"{type(model).__name__} has no pruner of its own")
    traced = tree_map_only(Tensor, _traced_instances, (args, kwargs))
    shapes = tree_map(_dynamic_instances, traced)
    held = memory.gates, memory.enabled, memory.channel_norm, memory.mask
    memory.gates = {site.name: _as_node(memory.gates[site.name], memory.min_keep) for site in sites}
    memory.enabled, memory.channel_norm, memory.mask = True, channel_norm, mask
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"), without_process_hooks():
            exported = torch.export.export(_WithDecisions(model, memory), traced, dynamic_shapes=shapes)
            exported = exported.run_decompositions({})  # only this shows buffers that change
            _require_repeatable(exported)
            graph = cast(fx.GraphModule, exported.module(check_guards=True))
            limits = (str(limit.upper) for limit in exported.range_constraints.values())
            graph.meta["guarded"] = bool(exported._guards_code) or any(limit != "int_oo" for limit in limits)
            return graph
    except Exception as error:
        lists = any(map(is_list_of_images, (*args, *kwargs.values())))
        reason = "it takes a list of images" if lists else str(error) or type(error).__name__
        raise UnsupportedError(f"{type(model).__name__} cannot be exported: {reason}") from error
    finally:
        memory.gates, memory.enabled, memory.channel_norm, memory.mask = held
        memory.clear()


def _as_node(gate: Gate, min_keep: int) -> Gate:
    return _OneNode(gate) if isinstance(gate, CVGate) and not min_keep else gate


def _traced_instances(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    return torch.zeros(TRACED_INSTANCES, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)


def _dynamic_instances(leaf: object) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    return {0: torch.export.Dim.AUTO} if leaf.dim() else {}


def _require_repeatable(exported: torch.export.ExportedProgram) -> None:
    """For any number of instances, and for every call."""
    changed = sorted(exported.graph_signature.buffers_to_mutate.values())
    if changed:
        raise UnsupportedError(f"a forward changes the buffer {changed[0].removeprefix('model.')}")
    if exported.graph_signature.user_inputs_to_mutate:
        raise UnsupportedError("a forward changes its input")
    if any(_checks_values(node) for node in exported.graph.nodes):
        raise UnsupportedError("a forward checks values that it computes")
    given = set(exported.graph_signature.user_inputs)
    for value in (node.meta.get("val") for node in exported.graph.nodes if node.name in given):
        if isinstance(value, Tensor) and value.dim() and _is_constant(value.shape[0]):
            raise UnsupportedError("it or a gate takes the number of instances for a constant, by len() or a loop")


def _checks_values(node: fx.Node) -> bool:
    if node.target is not _aten._assert_scalar.default:
        return False
    held = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    return bool(free_unbacked_symbols(held))


def _is_constant(size: Any) -> bool:
    return isinstance(size, int) or size.node.maybe_as_int() is not None
