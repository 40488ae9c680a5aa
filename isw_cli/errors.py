"""What a user can mend: one line, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "in_one_line"]


class InputError(ValueError):
    """An argument that cannot be used; the message says what to do."""


@contextmanager
def in_one_line(resumable: bool = False) -> Iterator[None]:
    """For scripts: an error that their user can mend is one line, exit code 1; ctrl-C is another, exit code 130.

    Args:
        resumable: Whether what was stopped can be gone on with.
    """
    from isw_plugin.errors import ISWError  # brings torch, which `isw --help` must not

    try:
        yield
    except (ISWError, InputError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        then = ": run the same command again to go on from the last saved epoch" if resumable else ""
        print(f"\nstopped{then}", file=sys.stderr)
        sys.exit(130)
