"""What one forward did: which operation read which tensor."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = ["LAYERS", "Call", "Graph", "Node", "is_norm", "norms_over_channels"]

LAYERS = (_ConvNd, nn.Linear)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Of other libraries, and functional inside: their operations would not tell what they are.
_CHANNEL_NORM_NAMES = ("RmsNorm", "SimpleNorm")
_NORM_NAMES = (*_CHANNEL_NORM_NAMES, "EvoNorm2d", "FilterResponseNorm", "FrozenBatchNorm")


@dataclass(frozen=True)
class Node:
    """A layer, a norm or an operation; ``inputs`` and ``outputs`` are numbers of values."""

    kind: str  # "layer", "norm", "recurrent", or the operation's name
    name: str  # of the module; "" for an operation
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    callers: tuple[str, ...]  # the modules it ran in, outermost first
    args: tuple[Any, ...] = field(default=(), compare=False)


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
    more: Counter[str] = field(default_factory=Counter)  # calls that only another number of instances takes

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
        return Counter(call.name for call in self.calls) + self.more


def norms_over_channels(module: nn.Module) -> bool:
    """Whether a norm takes its statistics over the channels of one place (LayerNorm)."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or _is_named(module, _CHANNEL_NORM_NAMES)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of torch or by the name of its class."""
    return isinstance(module, _NORMS) or _is_named(module, _NORM_NAMES)


def _is_named(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(kind.__name__.startswith(names) for kind in type(module).__mro__)
