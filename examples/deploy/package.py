"""A fast model as a package that C++ runs without Python: trains nothing, gates a timm model and compiles it.

    python examples/deploy/package.py resnet18 deploy

writes deploy/model.pt2, an image and what the model gives for it, compiles run.cpp, runs it, and compares.
"""

from isw_cli.script import in_one_line

import argparse
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._inductor.graph as inductor_graph
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from isw_cli.models import subject
from isw_cli.request import Request
from isw_plugin import InstanceWisePruner
from isw_plugin.ops import cpu

RUNNER = Path(__file__).with_name("run.cpp")

_aten = torch.ops.aten
_COMPILED = {  # which AOTInductor cannot call as they are: sizes, and calls with defaults that are numbers
    *(_aten.sym_size.int, _aten.view.default, _aten.reshape.default),
    *(_aten.linear.default, _aten.addmm.default),
}


def write_package(fast: Any, images: Tensor, file: Path) -> None:
    """An AOTInductor package of an accelerated model, for any number of images.

    The mode "lite" calls PyTorch's own operators, so that results are the same to the last bit. PyTorch 2.14 has no
    setting for the few that must be compiled, to calls of the same functions.
    """
    calls = inductor_graph.should_fallback_by_default
    chosen = mock.patch.object(
        inductor_graph, "should_fallback_by_default", lambda node: node.target not in _COMPILED and calls(node)
    )
    shapes = {"x": {0: torch.export.Dim("batch")}}
    options = torch._inductor.list_mode_options("lite")
    with torch.no_grad(), chosen:
        program = torch.export.export(fast, (images,), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def compile_runner(program: Path) -> list[str]:
    """Compiles run.cpp with the headers and libraries of the installed PyTorch; the command."""
    (libraries,) = library_paths()
    places = [*(f"-I{path}" for path in include_paths()), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    command = ["g++", "-std=c++20", "-O2", str(RUNNER), "-o", str(program), *places]
    command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-Wl,--allow-shlib-undefined"]
    subprocess.run(command, check=True)
    return command


def run(program: Path, package: Path, images: Tensor, calls: int = 0) -> tuple[Tensor, str]:
    """What the package gives for images, and the time that it says a call takes."""
    given, out = package.with_name("images.f32"), package.with_name("output.f32")
    images.numpy().tofile(given)
    command = [program, package, cpu.served_by(), given, out, *images.shape, calls]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return torch.from_numpy(np.fromfile(out, np.float32)).view(len(images), -1), done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    images = torch.randn(2, 3, 64, 64)  # give real ones
    model = subject(Request(options.model), classes=10).model
    fast = InstanceWisePruner(model, images, alpha=0.0, beta=1.0).accelerate(images, backend="gated")
    package, program = options.folder / "model.pt2", options.folder / "run"
    write_package(fast, images, package)
    print(shlex.join(compile_runner(program)))
    output, time = run(program, package, images, calls=100)
    print("equal" if torch.equal(output, fast(images)) else "not equal", time)


if __name__ == "__main__":
    with in_one_line():
        main()
