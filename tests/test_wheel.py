"""Wheels: pure ones without a compiler, and those that bring the kernels."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from isw_plugin.ops.build import ISAS
from isw_plugin.ops.cache import cache_folder
from tests.ops.test_build import COMPILER

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools", minversion="77")
HOOK = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy to build in."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("isw_plugin", "isw_cli"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def build(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HOOK, str(tree.parent)]
    return subprocess.run(command, cwd=tree, env=os.environ | env, capture_output=True, text=True, check=False)


def wheel_of(tree: Path, **env: str) -> Path:
    done = build(tree, **env)
    assert done.returncode == 0, done.stderr
    return tree.parent / done.stdout.splitlines()[-1]


def kernels_in(wheel: Path) -> list[str]:
    return sorted(Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/ops/built/" in name)


def test_a_wheel_has_kernels_on_request_alone(tree: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "fake++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "ISW_PLUGIN_CACHE": str(tmp_path / "cache")}
    with_kernels = wheel_of(tree, ISW_KERNELS="1", **env)
    assert with_kernels.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    libraries = {f"kernels_{isa}.so" for isa in ISAS} | {"operators.so"}
    assert {*kernels_in(with_kernels)} == libraries | {f"{library}.json" for library in libraries}
    pure = wheel_of(tree, **env)  # the same tree, where the others still lie
    assert pure.name.endswith("-py3-none-any.whl")
    assert kernels_in(pure) == []
    assert any(name.endswith("csrc/load.h") for name in zipfile.ZipFile(pure).namelist())  # to build at first use


def test_kernels_without_torch_are_refused(tree: Path, tmp_path: Path) -> None:
    """As in pip's own environment for builds."""
    (tmp_path / "without" / "torch").mkdir(parents=True)
    (tmp_path / "without" / "torch" / "__init__.py").write_text("raise ImportError(\"No module named 'torch'\")")
    done = build(tree, ISW_KERNELS="1", PYTHONPATH=str(tmp_path / "without"))
    assert done.returncode
    assert "ISW_KERNELS: No module named 'torch'. Kernels are built for the torch that is installed" in done.stderr
    assert "--no-build-isolation" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


GATE = """
import torch, warnings
warnings.simplefilter("error")
from isw_plugin import InstanceWisePruner
from isw_plugin.ops import cpu
model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Conv2d(c, 64, 3), torch.nn.ReLU()) for c in (3, 64, 64)))
images = torch.randn(2, 3, 16, 16)
fast = InstanceWisePruner(model.eval(), images, alpha=0.0, beta=1.0).accelerate(images, backend="gated")
with fast.recording() as record:
    fast(images)
print(cpu.active(), cpu.served_by(), fast.execution, float(record.keep_ratio) < 1)
"""


def test_a_wheel_with_kernels_needs_no_compiler_no_cache_and_no_home(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    wheel = wheel_of(tree, ISW_KERNELS="1", ISW_PLUGIN_CACHE=str(cache_folder()))
    place = tmp_path / "empty"
    venv.create(place, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True)
    (site,) = place.glob("lib/*/site-packages")
    (site / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    env = {"PATH": str(tmp_path / "nowhere"), "ISW_PLUGIN_CACHE": "/proc/nowhere", "COLUMNS": "200"}

    def run(program: str, *arguments: str) -> str:
        command = [str(place / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    active, library, execution, skips = run("python", "-c", GATE).split()
    assert library.startswith(str(site))
    assert (execution, skips, active in ISAS) == ("accelerated", "True", True)
    assert "no C++ compiler" not in run("isw", "doctor")
    for kind in ("cat", "dog"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number in range(6):
            noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(noise).save(tmp_path / "data" / kind / f"{number}.png")
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "weights.pt")
    chosen = ("--data", "data", "--weights", "weights.pt", "--size", "32", "--max-drop", "1", "--out", "out")
    run("isw", "gate", "resnet18", *chosen)
    assert "Accuracy, gates off" in (tmp_path / "out" / "report" / "index.html").read_text()
