"""Teams of threads that run a stretch of layers, and how many there may be."""

import subprocess
import sys
from pathlib import Path

import pytest

from isw_plugin.ops import build
from tests.conftest import CORES

CSRC = Path(build.__file__).parent / "csrc"
SOURCE = Path(__file__).with_name("team.cpp")
EVERYTHING = "many 1 alone 1 raises 1 starves 1 bound 1 rounds 1 forks 1"


def compiled(folder: Path, *options: str) -> str:
    program = str(folder / "team")
    command = [*build.find_compiler(), "-std=c++17", "-O1", "-g", "-pthread", *options, f"-I{CSRC}", str(SOURCE)]
    subprocess.run([*command, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("team"))


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
from pathlib import Path
import torch
from isw_plugin.accelerate.replay import Replayed
from isw_plugin.ops import conv2d, cpu, pack_weight

def helpers():
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return names.count("isw helper")

cores, threads = map(int, sys.argv[1].split(",")), int(sys.argv[2])
os.sched_setaffinity(0, cores)
torch.set_num_threads(threads)
assert cpu.load()
torch.manual_seed(0)
x, weight, bias = torch.randn(2, 40, 9, 9), pack_weight(torch.randn(40, 40, 3, 3)), torch.zeros(40)
large = torch.randn(2000, 3240)

def layers(x):
    y = conv2d(conv2d(x, weight, bias, padding=1)[0], weight, bias, padding=1)[0]
    return [torch.nn.functional.linear(y.flatten(1), large) if len(sys.argv) > 3 else y]

replayed = Replayed(layers)
with torch.inference_mode():
    first = layers(x)[0]
    assert torch.equal(replayed(x)[0], first) and helpers() == 0  # recorded
    assert torch.equal(replayed(x)[0], first)
    print(helpers())
    assert torch.get_num_threads() == threads
    child = os.fork() if len(sys.argv) == 3 else None  # threads of OpenMP may hang in a child
    if child == 0:
        os._exit(0 if torch.equal(replayed(x)[0], first) else 1)
assert child is None or os.waitpid(child, 0)[1] == 0
"""


def helpers_of(cores: int, threads: int, *more: str) -> int:
    if len(CORES) < cores:
        pytest.skip(f"this process may not use {cores} cores")
    command = [sys.executable, "-W", "ignore", "-c", RUNS, ",".join(map(str, CORES[:cores])), str(threads), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads here")
@pytest.mark.parametrize(("cores", "threads"), [(1, 4), (2, 1), (2, 2), (2, 8)])
def test_no_more_threads_than_cores_and_torch_allow(cores: int, threads: int) -> None:
    """Nor does a call change how many PyTorch has; a forked child may make it, too."""
    assert helpers_of(cores, threads) == min(cores, threads) - 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads here")
def test_large_layers_of_pytorch_keep_their_threads() -> None:
    """They would look for work for milliseconds on the cores of a team."""
    assert helpers_of(2, 2, "with a large layer") == 0
