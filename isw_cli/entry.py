"""Where `isw` starts. What it imports takes seconds and may swallow ctrl-C: till then that ends the process at once.

Imports nothing here that takes time.
"""

import os
import signal

__all__ = ["begun", "main"]


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us ignores it
        signal.signal(signal.SIGINT, _end)
    from isw_cli.main import app

    app()


def begun() -> None:
    """All is imported: from here on ctrl-C is an exception, so that drafts are taken away."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, b"isw: stopped; nothing was written\n")
    os._exit(130)
