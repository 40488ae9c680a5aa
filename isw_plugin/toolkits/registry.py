"""Pruners by name, static and dynamic alike; other packages add theirs through an entry point."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from isw_plugin.errors import MissingExtraError, SettingError, UnknownPrunerError

__all__ = ["GROUP", "PRUNERS", "Pruners", "register"]

GROUP = "isw_plugin.pruners"

_OURS = {
    "bn_scale": "torch_pruning.pruner:BNScalePruner",
    "group_norm": "torch_pruning.pruner:GroupNormPruner",
    "growing_reg": "torch_pruning.pruner:GrowingRegPruner",
    "instance_wise": "isw_plugin.pruner:InstanceWisePruner",
    "magnitude": "torch_pruning.pruner:BasePruner",
}


class Pruners(Mapping[str, type]):
    """A mapping from names to pruner classes that imports a class when it is asked for.

    It promises a class, not how to call it: every class keeps the signature of its own package. Names
    that are built in or registered come before entry points of the same name.

    Example:
        >>> from isw_plugin import PRUNERS
        >>> PRUNERS["instance_wise"].__name__, PRUNERS["bn_scale"].__name__
        ('InstanceWisePruner', 'BNScalePruner')
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._registered: dict[str, type] = {}

    def __getitem__(self, name: str) -> type:
        """Import and return the class.

        Raises:
            UnknownPrunerError: No such name; also a KeyError.
            MissingExtraError: It is torch-pruning's, which is not installed.
            SettingError: Another package's entry point of this name cannot be imported, or is no class.
        """
        if name in self._registered:
            return self._registered[name]
        if name in self._places:
            module, _, attribute = self._places[name].partition(":")
            try:
                found: type = getattr(importlib.import_module(module), attribute)
            except ImportError as error:
                raise MissingExtraError(
                    f"{name!r} is torch-pruning's ({error}): pip install 'isw_plugin[pruning]'", name=error.name
                ) from error
            return found
        entries = _entries()
        if name not in entries:
            raise UnknownPrunerError(f"no pruner is named {name!r}; there are {', '.join(self)}")
        return _loaded(entries[name])

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._places, *self._registered, *_entries()}))

    def __len__(self) -> int:
        return len(set(self))

    def __repr__(self) -> str:
        return f"Pruners({', '.join(self)})"

    def add(self, name: str, cls: type) -> None:
        """See ``register``."""
        if not name or not isinstance(name, str):
            raise SettingError(f"register({name!r}): a name is a string that is not empty")
        if not inspect.isclass(cls):
            raise SettingError(f"register({name!r}, {cls!r}): a pruner is a class")
        if name in self and self[name] is not cls:
            raise SettingError(f"register({name!r}): that name is {self[name].__qualname__}'s; choose another")
        self._registered[name] = cls


PRUNERS = Pruners(_OURS)


def register(name: str, cls: type) -> None:
    """Add a pruner class to ``PRUNERS`` in this process; an entry point adds one wherever a package is installed.

    Args:
        name: A new name. The same class may be registered twice.
        cls: The class, called by its users as its own package says.

    Raises:
        SettingError: The name is taken by another class, or this is no class.

    Example:
        >>> from isw_plugin import PRUNERS, register
        >>> class MyPruner: ...
        >>> register("mine", MyPruner)
        >>> PRUNERS["mine"] is MyPruner
        True
    """
    PRUNERS.add(name, cls)


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _loaded(entry: EntryPoint) -> type:
    package = entry.dist.name if entry.dist else "an unknown package"
    try:
        found = entry.load()
    except Exception as error:  # whatever another package's import raises
        raise SettingError(
            f"the pruner {entry.name!r} of {package} ({entry.value}) cannot be loaded: {error}"
        ) from error
    if not inspect.isclass(found):
        raise SettingError(f"the pruner {entry.name!r} of {package} ({entry.value}) is no class: {found!r}")
    return found
