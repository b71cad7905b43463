"""Readers of file formats: which one takes a file, and how others join.

`base` says what a reader promises. For a path, those registered by `register_reader` are asked
first (the latest before the others), then plug-ins (entry points of the group
``lazycache.readers``, looked up at the first need), then our own: NumPy's files, whatever nibabel
loads, and of the rest what AIMS reads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

from lazycache._frames import warn
from lazycache.errors import PluginWarning, ReadError, UnknownFormatError

from . import aims
from .aims import AimsReader
from .arrays import NumPyReader
from .base import Probe, Reader
from .callables import CallableReader
from .files import check_file
from .volumes import NibabelReader

__all__ = ["Probe", "Reader", "as_reader", "named", "reader_for", "register_reader"]

GROUP = "lazycache.readers"

# Each names the options that it takes, where the protocol has any.
_ours = cast("tuple[Reader, ...]", (NumPyReader(), NibabelReader(), AimsReader()))
_registered: tuple[Reader, ...] = ()
_plugins: tuple[Reader, ...] | None = None
_loading = False
# Reentrant: a plug-in may register readers, or ask for one, while it is imported; it then sees
# those that are there without plug-ins.
_lock = threading.RLock()


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def register_reader(reader: Reader | str) -> None:
    """Ask ``reader`` before all others from now on; it replaces one of the same name.

    It is a reader, or the name of one that is there: after ``register_reader("aims")`` AIMS reads
    all that it can. Files whose reader was already chosen keep it.
    """
    global _registered
    if isinstance(reader, str):
        reader = reader_for("register_reader", reader)
    _check(reader)
    with _lock:
        others = tuple(known for known in _registered if known.name != reader.name)
        _registered = (reader, *others)


def reader_for(path: str, name: str | None = None, *, without: Reader | None = None) -> Reader:
    """The reader called ``name``, or the first that takes ``path`` but for ``without``.

    Raises `UnknownFormatError` where there is none, or what is wrong with the file itself.
    """
    if name is not None:
        for reader in _all():
            if reader.name == name:
                return reader
        known = ", ".join(sorted({reader.name for reader in _all()}))
        raise UnknownFormatError(f"{path}: no reader is called {name!r}; there are {known}")
    for reader in _all():
        if reader is not without and _takes(reader, path):
            return reader
    check_file(path)
    raise UnknownFormatError(
        f"{path}: no reader takes a file of this name. NumPy's files and what nibabel loads are"
        " known by their extensions (.npy, .nii.gz, .mgz, .img ...); for others pass reader=,"
        " a function of the path, or see register_reader"
    )


def as_reader(obj: Any, path: str = "") -> Reader:
    """``obj`` as a reader: a name, a reader, an object with ``read(path, **options)``, a callable.

    The same function gives equal readers. ``path`` is only for messages.
    """
    if isinstance(obj, str):
        return reader_for(path, obj)
    if isinstance(obj, Reader) and not isinstance(obj, type):
        return obj
    if aims.is_reader(obj):
        return cast(Reader, AimsReader(obj))
    if not callable(getattr(obj, "read", obj)):
        raise TypeError(
            f"reader={obj!r}: expected a reader's name, a function of a path, or an object with a"
            " read method"
        )
    return CallableReader(obj, _probe_by_ours)


def named(reader: Any, path: str, options: Mapping[str, Any], dtype: Any) -> Any:
    """``reader``, or the name of the one that these arguments ask for; None: by the file.

    AIMS, if it may be needed, is loaded here and now, while no thread reads.
    """
    if reader is None and aims.asked_for(options, dtype):
        reader = "aims"
    if reader == "aims" or aims.is_reader(reader) or (reader is None and aims.reads_alone(path)):
        aims.get_ready()
    return reader


def _probe_by_ours(path: str) -> Probe | None:
    for reader in _ours:
        if reader.can_read(path):
            try:
                return reader.probe(path)
            except ReadError:
                return None
    return None


def _all() -> Iterator[Reader]:
    yield from _registered
    yield from _load_plugins()
    yield from _ours


def _takes(reader: Reader, path: str) -> bool:
    try:
        return reader.can_read(path)
    except Exception as error:
        _warn(f"the reader {reader.name!r} is skipped for {path}: its can_read failed", error)
        return False


def _load_plugins() -> tuple[Reader, ...]:
    global _plugins, _loading
    if _plugins is not None:
        return _plugins
    with _lock:
        if _plugins is not None or _loading:
            return _plugins or ()
        _loading = True
        try:
            found, broken = _find_plugins()
        finally:
            _loading = False
        _plugins = found
    for text, error in broken:
        _warn(text, error)
    return found


def _find_plugins() -> tuple[tuple[Reader, ...], list[tuple[str, Exception]]]:
    from importlib.metadata import entry_points

    found: list[Reader] = []
    broken: list[tuple[str, Exception]] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            reader = entry.load()
            if isinstance(reader, type):
                reader = reader()
            _check(reader)
        except Exception as error:
            broken.append((f"the reader plug-in {entry.name!r} ({entry.value}) is skipped", error))
        else:
            found.append(reader)
    return tuple(found), broken


def _warn(text: str, error: Exception) -> None:
    warn(f"{text}: {type(error).__name__}: {error}", PluginWarning)


def _check(reader: Any) -> None:
    if not isinstance(reader, Reader):
        raise TypeError(
            f"{reader!r} is no reader: it needs name, can_read(path), probe(path) and read(path)"
        )
