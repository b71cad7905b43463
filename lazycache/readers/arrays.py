"""NumPy's own files: ``.npy``, and one member of an ``.npz``."""

from __future__ import annotations

import ast
import contextlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache.errors import ReadError, TruncatedFileError, UnknownFormatError

from . import slabs
from .base import Probe, checkpoint
from .files import check_file, damaged, truncated
from .streams import Stream

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 20
_TRIES = 100
_PYTHON_2_LONG = re.compile(r"(\d)L\b")


@dataclass(frozen=True, slots=True)
class NumPyReader:
    """Reads ``.npy`` files, and the member ``member=`` of ``.npz`` files (the only one if None).

    Arrays of Python objects are refused: reading them could run any code.
    """

    name: str = "numpy"
    converts: bool = True

    def can_read(self, path: str) -> bool:
        return path.lower().endswith((".npy", ".npz"))

    def probe(
        self, path: str, *, member: str | None = None, dtype: DTypeLike | None = None
    ) -> Probe:
        layout, kind = _layout(path, member)
        wanted = layout.dtype if dtype is None else np.dtype(dtype)
        return Probe(
            format=kind,
            shape=layout.shape,
            dtype=wanted,
            nbytes=layout.nbytes(wanted),
            peak_nbytes=layout.peak_nbytes(wanted),
            files=(path,),
            order=layout.order,
            dtype_reason="" if wanted == layout.dtype else "asked for",
            in_blocks=True,
        )

    def read(
        self, path: str, *, member: str | None = None, dtype: DTypeLike | None = None
    ) -> NDArray[Any]:
        layout, _ = _layout(path, member)
        return slabs.read(layout, None if dtype is None else np.dtype(dtype))

    def read_part(
        self,
        path: str,
        index: slabs.Index,
        *,
        member: str | None = None,
        dtype: DTypeLike | None = None,
    ) -> NDArray[Any]:
        layout, _ = _layout(path, member)
        return slabs.read_part(layout, index, None if dtype is None else np.dtype(dtype))

    def open_blocks(
        self, path: str, *, member: str | None = None, dtype: DTypeLike | None = None
    ) -> slabs.Blocks:
        layout, _ = _layout(path, member)
        return slabs.Blocks(layout, None if dtype is None else np.dtype(dtype))


def _layout(path: str, member: str | None) -> tuple[slabs.Layout, str]:
    size = check_file(path).st_size
    with open(path, "rb") as file:
        start = file.read(6)
        if start[:2] == b"PK":
            return _member_layout(path, member), "NumPy .npz"
        if not _MAGIC.startswith(start):
            raise UnknownFormatError(
                f"{path}: its name says NumPy, its content is something else; rename it"
            )
        if member is not None:
            raise ReadError(f"{path} holds one array and no members: leave member={member!r} out")
        file.seek(0)
        layout = _parse(path, file)
    if size < layout.end:
        raise truncated(path, f"the {layout.stored_nbytes} bytes of its array")
    return layout, "NumPy .npy"


def _member_layout(path: str, member: str | None) -> slabs.Layout:
    import zipfile

    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise TruncatedFileError(
            f"{path} has no table of contents: it is truncated; get a complete copy"
        ) from error
    with archive:
        arrays = {
            name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")
        }
        if not arrays:
            raise ReadError(f"{path} holds no array: it is a zip file of something else")
        if member is None and len(arrays) == 1:
            (member,) = arrays
        if member is None or member not in arrays:
            asked = "say which array to read" if member is None else f"it has no array {member!r}"
            raise ReadError(f'{path}: {asked}, member="..." being one of {", ".join(arrays)}')
        try:
            with archive.open(arrays[member]) as file:
                return _parse(path, file, partial(_MemberStream, member=arrays[member]))
        except zipfile.BadZipFile as error:
            raise damaged(path, error) from error


def _parse(
    path: str, file: IO[bytes], opener: Callable[[str], Stream] | None = None
) -> slabs.Layout:
    """The header of an ``.npy`` stream (versions 1 to 3)."""
    try:
        major = struct.unpack("6sBB", file.read(8))[1]
        length_format = "<H" if major == 1 else "<I"
        (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
        raw = file.read(min(length, _LONGEST_HEADER))
        if len(raw) < min(length, _LONGEST_HEADER):
            raise truncated(path, "the end of its header")
        text = raw.decode("utf8" if major > 2 else "latin1")
        if major < 3:
            text = _PYTHON_2_LONG.sub(r"\1", text)
        fields = _literal(text)
        shape = tuple(int(size) for size in fields["shape"])
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
        order = fields["fortran_order"]
    except struct.error as error:
        raise truncated(path, "the end of its header") from error
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ReadError(f"{path}: its NumPy header can't be understood ({error})") from error
    if dtype.hasobject:
        raise ReadError(
            f"{path} holds pickled Python objects, which may run any code and are never read;"
            " save it as an array of numbers"
        )
    return slabs.Layout(
        path=path,
        shape=shape,
        dtype=dtype,
        offset=file.tell(),
        order="F" if order else "C",
        open=opener,
    )


def _literal(text: str) -> Any:
    """The value of a Python literal.

    Python 3.11 counts the depth of the syntax tree for all threads together, and raises
    SystemError when another one gets in between: then again.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(SystemError):
            return ast.literal_eval(text)
    return ast.literal_eval(text)


class _MemberStream(Stream):
    """A member of a zip file read forwards; `zipfile` checks its sum with its last byte."""

    def __init__(self, path: str, member: str) -> None:
        import zipfile

        super().__init__(path)
        with zipfile.ZipFile(path) as archive:
            # The member keeps the file open for as long as it needs it.
            self._file = archive.open(member)

    def read(self, most: int) -> bytes:
        checkpoint()
        try:
            piece = self._file.read(most)
        except Exception as error:  # zlib.error, BadZipFile, EOFError: none says which file
            raise damaged(self.path, error) from error
        self.position += len(piece)
        return piece

    def close(self) -> None:
        self._file.close()
