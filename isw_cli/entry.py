"""Where `isw` starts. What it imports takes seconds and may swallow ctrl-C: till then that ends the process at once.

Imports nothing here that takes time.
"""

import os
import signal

__all__ = ["begun", "main"]

_STOPS = (signal.SIGINT, signal.SIGTERM)  # `timeout`, `kill` and containers send the other


def main() -> None:
    for number in _STOPS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):  # else who started us ignores it
            signal.signal(number, _end)
    from isw_cli.main import app

    app()


def begun() -> None:
    """All is imported: from here on ctrl-C is an exception, so that drafts are taken away."""
    for number in _STOPS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, b"isw: stopped; nothing was written\n")
    os._exit(130)
