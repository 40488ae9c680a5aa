"""Building: cached by what goes in, safe for several processes at once, ahead of time on request."""

import subprocess
import sys
from pathlib import Path

import pytest

from isw_plugin.ops import build as build_module
from isw_plugin.ops.build import BuildError, build

# Writes the target after a while and one line per run into a log, so that double work shows.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo fake 1 && exit
echo run >> "$0.runs"
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "fake++"
    path.write_text(COMPILER)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("ISW_PLUGIN_CACHE", str(tmp_path / "cache"))
    return path


def runs(compiler: Path) -> int:
    return len(compiler.with_suffix(".runs").read_text().splitlines())


def test_what_was_built_is_kept(compiler: Path) -> None:
    first = build("generic")
    assert runs(compiler) == 2
    assert build("generic") == first
    assert runs(compiler) == 2
    assert build("avx2").operators == first.operators
    assert runs(compiler) == 3


def test_other_flags_or_another_compiler_build_again(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("generic")
    monkeypatch.setattr(build_module, "_KERNEL_FLAGS", ("-O1",))
    assert build("generic").kernels != first.kernels
    compiler.write_text(COMPILER.replace("fake 1", "fake 2"))
    assert build("generic").kernels != first.kernels
    assert runs(compiler) == 6


def test_a_failure_leaves_nothing_behind(compiler: Path) -> None:
    compiler.write_text(COMPILER + "exit 1\n")
    with pytest.raises(BuildError, match=r"failed; log: .*build\.log"):
        build("generic")
    assert not list(compiler.parent.glob("cache/*/*.so"))
    compiler.write_text(COMPILER)
    assert build("generic").kernels.exists()


def test_processes_that_build_at_once_build_once(compiler: Path) -> None:
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from isw_plugin.ops.build import build; build('generic')"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert runs(compiler) == 2


def test_two_real_builds_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISW_PLUGIN_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "isw_plugin.ops", "build"]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        assert "chosen: " in output
        assert str(tmp_path) in output
