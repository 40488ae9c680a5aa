"""Processes that have the package imported already: forked from one that has done nothing else, which takes no time."""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "timm", "isw_plugin"])


class Script:
    """``python -c code argument ...``, running; ``env`` replaces the environment where it is given."""

    def __init__(self, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._answer, send = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_run, args=(code, arguments, dict(env or os.environ), send))
        self._process.start()
        send.close()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def printed(self) -> str:
        """What it has printed when it has ended, which must be well."""
        output, failed = self._answer.recv() if self._answer.poll(300) else ("", "timed out")
        self._process.join()
        assert not failed, failed
        return output


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], answer: Connection) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", *arguments]
    failed = ""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            failed = traceback.format_exc()
    answer.send((output.getvalue(), failed))


def run_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """``work(rank, *arguments)`` in two processes."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=2, start_method="forkserver")
