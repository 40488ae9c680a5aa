import ast
import contextlib
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar, get_origin

import pytest

import isw_plugin
from isw_plugin import errors

MODULES = ["isw_plugin", *(module.name for module in pkgutil.walk_packages(isw_plugin.__path__, "isw_plugin."))]


def module(name: str) -> ModuleType:
    if name.startswith("isw_plugin.report"):
        pytest.importorskip("matplotlib")
    if name in ("isw_plugin.toolkits.nni", "isw_plugin.toolkits.lightning"):
        pytest.importorskip(name.rpartition(".")[2])
    if name == "isw_plugin.toolkits.timm":
        pytest.importorskip(name, exc_type=errors.MissingExtraError)  # an old timm
    expected = pytest.deprecated_call() if name == "isw_plugin.engine" else contextlib.nullcontext()
    with expected:
        sys.modules.pop("isw_plugin.engine", None)  # it warns as it is imported
        return importlib.import_module(name)


def defined(module: ModuleType) -> set[str]:
    """Public names that a module binds itself, type aliases apart, and if it is a package, those it collects."""
    names: set[str] = set()
    imports = (ast.ImportFrom,) if hasattr(module, "__path__") else ()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, imports) and node.module.startswith("isw_plugin"):
            names |= {alias.asname or alias.name for alias in node.names}
    public = {name for name in names if not name.startswith("_")}
    return {name for name in public if not is_for_typing(getattr(module, name))}


def is_for_typing(value: object) -> bool:
    return isinstance(value, TypeVar) or (get_origin(value) is not None and not inspect.isclass(value))


def test_the_surface_is_this() -> None:
    assert isw_plugin.__all__ == [
        "FBS",
        "LCCL",
        "PRUNERS",
        "CVGate",
        "Calibration",
        "ChannelGating",
        "Gate",
        "GateReport",
        "ISWError",
        "InstanceWisePruner",
        "MacReport",
        "MinNorm",
        "RandomGate",
        "calibrate",
        "count_macs",
        "evaluate",
        "load_accelerated",
        "load_pretrained",
        "register",
        "steer_thresholds",
    ]


@pytest.mark.parametrize("name", MODULES)
def test_all_is_what_a_module_defines(name: str) -> None:
    found = module(name)
    listed = set(getattr(found, "__all__", []))
    assert defined(found) <= listed
    assert all(hasattr(found, public) for public in listed)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name: str) -> None:
    found = module(name)
    for public in getattr(found, "__all__", []):
        value = getattr(found, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), public


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") == 1 and name != "isw_plugin.toolkits"])
def test_every_module_says_what_it_is(name: str) -> None:
    assert module(name).__doc__


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "ISWError"])
def test_every_error_is_ours_and_a_built_in_one(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.ISWError)
    assert issubclass(error, ValueError | RuntimeError)


@pytest.mark.parametrize("name", errors.__all__)
def test_the_tree_shows_every_error(name: str) -> None:
    assert re.search(rf"(^|─ ){name}\b", errors.__doc__, re.MULTILINE)
