"""Operators on `torch.ops.isw`: kernels where they can be built, else the function that defines their results.

The C++ library defines them as well, to serve exported programs without Python: whichever comes first does it.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import isw_plugin.ops.cpu as cpu
from isw_plugin.errors import EngineInputError, UnsupportedError
from isw_plugin.ops.reference import Gating, Statistics
from isw_plugin.ops.schemas import DEFINITIONS, SCHEMAS, gates

__all__ = ["define"]

_library: Any = torch.library.Library("isw", "DEF")  # type: ignore[no-untyped-call]


def define(name: str, fake: Callable[..., Any]) -> None:
    """An operator that runs its definition where there is no kernel: on the CPU until the first call.

    Raises:
        UnsupportedError: A library of another version has defined it otherwise.
    """
    plain = DEFINITIONS[name]
    parameters = list(inspect.signature(plain).parameters)

    def named(args: Sequence[Any]) -> dict[str, Any]:
        left = iter(args)
        return {each: _gating(*islice(left, 3)) if gates(each) else next(left, None) for each in parameters}

    def run(*args: Any) -> Any:
        if args[0].is_cpu and cpu.active() is None and cpu.load():  # now there is one
            return getattr(torch.ops.isw, name)(*args)
        if any(isinstance(each, Tensor) and _apart(each, args[0]) for each in args):
            raise EngineInputError(f"isw::{name}: expected dense tensors on one device")
        return plain(**named(args))

    if not _is_defined(name):
        _library.define(SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"isw::{name}", lambda *args: fake(**named(args)), lib=_library)


def _is_defined(name: str) -> bool:
    found = torch._C._jit_get_schemas_for_operator(f"isw::{name}")
    if found and found != [torch._C.parse_schema(f"isw::{SCHEMAS[name]}")]:
        raise UnsupportedError(
            f"isw::{name} was defined before isw_plugin was imported, by another version of it, as {found[0]}: "
            "load the library of this version, or none"
        )
    return bool(found)


def _apart(tensor: Tensor, x: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.device != x.device


def _gating(gate: Tensor | None, alpha: float, beta: float) -> Gating:
    return gate if gate is None or gate.dtype == torch.bool else Statistics(gate, alpha, beta)
