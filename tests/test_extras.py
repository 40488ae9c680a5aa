"""What is optional says which extra brings it."""

import importlib
import sys
import types

import pytest
import torch

from isw_plugin import PRUNERS
from isw_plugin.errors import ISWError, MissingExtraError

OPTIONAL = {
    "nni": r"pip install 'isw_plugin\[nni\]'",
    "lightning": r"pip install 'isw_plugin\[trainers\]'",
    "timm": "pip install --upgrade timm",
    "torch_pruning": r"pip install 'isw_plugin\[pruning\]'",
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_error_names_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [package, *sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    ours = [name for name in sys.modules if name.startswith(("isw_plugin.static", f"isw_plugin.toolkits.{package}"))]
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=OPTIONAL[package]) as caught:
        importlib.import_module(f"isw_plugin.toolkits.{package}")
    assert isinstance(caught.value, ISWError)
    assert isinstance(caught.value, ImportError)


def test_a_pruner_of_torch_pruning_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_pruning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"'magnitude' is torch-pruning's .*isw_plugin\[pruning\]"):
        PRUNERS["magnitude"]


def test_tasks_that_do_not_tell_their_model_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("timm.task")
    old.ClassificationTask = old.TrainingTask = type("TrainingTask", (torch.nn.Module,), {})
    monkeypatch.setitem(sys.modules, "timm.task", old)
    monkeypatch.delitem(sys.modules, "isw_plugin.toolkits.timm", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs timm 1\.0\.27.*pip install --upgrade timm"):
        importlib.import_module("isw_plugin.toolkits.timm")
