"""The C++ library by itself, before isw_plugin and after it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from isw_plugin import functional, ops
from isw_plugin.ops import Statistics, build, cpu, pack_weight
from isw_plugin.ops.schemas import SCHEMAS

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler")

ALONE = """
import sys, torch
library, given, out = sys.argv[1:]
torch.ops.load_library(library)
x, weight, bias, squares = torch.load(given)
norms = torch.ops.isw.channel_norm(x, 1)
y, sums = torch.ops.isw.conv2d(x, weight, bias, [1, 1], [1, 1], "relu", squares, 0.0, 0.9, None, None, 0.0, 0.0)
torch.save([y, sums, torch.ops.isw.mask(x, torch.ops.isw.decide(norms, 0.0, 1.0), 1)], out)
assert not any(name.startswith("isw_plugin") for name in sys.modules)
print(torch.ops.isw._loaded()[1])
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("isw::"):
        print(schema)
"""


def library() -> Path:
    return build.build(cpu.available()[0]).operators


def python(code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A process that has not seen isw_plugin."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=False)


def test_the_library_alone_has_the_operators_their_schemas_and_the_best_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 40, 9, 9), pack_weight(torch.randn(24, 40, 3, 3)), torch.randn(24)
    torch.save([x, weight, bias, ops.sum_squares(x)], tmp_path / "given")
    done = python(ALONE, library(), tmp_path / "given", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    kernels, *schemas = done.stdout.splitlines()
    assert Path(kernels).name == f"kernels_{cpu.available()[0]}.so"
    assert {str(getattr(torch.ops.isw, name).default._schema) for name in SCHEMAS} <= set(schemas)
    assert len(schemas) == len(SCHEMAS) + 1  # _loaded
    y, squares, masked = torch.load(tmp_path / "out")
    wanted = ops.conv2d(x, weight, bias, padding=1, act="relu", gating=Statistics(ops.sum_squares(x), 0.0, 0.9))
    assert torch.equal(y, wanted[0])
    assert torch.equal(squares, wanted[1])
    keep = functional.keep_mask(functional.channel_norm(x), 0.0, 1.0)
    assert not keep.all()
    assert torch.equal(masked, functional.mask(x, keep))


def test_without_kernels_beside_it_the_library_says_what_makes_them(tmp_path: Path) -> None:
    (tmp_path / "operators.so").write_bytes(library().read_bytes())
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.isw.sum_squares(torch.ones(1, 1, 1, 1))"
    done = python(code, tmp_path / "operators.so")
    assert (
        f"no kernels for this processor lie beside {tmp_path / 'operators.so'}: `python -m isw_plugin.ops build`"
        in (done.stderr)
    )


AFTER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from isw_plugin import ops
from isw_plugin.ops import cpu
assert cpu.active() is None
x = torch.ones(1, 1, 2, 2)
assert ops.sum_squares(x).item() == 4  # with kernels that the library chose
assert cpu.load() and str(cpu.served_by()) == sys.argv[1], cpu.served_by()
assert cpu.use() == cpu.active() == cpu.available()[0]
assert torch.ops.isw._loaded()[1].endswith(f"kernels_{cpu.active()}.so")
torch.compile(lambda x: ops.sum_squares(x), backend="eager", fullgraph=True)(x)
torch.classes.isw.Tape()
"""


def test_isw_plugin_takes_the_library_that_was_loaded_before(tmp_path: Path) -> None:
    """Its cache is empty, and there is no compiler."""
    root = str(Path(__file__).parents[2])
    cache = str(tmp_path / "cache")
    done = python(AFTER, library(), PYTHONPATH=root, ISW_PLUGIN_CACHE=cache, CXX="missing")
    assert done.returncode == 0, done.stderr


def test_a_second_copy_of_the_library_changes_nothing(tmp_path: Path) -> None:
    cpu.use()
    copy = tmp_path / "operators.so"
    copy.write_bytes(library().read_bytes())
    torch.ops.load_library(copy)
    assert cpu.served_by() == library()
    assert ops.sum_squares(torch.ones(1, 1, 2, 2)).item() == 4


def test_kernels_of_another_source_are_refused(tmp_path: Path) -> None:
    built = build.build("generic")
    other = tmp_path / "kernels_generic.so"
    key = built.kernels.parent.name.partition("-")[0].encode()
    other.write_bytes(built.kernels.read_bytes().replace(key, b"0" * len(key)))
    active = cpu.use()
    with pytest.raises(build.BuildError, match=r"loaded before: .*was not built together with this library"):
        cpu._loader._link("generic", build.Build("", built.operators, other))
    assert cpu.active() == active
    assert ops.sum_squares(torch.ones(1, 1, 2, 2)).item() == 4


def test_an_operator_of_another_version_is_refused() -> None:
    code = "import torch; torch.library.define('isw::conv2d', '(Tensor x) -> Tensor'); import isw_plugin"
    done = python(code, PYTHONPATH=str(Path(__file__).parents[2]))
    said = done.stderr.splitlines()[-1]
    assert said.startswith("isw_plugin.errors.UnsupportedError: isw::conv2d was defined before isw_plugin was imported")
    assert "isw::conv2d(Tensor x) -> Tensor: load the library of this version, or none" in said


MAPS: dict[str, Any] = {
    "map": lambda: torch.randn(5, 7, 6, 6),
    "channels last": lambda: torch.randn(5, 7, 6, 6).to(memory_format=torch.channels_last),
    "many instances": lambda: torch.randn(9, 64, 40, 40),  # some at a time
    "tokens": lambda: torch.randn(3, 5, 7),
    "features": lambda: torch.randn(3, 7),
    "float64": lambda: torch.randn(2, 7, 3, 3, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(2, 7, 3, 3, dtype=torch.bfloat16),
    "none": lambda: torch.randn(0, 7, 3, 3),
    "zeros": lambda: torch.zeros(2, 7, 3, 3),
}


@pytest.mark.parametrize("kind", MAPS)
def test_gates_in_cpp_are_those_in_python_to_the_last_bit(kind: str) -> None:
    cpu.load()
    torch.manual_seed(0)
    x = MAPS[kind]()
    for axis in (1, -1) if kind != "zeros" else (1,):
        norms = torch.ops.isw.channel_norm(x, axis)
        assert torch.equal(norms, functional.channel_norm(x, axis))
        for alpha, beta in ((0.0, 1.0), (0.05, 0.9), (float("inf"), 1.0)):
            keep = torch.ops.isw.decide(norms, alpha, beta)
            assert torch.equal(keep, functional.keep_mask(norms, alpha, beta))
            masked, wanted = torch.ops.isw.mask(x, keep, axis), functional.mask(x, keep, axis)
            assert torch.equal(masked, wanted)
            assert masked.stride() == wanted.stride()
