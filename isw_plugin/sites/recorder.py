"""One forward, written down as a graph.

Layers and norms are nodes; every other module is seen through, down to the operations it runs, so
custom activation modules and functional code look alike.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isw_plugin.copies import Untouched
from isw_plugin.sites.graph import LAYERS, Call, Graph, Node, is_norm

__all__ = ["record"]


def record(model: nn.Module, copied: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Run a copy of a model in eval mode.

    Raises:
        UnsupportedError: The copy runs the model itself.
    """
    graph = Graph(dict(model.named_modules()))
    for module in copied.modules():
        if type(module) in (nn.RNN, nn.LSTM, nn.GRU):
            module.forward = partial(_recurrent, module, module.forward)
    recorder = _Recorder(graph, copied)
    copied.eval()
    try:
        with torch.no_grad(), Untouched(model), recorder:
            copied(*args, **kwargs)
    finally:
        recorder.unhook()
    return graph


def _recurrent(rnn: Any, forward: Callable[..., Any], x: Any, hx: Any = None) -> Any:
    """Shapes alone on meta, where torch takes seconds for every step of time."""
    if not isinstance(x, Tensor) or not x.is_meta or x.shape[-1] != rnn.input_size or x.dim() not in (2, 3):
        return forward(x, hx)
    directions, size = 2 if rnn.bidirectional else 1, getattr(rnn, "proj_size", 0) or rnn.hidden_size
    swaps = rnn.batch_first and x.dim() == 3
    steps = x.transpose(0, 1) if swaps else x
    output = x.new_empty((*steps.shape[:-1], directions * size))
    state = (rnn.num_layers * directions, *steps.shape[1:-1])
    last = x.new_empty((*state, size))
    hidden = (last, x.new_empty((*state, rnn.hidden_size))) if isinstance(rnn, nn.LSTM) else last
    return output.transpose(0, 1) if swaps else output, hidden


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
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its operations are seen
                continue
            pre, post = self._hooks(name, module)
            self.handles += [
                module.register_forward_pre_hook(pre, with_kwargs=True),
                module.register_forward_hook(post, with_kwargs=True),
            ]

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        kind = "layer" if isinstance(module, LAYERS) else "norm" if is_norm(module) else None
        if isinstance(module, nn.RNNBase):
            kind = "recurrent"

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
