"""Pruners and gates by name: ours, registered ones, and those of an installed package."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch_pruning as tp

from isw_plugin import PRUNERS, InstanceWisePruner, register
from isw_plugin.errors import SettingError, UnknownPrunerError
from isw_plugin.toolkits.registry import Pruners
from tests.processes import Script

OURS = {
    "bn_scale": tp.pruner.BNScalePruner,
    "group_norm": tp.pruner.GroupNormPruner,
    "growing_reg": tp.pruner.GrowingRegPruner,
    "instance_wise": InstanceWisePruner,
    "magnitude": tp.pruner.MagnitudePruner,
}


class Mine:
    """A pruner of somebody else."""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Pruners:
    monkeypatch.setattr(PRUNERS, "_registered", {})
    return PRUNERS


@pytest.mark.parametrize("name", OURS)
def test_what_is_there(name: str) -> None:
    assert PRUNERS[name] is OURS[name]
    assert name in PRUNERS


def test_it_is_a_mapping() -> None:
    assert set(PRUNERS) >= OURS.keys()
    assert len(PRUNERS) == len(list(PRUNERS))
    assert PRUNERS.get("nobody") is None
    assert "nobody" not in PRUNERS
    assert "bn_scale" in repr(PRUNERS)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(UnknownPrunerError, match=r"^no pruner is named 'bn'; there are .*bn_scale, ") as caught:
        PRUNERS["bn"]
    assert isinstance(caught.value, KeyError)


def test_a_class_is_imported_when_it_is_asked_for() -> None:
    code = """
import sys
from isw_plugin import PRUNERS
list(PRUNERS), "magnitude" in PRUNERS
assert "torch_pruning" not in sys.modules
PRUNERS["magnitude"]
assert "torch_pruning" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_register(registry: Pruners) -> None:
    register("mine", Mine)
    register("mine", Mine)
    assert registry["mine"] is Mine
    assert "mine" in list(registry)
    with pytest.raises(SettingError, match=r"'mine'.*Mine's; choose another"):
        register("mine", dict)


@pytest.mark.parametrize(
    ("name", "cls", "said"),
    [
        ("bn_scale", Mine, "BNScalePruner's"),
        ("new", Mine(), "is a class"),
        ("", Mine, "not empty"),
        (3, Mine, "string"),
    ],
)
def test_what_cannot_be_registered(registry: Pruners, name, cls, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        register(name, cls)
    assert set(registry) == OURS.keys()


# -- an installed package --------------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass

class Pruner:
    pass

@dataclass(frozen=True)
class Half:
    share: float = 0.5

    def __call__(self, feature, norms):
        return norms >= self.share * norms.amax(1, keepdim=True)

@dataclass(frozen=True)
class Demanding:
    share: float

    def __call__(self, feature, norms):
        return norms > self.share

def everything(feature, norms):
    return norms >= 0

number = 3
"""
ENTRIES = """
[isw_plugin.pruners]
theirs = small_package:Pruner
bn_scale = small_package:Pruner
number = small_package:number
absent = small_package:Absent

[isw_plugin.gates]
half = small_package:Half
demanding = small_package:Demanding
everything = small_package:everything
number = small_package:number
absent = no_such_module:Gate
"""
START = """
import torch
from tests.conftest import Plain, made
from isw_plugin import PRUNERS, InstanceWisePruner, load_pretrained
from isw_plugin.errors import SettingError, StateMismatchError
import small_package

def attached(gate, **settings):
    return InstanceWisePruner(made(Plain), made(Plain).images(1), gate=gate, **settings)

def refusal(call):
    try:
        call()
    except SettingError as error:
        return str(error)
    raise AssertionError("not refused")
"""


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], None]:
    """Runs code in a process that has a small package with entry points installed."""
    (tmp_path / "small_package.py").write_text(MODULE)
    info = tmp_path / "small_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    paths = [str(tmp_path), str(Path(__file__).parents[2])]

    def run(code: str) -> None:
        start = f"import sys; sys.path[:0] = {paths!r}\n{START}\nFOLDER = {str(tmp_path / 'saved')!r}\n"
        Script(start + textwrap.dedent(code)).printed()

    return run


def test_pruners_of_an_installed_package(installed) -> None:
    installed("""
        assert PRUNERS["theirs"] is small_package.Pruner
        assert "theirs" in PRUNERS and "theirs" in list(PRUNERS)
        assert PRUNERS["bn_scale"].__name__ == "BNScalePruner"  # ours come first
        assert "small-package" in refusal(lambda: PRUNERS["number"])
        assert "is no class: 3" in refusal(lambda: PRUNERS["number"])
        assert "cannot be loaded" in refusal(lambda: PRUNERS["absent"])
        assert "theirs" in refusal(lambda: PRUNERS["their"])
    """)


def test_gates_of_an_installed_package(installed) -> None:
    installed("""
        pruner = attached("half")
        assert pruner.gate == small_package.Half(0.5)
        pruner.enable(share=0.25)
        images = made(Plain).images()
        pruner.model(images)
        assert torch.equal(pruner.keep["c1"], pruner.norms["c1"] >= 0.25 * pruner.norms["c1"].amax(1, keepdim=True))
        assert attached("everything").gate is small_package.everything

        said = refusal(lambda: attached("hlf"))
        assert "gate='hlf'" in said and "MinNorm" in said and "'half'" in said, said
        assert "gate=Demanding(...)" in refusal(lambda: attached("demanding"))
        assert "cannot be called" in refusal(lambda: attached("number"))
        assert "no_such_module" in refusal(lambda: attached("absent"))
        assert "set the CV gate" in refusal(lambda: attached("half", alpha=0.5))
    """)


def test_a_saved_gate_of_an_installed_package_is_found_again(installed) -> None:
    installed("""
        for gate in (small_package.Half(0.3), small_package.everything):
            attached(gate).save_pretrained(FOLDER)
            assert load_pretrained(FOLDER, made(Plain)).gate == gate
    """)
