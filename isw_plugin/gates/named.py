"""Gates by name: ours, and those of other packages through the entry point group ``isw_plugin.gates``."""

import inspect
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from isw_plugin.errors import SettingError
from isw_plugin.gates.channel_gating import ChannelGating
from isw_plugin.gates.cv import CVGate
from isw_plugin.gates.fbs import FBS
from isw_plugin.gates.fixed_ratio import MinNorm, RandomGate
from isw_plugin.gates.gate import Gate
from isw_plugin.gates.lccl import LCCL

__all__ = ["BUILT_IN", "GROUP", "named_gate", "stored_gate"]

GROUP = "isw_plugin.gates"
BUILT_IN: dict[str, Any] = {gate.__name__: gate for gate in (CVGate, MinNorm, RandomGate, FBS, ChannelGating, LCCL)}
_OURS: dict[str, type] = {"fbs": FBS, "channel_gating": ChannelGating, "lccl": LCCL}


def named_gate(name: str) -> Gate:
    """The gate that we or an installed package offer under a name, with its default parameters.

    Raises:
        SettingError: There is none, it cannot be loaded, has no defaults, or is no gate.
    """
    if name in _OURS:
        ours: Gate = _OURS[name]()
        return ours
    entries = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in entries:
        installed = ", ".join(map(repr, entries)) or "none"
        raise SettingError(
            f"gate={name!r}: 'cv', {', '.join(map(repr, _OURS))}, a gate such as MinNorm(ratio=0.3), or the name of an "
            f"installed gate (entry point group {GROUP}; installed: {installed})"
        )
    found = _loaded(entries[name])
    gate = _made(name, found) if inspect.isclass(found) else found
    if not callable(gate):
        raise SettingError(f"gate={name!r}: {gate!r} cannot be called with a feature map and its norms")
    offered: Gate = gate
    return offered


def stored_gate(type_name: str, parameters: Mapping[str, Any]) -> Gate | None:
    """A gate of an installed package, by the name of its class or function, or None where there is none."""
    for entry in entry_points(group=GROUP):
        found = _loaded(entry)
        if getattr(found, "__qualname__", "") == type_name:
            gate: Gate = found(**parameters) if isinstance(found, type) else found
            return gate
    return None


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever another package's import raises
        package = entry.dist.name if entry.dist else "an unknown package"
        raise SettingError(f"gate={entry.name!r} of {package} ({entry.value}) cannot be loaded: {error}") from error


def _made(name: str, cls: type) -> Any:
    try:
        return cls()
    except TypeError as error:
        raise SettingError(
            f"gate={name!r} has parameters without a default ({error}): pass a gate, gate={cls.__name__}(...)"
        ) from error
