"""What every reader says of a file that can't be read."""

from __future__ import annotations

import errno
import os
import stat

from lazycache.errors import ReadError, TruncatedFileError


def check_file(path: str) -> os.stat_result:
    """The state of a regular, readable, non-empty file.

    Raises `FileNotFoundError`, `IsADirectoryError` or `PermissionError` with its ``filename``,
    and `ReadError` for an empty file.
    """
    state = os.stat(path)
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, "A directory, where an image file was expected", path)
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    if state.st_size == 0:
        raise TruncatedFileError(
            f"{path} is empty: whatever wrote it did not finish; write or copy it again"
        )
    return state


def missing(path: str, wanted_by: str) -> FileNotFoundError:
    """The error for a side file that ``wanted_by`` can't do without."""
    return FileNotFoundError(errno.ENOENT, f"No such file, and {wanted_by} needs it", path)


def truncated(path: str, what: str) -> TruncatedFileError:
    """The error for a file that ends too early; ``what`` says before what."""
    return TruncatedFileError(f"{path} is truncated: it ends before {what}; get a complete copy")


def damaged(path: str, error: Exception) -> ReadError:
    """The error for compressed content that contradicts itself."""
    return ReadError(f"{path} is damaged ({error}): get another copy of it")
