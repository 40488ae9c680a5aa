"""Inputs of a call: what tells calls apart, and which ones no model takes."""

import enum
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from isw_plugin.errors import EngineInputError, SettingError
from isw_plugin.inputs import arguments

__all__ = ["Call", "autocast", "instances_of", "is_traced", "size_of"]

# Arguments that a graph may be made for: others may change and stay equal.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.memory_format)


def autocast(kind: str) -> torch.dtype | None:
    """The type that operations are cast to on this kind of device; None: off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def size_of(args: tuple[Any, ...], kwargs: dict[str, Any], kind: str) -> tuple[list[Any], Any]:
    """The inputs, flat, and all that decides what a graph's operators are called with; None: it cannot be known.

    Args:
        kind: Of device that the model runs on, "cpu" for one.
    """
    if len(args) == 1 and type(args[0]) is Tensor and not kwargs:  # in a fraction of the time
        x = args[0]
        plain = x.layout is torch.strided and not x.is_nested
        return [x], (x.shape, x.stride(), x.dtype, x.device, autocast(kind)) if plain else None
    flat, spec = pytree.tree_flatten((args, kwargs))
    if not all(_is_plain(leaf) for leaf in flat):
        return flat, None
    leaves = [_exact(leaf) if isinstance(leaf, Tensor) else _value(leaf) for leaf in flat]
    return flat, (*leaves, _same(flat), spec, autocast(kind))


@dataclass(frozen=True)
class Call:
    """Arguments of a forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any, caller: str) -> "Call":
        """Example inputs, as ``Inputs``.

        Raises:
            SettingError: There is no tensor among them.
            EngineInputError: There is something that no model takes.
        """
        call = cls(*arguments(inputs))
        call.check(set())
        if not any(isinstance(leaf, Tensor) for leaf in call.leaves):
            advice = "give a batch, as torch.randn(8, 3, 224, 224) is one"
            raise SettingError(f"{caller}: {inputs!r:.80} holds no tensor: {advice}")
        return call

    @property
    def flat(self) -> tuple[list[Any], Any]:
        """Leaves, and how they lie."""
        return pytree.tree_flatten((self.args, self.kwargs))

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def instances(self) -> int:
        return instances_of(self.leaves)

    def form(self, kind: str) -> Any:
        """What a graph is made for: the size, but for instances and memory order."""
        flat, spec = pytree.tree_flatten((self.args, self.kwargs))
        leaves = [_form(leaf) if isinstance(leaf, Tensor) else _value(leaf) for leaf in flat]
        return (*leaves, _same(flat), spec, autocast(kind))

    def copied(self) -> "Call":
        """For a forward that may change its inputs."""
        copies: dict[int, Tensor] = {}

        def copy(x: Tensor) -> Tensor:
            return copies.setdefault(id(x), x.detach().clone())

        return Call(*pytree.tree_map_only(Tensor, copy, (self.args, self.kwargs)))

    def emptied(self) -> "Call":
        """Without its instances, as an example to make others like."""
        return Call(*pytree.tree_map_only(Tensor, lambda x: x[:0].clone() if x.dim() else x, (self.args, self.kwargs)))

    def like(self, size: int | tuple[int, ...]) -> "Call":
        """Noise of so many instances, or of this shape.

        Raises:
            SettingError: A shape for several tensors.
        """
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        if isinstance(size, tuple) and (len(tensors) != 1 or not size):
            raise SettingError(f"prepare: the shape {size} for {len(tensors)} tensors: give example inputs")

        def noise(x: Tensor) -> Tensor:
            if not x.dim():
                return x
            blank = x.new_zeros(size if isinstance(size, tuple) else (size, *x.shape[1:]))
            return torch.randn_like(blank) if blank.is_floating_point() else blank

        return Call(*pytree.tree_map_only(Tensor, noise, (self.args, self.kwargs)))

    def check(self, devices: set[torch.device]) -> None:
        """Refuse what no model on these devices takes.

        Raises:
            EngineInputError: Says what to give instead.
        """
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor):
                if hasattr(leaf, "__array__") and not isinstance(leaf, numbers.Number):
                    raise EngineInputError(f"{type(leaf).__name__} instead of a tensor: torch.as_tensor makes one")
            elif not _is_plain(leaf):
                kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
                raise EngineInputError(f"a {kind} tensor: give a dense one of a single shape")
            elif len(devices) == 1 and leaf.dim() and leaf.device not in devices:
                (device,) = devices
                raise EngineInputError(f"{_described(leaf)} for a model on {device}: give x.to({str(device)!r})")

    def __str__(self) -> str:
        leaves = [_described(leaf) for leaf in self.leaves]
        return ", ".join(leaves[:4]) + (", ..." if len(leaves) > 4 else "")


def is_traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an export runs this call: ``torch.compiler.is_compiling`` is true in other threads then, too."""
    if len(args) == 1 and type(args[0]) is Tensor and not kwargs:
        return False
    return any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs)))


def instances_of(flat: Sequence[Any]) -> int:
    """Of flat inputs: the first axis of the first tensor that has one."""
    return next((leaf.shape[0] for leaf in flat if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _is_plain(leaf: Any) -> bool:
    """Whether what it is can be told by a key."""
    if isinstance(leaf, Tensor):
        return leaf.layout is torch.strided and not leaf.is_nested
    return isinstance(leaf, _PLAIN)


def _exact(x: Tensor) -> tuple[Any, ...]:
    return (type(x), x.shape, x.stride(), x.dtype, x.device)


def _form(x: Tensor) -> tuple[Any, ...]:
    kind = Tensor if isinstance(x, FakeTensor) else type(x)
    return (kind, x.dim(), *map(int, x.shape[1:]), x.dtype, x.device)


def _value(leaf: Any) -> tuple[Any, ...]:
    """1, 1.0 and True are equal, 0.0 and -0.0 too; NaN is not itself."""
    return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)


def _same(flat: Sequence[Any]) -> tuple[int, ...]:
    """Which tensors are one."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(leaf), place) for place, leaf in enumerate(flat) if isinstance(leaf, Tensor))


def _described(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, _PLAIN) else f"a {type(leaf).__name__}"
    where = "" if leaf.is_cpu else f" on {leaf.device}"
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{where}"
