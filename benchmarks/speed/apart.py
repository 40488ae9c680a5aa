"""Ways to run a network in processes of their own: thread pools of several runtimes disturb each other in one."""

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import runtimes
from benchmarks.speed.networks import gate_at, network, noise
from isw_plugin import InstanceWisePruner
from isw_plugin.ops import cpu

__all__ = ["WAYS", "Apart", "Task", "seconds_of_each"]

WAYS = ("gated", "dense", "torch", *runtimes.RUNTIMES)
_START = 600.0  # seconds that a process may take to make its network ready


@dataclass(frozen=True)
class Task:
    """What a process times.

    Attributes:
        way: Of WAYS. "dense" and "gated" are ours, "torch" is torch.compile with freezing, the others are runtimes.
        name, side, batch: See ``networks``.
        threads: None: as many as torch takes by itself.
        keep: Share of channels that "gated" keeps.
        models: Folder that keeps what was made ready, ONNX files and our fast models; None: all is made anew.
        fast: One of ours, pickled by who starts the process and knows its error; ``way`` is then its name alone.
    """

    way: str
    name: str
    side: int
    batch: int
    threads: int | None = None
    keep: float = 0.5
    models: Path | None = None
    fast: Path | None = None

    @property
    def stem(self) -> str:
        """Of the names of its files."""
        return f"{self.name}-{self.side}-{self.batch}".replace(" ", "-")


class Apart:
    """A process that runs its task when asked, and sleeps otherwise.

    Attributes:
        error: Largest difference to the eager model's outputs, of the largest; of a gated model, to its masked one's;
            of a pickled one 0.
        threads: Of torch in it, when it was ready.
    """

    def __init__(self, task: Task, cores: Collection[int] | None = None, enter: Callable[[int], None] | None = None):
        """``cores`` are those it may run on; ``enter`` hears the process' number before it begins."""
        self._pipe, theirs = multiprocessing.Pipe()
        context: Any = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        held = os.sched_getaffinity(0)
        try:
            if cores is not None:
                os.sched_setaffinity(0, cores)  # of this thread, for its child to inherit
            self._process.start()
        finally:
            os.sched_setaffinity(0, held)
        theirs.close()
        if enter is not None:
            enter(self._process.pid)
        self._pipe.send(task)
        self.error, self.threads = self._answer(_START)

    def seconds(self, repeats: int) -> list[float]:
        """Seconds of each call, after one that is not counted."""
        self._pipe.send(repeats)
        taken: list[float] = self._answer(_START)
        return taken

    def __call__(self) -> None:
        self.seconds(1)

    def _answer(self, patience: float) -> Any:
        if not self._pipe.poll(patience):
            raise RuntimeError(f"a process gave no answer in {patience:.0f} s")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection) -> None:
    try:
        task: Task = pipe.recv()
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        model, images = network(task.name, task.side), noise(task.batch, task.side)
        run, error = _ready(task, model, images)
        pipe.send((error, torch.get_num_threads()))
        while True:
            pipe.send(_timed(run, pipe.recv()))
    except EOFError:
        return
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


@torch.inference_mode()
def _timed(run: Callable[[], object], repeats: int) -> list[float]:
    return seconds_of_each(run, repeats)


def seconds_of_each(run: Callable[[], object], repeats: int) -> list[float]:
    """Of so many calls, after one that is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def _ready(task: Task, model: nn.Module, images: Tensor) -> tuple[Callable[[], Any], float]:
    """A function that runs the task, and its error."""
    if task.fast is not None:
        cpu.load()
        return partial(pickle.loads(task.fast.read_bytes()), images), 0.0
    if task.way in runtimes.RUNTIMES:
        exported = runtimes.exported(model, images, task.models, task.stem)
        run = runtimes.load(task.way, exported, images, task.threads or torch.get_num_threads())
        return run, _error(run, model, images)
    pruner = InstanceWisePruner(model, images[:1])
    if task.way == "gated":
        pruner = gate_at(pruner, images, task.keep)
        pruner.step()
    with torch.inference_mode():
        if task.way == "torch":
            last = {"memory_format": torch.channels_last}
            run = runtimes.frozen(model.to(**last), images.contiguous(**last))
        else:
            fast = _fast(task, pruner, images)
            run = partial(fast, images)
    return run, _error(run, model, images)


@torch.inference_mode()
def _error(run: Callable[[], Any], model: nn.Module, images: Tensor) -> float:
    wanted = model(images)
    error: float = ((run() - wanted).abs().max() / wanted.abs().max()).item()
    return error


def _fast(task: Task, pruner: InstanceWisePruner, images: Tensor) -> Any:
    cpu.load()
    about = f"{task.way}-{task.keep}-{torch.get_num_threads()}-{cpu.active()}"
    kept = task.models / f"{task.stem}-{about}.pickle" if task.models else None
    if kept and kept.exists():
        return pickle.loads(kept.read_bytes())  # which this study wrote
    fast = pruner.accelerate(images, backend=task.way)
    if kept:
        kept.write_bytes(pickle.dumps(fast))
    return fast
