"""Graphs that run, as plain JSON values and tensors by name, and back.

A file may come from anybody: a graph calls nothing but operators of PyTorch and of ours that compute from tensors, and
the engine's layers; names in a file are looked up, never evaluated. ONNX in a file is examined by runtime.py.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isw_plugin.accelerate.execution import DenseConv, DenseLinear, ExpandDepthwise, GatedConv
from isw_plugin.accelerate.layers import Layer, Linear, conv, linear
from isw_plugin.accelerate.lower import Decision
from isw_plugin.accelerate.plan import Outputs, Plan
from isw_plugin.errors import StateMismatchError, UnsupportedError
from isw_plugin.ops.reference import unpack_weight

__all__ = ["TensorNames", "decoded_plan", "encoded_plan", "packed", "unpacked"]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "layers.conv": conv,
    "layers.linear": linear,
    **{f"sizes.{f.__name__}": f for f in (operator.getitem, operator.mul, operator.add, operator.sub)},
    **{f"sizes.{f.__name__}": f for f in (operator.floordiv, operator.mod, operator.neg)},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_MAKERS = {"arange", "full", "zeros", "ones", "scalar_tensor"}  # operators that may take no tensor
_INTERNAL = {  # names with an underscore that export leaves
    "__and__",  # and other operators of Python on tensors
    "__lshift__",
    "__or__",
    "__rshift__",
    "__xor__",
    "_adaptive_avg_pool2d",
    "_log_softmax",
    "_native_batch_norm_legit_no_training",
    "_softmax",
    "_to_copy",
    "_unsafe_view",
    "_weight_norm",
}
_CONSTANTS = {"dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "format": torch.memory_format}
_PACKS = {"tuple": tuple, "list": list}


class TensorNames:
    """Tensors of graphs, each once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, tuple[Tensor, str]] = {}  # the tensor lives here, or its id would be another's

    def of(self, tensor: Tensor, stored: Callable[[Tensor], Tensor] = torch.Tensor.detach) -> str:
        """The name of a tensor, which is stored as what ``stored`` makes of it."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = tensor, str(len(self._names))
            self.tensors[self._names[id(tensor)][1]] = stored(tensor)
        return self._names[id(tensor)][1]


def encoded_plan(plan: Plan, names: TensorNames) -> dict[str, Any]:
    """A plan as JSON values; its guards apart.

    Raises:
        UnsupportedError: It holds something that a file cannot.
    """
    places = {node: place for place, node in enumerate(plan.graph.graph.nodes)}
    *nodes, output = places
    return {
        "nodes": [_encoded_node(node, plan.graph, places, names) for node in nodes],
        "given": _encoded(output.args[0], places),
        "count": plan.outputs.count,
        "packed": None if plan.outputs.packed is None else packed(plan.outputs.packed),
        "own": list(plan.outputs.own),
        "decisions": [[decision.site, _encoded(decision.thresholds, places)] for decision in plan.decisions],
    }


def decoded_plan(encoded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """The plan again. Raises whatever a damaged one leads to."""
    root, graph = nn.Module(), fx.Graph()
    nodes: list[fx.Node] = []
    for place, node in enumerate(encoded["nodes"]):
        nodes.append(_decoded_node(node, place, root, graph, nodes, tensors))
    graph.output(tuple(_decoded(encoded["given"], nodes)))
    graph.lint()
    outputs = None if encoded["packed"] is None else unpacked(encoded["packed"], encoded["count"])
    decisions = [
        Decision(site, None if limits is None else tuple(_decoded(limits, nodes)))
        for site, limits in encoded["decisions"]
    ]
    return Plan(fx.GraphModule(root, graph), Outputs(encoded["count"], outputs, tuple(encoded["own"])), decisions)


# -- nodes -----------------------------------------------------------------------------------------


def _encoded_node(
    node: fx.Node, root: fx.GraphModule, places: Mapping[fx.Node, int], names: TensorNames
) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"op": "input"}
    if node.op == "get_attr":
        return {"op": "tensor", "name": names.of(getattr(root, str(node.target)))}
    arguments = {"args": _encoded(node.args, places), "kwargs": _encoded(dict(node.kwargs), places)}
    if node.op == "call_module":
        return {"op": "layer", "layer": _encoded_layer(getattr(root, str(node.target)), names), **arguments}
    return {"op": "call", "target": _name_of(node.target), **arguments}


def _decoded_node(
    encoded: Mapping[str, Any],
    place: int,
    root: nn.Module,
    graph: fx.Graph,
    nodes: list[fx.Node],
    tensors: Mapping[str, Tensor],
) -> fx.Node:
    name = f"at_{place}"  # never one from the file: fx writes names into a program
    if encoded["op"] == "input":
        return graph.placeholder(name)
    if encoded["op"] == "tensor":
        root.register_buffer(name, tensors[encoded["name"]])
        return graph.get_attr(name)
    args, kwargs = tuple(_decoded(encoded["args"], nodes)), _decoded(encoded["kwargs"], nodes)
    if encoded["op"] == "layer":
        root.add_module(name, _decoded_layer(encoded["layer"], tensors))
        return graph.call_module(name, args, kwargs)
    if encoded["op"] != "call":
        raise StateMismatchError(f"a damaged node is {str(encoded['op'])[:40]!r}")
    return graph.call_function(_function(encoded["target"]), args, kwargs)


def _name_of(target: Any) -> str:
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _NAMES.get(target, "")
    try:
        _function(name)
    except StateMismatchError as error:
        raise UnsupportedError(f"the graph cannot be saved: it calls {target}") from error
    return name


def _function(name: str) -> Callable[..., Any]:
    """What a graph may call by this name.

    Raises:
        StateMismatchError: Nothing.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    found = re.fullmatch(r"(aten|isw)\.([a-z_0-9A-Z]+)\.([a-z_0-9A-Z]+)", name)
    packet: Any = getattr(getattr(torch.ops, found[1]), found[2], None) if found else None
    overloads = [each or "default" for each in packet._overload_names] if _is_operator(packet) else []
    if not found or found[3] not in overloads:
        raise StateMismatchError(f"a graph calls {name[:80]!r}, which this torch {torch.__version__} does not have")
    called = getattr(packet, found[3])
    internal = found[2].startswith("_") and found[2] not in _INTERNAL
    reads = found[2] in _MAKERS or any("Tensor" in str(argument.type) for argument in called._schema.arguments)
    if internal or not reads or called._schema.is_mutable or found[2].endswith("_backward"):
        raise StateMismatchError(f"a graph calls {name[:80]!r}, which none that was saved does")
    return called  # type: ignore[no-any-return]  # of torch


def _is_operator(packet: Any) -> bool:
    return isinstance(packet, torch._ops.OpOverloadPacket)


# -- layers ----------------------------------------------------------------------------------------


def _encoded_layer(module: nn.Module, names: TensorNames) -> dict[str, Any]:
    if type(module) is ExpandDepthwise:
        pair = {name: _encoded_layer(each, names) for name, each in module.named_children()}
        return {"runs": "expand depthwise", **pair}
    if type(module) is GatedConv:
        channels, groups = len(module.bias), module.groups

        def dense(weight: Tensor) -> Tensor:
            return weight if module.depthwise else unpack_weight(weight, channels, groups)

        weight, bias = names.of(module.weight, dense), names.of(module.bias)
        window = {"stride": module.stride, "padding": module.padding, "dilation": [1, 1], "groups": groups}
        return {"runs": "gated", "weight": weight, "bias": bias, **window, "act": module.act, "pooled": module.pooled}
    if type(module) is DenseConv:
        layer = module.layer
        window = {name: list(getattr(layer, name)) for name in ("stride", "padding", "dilation")}
        held = {"weight": names.of(layer.weight), "bias": names.of(layer.bias), "groups": layer.groups}
        return {"runs": "dense", **held, **window, "act": layer.act, "shape": module.shape}
    if type(module) is DenseLinear:
        flat = module.layer
        bias_name = None if flat.bias is None else names.of(flat.bias)
        return {
            "runs": "linear",
            "weight": names.of(flat.weight),
            "bias": bias_name,
            "act": flat.act,
            "rows": module.rows,
        }
    raise UnsupportedError(f"the graph cannot be saved: it runs a {type(module).__name__}")


def _decoded_layer(encoded: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if encoded["runs"] == "expand depthwise":
        expand, depthwise = (_decoded_layer(encoded[name], tensors) for name in ("expand", "depthwise"))
        if not isinstance(expand, GatedConv) or not isinstance(depthwise, GatedConv):
            raise StateMismatchError("a damaged pair of layers does not skip")
        return ExpandDepthwise(expand, depthwise)
    weight, act = tensors[encoded["weight"]], encoded["act"]
    if encoded["runs"] == "linear":
        bias = None if encoded["bias"] is None else tensors[encoded["bias"]]
        return DenseLinear(Linear(weight, bias, act), encoded["rows"])
    stride, padding, dilation = (tuple(encoded[name]) for name in ("stride", "padding", "dilation"))
    layer = Layer(weight, tensors[encoded["bias"]], stride, padding, dilation, encoded["groups"], act)
    if encoded["runs"] == "dense":
        return DenseConv(layer, encoded["shape"])
    if encoded["runs"] != "gated":
        raise StateMismatchError(f"a damaged layer runs {str(encoded['runs'])[:40]!r}")
    gated = GatedConv(layer)
    return gated.with_pool() if encoded["pooled"] else gated


# -- values ----------------------------------------------------------------------------------------


def _encoded(value: Any, places: Mapping[fx.Node, int]) -> Any:
    """Arguments of a node: lists for tuples, which operators do not tell apart."""
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, list | tuple):
        return [_encoded(item, places) for item in value]
    if isinstance(value, dict):
        return {"dict": {name: _encoded(item, places) for name, item in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = next((kind for kind, of in _CONSTANTS.items() if isinstance(value, of)), None)
    if kind is None:
        raise UnsupportedError(f"the graph cannot be saved: it holds a {type(value).__name__}")
    return {kind: str(value).removeprefix("torch.")}


def _decoded(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {name: _decoded(item, nodes) for name, item in held.items()}
    if kind == "node":
        return nodes[held]
    if kind in ("float", "device"):
        return float(held) if kind == "float" else torch.device(held)
    found = getattr(torch, held, None)
    if not isinstance(found, _CONSTANTS[kind]):
        raise StateMismatchError(f"{held[:40]!r} is no {kind} of torch")
    return found


def packed(spec: Any) -> Any:
    """How flat values lie in tuples, lists and dicts, as JSON values; places for leaves.

    Raises:
        UnsupportedError: They lie in something else.
    """
    return _packed(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))


def _packed(value: Any) -> Any:
    if type(value) is int:
        return value
    if type(value) in (tuple, list):
        return {type(value).__name__: [_packed(item) for item in value]}
    if type(value) is dict and all(isinstance(name, str) for name in value):
        return {"dict": {name: _packed(item) for name, item in value.items()}}
    raise UnsupportedError(f"the graph cannot be saved: inputs or outputs lie in a {type(value).__name__}")


def unpacked(encoded: Any, leaves: int) -> Any:
    """The ``TreeSpec`` again.

    Raises:
        StateMismatchError: It holds others than so many leaves, in order.
    """
    found, spec = pytree.tree_flatten(_unpacked(encoded))
    if found != list(range(leaves)):
        raise StateMismatchError("inputs or outputs lie in no order")
    return spec


def _unpacked(encoded: Any) -> Any:
    if type(encoded) is int:
        return encoded
    ((kind, held),) = encoded.items()
    if kind == "dict":
        return {name: _unpacked(item) for name, item in held.items()}
    return _PACKS[kind](_unpacked(item) for item in held)
