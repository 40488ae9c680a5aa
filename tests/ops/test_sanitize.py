"""Every kernel under sanitizers, on buffers of their exact size: `pytest -m slow tests/ops/test_sanitize.py`.

ISW_SANITIZE_CASES says how many random calls (300). Masked accesses of AVX are not watched, those of the generic
kernels are.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from isw_plugin.ops import build, cpu

CSRC = Path(build.__file__).parent / "csrc"
CASES = os.environ.get("ISW_SANITIZE_CASES", "300")


MEMORY = "address,undefined"


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizers", "isa"), [(MEMORY, "generic"), (MEMORY, "best"), ("thread", "generic")])
def test_no_kernel_leaves_its_buffers_or_races(sanitizers: str, isa: str, tmp_path: Path) -> None:
    options = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread"]
    options += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags = build.ISAS[cpu.available()[0] if isa == "best" else isa]
    sources = [str(Path(__file__).with_name("driver.cpp")), str(CSRC / "kernels.cpp")]
    driver = str(tmp_path / "driver")
    subprocess.run([*build.find_compiler(), *options, *flags, f"-I{CSRC}", *sources, "-o", driver], check=True)
    done = subprocess.run([driver, CASES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{CASES} cases\n"), done.stderr[:4000]


ARM = {"compiler": "aarch64-linux-gnu-g++", "emulator": "qemu-aarch64"}


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ARM.values())), reason="apt install g++-aarch64-linux-gnu qemu-user")
def test_kernels_on_arm_give_what_those_on_x86_give(tmp_path: Path) -> None:
    sources = [str(Path(__file__).with_name("driver.cpp")), str(CSRC / "kernels.cpp")]
    sums = {}
    for compiler, run in ((build.find_compiler(), []), ([ARM["compiler"], "-static"], [ARM["emulator"]])):
        driver = str(tmp_path / "driver")
        command = [*compiler, *build._KERNEL_FLAGS, "-pthread", f"-I{CSRC}", *sources, "-o", driver]
        subprocess.run(command, check=True)
        done = subprocess.run([*run, driver, CASES, "sums"], capture_output=True, text=True, check=True)
        lines = [line.split() for line in done.stdout.splitlines()[:-1]]
        sums[compiler[0]] = torch.tensor([[float(number) for number in line] for line in sorted(lines)])
    x86, arm = sums.values()
    assert len(x86) == int(CASES)
    torch.testing.assert_close(arm, x86, rtol=2e-3, atol=1e-3)
