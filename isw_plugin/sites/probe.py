"""One forward of a copy without memory: which operation reads which tensor.

Layers and norms are nodes; every other module is seen through, down to the operations it runs, so
custom activation modules and functional code look alike.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from isw_plugin.copies import copy_of
from isw_plugin.errors import ProbeError

__all__ = [
    "INSTANCES",
    "LAYERS",
    "Call",
    "Graph",
    "Inputs",
    "Node",
    "default_inputs",
    "norms_over_channels",
    "probe",
]

Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]

LAYERS = (_ConvNd, nn.Linear)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Of other libraries, and functional inside: their operations would not tell what they are.
_CHANNEL_NORM_NAMES = ("RmsNorm", "SimpleNorm")
_NORM_NAMES = (*_CHANNEL_NORM_NAMES, "EvoNorm2d", "FilterResponseNorm", "FrozenBatchNorm")

INSTANCES = 2  # a map whose axis 0 is not this long does not keep its instances apart


@dataclass(frozen=True)
class Node:
    """A layer, a norm or an operation; ``inputs`` and ``outputs`` are numbers of values."""

    kind: str  # "layer", "norm", "recurrent", or the operation's name
    name: str  # of the module; "" for an operation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[str, ...]  # the modules it ran in, outermost first
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Call:
    """A call of a module: the values it got, by position and by name, and the one it gave."""

    name: str
    inputs: tuple[int | None, ...]  # None: an argument that is no tensor
    named: tuple[int, ...] = ()
    output: int | None = None

    def tensors(self) -> tuple[int, ...]:
        return (*(value for value in self.inputs if value is not None), *self.named)


@dataclass
class Graph:
    """What the probe saw, in the order of execution."""

    modules: dict[str, nn.Module]  # of the model itself, not of the copy
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # by value
    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)  # a module comes after those it called
    own: dict[str, str] = field(default_factory=dict)  # modules that compute a layer's work themselves, and how

    def __post_init__(self) -> None:
        self.layers = {name: module for name, module in self.modules.items() if isinstance(module, LAYERS)}

    @cached_property
    def producers(self) -> dict[int, Node]:
        """For every value, the node that made it; asked for when the graph is complete."""
        return {value: node for node in self.nodes for value in node.outputs}

    def users(self) -> list[list[Node]]:
        """For every value, the nodes that read it."""
        users: list[list[Node]] = [[] for _ in self.shapes]
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                users[value].append(node)
        return users

    def call_counts(self) -> Counter[str]:
        return Counter(call.name for call in self.calls)


def norms_over_channels(module: nn.Module) -> bool:
    """Whether a norm takes its statistics over the channels of one place (LayerNorm)."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or _is_named(module, _CHANNEL_NORM_NAMES)


def _is_named(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(kind.__name__.startswith(names) for kind in type(module).__mro__)


def default_inputs(model: nn.Module) -> Tensor | None:
    """Zeros of the size that a timm model declares, in the type of its weights, or None where it declares none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        return None
    channels, *size = config["input_size"]
    channels = getattr(model, "in_chans", channels)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = torch.zeros(1, channels, *(_edited_size(model) or size), dtype=dtype, device="meta")
    first = next((module for module in model.modules() if isinstance(module, _ConvNd)), None)
    if first is None or first.in_channels == channels:
        return inputs
    # A stem of the user's own, unless it folds pixels into channels before its first convolution.
    as_edited = inputs[:, :1].expand(-1, first.in_channels, *(-1 for _ in size)).contiguous()
    try:
        probe(model, as_edited)
    except ProbeError:
        return inputs
    return as_edited


def _edited_size(model: nn.Module) -> Sequence[int] | None:
    """The ``img_size`` that a timm model was built with; before timm 1.0.31 only a part of it may know."""
    known = [getattr(model, "_traits", {}).get("img_size"), *(getattr(m, "img_size", None) for m in model.modules())]
    size = next((size for size in known if size), None)
    return (size, size) if isinstance(size, int) else size


def probe(model: nn.Module, inputs: Inputs) -> Graph:
    """Run a copy of the model once, in eval mode, on ``meta`` (no memory, no arithmetic).

    Args:
        model: Left untouched.
        inputs: What its forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ProbeError: The forward fails on these inputs.
    """
    device = next(model.parameters(), torch.empty(0)).device
    # Inference tensors have no versions; a forward that draws noise must not move the user's generators.
    generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.inference_mode(False), generators, warnings.catch_warnings(action="ignore"):
        try:
            return _run(model, _meta_copy(model), tree_map_only(Tensor, _as_two_instances("meta"), inputs))
        except Exception as on_meta:
            # Code that reads values (.item(), tables kept outside buffers) cannot run on meta.
            try:
                real = tree_map_only(Tensor, _as_two_instances(device), inputs)
                return _run(model, copy_of(model), real)
            except Exception as error:
                shapes = [tuple(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
                raise ProbeError(
                    f"{type(model).__name__} could not be run on example inputs of shape {shapes}: {error!r} (on meta: "
                    f"{on_meta!r}). Pass example_inputs that its forward accepts"
                ) from error


def _as_two_instances(device: str | torch.device) -> Callable[[Tensor], Tensor]:
    def convert(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor.to(device)
        return torch.zeros(INSTANCES, *tensor.shape[1:], dtype=tensor.dtype, device=device)

    return convert


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes only; nothing large is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy_of(model, memo)


def _run(model: nn.Module, copied: nn.Module, inputs: Inputs) -> Graph:
    graph = Graph(dict(model.named_modules()))
    recorder = _Recorder(graph, copied)
    copied.eval()
    try:
        with torch.no_grad(), recorder:
            if isinstance(inputs, dict):
                copied(**inputs)
            else:
                copied(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        recorder.unhook()
    return graph


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Writes the graph: hooks see the modules, the dispatch mode the operations between them."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.graph = graph
        # An id is only unique while its tensor lives; a forward may replace a buffer (ConViT).
        self.alive: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.constants = {id(tensor) for tensor in self.alive}
        self.owners = {
            id(parameter): name
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
            for parameter in module.parameters()
        }
        self.values: dict[tuple[int, int], int] = {}
        self.stack: list[Call] = []
        self.inside: str | None = None  # the layer or norm that runs; it is one node
        self.handles = []
        for name, module in model.named_modules():
            pre, post = self._hooks(name, module)
            self.handles += [
                module.register_forward_pre_hook(pre, with_kwargs=True),
                module.register_forward_hook(post, with_kwargs=True),
            ]

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        norm = isinstance(module, _NORMS) or _is_named(module, _NORM_NAMES)
        kind = "layer" if isinstance(module, LAYERS) else "norm" if norm else None
        if isinstance(module, nn.RNNBase):
            kind = "recurrent"  # thousands of operations on meta

        def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inside is not None:
                return
            positions = tuple(self._value(arg) if isinstance(arg, Tensor) else None for arg in args)
            named = tuple(self._value(arg) for arg in kwargs.values() if isinstance(arg, Tensor))
            self.stack.append(Call(name, positions, named))
            if kind:
                self.inside = name

        def post(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if self.inside not in (None, name):
                return
            self.inside = None
            call = replace(self.stack.pop(), output=self._value(output) if isinstance(output, Tensor) else None)
            if kind:
                outputs = tuple(self._value(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
                self._add(Node(kind, name, call.tensors(), outputs, self._callers()))
            self.graph.calls.append(call)

        return pre, post

    def _callers(self) -> tuple[str, ...]:
        return tuple(call.name for call in self.stack)

    def _value(self, tensor: Tensor, version: int | None = None) -> int:
        key = (id(tensor), tensor._version if version is None else version)
        if key not in self.values:
            self.values[key] = len(self.graph.shapes)
            self.graph.shapes.append(tuple(tensor.shape))
            self.alive.append(tensor)
        return self.values[key]

    def _add(self, node: Node) -> None:
        if set(node.outputs) - set(node.inputs):
            self.graph.nodes.append(node)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.inside is not None:
            return func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [t for t in tensors if id(t) not in self.constants]
        self._note_own(func.overloadpacket.__name__, tensors)
        inputs = tuple(self._value(t) for t in given if t.dim())
        before = {id(t): t._version for t in given}
        out = func(*args, **(kwargs or {}))
        version = before[id(given[0])] if func.is_view and given else None  # a view's version is its base's
        outputs = tuple(self._output(t, before, version) for t in tree_leaves(out) if isinstance(t, Tensor))
        if given and out is given[0] and (base := out._base) is not None:  # written through a view into its base
            inputs += (self._value(base, before[id(out)]),)
            outputs += (self._value(base, before[id(out)] + 1),)
        self._add(Node(func.overloadpacket.__name__.rstrip("_"), "", inputs, outputs, self._callers(), args))
        return out

    def _note_own(self, kind: str, tensors: list[Tensor]) -> None:
        """A layer's weight used by an operation outside, or a convolution whose weight was computed."""
        for owner in {self.owners[id(t)] for t in tensors if id(t) in self.owners}:
            self.graph.own[owner] = "its weight is used without calling it"
        if kind == "convolution" and self.stack and id(tensors[1]) not in self.constants:
            self.graph.own[self.stack[-1].name] = "computes a convolution of its own"

    def _output(self, tensor: Tensor, before: dict[int, int], version: int | None) -> int:
        """An operation in place gives its input back; version counters move only after this call."""
        return self._value(tensor, before[id(tensor)] + 1 if id(tensor) in before else version)
