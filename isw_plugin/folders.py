"""Folders of safetensors and a JSON document, written as a whole and read with care: whoever wrote may have meant harm.

The document names files of tensors by their content and is replaced last and at once, so a reader finds the old pair or
the new one, whenever writing stops. Whoever saves holds a lock; the files of a save that was stopped go with the next.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isw_plugin.errors import SettingError, StateMismatchError, UnsupportedError

__all__ = ["DOCUMENTS", "File", "files_named_by", "parsed", "path_of", "replace", "short", "tensor_file", "tensors_in"]

DOCUMENTS = ("pruner.json", "accelerated.json")
_TENSORS = re.compile(r"(?:model|heads|gates|graphs)-[0-9a-f]{16}\.safetensors")
_DRAFT = re.compile(rf"\.({'|'.join(map(re.escape, DOCUMENTS))}|{_TENSORS.pattern})\.\d+(\.old)?\.draft")
_LOCK = ".pruner.lock"
_LARGEST_FILE = 1 << 26  # bytes; of timm's models none needs 4 MB
_LARGEST_HEADER = 1 << 23  # bytes of a safetensors header; a tensor takes about 120
_DEEPEST = 64


def path_of(given: str | os.PathLike[str], kind: str = "folder", example: str = "runs/gated") -> Path:
    """The folder, or the file, that a user means.

    Raises:
        SettingError: It names none.
    """
    if not isinstance(given, str | os.PathLike) or not isinstance(os.fspath(given), str) or not os.fspath(given):
        raise SettingError(f"{kind}={given!r}: the path of a {kind}, such as {example!r}")
    if "\0" in os.fspath(given):
        raise SettingError(f"{kind}={given!r}: no path holds the character 0")
    return Path(given)


class File(NamedTuple):
    """What is to be written, and its SHA-256."""

    name: str
    digest: str
    content: bytes


def tensor_file(kind: str, state: Mapping[str, Any]) -> File:
    """Tensors as a file that is named by its content.

    Raises:
        UnsupportedError: There is something else than tensors among them, or some of a kind that no file holds.
    """
    content = _safetensors(state)
    digest = hashlib.sha256(content).hexdigest()
    return File(f"{kind}-{digest[:16]}.safetensors", digest, content)


def _safetensors(state: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    other = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise UnsupportedError(f"only tensors can be saved without pickle, and the state_dict holds {', '.join(other)}")
    # Copies, since tied weights share memory and a file has none to share.
    form = torch.contiguous_format
    try:
        return save({key: value.detach().to("cpu", copy=True, memory_format=form) for key, value in state.items()})
    except (ValueError, KeyError, RuntimeError) as error:  # on meta, sparse, or of a type that the format lacks
        raise UnsupportedError(f"the weights cannot be saved as safetensors: {error}") from error


# -- writing --------------------------------------------------------------------------------------


def replace(path: Path, name: str, files: Iterable[File], document: bytes) -> None:
    """Replace a document and the files that it names, all at once for whoever reads; waits for others who save.

    Args:
        path: Folder, made if missing.
        name: Of the document, one of ``DOCUMENTS``.

    Raises:
        OSError: They cannot be written; what was there before is still there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        _replace(path, path / name, {file.name: file.content for file in files}, document)


def _replace(path: Path, target: Path, files: Mapping[str, bytes], document: bytes) -> None:
    _clear(path)
    try:
        # What is to go and what is to come is named by drafts: wherever this stops, the rest can be found.
        if target.is_file():
            _write(_draft(target, ".old"), target.read_bytes())
        facts = _draft(target)
        _write(facts, document)
        for name, content in files.items():
            _write(_draft(path / name), content)
        for name in files:
            _draft(path / name).replace(path / name)
        facts.replace(target)
    finally:
        _clear(path)


def _clear(path: Path) -> None:
    """Remove drafts of ours, and tensors that drafts name and no document does."""
    drafts = [file for file in path.iterdir() if _DRAFT.fullmatch(file.name)]
    named = {name for draft in drafts for name in files_named_by(draft)}
    for name in named.difference(*(files_named_by(path / document) for document in DOCUMENTS)):
        (path / name).unlink(missing_ok=True)
    for draft in drafts:
        draft.unlink(missing_ok=True)


def _draft(target: Path, kind: str = "") -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}{kind}.draft")


def _write(draft: Path, content: bytes) -> None:
    with draft.open("xb") as file:  # never through a link that somebody put there
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process or thread saves. The lock's file goes afterwards, which filelock's does not everywhere."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    lock = path / _LOCK
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # of a file system that knows no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.exists() or not os.path.samestat(os.fstat(file), lock.stat()):
                continue  # of one who was done meanwhile
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


# -- reading --------------------------------------------------------------------------------------


def files_named_by(path: Path) -> set[str]:
    """The files of tensors that a document of ours, or a draft of one, names."""
    try:
        facts = parsed(path)
        names = [part["file"] for part in facts.values() if isinstance(part, dict) and "file" in part]
    except (OSError, StateMismatchError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and _TENSORS.fullmatch(name)}


def parsed(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: There is none.
        StateMismatchError: Damaged, too large or too deep.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(2, "no such file", str(path))
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    try:
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE:,} bytes")
        facts = json.loads(content, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique)
        level = [facts]
        for _ in range(_DEEPEST):
            level = [child for value in level for child in _children(value)]
        if level:
            raise ValueError(f"nested more than {_DEEPEST} deep")
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise StateMismatchError(f"{path} was not written by save_pretrained, or is damaged: {reason}") from error
    return facts


def tensors_in(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a file with this SHA-256.

    Raises:
        StateMismatchError: Missing, changed or damaged.
    """
    from safetensors.torch import load

    try:
        content = path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise StateMismatchError(
            f"{path} is missing or was changed: its checksum is not the one that was saved: "
            "copy the folder again, or save it anew"
        )
    try:
        if int.from_bytes(content[:8], "little") > _LARGEST_HEADER:
            raise ValueError(f"a header of more than {_LARGEST_HEADER:,} bytes")
        return dict(load(content))
    except Exception as error:  # whatever safetensors says of a file that was made to break it
        raise StateMismatchError(f"{path} is damaged: {error!r}") from error


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is no float")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
