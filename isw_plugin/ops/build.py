"""Compiles the kernels, once per source, torch, compiler and flags; any number of processes may ask at once."""

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from isw_plugin.errors import UnsupportedError
from isw_plugin.ops.cache import (
    cache_folder,
    cache_folders,
    is_trusted,
    is_whole,
    keep_library,
    make_folder,
    maker_of,
    manifest_of,
)
from isw_plugin.ops.schemas import SCHEMAS

__all__ = ["ISAS", "Build", "BuildError", "build", "find_compiler", "ship"]

_SOURCES = Path(__file__).parent / "csrc"
_SHIPPED = Path(__file__).parent / "built"  # in a wheel with kernels: a folder named by source and torch
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
    "-DISW_SCHEMAS=" + ",".join(f'"{schema}"' for schema in SCHEMAS.values()),
)
_PATHS = (f"-I{_TORCH / 'include'}", f"-L{_TORCH / 'lib'}")
_LIBRARIES = ("-ltorch_cpu", "-lc10", "-ldl")
_NO_OPENMP = re.compile(r"omp\.h|-lg?omp\b|libg?omp|option '-fopenmp'")


class BuildError(UnsupportedError):
    """The kernels cannot be built here."""


@dataclass(frozen=True)
class Build:
    """Paths of what was built, and with what."""

    compiler: str
    operators: Path
    kernels: Path


def find_compiler() -> list[str]:
    """CXX, which may hold more than one word or a path with blanks, or the first C++ compiler on the path."""
    given = os.environ.get("CXX", "").strip()
    try:
        words = shlex.split(given)
    except ValueError:  # a quotation that does not end
        words = []
    commands = [[" ".join(words[:i]), *words[i:]] for i in range(len(words), 0, -1)]
    for command in commands if given else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise _no_compiler(given or "c++, g++, clang++")


def _no_compiler(names: str) -> BuildError:
    log = cache_folder() / "build.log"
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"none of {names} is on PATH={os.environ.get('PATH', '')}\n")
    return BuildError(f"no C++ compiler ({names}) was found; log: {log}")


def build(isa: str, *, anew: bool = False) -> Build:
    """Finds the operators and one instruction set's kernels, or builds what is missing.

    Libraries of another compiler do where there is none, or where it fails.

    Args:
        isa: One of ISAS.
        anew: What is there does not load: build it again.

    Raises:
        BuildError: Nothing was found, and nothing could be built; the message names the log.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows")
    try:
        source = _source_key()
        if not anew and (shipped := _in_folder(_SHIPPED / f"{source}-{torch.__version__}", isa, is_whole)):
            return shipped
        try:
            return _built_by(find_compiler(), source, isa, anew)
        except BuildError as error:
            if found := _found(f"{source}-*", isa):
                return found
            raise BuildError(f"{error}{_why_not_shipped()}") from error
    except OSError as error:
        raise BuildError(f"{error}; ISW_PLUGIN_CACHE names another cache folder") from error


def _built_by(compiler: list[str], source: str, isa: str, anew: bool) -> Build:
    name = f"{source}-{_version_key(compiler)}"
    if not anew and (found := _found(name, isa)):
        return found
    logging.getLogger("isw_plugin").warning(
        "isw_plugin builds its kernels, once, for about a minute: `python -m isw_plugin.ops build` does it ahead%s",
        _why_not_shipped(),
    )
    *others, last = cache_folders()
    for folder in others:
        with suppress(OSError):
            make_folder(folder / name)
            return _build_in(folder / name, compiler, isa, anew)
    make_folder(last / name)
    return _build_in(last / name, compiler, isa, anew)


def _found(name: str, isa: str) -> Build | None:
    """A build in a folder of this name or pattern."""
    for cache in cache_folders():
        for folder in sorted(cache.glob(name)):
            if build := _in_folder(folder, isa, is_trusted):
                return build
    return None


def _in_folder(folder: Path, isa: str, is_right: Callable[[Path], bool]) -> Build | None:
    operators, kernels = _libraries(folder, isa)
    return Build(maker_of(operators), operators, kernels) if is_right(operators) and is_right(kernels) else None


def _why_not_shipped() -> str:
    """What to say of a wheel's kernels that were not taken; nothing where it has none."""
    versions = [folder.name.partition("-")[2] for folder in _SHIPPED.glob("*-*")]
    if not versions:
        return ""
    if versions == [torch.__version__]:
        return "; those of this wheel were changed or do not load here: install it anew"
    return f"; those of this wheel are for torch {', '.join(versions)}, and this is {torch.__version__}"


def ship(package: Path) -> None:
    """Puts the kernels of every instruction set into a copy of this package, where a later `build` finds them.

    Raises:
        BuildError: They cannot be built.
    """
    folder = package / "ops" / "built" / f"{_source_key()}-{torch.__version__}"
    folder.mkdir(parents=True)
    for isa in ISAS if platform.machine() == "x86_64" else ["generic"]:
        built = build(isa)
        for library in (built.operators, built.kernels):
            for file in (library, manifest_of(library)):
                shutil.copy(file, folder)


def _libraries(folder: Path, isa: str) -> tuple[Path, Path]:
    return folder / "operators.so", folder / f"kernels_{isa}.so"


def _build_in(folder: Path, compiler: list[str], isa: str, anew: bool) -> Build:
    operators, kernels = _libraries(folder, isa)
    sources = [str(_SOURCES / name) for name in ("operators.cpp", "replay.cpp")]
    common = [*compiler, *_SHARED, f'-DISW_SOURCE="{folder.name.partition("-")[0]}"']  # they must be of one
    commands = {
        operators: [*common, *_OPERATOR_FLAGS, *_PATHS, *sources, *_LIBRARIES],
        kernels: [*common, *_KERNEL_FLAGS, *ISAS[isa], str(_SOURCES / "kernels.cpp")],
    }
    with _locked(folder / "lock"):
        missing = {library: command for library, command in commands.items() if anew or not is_trusted(library)}
        _compile(missing, folder / "build.log", shlex.join(compiler))
    return Build(shlex.join(compiler), operators, kernels)


def _source_key() -> str:
    """Of all that goes in but the compiler."""
    parts = (torch.__version__, platform.machine(), _SHARED, _KERNEL_FLAGS, _OPERATOR_FLAGS, ISAS)
    digest = hashlib.sha256(repr(parts).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _version_key(compiler: list[str]) -> str:
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"the compiler {shlex.join(compiler)} does not run: {error}") from error
    return hashlib.sha256(version + repr(compiler[1:]).encode()).hexdigest()[:8]


def _compile(commands: dict[Path, list[str]], log: Path, compiler: str) -> None:
    if not commands:
        return
    with log.open("w") as output:
        running = []
        try:
            for library, command in commands.items():
                command = [*command, "-o", str(library.with_suffix(".partial"))]
                print(shlex.join(command), file=output, flush=True)
                running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
            failed = [process for process in running if process.wait()]
        finally:
            for process in running:
                process.kill()  # those that an interrupt left
    if failed:
        no_openmp = _NO_OPENMP.search(log.read_text(errors="replace"))
        advice = "; install its OpenMP (for clang: libomp-dev)" if no_openmp else ""
        raise BuildError(f"the compiler {compiler} failed{advice}; log: {log}")
    for library in commands:
        keep_library(library.with_suffix(".partial"), library, compiler)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
