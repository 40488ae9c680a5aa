"""What a user can mend: one line, no traceback."""

__all__ = ["InputError"]


class InputError(ValueError):
    """An argument that cannot be used; the message says what to do."""
