"""How a benchmark was called, for its results."""

import shlex
import sys
from pathlib import Path

__all__ = ["command"]


def command(module: str) -> str:
    """The command line; absolute paths lose their folders, which are this machine's own."""
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *words])
