"""Every public name has an example in its docstring, and it runs."""

import copy
import doctest
import inspect
from typing import Any

import pytest

import isw_plugin
from isw_plugin import PRUNERS, InstanceWisePruner

METHODS = [
    name
    for name, member in vars(InstanceWisePruner).items()
    if not name.startswith("_") and not isinstance(member, property)
]


def run(name: str, docstring: str | None, names: dict[str, Any]) -> dict[str, Any]:
    """Run the example of a docstring, and return the names that it leaves behind."""
    test = doctest.DocTestParser().get_doctest(docstring or "", names, name, None, None)
    assert test.examples, f"{name} has no example"
    told: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=told.append, clear_globs=False)
    assert not failed, "".join(told)
    return test.globs


def docstring_of(value: object) -> str | None:
    return inspect.getdoc(value if inspect.isroutine(value) or inspect.isclass(value) else type(value))


@pytest.fixture(scope="module")
def after_the_class() -> dict[str, Any]:
    return run("InstanceWisePruner", InstanceWisePruner.__doc__, {})


@pytest.mark.parametrize("name", isw_plugin.__all__)
def test_the_example_of_a_public_name_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRUNERS, "_registered", {})
    run(name, docstring_of(getattr(isw_plugin, name)), {})


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_goes_on_from_that_of_the_class(name: str, after_the_class: dict[str, Any]) -> None:
    model = copy.deepcopy(after_the_class["model"])
    names = after_the_class | {"model": model, "pruner": InstanceWisePruner.of(model)}
    run(name, inspect.getdoc(getattr(InstanceWisePruner, name)), names)
