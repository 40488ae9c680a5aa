"""Imports point one way: a module knows those before it, never those after it or beside it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import isw_plugin

ROOT = Path(isw_plugin.__file__).parent
ORDER = [
    {"errors", "ranks", "machine"},
    {"functional", "inputs", "copies", "values", "folders"},
    {"ops"},
    {"sites", "gates", "structure", "decay", "batches"},
    {"heads", "followers", "learned"},
    {"settings"},
    {"memory", "masking"},
    {"places"},
    {"learned_hooks"},
    {"hooks", "stored", "engine"},
    {"accelerate", "attachment", "summary"},
    {"wrappers", "static", "saving", "predict"},
    {"pruner"},
    {"measure", "loading"},
    {"calibrate", "budget"},
    {"steering"},
    {"report", "toolkits", "export"},
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
PARTS = sorted({path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - {"__init__"})


def files(part: str) -> list[Path]:
    return [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} if node.module != "isw_plugin" else {f"isw_plugin.{a.name}" for a in node.names}
    return found


def parts_known_to(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("isw_plugin.")}


def test_every_module_has_its_place() -> None:
    assert set(PLACE) == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_modules_import_only_those_before_them(part: str) -> None:
    for path in files(part):
        late = {name for name in parts_known_to(path) - {part} if PLACE[name] >= PLACE[part]}
        assert not late, f"{path.name} imports {late}"


def test_the_paper_knows_nothing_but_errors() -> None:
    assert parts_known_to(ROOT / "functional.py") <= {"errors"}


@pytest.mark.parametrize("part", [part for part in PARTS if (ROOT / part).is_dir()])
def test_there_is_no_cycle_in_a_package(part: str) -> None:
    edges = {
        f"isw_plugin.{part}.{path.stem}": {name for name in imports(path) if name.startswith(f"isw_plugin.{part}.")}
        for path in files(part)
        if path.stem != "__init__"
    }
    while leaves := {name for name, known in edges.items() if not known & edges.keys()}:
        edges = {name: known for name, known in edges.items() if name not in leaves}
    assert not edges


@pytest.mark.parametrize("part", [part for part in PARTS if (ROOT / part).is_dir()])
def test_a_package_does_not_import_itself_as_a_whole(part: str) -> None:
    for path in files(part):
        assert f"isw_plugin.{part}" not in imports(path)


def test_importing_the_package_is_lean() -> None:
    heavy = ["nni", "matplotlib", "sklearn", "safetensors", "torch_pruning", "timm", "torch._inductor"]
    code = f"import isw_plugin, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
