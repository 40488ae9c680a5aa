"""What is optional says which extra brings it."""

import importlib
import sys

import pytest

from isw_plugin.errors import ISWError, MissingExtraError

OPTIONAL = {
    "nni": r"pip install 'isw_plugin\[nni\]'",
    "lightning": r"pip install 'isw_plugin\[trainers\]'",
    "timm": "pip install --upgrade timm",
}


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_error_names_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [package, *sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"isw_plugin.toolkits.{package}", raising=False)
    with pytest.raises(MissingExtraError, match=OPTIONAL[package]) as caught:
        importlib.import_module(f"isw_plugin.toolkits.{package}")
    assert isinstance(caught.value, ISWError)
    assert isinstance(caught.value, ImportError)
