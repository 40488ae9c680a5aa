"""A study knows the lab and itself; examples and benchmarks do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path.name for path in (ROOT / "benchmarks").iterdir() if (path / "README.md").exists())
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def studies_known_to(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("benchmarks.")}


def test_there_are_the_studies() -> None:
    folders = {path.parent.name for path in (ROOT / "benchmarks").glob("*/*.py")}
    assert folders == {*STUDIES, "lab"}
    assert all((ROOT / "benchmarks" / study / "__main__.py").exists() for study in STUDIES)


@pytest.mark.parametrize("study", [*STUDIES, "lab"])
def test_a_study_knows_the_lab_and_itself(study: str) -> None:
    for path in (ROOT / "benchmarks" / study).rglob("*.py"):
        assert studies_known_to(path) <= {study, "lab"}, path


def test_benchmarks_know_no_example() -> None:
    examples = {path.stem for path in EXAMPLES}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not examples & {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_know_no_benchmark(path: Path) -> None:
    assert not {name for name in imports(path) if name.startswith(("benchmarks", "tests"))}


@pytest.mark.parametrize("name", ["images", "run_folder", "training"])
def test_what_lab_and_examples_have_twice_is_the_same(name: str) -> None:
    """An example is to be read and run by itself, so it cannot import the lab; a mend has to reach both."""
    ours, theirs = (ast.parse((ROOT / folder / f"{name}.py").read_text()) for folder in ("benchmarks/lab", "examples"))
    for tree in (ours, theirs):
        tree.body = [node for node in tree.body[1:] if not isinstance(node, ast.ImportFrom)]  # [0]: the docstring
    assert ast.dump(ours) == ast.dump(theirs)
