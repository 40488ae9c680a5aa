"""A folder that a long job can be killed over at any time and goes on from: atomic files, no pickle."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor


class OtherRunError(ValueError):
    """The folder holds something else, or a run with other settings; nothing in it was touched."""


class RunFolder:
    """Tensors and facts by name under one folder that belongs to one set of settings.

    Args:
        path: The folder; made if missing.
        settings: JSON values that the results depend on.

    Raises:
        OtherRunError: The folder belongs to other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        require_free_or_same(path, settings)
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.write("settings.json", json.dumps(settings, indent=2))

    def write(self, name: str, content: str | bytes) -> Path:
        """Replace a file at once: a reader finds the old content or the new, never a part."""
        target, draft = self.path / name, self.path / f".{name}.draft"
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
        return target

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").exists()

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Save tensors with JSON facts about them as ``name.safetensors``."""
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.write(f"{name}.safetensors", save(plain, metadata={"facts": json.dumps(facts)}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what ``save`` was given under this name."""
        with safe_open(self.path / f"{name}.safetensors", framework="pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118

    def delete(self, name: str) -> None:
        (self.path / f"{name}.safetensors").unlink(missing_ok=True)


def require_free_or_same(path: Path, settings: dict[str, Any]) -> None:
    """Raise OtherRunError unless the path is free or holds a run with these settings; changes nothing."""
    known = path / "settings.json"
    if known.exists():
        _require_equal(json.loads(known.read_text()), json.loads(json.dumps(settings)), path)
    elif path.exists() and not path.is_dir():
        raise OtherRunError(f"{path} is a file: choose another --out")
    elif path.exists() and any(not file.name.endswith(".draft") for file in path.iterdir()):
        raise OtherRunError(f"{path} is not empty and is no run folder: choose another --out")


def _require_equal(found: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    keys = sorted(found.keys() | asked.keys())
    other = [f"{k}: {found.get(k)!r} there, {asked.get(k)!r} asked" for k in keys if found.get(k) != asked.get(k)]
    if other:
        raise OtherRunError(
            f"{path} holds a run with other settings ({'; '.join(other)}): choose another --out, or delete it"
        )
