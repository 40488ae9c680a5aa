"""What this machine has: versions, processor, kernels, extras."""

import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from isw_cli.output import as_json, table, tell
from isw_plugin.machine import hardware
from isw_plugin.ops.build import BuildError, build, find_compiler
from isw_plugin.ops.cache import cache_folder
from isw_plugin.ops.cpu import ADVICE, available, load, served_by, use

__all__ = ["build_kernels", "examine"]

_EXTRAS = {
    "report": ("matplotlib",),
    "onnx": ("onnx", "onnxscript"),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "pruning": ("torch-pruning",),
}


def build_kernels(json: bool) -> None:
    start = time.perf_counter()
    isa = use()
    built = build(isa)
    facts = {"instruction_set": isa, "compiler": built.compiler, "kernels": str(built.kernels)}
    facts["library"] = str(built.operators)
    facts["seconds"] = f"{time.perf_counter() - start:.1f}"
    if json:
        as_json(facts)
    else:
        table(facts.items())


def examine(json: bool) -> bool:
    """Whether kernels run here; shows all that bears on it."""
    missing: dict[str, str] = {}
    facts: dict[str, Any] = {
        "isw_plugin": _version("isw_plugin"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        **{name: _version(name) for name in ("torchvision", "timm")},
        "processor": hardware(),
        "instruction sets": ", ".join(available()),
        "threads": str(torch.get_num_threads()),
        "compiler": _compiler(),
        "kernels": "loaded" if load() else "none: plain PyTorch, which does not get faster",
        "library": str(served_by() or "-"),
        "cache": str(cache_folder()),
    }
    for extra, packages in _EXTRAS.items():
        found = {package: _version(package) for package in packages}
        facts[extra] = ", ".join(f"{package} {held}" for package, held in found.items())
        if "-" in found.values():
            missing[extra] = f"pip install 'isw_plugin[{extra}]'"
    if facts["kernels"] != "loaded":
        missing |= dict.fromkeys(["kernels"] + ["compiler"] * (facts["compiler"] == "-"), ADVICE)
    if json:
        as_json(facts | {"missing": missing})
        return "kernels" not in missing
    table(facts.items())
    for name, advice in missing.items():
        tell(f"missing: {name}: {advice}")
    return "kernels" not in missing


def _compiler() -> str:
    try:
        return shlex.join(find_compiler())
    except BuildError:
        return "-"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
