"""What a gate is, and how its parameters are changed."""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from isw_plugin.errors import GateParameterError

__all__ = ["Gate", "keeps_all", "with_parameters"]

G = TypeVar("G", bound="Gate")


@runtime_checkable
class Gate(Protocol):
    """Decides per instance which channels of a feature map are kept.

    Any callable of this form works; a frozen dataclass also lets its parameters be changed by name.

    Example:
        >>> import torch
        >>> from isw_plugin import Gate
        >>> def above_half_of_the_largest(feature, norms):
        ...     return norms > norms.amax(1, keepdim=True) / 2
        >>> isinstance(above_half_of_the_largest, Gate)  # so InstanceWisePruner(model, gate=...) takes it
        True
    """

    def __call__(self, feature: Tensor, norms: Tensor) -> Tensor:
        """Decide.

        Args:
            feature: The map, (N, C, H, W) or with channels last.
            norms: Its channel norms (Eq. 3), shape (N, C).

        Returns:
            True where the channel is kept, bool, shape (N, C).
        """
        ...


def keeps_all(gate: Gate) -> bool:
    """Whether the gate says of itself that it keeps every channel of every instance."""
    return bool(getattr(gate, "keeps_all", False))


def with_parameters(gate: G, **parameters: Any) -> G:
    """Return the gate with some parameters replaced.

    Raises:
        GateParameterError: An unknown name.
        SettingError: A value that the gate refuses.
    """
    if not parameters:
        return gate
    known: list[str] = [f.name for f in dataclasses.fields(gate)] if dataclasses.is_dataclass(gate) else []
    unknown = sorted(parameters.keys() - set(known))
    if unknown:
        raise GateParameterError(
            f"{type(gate).__name__} has no parameter {', '.join(unknown)}; it has {known or 'none'}"
        )
    return dataclasses.replace(gate, **parameters)  # type: ignore[type-var]  # a dataclass: it has fields
