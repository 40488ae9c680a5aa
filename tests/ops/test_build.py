"""Building: cached by what goes in, safe for several processes at once, ahead of time on request."""

import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isw_plugin.ops import build as build_module
from isw_plugin.ops import cache as cache_module
from isw_plugin.ops.build import ISAS, BuildError, build, find_compiler, ship
from isw_plugin.ops.cache import cache_folder, cache_folders

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


DAMAGES: dict[str, Callable[[Path], object]] = {  # of a library
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "of zero length": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("text"),
    "one byte changed": lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "file").write_text("")),
    "a link": lambda path: path.rename(path.with_name("other")).parent and path.symlink_to("other"),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "written by the group": lambda path: path.chmod(0o775),
    "written by all": lambda path: path.chmod(0o757),
    "another's": lambda path: os.chown(path, 12345, 12345),
}


OTHERS = [
    (damage, what) for damage in ("missing", "text", "a folder") for what in ("operators.so", "operators.so.json")
]


@pytest.mark.parametrize(("damage", "what"), [*((damage, "kernels_generic.so") for damage in DAMAGES), *OTHERS])
def test_what_is_not_as_it_was_built_is_built_again(compiler: Path, damage: str, what: str) -> None:
    if damage == "another's" and os.geteuid():
        pytest.skip("only root gives files away")
    first = build("generic")
    DAMAGES[damage](first.kernels.with_name(what))
    assert build("generic") == first
    assert runs(compiler) == 3  # once, and only this library
    assert build("generic") == first
    assert runs(compiler) == 3
    assert first.kernels.read_text() == first.operators.read_text() == "library\n"
    assert first.kernels.is_file()
    assert not first.kernels.is_symlink()


def test_a_folder_that_all_may_write_is_taken_back(compiler: Path) -> None:
    folder = build("generic").kernels.parent
    folder.chmod(0o777)
    build("generic")
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_cache_that_all_may_write_is_refused(compiler: Path) -> None:
    cache_folder().mkdir(mode=0o755)
    cache_folder().chmod(0o777)
    with pytest.raises(BuildError, match=r"others own or can write .*chmod go-w.*ISW_PLUGIN_CACHE"):
        build("generic")
    cache_folder().chmod(0o1777)  # as /tmp: nobody moves what is not his
    build("generic")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_somebody_else_is_refused(compiler: Path) -> None:
    folder = build("generic").kernels.parent
    os.chown(folder, 12345, 12345)
    with pytest.raises(BuildError, match="others own or can write"):
        build("generic")


def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


def test_without_a_compiler_what_any_built_does(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("generic")
    with monkeypatch.context() as context:
        no_compiler(tmp_path, context)
        assert build("generic") == first
        with pytest.raises(BuildError, match="no C"):
            build("avx2")
        context.setattr(build_module, "_KERNEL_FLAGS", ("-O1",))
        with pytest.raises(BuildError, match="no C"):
            build("generic")
    compiler.write_text(COMPILER.replace("fake 1", "fake 2") + "exit 1\n")
    assert build("generic") == first  # nor where another fails


def test_a_cache_that_cannot_be_written_is_read(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("generic")

    def refuse(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(build_module, "make_folder", refuse)
    monkeypatch.setattr(build_module, "_locked", refuse)
    assert build("generic") == first
    with pytest.raises(BuildError, match=r"Read-only.*ISW_PLUGIN_CACHE"):
        build("avx2")


@pytest.mark.parametrize("form", ["sh {}", "'{}'", "{}"])
def test_a_compiler_may_be_several_words_or_have_blanks(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    blank = tmp_path / "my tools"
    blank.mkdir()
    place = compiler if form.startswith("sh ") else compiler.rename(blank / "fake++")
    monkeypatch.setenv("CXX", form.format(place))
    assert build("generic").kernels.is_file()
    assert runs(place) == 2


def test_a_compiler_that_does_not_run_is_named(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(BuildError, match=r"fake\+\+ does not run: .*format"):
        build("generic")
    monkeypatch.setenv("CXX", "'no end")
    with pytest.raises(BuildError, match=r"no C.*'no end"):
        find_compiler()


def test_clang_without_openmp_is_told_what_to_install(compiler: Path) -> None:
    compiler.write_text(COMPILER + "echo \"fatal error: 'omp.h' file not found\"\nexit 1\n")
    with pytest.raises(BuildError, match=r"install its OpenMP \(for clang: libomp-dev\); log: "):
        build("generic")


def test_a_user_without_a_home_builds_among_temporary_files(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ISW_PLUGIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folders() == [tmp_path / f"isw_plugin-{os.geteuid()}"]
    assert tmp_path in build("generic").kernels.parents
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")  # a home that nothing can be written to
    monkeypatch.setattr(build_module, "_KERNEL_FLAGS", ("-O1",))
    assert cache_folders()[1] in build("generic").kernels.parents


def test_building_is_announced_and_finding_is_not(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "isw_plugin"):
        build("generic")
        build("generic")
    assert [record.message for record in caplog.records if "python -m isw_plugin.ops build" in record.message]
    assert len(caplog.records) == 1


@pytest.fixture
def wheel(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels in an installed package, and neither a compiler nor a cache to write to."""
    ship(tmp_path / "isw_plugin")
    monkeypatch.setattr(build_module, "_SHIPPED", tmp_path / "isw_plugin" / "ops" / "built")
    monkeypatch.setenv("ISW_PLUGIN_CACHE", "/proc/nowhere")
    no_compiler(tmp_path, monkeypatch)
    (folder,) = build_module._SHIPPED.iterdir()
    return folder


def test_kernels_of_a_wheel_need_no_compiler_and_no_cache(wheel: Path, compiler: Path) -> None:
    if platform.machine() == "x86_64":
        assert runs(compiler) == 1 + len(ISAS)
    wheel.chmod(0o777)  # who may write there may change the Python code, too
    for file in wheel.iterdir():
        file.chmod(0o664)
    built = build("generic")
    assert (built.operators, built.kernels) == (wheel / "operators.so", wheel / "kernels_generic.so")
    assert built.compiler == str(compiler)


@pytest.mark.parametrize("what", ["operators.so", "kernels_generic.so", "kernels_generic.so.json"])
def test_damaged_kernels_of_a_wheel_are_not_loaded(wheel: Path, what: str) -> None:
    (wheel / what).write_text("")
    with pytest.raises(BuildError, match=r"no C.*; those of this wheel were changed .*: install it anew"):
        build("generic")


def test_kernels_of_a_wheel_for_another_torch_are_not_loaded(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_for = re.escape(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(BuildError, match=rf"no C.*; those of this wheel are for torch {made_for}, and this is 9\.9\.9"):
        build("generic")


def test_where_kernels_of_a_wheel_do_not_fit_they_are_built(
    wheel: Path, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ISW_PLUGIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert build("generic", anew=True).kernels.parent.parent == tmp_path / "cache"  # they did not load
    monkeypatch.setattr(build_module, "_KERNEL_FLAGS", ("-O1",))  # another source
    assert build("generic").kernels.parent.parent == tmp_path / "cache"
    assert "builds its kernels, once" in caplog.text
    assert "those of this wheel" in caplog.text


@pytest.mark.slow  # half a minute of compiling
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
