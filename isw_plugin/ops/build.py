"""Compiles the kernels, once per source, torch, compiler and flags; any number of processes may ask at once."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from isw_plugin.errors import UnsupportedError

__all__ = ["ISAS", "Build", "BuildError", "build", "cache_folder", "find_compiler"]

_SOURCES = Path(__file__).parent / "csrc"
_TORCH = Path(torch.__file__).parent
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
ISAS = {"avx512_bf16": ("-mavx512bf16", *_AVX512), "avx512": _AVX512, "avx2": _AVX2, "generic": ()}
_SHARED = ("-shared", "-fPIC", "-fvisibility=hidden")
_KERNEL_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_OPERATOR_FLAGS = (
    "-std=c++20",
    "-O2",
    "-fopenmp",
    "-DNDEBUG",  # as torch: its headers check in debug what it only then keeps
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    f"-I{_TORCH / 'include'}",
    f"-L{_TORCH / 'lib'}",
)
_LIBRARIES = ("-ltorch_cpu", "-lc10")


class BuildError(UnsupportedError):
    """The kernels cannot be built here."""


@dataclass(frozen=True)
class Build:
    """Paths of what was built, and with what."""

    compiler: str
    operators: Path
    kernels: Path


def cache_folder() -> Path:
    """ISW_PLUGIN_CACHE, or isw_plugin in the user's cache folder."""
    if folder := os.environ.get("ISW_PLUGIN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isw_plugin"


def find_compiler() -> str:
    """CXX, or the first C++ compiler on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    log = cache_folder() / "build.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"none of {', '.join(names)} is on PATH={os.environ.get('PATH', '')}\n")
    raise BuildError(f"no C++ compiler ({', '.join(names)}) was found; log: {log}")


def build(isa: str) -> Build:
    """Builds what is missing of the operators and of one instruction set's kernels.

    Raises:
        BuildError: Nothing could be built; the message names the log.
    """
    try:
        compiler = find_compiler()
        folder = cache_folder() / _key(compiler)
        folder.mkdir(parents=True, exist_ok=True)
        result = Build(compiler, folder / "operators.so", folder / f"kernels_{isa}.so")
        with _locked(folder / "lock"):
            _compile(_commands(compiler, isa, result), folder / "build.log")
    except OSError as error:
        raise BuildError(f"{error}; ISW_PLUGIN_CACHE names another cache folder") from error
    return result


def _commands(compiler: str, isa: str, result: Build) -> dict[Path, list[str]]:
    sources = [str(_SOURCES / name) for name in ("operators.cpp", "replay.cpp")]
    operators = [compiler, *_SHARED, *_OPERATOR_FLAGS, *sources, *_LIBRARIES]
    kernels = [compiler, *_SHARED, *_KERNEL_FLAGS, *ISAS[isa], str(_SOURCES / "kernels.cpp")]
    commands = {result.operators: operators, result.kernels: kernels}
    return {target: command for target, command in commands.items() if not target.exists()}


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((torch.__version__, version, _SHARED, _KERNEL_FLAGS, _OPERATOR_FLAGS, ISAS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(commands: dict[Path, list[str]], log: Path) -> None:
    if not commands:
        return
    with log.open("w") as output:
        running = []
        for target, command in commands.items():
            command = [*command, "-o", str(target.with_suffix(".partial"))]
            output.write(" ".join(command) + "\n")
            output.flush()
            running.append((target, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)))
        failed = [target for target, process in running if process.wait()]
    if failed:
        raise BuildError(f"the compiler {next(iter(commands.values()))[0]} failed; log: {log}")
    for target, _ in running:
        target.with_suffix(".partial").replace(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows")
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
