"""What an accelerated model shows of the model that it was made from: copies, so that nothing reached can change it."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from isw_plugin.accelerate.masked import Masked
from isw_plugin.accelerate.signature import Named, parameters_of
from isw_plugin.copies import copy_of
from isw_plugin.errors import UnsupportedError

__all__ = ["Snapshot"]

_ADVICE = "change the model it was made from and accelerate again"


class Snapshot(Named):
    """Holds a model whose weights were packed elsewhere: a change of one would not be one of the other.

    The model is no submodule. ``masked``, ``parameters()``, ``buffers()`` and ``state_dict()`` give copies; loading,
    another type or device, and assigning modules or tensors are refused.
    """

    def __init__(self, held: Masked) -> None:
        super().__init__()
        self._held = held
        self._shown: tuple[nn.Module, ...] = ()
        self._show(parameters_of(held.model.forward))

    @property
    def masked(self) -> nn.Module:
        """A copy of the masked model that this one was made from."""
        if not self._shown:
            self._shown = (copy_of(self._held.model),)
        return self._shown[0]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Copies, without gradients; none for who asks for duplicates, since that is done to swap tensors (export)."""
        found = self._held.model.named_parameters(_within(prefix), recurse) if remove_duplicate else ()
        for name, held in found:
            yield name, nn.Parameter(held.detach().clone(), requires_grad=False)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Copies, as of parameters."""
        found = self._held.model.named_buffers(_within(prefix), recurse) if remove_duplicate else ()
        for name, held in found:
            yield name, held.detach().clone()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise UnsupportedError("an accelerated model has no gradients: train the model it was made from")
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise UnsupportedError("an accelerated model has no gradients: train the model it was made from")
        return super().train(mode)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "masked" or isinstance(value, nn.Module | Tensor):
            raise UnsupportedError(f"an accelerated model is a snapshot, {name} cannot be assigned: {_ADVICE}")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_shown": ()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self._held.model.state_dict(prefix=f"{prefix}masked.").items():
            destination[name] = value.clone() if isinstance(value, Tensor) else value

    def _load_from_state_dict(self, *_: Any) -> NoReturn:
        raise UnsupportedError(f"an accelerated model is a snapshot, it loads no state_dict: {_ADVICE}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``half``, ``cuda`` and the like come to; one that changes nothing is let through."""
        tensors = (*self._held.model.parameters(), *self._held.model.buffers())
        for dtype, device in {(held.dtype, held.device) for held in tensors}:
            try:
                found = fn(torch.empty(0, dtype=dtype, device=device))
            except Exception as error:
                raise UnsupportedError(f"an accelerated model stays as it is ({error}): {_ADVICE}") from error
            if (found.dtype, found.device) != (dtype, device):
                to = found.dtype if found.dtype != dtype else found.device
                raise UnsupportedError(f"an accelerated model stays as it is, it cannot become {to}: {_ADVICE}")
        return self


def _within(prefix: str) -> str:
    return f"{prefix}{'.' if prefix else ''}masked"
