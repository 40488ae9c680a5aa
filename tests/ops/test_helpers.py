"""Threads that help whoever runs the kernels' tasks, and how many there may be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isw_plugin.ops import build

CSRC = Path(build.__file__).parent / "csrc"
SOURCE = Path(__file__).with_name("helpers.cpp")
EVERYTHING = "many 1 alone 1 raises 1 starves 1 bound 1 forks 1"


def compiled(folder: Path, *options: str) -> str:
    program = str(folder / "helpers")
    command = [*build.find_compiler(), "-std=c++17", "-O1", "-g", "-pthread", *options, f"-I{CSRC}", str(SOURCE)]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("helpers"))


def said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_every_task_runs_once_whatever_helpers_do(program: str) -> None:
    """From many threads; alone; after an error, which is raised; without memory; within its mask; in a child."""
    assert said_by(program) == EVERYTHING


@pytest.mark.slow
def test_no_task_races(tmp_path: Path) -> None:
    assert said_by(compiled(tmp_path, "-fsanitize=thread"), "sanitized") == EVERYTHING


@pytest.mark.parametrize(
    ("quota", "of_parent", "wanted"),
    [
        ("max 100000", "max 100000", -1),
        ("150000 100000", "max 100000", 1),  # whole processors: a quota that is spent stops every thread
        ("400000 100000", "max 100000", 4),
        ("400000 100000", "250000 100000", 2),
        ("20000 100000", "max 100000", 1),
        (None, "300000 100000", 3),  # a container sees its group as the root
        (None, None, -1),
    ],
)
def test_quotas_are_the_least_of_all_groups(
    program: str, tmp_path: Path, quota: str | None, of_parent: str | None, wanted: int
) -> None:
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    for folder, text in ((group, quota), (tmp_path, of_parent)):
        if text is not None:
            (folder / "cpu.max").write_text(f"{text}\n")
            spent, period = text.split()
            (folder / "cpu.cfs_quota_us").write_text("-1\n" if spent == "max" else f"{spent}\n")
            (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert said_by(program, "2", str(tmp_path), "/a/b") == f"{wanted}"
    assert said_by(program, "1", str(tmp_path), "/a/b") == f"{wanted}"


RUNS = """
import os, sys
import torch
from isw_plugin.ops import conv2d, cpu, pack_weight

def tasks():
    return len(os.listdir("/proc/self/task"))

cores, threads = int(sys.argv[1]), int(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
torch.set_num_threads(threads)
assert cpu.load()
torch.manual_seed(0)
x, weight, bias = torch.randn(2, 40, 9, 9), pack_weight(torch.randn(70, 40, 3, 3)), torch.zeros(70)
before = tasks()
y = conv2d(x, weight, bias, padding=1)[0]
print(tasks() - before)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(conv2d(x, weight, bias, padding=1)[0], y) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks here")
@pytest.mark.parametrize(("cores", "threads"), [(1, 4), (2, 1), (2, 2), (2, 8)])
def test_no_more_threads_than_cores_and_torch_allow(cores: int, threads: int) -> None:
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip(f"this process may not use {cores} cores")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RUNS, str(cores), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"{min(cores, threads) - 1}\n"), done.stderr
