"""What happens outside of what was recorded."""

from __future__ import annotations


class NotRecordedError(AssertionError):
    """Nobody has recorded what the real module does here: code must not rely on it."""


class KilledError(BaseException):
    """Here the real module kills the process, eats all its memory, or never returns."""


def unknown(noise: str) -> Exception:
    """The bare exception that the real module raises, after noise on the standard error."""
    import os

    os.write(2, f"{noise}\n".encode())
    return Exception("unknown")
