"""Where built libraries lie, and which of them are loaded: as they were built, by this user or root."""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "cache_folder",
    "cache_folders",
    "is_trusted",
    "is_whole",
    "keep_library",
    "make_folder",
    "maker_of",
    "manifest_of",
]


def cache_folder() -> Path:
    """ISW_PLUGIN_CACHE, or isw_plugin in the user's cache folder, or one among temporary files."""
    return cache_folders()[0]


def cache_folders() -> list[Path]:
    """Where to look and to build, in this order: where the user said, else at home and among temporary files."""
    if folder := os.environ.get("ISW_PLUGIN_CACHE"):
        return [Path(folder)]
    temporary = Path(tempfile.gettempdir()) / f"isw_plugin-{os.geteuid()}"
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return [Path(folder) / "isw_plugin", temporary]
    try:
        return [Path.home() / ".cache" / "isw_plugin", temporary]
    except RuntimeError:  # a user without a home
        return [temporary]


def make_folder(folder: Path) -> None:
    """A folder for libraries that nobody else can write, in a cache that nobody else owns.

    Raises:
        OSError: It cannot be made, or others own it.
    """
    for place in (folder.parent, folder):  # or a parent would be made for all to write, as the umask says
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
    if folder.lstat().st_uid == os.geteuid() and folder.lstat().st_mode & 0o022:
        folder.chmod(0o755)
    if not _is_safe(folder):
        raise PermissionError(f"others own or can write {folder} or {folder.parent}: chown, and chmod go-w both")


def is_trusted(library: Path) -> bool:
    """Whether nobody else can have written this library, and nothing happened to it since it was built."""
    try:
        mine = _is_safe(library.parent)
        mine = mine and all(_is_private(file, stat.S_ISREG) for file in (library, manifest_of(library)))
    except OSError:
        return False
    return mine and is_whole(library)


def is_whole(library: Path) -> bool:
    """Whether nothing happened to this library since it was built: half of one would end the process."""
    try:
        return bool(json.loads(manifest_of(library).read_text())["sha256"] == _digest(library))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def maker_of(library: Path) -> str:
    """The compiler that a trusted library was built by."""
    return str(json.loads(manifest_of(library).read_text())["compiler"])


def keep_library(built: Path, library: Path, compiler: str) -> None:
    """Moves a library to its place, whatever lies there, and then says what it must be."""
    manifest = built.with_suffix(".json")
    manifest.write_text(json.dumps({"compiler": compiler, "sha256": _digest(built)}))
    for file, place in ((built, library), (manifest, manifest_of(library))):
        file.chmod(0o755)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        file.replace(place)


def manifest_of(library: Path) -> Path:
    """The file that says what a library must be."""
    return library.with_name(library.name + ".json")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_private(path: Path, of_kind: Callable[[int], bool]) -> bool:
    """Of this kind, no link, of this user or root, and written by nobody else."""
    status = path.lstat()
    return of_kind(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _is_safe(folder: Path) -> bool:
    """A folder that only this user or root writes; in the cache around it nobody else can put another one."""
    cache = folder.parent.stat()
    shared = cache.st_mode & 0o002 and not cache.st_mode & stat.S_ISVTX
    return _is_private(folder, stat.S_ISDIR) and cache.st_uid in (os.geteuid(), 0) and not shared
