"""A simplified dense graph as an ONNX model, for runtimes that take one. Needs the package ``onnx``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from isw_plugin.accelerate.layers import conv, linear
from isw_plugin.errors import UnsupportedError
from isw_plugin.ops.reference import borders

__all__ = ["onnx_of"]

_aten = torch.ops.aten
_OPSET, _IR = 20, 9  # the first with Gelu, and the form that came with it
_ALIKE = {  # ATen's operator takes what ONNX's does, and nothing else that is not at its default
    _aten.relu.default: "Relu",
    _aten.sigmoid.default: "Sigmoid",
    _aten.tanh.default: "Tanh",
    _aten.hardswish.default: "HardSwish",
    _aten.gelu.default: "Gelu",
    _aten.add.Tensor: "Add",
    _aten.sub.Tensor: "Sub",
    _aten.mul.Tensor: "Mul",
    _aten.div.Tensor: "Div",
}


def onnx_of(graph_module: fx.GraphModule) -> bytes:
    """The model, serialised; its inputs and outputs are those of the graph, for any number of instances.

    Args:
        graph_module: Without gates; every layer is one ``conv`` or ``linear``.

    Raises:
        UnsupportedError: The graph has what is not written here, or is not of float32.
    """
    writer = _Writer(graph_module)
    for node in graph_module.graph.nodes:
        writer.write(node)
    return writer.model()


class _Writer:
    def __init__(self, graph_module: fx.GraphModule) -> None:
        import onnx

        self.onnx: Any = onnx
        self.source = graph_module
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def write(self, node: fx.Node) -> None:
        """Add what a node computes; UnsupportedError where there is no operator for it."""
        if node.op == "placeholder":
            self.inputs.append(self._value(node))
        elif node.op == "get_attr":
            self.constant(_attribute(self.source, str(node.target)), node.name)
        elif node.op == "output":
            given: Any = node.args[0]
            self.outputs += [self._value(each) for each in given]
        elif isinstance(node.meta.get("val"), Tensor):  # sizes are asked for where they are read
            _WRITERS.get(node.target, _alike)(self, node)

    def model(self) -> bytes:
        """All that was written, as an ONNX file holds it; UnsupportedError where an output has no name of its own."""
        names = [value.name for value in (*self.inputs, *self.outputs)]
        if len(set(names)) < len(names):
            raise UnsupportedError("an output is an input, or another output")
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "dense", self.inputs, self.outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        serialized: bytes = made.SerializeToString()
        return serialized

    def emit(self, operator: str, inputs: Sequence[Any], output: str = "", **attributes: Any) -> str:
        """Add a node; its inputs are names, nodes or numbers. Returns the name of its output."""
        output = output or f"value_{len(self.nodes)}"
        named = [self.name_of(each) for each in inputs]
        self.nodes.append(self.onnx.helper.make_node(operator, named, [output], **attributes))
        return output

    def name_of(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        return str(value.name) if isinstance(value, fx.Node) else self.constant(torch.tensor(float(value)))

    def constant(self, tensor: Tensor, name: str = "") -> str:
        name = name or f"constant_{len(self.constants)}"
        if tensor.dtype not in (torch.float32, torch.int64):
            raise UnsupportedError(f"{tensor.dtype} is not written as ONNX")
        self.constants.append(self.onnx.numpy_helper.from_array(tensor.detach().cpu().contiguous().numpy(), name))
        return name

    def whole_numbers(self, values: Sequence[int]) -> str:
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def _value(self, node: Any) -> Any:
        held = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(held, Tensor) or held.dtype != torch.float32 or not held.dim():
            raise UnsupportedError(f"{node} is not a batch of float32")
        shape = ["instances", *(size if isinstance(size, int) else None for size in held.shape[1:])]
        return self.onnx.helper.make_tensor_value_info(node.name, self.onnx.TensorProto.FLOAT, shape)

    def activate(self, act: str, value: str, output: str) -> None:
        names = {"none": "Identity", "relu": "Relu", "hardswish": "HardSwish", "gelu": "Gelu"}
        if act == "relu6":
            self.emit("Clip", [value, 0.0, 6.0], output)
        elif act == "silu":
            self.emit("Mul", [value, self.emit("Sigmoid", [value])], output)
        else:
            self.emit(names[act], [value], output)


def _attribute(root: Any, target: str) -> Tensor:
    for name in target.split("."):
        root = getattr(root, name)
    tensor: Tensor = root
    return tensor


def _pair(values: Any) -> list[int]:
    return [int(values[0]), int(values[-1])] if isinstance(values, Sequence) else [int(values)] * 2


def _refuse(node: fx.Node) -> UnsupportedError:
    return UnsupportedError(f"{node.target} is not written as ONNX, or not with {node.args[1:]}")


# -- operators -------------------------------------------------------------------------------------


def _alike(writer: _Writer, node: fx.Node) -> None:
    others = [arg for arg in node.args if not isinstance(arg, fx.Node | float | int) or isinstance(arg, bool)]
    if node.target not in _ALIKE or others or node.kwargs:
        raise _refuse(node)
    writer.emit(_ALIKE[node.target], node.args, node.name)


def _conv(writer: _Writer, node: fx.Node) -> None:
    x, weight, bias, residual, _, _, stride, padding, dilation, groups, act = node.args
    window: dict[str, Any] = {
        "strides": _pair(stride),
        "pads": list(borders(padding)),  # type: ignore[arg-type]  # whole numbers
        "dilations": _pair(dilation),
        "group": groups,
    }
    y = writer.emit("Conv", [x, weight, *([] if bias is None else [bias])], **window)
    y = y if residual is None else writer.emit("Add", [y, residual])
    writer.activate(str(act), y, node.name)


def _linear(writer: _Writer, node: fx.Node) -> None:
    x, weight, bias, act = node.args
    y = writer.emit("MatMul", [x, writer.emit("Transpose", [weight], perm=[1, 0])])
    y = y if bias is None else writer.emit("Add", [y, bias])
    writer.activate(str(act), y, node.name)


def _clip(writer: _Writer, node: fx.Node) -> None:
    least, most = [*node.args[1:], None, None][:2] if node.target is not _aten.relu6.default else (0.0, 6.0)
    if not isinstance(least, int | float) or not isinstance(most, int | float):
        raise _refuse(node)
    writer.emit("Clip", [node.args[0], least, most], node.name)


def _silu(writer: _Writer, node: fx.Node) -> None:
    writer.activate("silu", writer.name_of(node.args[0]), node.name)


def _hardsigmoid(writer: _Writer, node: fx.Node) -> None:
    writer.emit("HardSigmoid", node.args[:1], node.name, alpha=1 / 6, beta=0.5)


def _pool(writer: _Writer, node: fx.Node) -> None:
    """Max and average, of whole windows; averages count zeros around the map, as ATen's by default."""
    is_max = node.target is _aten.max_pool2d.default
    plain: list[Any] = [1, False] if is_max else [False, True, None]
    given: list[Any] = [*node.args[1:], *[[], 0, *plain][len(node.args) - 2 :]]
    kernel, stride, padding, *others = given
    others = [1 if other == [1, 1] else other for other in others]
    if others != plain or node.kwargs:
        raise _refuse(node)
    window = {"kernel_shape": _pair(kernel), "strides": _pair(stride or kernel), "pads": _pair(padding) * 2}
    if is_max:
        writer.emit("MaxPool", node.args[:1], node.name, **window)
    else:
        writer.emit("AveragePool", node.args[:1], node.name, **window, count_include_pad=1)


def _global_pool(writer: _Writer, node: fx.Node) -> None:
    if _pair(node.args[1]) != [1, 1]:
        raise _refuse(node)
    writer.emit("GlobalAveragePool", node.args[:1], node.name)


def _mean(writer: _Writer, node: fx.Node) -> None:
    if node.kwargs or len(node.args) < 2:
        raise _refuse(node)
    dims: Any = node.args[1]
    keepdim = int(bool(node.args[2])) if len(node.args) > 2 else 0
    writer.emit("ReduceMean", [node.args[0], writer.whole_numbers(dims)], node.name, keepdims=keepdim)


def _reshape(writer: _Writer, node: fx.Node) -> None:
    """Of every instance by itself: ONNX's 0 is the size that there was."""
    sizes: Any = node.meta["val"].shape
    before: Any = node.args[0].meta["val"].shape  # type: ignore[union-attr]  # a node
    if sizes[0] != before[0] or not all(isinstance(size, int) for size in sizes[1:]):
        raise _refuse(node)
    writer.emit("Reshape", [node.args[0], writer.whole_numbers([0, *sizes[1:]])], node.name)


def _permute(writer: _Writer, node: fx.Node) -> None:
    dims: Any = node.args[1]
    writer.emit("Transpose", node.args[:1], node.name, perm=[dim % len(dims) for dim in dims])


def _cat(writer: _Writer, node: fx.Node) -> None:
    tensors: Any = node.args[0]
    writer.emit("Concat", tensors, node.name, axis=node.args[1] if len(node.args) > 1 else 0)


_WRITERS: dict[Any, Callable[[_Writer, fx.Node], None]] = {
    conv: _conv,
    linear: _linear,
    _aten.relu6.default: _clip,
    _aten.hardtanh.default: _clip,
    _aten.clamp.default: _clip,
    _aten.silu.default: _silu,
    _aten.hardsigmoid.default: _hardsigmoid,
    _aten.max_pool2d.default: _pool,
    _aten.avg_pool2d.default: _pool,
    _aten.adaptive_avg_pool2d.default: _global_pool,
    _aten.mean.dim: _mean,
    _aten.reshape.default: _reshape,
    _aten.view.default: _reshape,
    _aten.flatten.using_ints: _reshape,
    _aten.squeeze.dims: _reshape,
    _aten.unsqueeze.default: _reshape,
    _aten.permute.default: _permute,
    _aten.cat.default: _cat,
}
