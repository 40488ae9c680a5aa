"""Every message that docs/troubleshooting.md and the matrix of docs/deployment.md quote is in the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOLE = "\0"  # where a message has what it is about


def texts() -> set[str]:
    """All words in the sources, joined where Python joins them."""
    csrc = (ROOT / "isw_plugin" / "ops" / "csrc").iterdir()
    in_cpp = {text for file in csrc for text in re.findall(r'"([^"\n]*)"', file.read_text())}
    files = [file for package in ("isw_plugin", "isw_cli") for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    joined = ["".join(map(_part, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return {
        *in_cpp,
        *joined,
        *(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)),
    }


def _part(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else HOLE


def quoted(page: str, column: int) -> list[str]:
    rows = [line.split("|") for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| ")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row[column])]


# Not messages of ours: names of calls, and what PyTorch says.
OTHERS = {"summary()", "Could not find schema for isw::..."}
QUOTED = [*quoted("troubleshooting.md", 1), *quoted("deployment.md", 4)]


@pytest.fixture(scope="module")
def messages() -> set[str]:
    return texts()


@pytest.mark.parametrize("message", [message for message in QUOTED if message not in OTHERS])
def test_messages_are_those_of_the_sources(message: str, messages: set[str]) -> None:
    """What the sources put together of several texts is quoted with a colon or "and" between them."""
    missing = [part for part in re.split(r"\.\.\.|: |, and ", message) if not any(part in text for text in messages)]
    assert missing == []


def test_the_page_has_every_kind_of_error() -> None:
    errors = ast.parse((ROOT / "isw_plugin" / "errors.py").read_text()).body
    names = {node.name for node in errors if isinstance(node, ast.ClassDef)} - {"ISWError"}
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert names - set(re.findall(r"\b\w+Error\b", page)) == set()
