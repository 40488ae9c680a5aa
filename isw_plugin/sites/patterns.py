"""Layer-name patterns: which names a user means."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from isw_plugin.errors import PatternError

__all__ = ["Patterns", "matches", "select"]

Patterns: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]


def matches(patterns: Patterns, name: str, module: nn.Module) -> bool:
    """Whether a layer is meant.

    Args:
        patterns: One pattern or several, of which one must fit: a glob over the full name
            (``fnmatch.fnmatchcase``), or ``re:`` and a regular expression that must match the whole
            name. Or a function of name and module.
        name: Full name, as in ``model.named_modules()``.
        module: The layer.

    Raises:
        PatternError: A malformed regular expression.
    """
    if callable(patterns):
        return bool(patterns(name, module))
    return any(_fits(pattern, name) for pattern in _listed(patterns))


def select(
    layers: Mapping[str, nn.Module], include: Patterns, exclude: Patterns = (), setting: str = "layers"
) -> tuple[str, ...]:
    """Names of the layers that ``include`` means and ``exclude`` does not, in the order of ``layers``.

    Args:
        layers: All there are.
        include, exclude: Patterns.
        setting: What the user knows ``include`` as.

    Raises:
        PatternError: A pattern means no layer (a typing error would go unseen), or ``exclude`` takes away
            all that ``include`` means.
    """
    _require_each_fits(layers, setting, include)
    _require_each_fits(layers, "exclude", exclude)
    included = [name for name, module in layers.items() if matches(include, name, module)]
    selected = tuple(name for name in included if not matches(exclude, name, layers[name]))
    if not selected:
        raise PatternError(
            f"{setting}={include!r} selects {len(included)} of {len(layers)} layers and exclude={exclude!r} "
            f"leaves none. {_close_names(layers, include)}"
        )
    return selected


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _fits(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise PatternError(f"{pattern!r} is no regular expression: {error}") from error


def _require_each_fits(layers: Mapping[str, nn.Module], setting: str, patterns: Patterns) -> None:
    if callable(patterns):
        return
    for pattern in _listed(patterns):
        if not any(_fits(pattern, name) for name in layers):
            raise PatternError(
                f"{setting}={pattern!r} matches 0 of {len(layers)} layers. {_close_names(layers, pattern)}"
            )


def _close_names(layers: Mapping[str, nn.Module], patterns: Patterns) -> str:
    wanted = "" if callable(patterns) else " ".join(_listed(patterns)).removeprefix("re:")
    close = difflib.get_close_matches(wanted, layers, n=4, cutoff=0.3) or list(layers)[:4]
    return (
        f"Close names: {', '.join(close)}. Patterns are globs over the full layer name; "
        "prefix 're:' for a regular expression."
    )
