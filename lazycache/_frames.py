"""Where the user's own code is, for warnings and for errors that come later than their cause."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

Location = tuple[str, int]

# Code of these packages isn't the user's.
_NOT_USERS = (__name__.partition(".")[0], "numpy")


def user_frame() -> tuple[FrameType | None, int]:
    """The innermost frame of the user's code, and its ``stacklevel`` for the caller."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS:
            return frame, level
        frame = frame.f_back
        level += 1
    return None, 1


def location() -> Location | None:
    """The file and line of the user's code that is running."""
    frame, _ = user_frame()
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that is running."""
    warnings.warn(text, category, stacklevel=user_frame()[1])
