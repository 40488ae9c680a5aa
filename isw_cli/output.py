"""What a command shows: tables for people, JSON for programs; progress on stderr."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from isw_cli.errors import InputError

__all__ = ["Tracked", "as_json", "errors", "folder_for", "table", "tell"]

errors = Console(stderr=True, highlight=False, soft_wrap=True)
_FIGURES = "classes|cv_per_site|easiest_hardest|easy_to_hard|frontier|heatmap|keep_per_site|latency"
_OURS = re.compile(  # all that the commands write, below --out
    rf"dense\.(onnx|xml|bin)|(report/)?(index\.html|({_FIGURES})\.png)"
    r"|(gated|fast)/((pruner|accelerated|images)\.json|[a-z]+-[0-9a-f]{16}\.safetensors)"
)
_plain = Console(highlight=False, soft_wrap=True, markup=False)


def as_json(values: Any) -> None:
    print(json.dumps(values, indent=1, default=str))


def tell(text: str) -> None:
    _plain.print(text)


def table(rows: Iterable[tuple[str, str]], title: str | None = None) -> None:
    """Names and what they stand for."""
    shown = Table("", "", title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    shown.columns[1].overflow = "fold"  # paths
    for row in rows:
        shown.add_row(*row)
    _plain.print(shown)


class Tracked:
    """A loader that shows how far it is, where stderr is a terminal."""

    def __init__(self, loader: Any, what: str) -> None:
        self.loader, self.what = loader, what

    def __len__(self) -> int:
        return len(self.loader) if isinstance(self.loader, Sized) else 0

    def __iter__(self) -> Iterator[Any]:
        yield from track(
            self.loader, self.what, len(self), console=errors, transient=True, disable=not errors.is_terminal
        )


@contextmanager
def folder_for(out: Path, force: bool) -> Iterator[Path]:
    """A draft that becomes ``out`` when all went well; what was there before is there until then."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder")
    held = sorted(file for file in out.rglob("*") if file.is_symlink() or not file.is_dir())
    if held and not force:
        raise InputError(f"--out {out} is not empty: name another folder, or pass --force to replace it")
    for name in (file.relative_to(out).as_posix() for file in held):
        if not _OURS.fullmatch(name):
            raise InputError(f"--out {out} holds {name}, which isw did not write: name another folder")
    out = out.absolute()
    nearest = next(parent for parent in out.parents if parent.exists())
    try:
        place = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=nearest)
    except OSError as error:
        raise InputError(
            f"--out {out}: nothing can be written in {nearest} ({error.strerror}): name another folder"
        ) from error
    with place as temporary:
        draft = Path(temporary) / "new"
        draft.mkdir()
        yield draft
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            shutil.move(out, Path(temporary) / "old")
        draft.rename(out)
