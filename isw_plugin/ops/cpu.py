"""Loads the CPU kernels on first use and chooses the instruction set."""

import ctypes
import os
import threading
import warnings
from pathlib import Path

import torch

from isw_plugin.errors import UnsupportedError
from isw_plugin.ops.build import ISAS, Build, BuildError, build

__all__ = ["ADVICE", "active", "available", "load", "release_memory", "served_by", "use"]

ADVICE = (
    "install a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "with clang also libomp) and start again"
)
_UNUSABLE = (OSError, AttributeError)  # no library, or one without our functions


class _Loader:
    """The one set of kernels of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.isa: str | None = None
        self.failed = False
        self.operators: ctypes.CDLL | None = None
        self.loaded_before: Path | None = None  # by somebody else, with kernels beside it

    def load(self) -> bool:
        with self.lock:
            if self.isa is None and not self.failed:
                self._try(available()[0])
            return self.isa is not None

    def switch(self, isa: str) -> None:
        """Build and load these kernels, or raise BuildError; the lock is the caller's."""
        try:
            self._link(isa, self._found_or_built(isa))
        except _UNUSABLE:  # built for another machine, say: a cache may be shared
            built = build(isa, anew=True)
            try:
                self._link(isa, built)
            except _UNUSABLE as error:
                folder = built.kernels.parent
                raise BuildError(f"what {built.compiler} built does not load: {error}; delete {folder}") from error

    def _found_or_built(self, isa: str) -> Build:
        if self.operators is None:
            self.loaded_before = served_by()
        if self.loaded_before and (kernels := self.loaded_before.with_name(f"kernels_{isa}.so")).exists():
            return Build("another process", self.loaded_before, kernels)
        return build(isa)

    def _link(self, isa: str, built: Build) -> None:
        ctypes.CDLL(str(built.kernels))  # before operators are registered that could not run
        operators = self.operators or ctypes.CDLL(str(self.loaded_before or built.operators))
        operators.isw_use.restype = ctypes.c_char_p
        if problem := operators.isw_use(os.fsencode(built.kernels)):
            raise BuildError(f"torch.ops.isw runs in {served_by()}, loaded before: {os.fsdecode(problem)}")
        self.isa, self.operators = isa, operators

    def _try(self, isa: str) -> None:
        try:
            self.switch(isa)
        except BuildError as error:
            self.failed = True
            message = f"isw_plugin runs in plain PyTorch, which does not get faster: {error}. To get kernels, {ADVICE}."
            warnings.warn(message, RuntimeWarning, stacklevel=3)


_loader = _Loader()


def available() -> list[str]:
    """Instruction sets that this processor has, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and not torch.cpu._is_avx512_bf16_supported():
        capability = "AVX512 without bfloat16"
    skipped = {"AVX512": 0, "AVX512 without bfloat16": 1, "AVX2": 2}.get(capability, 3)
    return list(ISAS)[skipped:]


def served_by() -> Path | None:
    """The library that operators run in, whoever loaded it; None: none yet."""
    try:
        return Path(torch.ops.isw._loaded()[0])
    except AttributeError:
        return None


def active() -> str | None:
    """The instruction set in use; None before the first call and without kernels."""
    return _loader.isa


def load() -> bool:
    """Builds and loads the best kernels unless that was done or failed; False: PyTorch has to do.

    A failure warns once in a process.
    """
    return _loader.isa is not None or _loader.load()


def use(isa: str | None = None) -> str:
    """Changes the kernels of this process.

    Args:
        isa: "avx512_bf16", "avx512", "avx2" or "generic"; None takes the best that this processor has.

    Returns:
        The instruction set now in use.

    Raises:
        UnsupportedError: No such instruction set, or not on this processor.
        BuildError: The kernels cannot be built.
    """
    isa = isa or available()[0]
    if isa not in available():
        raise UnsupportedError(f"isa={isa!r}: this processor has {', '.join(available())}")
    with _loader.lock:
        _loader.switch(isa)
    return isa


def release_memory() -> None:
    """Gives back to the system what the engine keeps for the next large maps, 256 MB at most."""
    with _loader.lock:
        if _loader.operators is not None:
            _loader.operators.isw_release()
