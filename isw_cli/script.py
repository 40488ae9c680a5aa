"""What a script imports first, since what comes after it takes seconds: from then on ctrl-C is one line."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from isw_cli.errors import InputError

__all__ = ["in_one_line"]


@contextmanager
def in_one_line(resumable: bool = False) -> Iterator[None]:
    """For scripts: an error that their user can mend is one line, exit code 1; ctrl-C is another, exit code 130.

    Args:
        resumable: Whether what was stopped can be gone on with.
    """
    from isw_plugin.errors import ISWError  # brings torch, which is to come after the handler below

    if signal.getsignal(signal.SIGINT) is _end:  # all is imported: from here on, drafts are taken away
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except (ISWError, InputError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        then = ": run the same command again to go on from the last saved epoch" if resumable else ""
        print(f"\nstopped{then}", file=sys.stderr)
        sys.exit(130)


def _end(*_: object) -> None:
    os.write(2, b"\nstopped\n")
    os._exit(130)


def _importer() -> str:
    """The name of the module that imports this one."""
    frame = sys._getframe(2)
    while "importlib" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


# A script that somebody imports has no say in this, nor one whose starter ignores ctrl-C.
if _importer() == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
