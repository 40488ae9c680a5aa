"""The names of a forward's parameters, on a model that passes them on: exports go by them."""

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["Named", "Parameters", "parameters_of"]

Parameters = tuple[tuple[str, int, bool], ...]  # name, kind, whether it may be left out


def parameters_of(forward: Callable[..., Any]) -> Parameters:
    """Of a model's forward; none where it does not tell."""
    try:
        found = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple((each.name, int(each.kind), each.default is not each.empty) for each in found)


class Named(nn.Module):
    """Shows the parameters of another's forward as its own, in copies too."""

    _parameters_shown: Parameters = ()

    def _show(self, parameters: Sequence[Sequence[Any]]) -> None:
        self.__dict__["_parameters_shown"] = shown = tuple(map(tuple, parameters))
        if shown:
            self.__dict__["forward"] = MethodType(_forward_of(shown), self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self._show(self._parameters_shown)


def _forward_of(shown: Parameters) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    kinds = list(inspect._ParameterKind)
    named = [inspect.Parameter("self", kinds[0])]
    for name, kind, optional in shown:
        named.append(inspect.Parameter(name, kinds[kind], default=None if optional else inspect.Parameter.empty))
    if any(each.name == "self" for each in named[1:]):
        named[0] = named[0].replace(name="model_")
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return forward
