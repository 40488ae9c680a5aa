"""How, where and when a benchmark was called, for its results."""

import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from isw_plugin.measure import hardware

__all__ = ["circumstances", "command"]


def command(module: str) -> str:
    """The command line; absolute paths lose their folders, which are this machine's own."""
    words = [f".../{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *words])


def circumstances(module: str) -> dict[str, str]:
    """Command, processor and its threads, version of torch, date."""
    return {
        "command": command(module),
        "hardware": f"{hardware(torch.device('cpu'))}, {torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
