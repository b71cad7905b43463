"""What people see on stderr: errors, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lazycache.errors import FormulaError, LazyCacheError
from lazycache.sizes import format_size
from lazycache.stats import Event

log = logging.getLogger("lazycache")

Step = Callable[[], object]

# Where an operator was written is a line of Python, which means nothing to users of the command.
_WRITTEN_AT = re.compile(r'(, written)? at "[^"]*", line \d+')


class UsageError(Exception):
    """The command can't be carried out as it was written; nothing was read."""


def complain(error: Exception) -> None:
    """Print the error as one line; that of a formula with the place it points at below."""
    print(f"lazycache: error: {describe(error)}", file=sys.stderr)


def describe(error: Exception) -> str:
    """What an error says, in one line that begins with the file where there is one."""
    if isinstance(error, FormulaError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text = one_line(str(error))
    if text and isinstance(error, UsageError | OSError | LazyCacheError):
        return text
    notes = "; ".join(one_line(note) for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {text}{notes and f' ({notes})'}"


def one_line(text: str) -> str:
    return " ".join(_WRITTEN_AT.sub("", text).split())


@contextmanager
def progress(total: int, *, shown: bool) -> Iterator[Step]:
    """A bar over ``total`` files; calling what this gives counts one, from any thread."""
    if not shown or not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="file", file=sys.stderr, leave=False) as bar:

        def step() -> None:
            # A file that had to be read again takes the count beyond what was foreseen.
            bar.total = max(bar.total or 0, bar.n + 1)
            bar.update()

        yield step


def tell(event: Event) -> None:
    """Log what happened in the cache, for ``-v``."""
    log.info("%s %s (%s)", event.kind, event.name, format_size(event.nbytes))


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
