"""A folder that a long job can be killed over at any time and goes on from: atomic files, no pickle, one process."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from isw_cli.errors import InputError

_LOCK = ".lock"


class OtherRunError(InputError):
    """The folder holds something else, a damaged run or one with other settings, or is in use; it was not touched."""


class RunFolder:
    """Tensors and facts by name under one folder that belongs to one set of settings, and to one process.

    Args:
        path: The folder; made if missing.
        settings: JSON values that the results depend on.

    Raises:
        OtherRunError: The folder belongs to other settings, or another process uses it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        require_free_or_same(path, settings)
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        _hold(path.resolve())
        require_free_or_same(path, settings)  # another run may have been faster
        for draft in path.glob(".*.draft"):  # of a run that was killed
            draft.unlink()
        self.write("settings.json", json.dumps(settings, indent=2))

    def write(self, name: str, content: str | bytes) -> Path:
        """Replace a file at once: a reader finds the old content or the new, never a part."""
        target, draft = self.path / name, self.path / f".{name}.{os.getpid()}.draft"
        try:
            with draft.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Save tensors with JSON facts about them as ``name.safetensors``."""
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.write(f"{name}.safetensors", save(plain, metadata={"facts": json.dumps(facts)}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what ``save`` was given under this name.

        Raises:
            OtherRunError: The file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                return {key: file.get_tensor(key) for key in file.keys()}, dict(facts)  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever safetensors says
            raise damaged(path, error) from error

    def delete(self, name: str) -> None:
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)


def damaged(path: Path, error: object) -> OtherRunError:
    return OtherRunError(f"{path} is damaged ({error!r}): delete it to do that part again, or choose another --out")


def require_free_or_same(path: Path, settings: dict[str, Any]) -> None:
    """Raise OtherRunError unless the path is free or holds a run with these settings; changes nothing."""
    known = path / "settings.json"
    if known.exists():
        require_equal(_settings(known), json.loads(json.dumps(settings)), path)
    elif path.exists() and not path.is_dir():
        raise OtherRunError(f"{path} is a file: choose another --out")
    elif path.exists() and any(file.name != _LOCK and not file.name.endswith(".draft") for file in path.iterdir()):
        raise OtherRunError(f"{path} is not empty and is no run folder: choose another --out")


@cache  # a process holds a folder until it ends, however many RunFolders it makes of it
def _hold(path: Path) -> FileLock:
    lock = FileLock(path / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OtherRunError(f"{path} is in use by another run: wait for its end, or choose another --out") from error
    return lock


def _settings(known: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(known.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(known, error) from error


def require_equal(found: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Raise OtherRunError unless what was done at this path was done with these settings."""
    keys = sorted(found.keys() | asked.keys())
    other = [f"{k}: {found.get(k)!r} there, {asked.get(k)!r} asked" for k in keys if found.get(k) != asked.get(k)]
    if other:
        raise OtherRunError(
            f"{path} holds a run with other settings ({'; '.join(other)}): choose another --out, or delete it"
        )
