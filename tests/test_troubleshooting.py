"""Every message that docs/troubleshooting.md and the matrix of docs/deployment.md quote is in the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOLE = "\0"  # where a message has what it is about


def texts() -> set[str]:
    """All words in the sources, joined where Python joins them."""
    files = [file for package in ("isw_plugin", "isw_cli") for file in (ROOT / package).rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    joined = ["".join(map(_part, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return {*joined, *(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))}


def _part(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else HOLE


def quoted(page: str, column: int) -> list[str]:
    rows = [line.split("|") for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| ")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row[column])]


# Not messages: names of errors and calls.
NAMES = {"summary()"}
TROUBLES = [message for message in quoted("troubleshooting.md", 1) if message not in NAMES]


@pytest.fixture(scope="module")
def messages() -> set[str]:
    return texts()


@pytest.mark.parametrize("message", TROUBLES + quoted("deployment.md", 4))
def test_messages_are_those_of_the_sources(message: str, messages: set[str]) -> None:
    """What the sources put together of several texts is quoted with a colon or "and" between them."""
    missing = [part for part in re.split(r"\.\.\.|: |, and ", message) if not any(part in text for text in messages)]
    assert missing == []


def test_the_page_has_every_kind_of_error() -> None:
    errors = ast.parse((ROOT / "isw_plugin" / "errors.py").read_text()).body
    names = {node.name for node in errors if isinstance(node, ast.ClassDef)} - {"ISWError"}
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert names - set(re.findall(r"\b\w+Error\b", page)) == set()
