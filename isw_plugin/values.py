"""What users pass as settings: numbers (Python's and numpy's, and tensors of one element), words, patterns, inputs."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from isw_plugin.errors import PatternError, SettingError

__all__ = ["as_count", "as_number", "check_choice", "check_inputs", "check_patterns", "check_per_site"]


def as_number(name: str, value: Any, meaning: str) -> float:
    """The value as a float.

    Raises:
        SettingError: It is no real number; says what the setting means.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise SettingError(f"{name}={value!r}: {meaning}, not a {type(value).__name__}")
    return float(number)


def as_count(name: str, value: Any, meaning: str, least: int | None = 0) -> int:
    """The value as an int.

    Raises:
        SettingError: It is no integer, or below ``least`` (None: any will do); says what the setting means.
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    whole = isinstance(number, Integral) and not isinstance(number, bool)
    if not whole or (least is not None and number < least):
        range_ = "" if least is None else f"{least} or more, "
        raise SettingError(f"{name}={value!r}: {meaning} is {range_}a whole number")
    return int(number)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise SettingError unless it is one of these words."""
    if value not in choices:
        raise SettingError(f"{name}={value!r}: one of {', '.join(map(repr, choices))}")


def check_inputs(inputs: Any) -> None:
    """Raise SettingError where example inputs hold a shape or an array instead of a tensor."""
    leaves = tree_leaves(inputs)
    if isinstance(inputs, tuple | list) and leaves and all(type(leaf) is int for leaf in leaves):
        shape = leaves if len(leaves) != 3 else [1, *leaves]
        raise SettingError(
            f"example_inputs={inputs!r} is a shape: pass a tensor, such as torch.zeros({', '.join(map(str, shape))})"
        )
    arrays = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__")]
    if arrays or isinstance(inputs, bool | int | float | str | bytes):
        raise SettingError(
            f"example_inputs hold a {(arrays or [type(inputs).__name__])[0]}: pass tensors, such as "
            "torch.from_numpy(images), a tuple of what forward takes or a dict of it by name"
        )


def check_patterns(name: str, patterns: Any) -> None:
    """Raise PatternError unless these may be layer-name patterns."""
    listed = isinstance(patterns, list | tuple) and all(isinstance(pattern, str) for pattern in patterns)
    if not (isinstance(patterns, str) or callable(patterns) or listed):
        raise PatternError(
            f"{name}={patterns!r}: a glob over layer names, a list of globs, or a function (name, module) -> bool"
        )


def check_per_site(per_site: Any) -> None:
    """Raise SettingError unless these are dicts of settings by pattern."""

    def named(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)

    if not (named(per_site) and all(map(named, per_site.values()))):
        raise SettingError(
            f"per_site={per_site!r}: patterns and what differs there, such as {{'layer1.*': {{'beta': 0.5}}}}"
        )
