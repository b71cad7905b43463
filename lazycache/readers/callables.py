"""Any callable, or object with ``.read``, as a reader."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType
from typing import Any

from lazycache.errors import LazyCacheError

from .base import Probe
from .files import check_file

_GZIP_RATIO = 4


class CallableReader:
    """A reader made of ``target(path, **options)``, or of ``target.read(path, **options)``.

    Two of them are equal when they have the same target, which each keeps alive: the place in
    memory of a dead function, and so its id, may be taken by another one. Nothing says what the
    target will return, so `probe` tells no shape, and sizes that are guesses: those of the file as
    one of our readers sees it, else of the bytes on disk.
    """

    __slots__ = ("_estimate", "_identity", "function", "name", "target")

    def __init__(self, target: Any, estimate: Callable[[str], Probe | None]) -> None:
        self.target = target
        self.function: Callable[..., Any] = getattr(target, "read", target)
        given = getattr(target, "name", None) or getattr(target, "__qualname__", None)
        self.name = str(given or type(target).__name__)
        self._estimate = estimate
        if isinstance(target, MethodType):  # a new object at each access
            self._identity = (id(target.__self__), id(target.__func__))
        else:
            self._identity = (id(target), 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallableReader) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[Any, ...]:
        return CallableReader, (self.target, self._estimate)

    def __repr__(self) -> str:
        return f"<reader {self.name}>"

    def can_read(self, path: str) -> bool:
        return True

    def probe(self, path: str, **options: Any) -> Probe:
        if os.path.isdir(path):
            # A function may well read a folder: a DICOM series.
            with os.scandir(path) as entries:
                found = sorted(entry.path for entry in entries if entry.is_file())
            nbytes = sum(os.path.getsize(file) for file in found)
            return self._guess(nbytes, (path, *found))
        size = check_file(path).st_size
        known = self._estimate(path)
        if known is not None:
            return self._guess(known.nbytes, known.files)
        packed = path.lower().endswith((".gz", ".mgz", ".bz2"))
        return self._guess(size * _GZIP_RATIO if packed else size, (path,))

    def read(self, path: str, **options: Any) -> Any:
        try:
            return self.function(path, **options)
        except Exception as error:
            if not isinstance(error, LazyCacheError) and path not in str(error):
                error.add_note(f"lazycache: while {self.name} read {path}")
            raise

    def _guess(self, nbytes: int, files: tuple[str, ...]) -> Probe:
        return Probe(
            format=self.name, shape=None, dtype=None, nbytes=nbytes, peak_nbytes=nbytes, files=files
        )
