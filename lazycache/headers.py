"""What the headers of files tell, and whether the files are still those that were read."""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import queue
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ._frames import warn
from ._parts import backwards
from ._volumes import is_known
from .errors import FileChangedError, FileChangedWarning, ReadError
from .expression import FileNode, Info, Node, OpNode, describe, walk
from .grid import listed
from .layout import dense
from .source import FileKey

_PROBING_THREADS = 8


def file_info(key: FileKey) -> Info:
    """What the header of a file tells; raises what probing raises."""
    probe = key.probe()
    layout = None
    known = not probe.kind or is_known(probe.kind)
    if probe.shape is not None and probe.dtype is not None and known:
        layout = dense(probe.shape, probe.dtype, probe.order, probe.kind)
        if key.part is not None:
            turned = zip(layout.strides, backwards(key.part, len(probe.shape)), strict=True)
            layout = layout._replace(strides=tuple(-s if back else s for s, back in turned))
    # Of an object the header is what its own method gives, and its axes may be turned.
    name = f"{key.title} (read by AIMS)" if probe.kind else key.title
    return Info(layout, probe.affine, None if probe.kind else probe.header, name)


def probe_all(files: Iterable[FileNode]) -> None:
    """Read the headers of all files, several at a time.

    Raises the error of a single bad file as it is, or one error that lists the first 20. Warns of
    files that changed since their proxy was pickled.
    """
    nodes = list(files)
    keys = list(dict.fromkeys(node.key for node in nodes))
    errors: dict[FileKey, Exception] = {}

    def look(key: FileKey) -> None:
        try:
            key.probe()
        except Exception as error:
            errors[key] = error

    if len(keys) < _PROBING_THREADS:
        for key in keys:
            look(key)
    else:
        _share_out(look, keys)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        found = [errors[key] for key in keys if key in errors]
        kind = ReadError
        if all(isinstance(error, FileNotFoundError) for error in found):
            kind = FileNotFoundError  # type: ignore[assignment]
            lines = [key.path for key in keys if key in errors]
            text = f"{len(found)} of {len(keys)} files don't exist: {listed(lines)}"
        else:
            lines = [str(error) for error in found]
            text = f"{len(found)} of {len(keys)} files can't be read: {listed(lines)}"
        raise kind(text) from found[0]
    for node in nodes:
        expected, node.expected = node.expected, None
        if expected is not None and expected != node.key.fingerprint:
            warn(
                f"{node.key.name} changed since the expression was pickled: the new data are used",
                FileChangedWarning,
            )


def _share_out(look: Callable[[FileKey], None], keys: Iterable[FileKey]) -> None:
    """``look`` at each of ``keys``, in several threads and in this one.

    No executor: its locks are taken by Python code, and an interrupt of that leaves them held, so
    that nobody would ever see its threads end.
    """
    left = deque(keys)
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                look(left.popleft())
        except IndexError:
            pass
        finally:
            ended.put(None)

    try:
        working = 1
        with contextlib.suppress(RuntimeError):  # no more threads: with those that there are
            for _ in range(_PROBING_THREADS - 1):
                _thread.start_new_thread(contextvars.copy_context().run, (work,))
                working += 1
        work()
        for _ in range(working):
            ended.get()
    finally:
        left.clear()


def check_unchanged(nodes: Iterable[Node]) -> None:
    """Raise `FileChangedError` where something that was computed would be so from other content."""
    for node in nodes:
        if not isinstance(node, OpNode) or node.seen is None:
            continue
        for key, fingerprint in node.seen.items():
            if key.fingerprint != fingerprint:
                raise FileChangedError(
                    f"{key.name} changed since {describe(node)} was computed, and its value is no "
                    f"longer in memory: write the expression again to compute it from the new file"
                )


def check_same(seen: Mapping[FileKey, Any], files: Iterable[FileNode]) -> None:
    """Raise `FileChangedError` where a file isn't any more what it was as the plan began.

    What is read tells that itself; but somebody else may have noticed it before, and what is known
    of the file is then of its new content.
    """
    for node in files:
        key = node.key
        try:
            same = key.fingerprint == seen[key]
        except OSError:
            same = False
        if not same:
            raise FileChangedError(
                f"{key.name} changed during the computation: run it again once nobody writes to it"
            )


def fingerprints(root: OpNode) -> dict[FileKey, Any]:
    """The state of each file that the value of ``root`` was computed from."""
    found: dict[FileKey, Any] = {}
    for node in walk([root], stop=lambda node: isinstance(node, OpNode) and node.seen is not None):
        if isinstance(node, FileNode):
            found[node.key] = node.key.fingerprint
        elif isinstance(node, OpNode) and node.seen is not None:
            found.update(node.seen)
    return found
