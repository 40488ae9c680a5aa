"""A control group with a quota of processor time, where this process may make one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["quota"]

_PERIOD = 100_000  # microseconds
_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def quota(processors: float) -> Iterator[Callable[[int], None] | None]:
    """Gives a function that puts a process into the group; None where there is no group to be had.

    Processes must have ended before the block does.
    """
    group = _made(processors)
    try:
        yield None if group is None else lambda number: _write(group / "cgroup.procs", number)
    finally:
        if group is not None:
            group.rmdir()


def _made(processors: float) -> Path | None:
    """Version 2 of control groups, then 1."""
    limit = round(processors * _PERIOD)
    forms = {
        _ROOT: {"cpu.max": f"{limit} {_PERIOD}"},
        _ROOT / "cpu": {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": limit},
    }
    for root, settings in forms.items():
        group = root / f"isw-speed-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            try:
                for name, value in settings.items():
                    _write(group / name, value)
                return group
            except OSError:
                group.rmdir()
    return None


def _write(path: Path, value: object) -> None:
    if not path.exists():
        raise FileNotFoundError(path)
    path.write_text(f"{value}\n")
