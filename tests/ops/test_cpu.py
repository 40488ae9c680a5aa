"""Loading, choosing, threads, and life without a compiler."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isw_plugin import ops
from isw_plugin.errors import UnsupportedError
from isw_plugin.ops import Statistics, cpu, pack_weight
from isw_plugin.ops.build import build
from isw_plugin.ops.cache import cache_folder
from tests.processes import Script

# A fresh process: one call twice, every warning printed, then the result against the reference.
SCRIPT = """
import warnings, torch
from isw_plugin import ops
from isw_plugin.ops import cpu, reference, pack_weight
torch.manual_seed(0)
x, weight, bias = torch.randn(2, 5, 8, 8), pack_weight(torch.randn(7, 5, 3, 3)), torch.randn(7)
keep = torch.rand(2, 5) > 0.5
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ops.conv2d(x, weight, bias)
    found = ops.conv2d(x, weight, bias, gating=keep)
for warning in caught:
    print("warning:", warning.message)
torch.testing.assert_close(found, reference.conv2d(x, weight, bias, gating=keep))
grouped = pack_weight(torch.randn(10, 1, 3, 3), 5), torch.randn(10), 5
torch.testing.assert_close(
    ops.grouped_conv2d(x, *grouped, gating=keep), reference.grouped_conv2d(x, *grouped, gating=keep)
)
print("kernels:", cpu.active())
"""


def run_fresh(env: dict[str, str]) -> list[str]:
    return Script(SCRIPT, env=env).printed().splitlines()


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {"PATH": "/usr/bin:/bin", "ISW_PLUGIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(root)}


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)
    cpu.use()


def program(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("isa", cpu.available())
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    assert cpu.use(isa) == isa
    assert cpu.active() == isa


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="isa='sse9': this processor has"):
        cpu.use("sse9")


def test_no_compiler_is_one_warning_and_plain_pytorch(env: dict[str, str], tmp_path: Path) -> None:
    lines = run_fresh(env | {"CXX": str(tmp_path / "missing")})
    assert lines[-1] == "kernels: None"
    assert len(lines) == 2
    assert "no C++ compiler" in lines[0]
    assert "apt install g++" in lines[0]
    log = lines[0].split("log: ")[1].split(".log")[0] + ".log"
    assert "missing" in Path(log).read_text()


def test_a_failing_compiler_is_one_warning_that_names_the_log(env: dict[str, str], tmp_path: Path) -> None:
    broken = program(tmp_path, "broken++", "echo omp.h was not found; exit 1")
    lines = run_fresh(env | {"CXX": broken})
    assert lines[-1] == "kernels: None"
    assert len(lines) == 2
    assert "libomp" in lines[0]
    log = lines[0].split("log: ")[1].split(".log")[0] + ".log"
    assert "omp.h was not found" in Path(log).read_text()


def test_a_library_that_does_not_load_is_one_warning(env: dict[str, str], tmp_path: Path) -> None:
    useless = program(tmp_path, "useless++", 'while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    lines = run_fresh(env | {"CXX": useless})
    assert lines[-1] == "kernels: None"
    assert len(lines) == 2
    assert "does not load" in lines[0]


def test_a_cache_that_cannot_be_written_is_one_warning(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = run_fresh(env | {"ISW_PLUGIN_CACHE": str(tmp_path / "file" / "cache")})
    assert lines[-1] == "kernels: None"
    assert len(lines) == 2
    assert "ISW_PLUGIN_CACHE" in lines[0]


def test_kernels_built_ahead_need_no_compiler_and_damaged_ones_are_not_run(env: dict[str, str], tmp_path: Path) -> None:
    built = build(cpu.available()[0]).kernels
    kernels = Path(env["ISW_PLUGIN_CACHE"], built.parent.name, built.name)
    shutil.copytree(built.parent, kernels.parent)
    env |= {"PATH": str(tmp_path)}
    assert run_fresh(env) == [f"kernels: {cpu.available()[0]}"]
    with kernels.open("r+b") as file:
        file.truncate(kernels.stat().st_size // 2)  # loading it would be a bus error
    warning, active = run_fresh(env)
    assert "no C++ compiler" in warning
    assert active == "kernels: None"


def test_importing_builds_nothing(env: dict[str, str]) -> None:
    code = "import isw_plugin.ops; from isw_plugin.ops import cpu; assert cpu.active() is None"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert not Path(env["ISW_PLUGIN_CACHE"]).exists()


def layers() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 40, 37, 9, 3), (2, 64, 48, 32, 3), (1, 200, 96, 4, 3), (2, 48, 65, 28, 1), (5, 70, 40, 2, 3)]
    return [
        (
            torch.randn(n, c, size, size, generator=generator) * torch.rand(1, c, 1, 1, generator=generator),
            pack_weight(torch.randn(out, c, k, k, generator=generator)),
            torch.randn(out, generator=generator),
        )
        for n, c, out, size, k in shapes
    ]


def run_layers() -> list[Tensor]:
    results: list[Tensor] = []
    for x, weight, bias in layers():
        statistics = Statistics(ops.sum_squares(x), 0.0, 0.9)
        results += ops.conv2d(x, weight, bias, padding=weight.shape[2] // 2, act="relu", gating=statistics)
        results += ops.depthwise_conv2d(x, x[0, :, None, :2, :2].contiguous(), x[0, :, 0, 0].contiguous())
    return results


@pytest.mark.parametrize("isa", cpu.available())
def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    cpu.use(isa)
    torch.set_num_threads(1)
    wanted = run_layers()
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run_layers(), wanted))


@pytest.mark.parametrize("isa", cpu.available())
def test_sixteen_threads_at_once(isa: str) -> None:
    cpu.use(isa)
    wanted = run_layers()
    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(lambda _: run_layers(), range(32)):
            assert all(map(torch.equal, results, wanted))


def test_memory_of_large_maps_is_used_again_but_never_twice_at_once() -> None:
    cpu.use()
    x, weight, bias = torch.randn(1, 3, 128, 128), pack_weight(torch.randn(32, 3, 1, 1)), torch.randn(32)
    first, _ = ops.conv2d(x, weight, bias)
    values, place = first.clone(), first.data_ptr()
    second, _ = ops.conv2d(2 * x, weight, bias)
    assert second.data_ptr() != place
    assert torch.equal(first, values)
    del first
    third, _ = ops.conv2d(x, weight, bias)
    assert third.data_ptr() == place
    assert torch.equal(third, values)
    del third
    cpu.release_memory()
    view = second[:, 3:]
    del second
    fourth, _ = ops.conv2d(x, weight, bias)
    assert fourth.data_ptr() != view.untyped_storage().data_ptr()  # a view holds it
    assert torch.equal(fourth, values)


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISW_PLUGIN_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("ISW_PLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/else")
    assert cache_folder() == Path("/else/isw_plugin")
