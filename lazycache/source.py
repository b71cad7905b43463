"""What can be loaded, and who may want it again.

A `Key` is what the cache stores under. Keys compare by identity, which makes a look-up cheap, and
`file_key` interns them: the same path, reader and options always give the same object, which keeps
its reader alive. A `Handle` is somebody who may use the data of a key again; the cache asks a key
for its live handles to tell data that is still of interest from data that isn't. A `Result` is a
computed value, owned by whoever computed it.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _aims, _buffers
from ._parts import forward, index_text, normalise, sliced_affine
from .errors import FileChangedError, ReadError
from .readers import Reader, as_reader, reader_for
from .readers.base import BlockReader, Blocks, Probe

Fingerprint = tuple[tuple[str, int, int, int], ...]


class Key:
    """One thing that a cache can hold. Equal only to itself."""

    __slots__ = ("__weakref__", "_handles", "name", "watchers")

    def __init__(self, name: str) -> None:
        self.name = name
        # Live handles. Sets and lists are changed by single atomic calls, never under a lock:
        # a handle may die inside any locked section.
        self._handles: set[weakref.ref[Handle]] = set()
        # Queues of the tables that hold this key and want to know when a handle dies.
        self.watchers: list[deque[Any]] = []

    def estimate(self) -> tuple[int, int]:
        """(nbytes, peak_nbytes) of the data, from its header alone."""
        raise ReadError(f"{self.name}: nothing is known of its size")

    def load(self) -> Any:
        """The data. Raises what reading raises, with the name of the file."""
        raise ReadError(f"{self.name}: it can't be loaded")

    def handles(self) -> list[Handle]:
        """The handles that are alive now."""
        return [handle for ref in self._handles.copy() if (handle := ref()) is not None]

    @property
    def referenced(self) -> bool:
        """Whether any handle is alive."""
        return bool(self._handles)

    @property
    def used_up(self) -> bool:
        """Whether there are live handles and each has executed all its operations."""
        handles = self.handles()
        return bool(handles) and all(handle.exhausted for handle in handles)

    def _forget(self, ref: weakref.ref[Handle]) -> None:
        # Runs wherever the last reference to a handle goes, inside a locked section too: it takes
        # no lock and only tells the tables that they have something to look at.
        self._handles.discard(ref)
        for queue in list(self.watchers):
            queue.append(self)


class Handle:
    """Somebody who may use the data of a key again, ``nops`` times (0: without end).

    ``left`` is the number of operations left before the data may go; the cache sets it back to
    ``nops`` when the data are loaded again.
    """

    __slots__ = ("__weakref__", "key", "left", "nops")

    def __init__(self, key: Key, nops: int = 0) -> None:
        self.key = key
        self.nops = self.left = nops
        key._handles.add(weakref.ref(self, key._forget))

    @property
    def exhausted(self) -> bool:
        return self.nops > 0 and self.left <= 0


class Result:
    """A computed value that its maker owns; ``value`` is None before it is there and after it went.

    The cache may `evict` it to make room if the maker said that it can be computed again. As long
    as somebody else still holds the memory, the value is handed back all the same.
    """

    __slots__ = ("__weakref__", "_recall", "_value", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._value: Any = None
        self._recall: Callable[[], Any] | None = None

    @property
    def value(self) -> Any:
        value = self._value
        recall = self._recall
        return recall() if value is None and recall is not None else value

    @value.setter
    def value(self, value: Any) -> None:
        self._value = value
        self._recall = None

    def evict(self) -> Any:
        """Give the value up, returning it for the caller to drop."""
        value = self._value
        self._recall = None if value is None else _buffers.recall(value)
        self._value = None
        return value


class _Known(NamedTuple):
    """What was read from a file's header, and the state of its files at that moment."""

    fingerprint: Fingerprint
    probe: Probe


class FileKey(Key):
    """The data of a file, or a part of it, as one reader with one set of options reads it."""

    __slots__ = ("_known", "dtype", "options", "part", "path", "reader", "title")

    def __init__(
        self,
        path: str,
        reader: Reader | None,
        options: Mapping[str, Any],
        dtype: np.dtype[Any] | None,
        part: tuple[Any, ...] | None,
    ) -> None:
        # What a reader makes of a file may be something else than the file: it says so.
        self.title = path + getattr(reader, "label", "")
        super().__init__(self.title if part is None else f"{self.title}[{index_text(part)}]")
        self.path = path
        self.reader = reader
        self.options = MappingProxyType(dict(options))
        self.dtype = dtype
        self.part = part
        self._known: _Known | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return file_key, (self.path, self.reader, dict(self.options), self.dtype, self.part)

    def anew(self, part: tuple[Any, ...] | None = None) -> FileKey:
        """The same data, or a part of a whole, under a key of its own that nothing is known of yet.

        For who reads the files at once: nobody else finds this key.
        """
        return FileKey(self.path, self.reader, self.options, self.dtype, part or self.part)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The files that it needs, as far as that is known without looking at any."""
        return (self.path, *getattr(self.reader, "inputs", ()))

    def probe(self) -> Probe:
        """What the header tells of the data: of the part, in the dtype asked for.

        Raises `FileNotFoundError`, `IsADirectoryError`, `PermissionError` or `ReadError`, naming
        the file, and `IndexError` where the part lies outside.
        """
        return self._look().probe

    @property
    def fingerprint(self) -> Fingerprint:
        """(path, size, mtime in ns, inode) of every file that the data come from."""
        return self._look().fingerprint

    def estimate(self) -> tuple[int, int]:
        probe = self.probe()
        return probe.nbytes, probe.peak_nbytes

    def refresh(self) -> bool:
        """Look at the files again: True, and the old header is forgotten, if they changed.

        A file that is gone counts as changed; the next `probe` says so.
        """
        known = self._known
        if known is None or _same_files(known.fingerprint):
            return False
        self._known = None
        return True

    def comes_from(self, path: str) -> bool:
        """Whether the file at the absolute ``path`` is one of those that were probed."""
        known = self._known
        files = () if known is None else known.fingerprint
        return path == self.path or any(path == file for file, *_ in files)

    def load(self) -> Any:
        """The data, read-only where its type allows it.

        Raises `FileChangedError` when the files aren't those that were probed, or change while
        they are read.
        """
        known = self._look()
        if not _same_files(known.fingerprint):
            raise self._changed("after its header was read")
        try:
            value = self._read(known.probe)
        except Exception:
            self._check(known)
            raise
        if value is None:
            raise ReadError(
                f"{self.path}: the reader {self._reader().name!r} returned None in place of data"
            )
        self._check(known)
        return _buffers.readonly(value) if isinstance(value, np.ndarray) else value

    def open_blocks(self) -> FileBlocks:
        """The data a block at a time, where the probe says that they can be had so."""
        known = self._look()
        if not _same_files(known.fingerprint):
            raise self._changed("after its header was read")
        options = dict(self.options)
        if self.dtype is not None:
            options["dtype"] = self.dtype
        reader = cast(BlockReader, self._reader())
        try:
            blocks = reader.open_blocks(self.path, **options)
        except Exception:
            self._check(known)
            raise
        return FileBlocks(self, known, blocks)

    def _read(self, probe: Probe) -> Any:
        reader = self._reader()
        options = dict(self.options)
        converts = getattr(reader, "converts", False)
        if self.dtype is not None and converts:
            options["dtype"] = self.dtype
        if self.part is None:
            value = reader.read(self.path, **options)
        else:
            index = normalise(self.part, self._whole_shape())
            taken, flips = forward(index)
            read_part = getattr(reader, "read_part", None)
            if read_part is not None:
                value = read_part(self.path, taken, **options)
            else:
                value = np.asarray(reader.read(self.path, **options))[taken].copy(order="K")
            if flips:
                value = value[flips]
        if self.dtype is not None and getattr(value, "dtype", self.dtype) != self.dtype:
            value = value.astype(self.dtype)
        return value

    def _reader(self) -> Reader:
        if self.reader is None:
            self.reader = reader_for(self.path)
        return self.reader

    def _whole_shape(self) -> tuple[int, ...]:
        shape = self._reader().probe(self.path, **self.options).shape
        if shape is None:
            raise ReadError(f"{self.path}: only arrays have parts, and this is none")
        return shape

    def _look(self) -> _Known:
        known = self._known
        if known is None:
            reader = self._reader()
            probe = reader.probe(self.path, **self.options)
            if probe.kind and self.dtype is not None:
                probe = reader.probe(self.path, dtype=self.dtype, **self.options)
            probe = self._adapt(reader, probe)
            known = self._known = _Known(_fingerprint(probe.files), probe)
        return known

    def _adapt(self, reader: Reader, probe: Probe) -> Probe:
        """The probe of the file made that of the part, in the dtype asked for."""
        shape, affine, dtype = probe.shape, probe.affine, probe.dtype
        converts = getattr(reader, "converts", False)
        in_blocks = self.part is None and hasattr(reader, "open_blocks")
        if not in_blocks or (self.dtype is not None and not converts):
            probe = replace(probe, in_blocks=False)
        if shape is None or dtype is None or (self.part is None and self.dtype is None):
            return probe
        if self.part is None and probe.kind:
            return probe  # converted by its reader
        transient = max(0, probe.peak_nbytes - probe.nbytes)
        whole = probe.nbytes
        if self.part is not None:
            index = normalise(self.part, shape)
            affine = sliced_affine(affine, index, shape)
            shape = np.broadcast_to(np.empty(()), shape)[index].shape
        nbytes = math.prod(shape) * dtype.itemsize
        if self.part is not None and (probe.kind or not hasattr(reader, "read_part")):
            transient += whole
        if self.dtype is not None and self.dtype != dtype:
            if not getattr(reader, "converts", False):
                transient += nbytes
            dtype = self.dtype
            nbytes = math.prod(shape) * dtype.itemsize
            reason = "asked for"
        else:
            reason = probe.dtype_reason
        return replace(
            probe,
            shape=shape,
            dtype=dtype,
            nbytes=nbytes,
            peak_nbytes=nbytes + transient,
            affine=affine,
            dtype_reason=reason,
            kind="",
        )

    def _check(self, known: _Known) -> None:
        """Raise `FileChangedError` if the files aren't those that were probed."""
        if not _same_files(known.fingerprint):
            raise self._changed("while it was read") from None

    def _changed(self, when: str) -> FileChangedError:
        self._known = None
        return FileChangedError(
            f"{self.path} changed {when}: run the computation again once nobody writes to it"
        )


class FileBlocks:
    """The data of a `FileKey` forwards, a block at a time; see `lazycache.readers.base.Blocks`."""

    def __init__(self, key: FileKey, known: _Known, blocks: Blocks) -> None:
        self._key = key
        self._known = known
        self._blocks = blocks

    def into(self, flat: NDArray[Any]) -> None:
        try:
            self._blocks.into(flat)
        except Exception:
            self.finish()
            raise

    def skip(self, count: int) -> None:
        try:
            self._blocks.skip(count)
        except Exception:
            self.finish()
            raise

    def finish(self) -> None:
        """Raise `FileChangedError` if the files aren't those that were probed."""
        self._key._check(self._known)

    def close(self) -> None:
        self._blocks.close()


_keys: weakref.WeakValueDictionary[Hashable, FileKey] = weakref.WeakValueDictionary()
# Reentrant, because a finalizer that runs inside the section may itself make a proxy.
_keys_lock = threading.RLock()


def _unlock_in_child() -> None:
    global _keys_lock
    _keys_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def file_key(
    path: str | os.PathLike[str],
    reader: Any = None,
    options: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    part: tuple[Any, ...] | None = None,
) -> FileKey:
    """The one key for this path, reader, options, dtype and part. Never touches the disk.

    ``reader`` is None (chosen by the file at first use), a registered name, a callable, or an
    object with a ``read`` method. ``part`` is a basic index (ints, slices, an Ellipsis).
    """
    path = os.path.abspath(os.fspath(path))
    resolved = None if reader is None else as_reader(reader, path)
    wanted = None if dtype is None else _aims.as_dtype(dtype)
    recipe = (path, resolved, _freeze(options or {}), wanted, _freeze(part))
    with _keys_lock:
        key = _keys.get(recipe)
        if key is None:
            key = _keys[recipe] = FileKey(path, resolved, options or {}, wanted, part)
    return key


def keys_of(path: str | os.PathLike[str]) -> list[FileKey]:
    """The keys in use whose data come, or may come, from the file at ``path``."""
    place = os.path.abspath(os.fspath(path))
    with _keys_lock:
        return [key for key in _keys.values() if key.comes_from(place)]


class _ById:
    """An option that can't be hashed, compared by identity and kept alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.value is self.value


def _freeze(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return ("dict", tuple(sorted((str(k), _freeze(v)) for k, v in value.items())))
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(_freeze(item) for item in value))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    try:
        hash(value)
    except TypeError:
        return _ById(value)
    # 1, 1.0 and True are equal, but a reader may take them differently.
    return (type(value), value)


def _fingerprint(files: tuple[str, ...]) -> Fingerprint:
    states = []
    for file in files:
        state = os.stat(file)
        states.append((file, state.st_size, state.st_mtime_ns, state.st_ino))
    return tuple(states)


def _same_files(fingerprint: Fingerprint) -> bool:
    try:
        return _fingerprint(tuple(file for file, *_ in fingerprint)) == fingerprint
    except OSError:
        return False
