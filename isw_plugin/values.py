"""Numbers that users pass as settings: Python's and numpy's, and tensors of one element."""

from numbers import Integral, Real
from typing import Any

from torch import Tensor

from isw_plugin.errors import SettingError

__all__ = ["as_count", "as_number"]


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
