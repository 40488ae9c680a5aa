"""What a user can mend: one line, no traceback."""

__all__ = ["InputError", "line"]


class InputError(ValueError):
    """An argument that cannot be used; the message says what to do."""


def line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
