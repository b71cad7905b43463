"""Writing results: the one place that creates files.

An `ImageStream` takes the voxels a block at a time, in the order of the file, and `write_image`
sends it those of an array, whatever their order in memory. Both write into a hidden folder beside
the target and rename at the end, so a reader of the target sees the old file or the whole new one.
So writing takes a few MiB more than the data that are there. `check_output` finds beforehand,
before anything is computed, what would make the writing fail.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache._conversion import TRANSIENT, Conversion, check_kinds
from lazycache._sinks import Behind, Scratch
from lazycache.errors import WriteError

BLOCK_NBYTES = 512 << 10  # of an array, put in the order of the file
CHUNK_NBYTES = 2 << 20  # compressed at once
EXTENSIONS = (".nii.gz", ".nii", ".img", ".hdr", ".mgz", ".mgh", ".npy")
_PAIR = {".img": ".hdr", ".hdr": ".img", ".ima": ".dim", ".dim": ".ima"}
_INT32 = np.iinfo(np.int32)
_COMPRESSOR_NBYTES = 1 << 20  # its tables, and what it keeps of what came before

Path = str | os.PathLike[str]
Writer = Callable[[str, NDArray[Any], NDArray[np.float64] | None, Any], None]


class _File(Protocol):
    """What is written to: a file, or a compressor in front of one."""

    def write(self, data: Any, /) -> int: ...

    def seek(self, offset: int, /) -> int: ...

    def close(self) -> None: ...


def write_image(
    path: Path,
    data: Any,
    *,
    affine: NDArray[np.float64] | None = None,
    header: Any = None,
    dtype: DTypeLike | None = None,
    inputs: Iterable[Path] = (),
    writer: Writer | None = None,
) -> None:
    """Write an array as an image (NIfTI, NIfTI pair, MGH) or a ``.npy`` file, by its extension.

    Without ``dtype`` the values on disk are those of ``data``, unscaled, in its type; images hold
    bool as uint8, float16 as float32, 64-bit integers as int32 where the values fit, and
    otherwise what `stored_dtype` says. With ``dtype`` they are converted: floats to integers
    round to the nearest, and a value out of range, or NaN, is an error, never wrapped around.

    ``affine`` (4x4, voxels to millimetres) None means a file without orientation. ``header`` is a
    nibabel header of any format, from which the codes of the orientation, the units and the
    repetition time are kept. ``inputs`` are files that must not be overwritten. ``writer`` is the
    ``write`` of a reader that writes a format of its own.

    Raises WriteError. Whatever stood at ``path`` before still does then, and nothing is left
    beside it, after an interrupt neither. A symbolic link at ``path`` is replaced, not followed.
    """
    target = os.fspath(path)
    check_output(target, inputs, writer)
    array = np.asarray(data)
    _check_type(array.dtype, target)
    if writer is not None:
        with told(target), Scratch(target) as scratch:
            writer(scratch.path, converted(array, dtype, target), affine, header)
            move(scratch, target)
        return
    fortran = True
    if _is_npy(target):
        fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    elif not array.ndim:
        raise WriteError(f"{target}: the result is a number ({array}), not an image")
    else:
        _check_shape(array.shape, target)
    form = _form(target, array.shape, array.dtype, fortran, affine, header, dtype, array)
    with ImageStream(target, form, array.dtype, array.size) as stream:
        for block in _fortran_blocks(
            array if fortran else array.T, max(1, BLOCK_NBYTES // array.dtype.itemsize)
        ):
            stream.write(block)
        stream.finish()


def can_stream(
    path: Path,
    shape: Sequence[int],
    source: np.dtype[Any],
    order: Literal["C", "F"],
    dtype: DTypeLike | None = None,
) -> bool:
    """Whether `stream_image` can write an array of this ``shape``, type and memory order.

    It can't where the order isn't that of the file (``.npy`` has both, the others only Fortran's),
    or where only all of the values tell their type on disk (64-bit integers in an image, without
    ``dtype``), and it doesn't take what has no axis or no element, or formats of plug-ins:
    `write_image` may do all of these. Raises WriteError for what that refuses by shape and types.
    """
    target = os.fspath(path)
    _check_type(source, target)
    if not target.lower().endswith(EXTENSIONS) or not shape:
        return False
    if _is_npy(target):
        check_kinds(source, source if dtype is None else np.dtype(dtype), target)
        return 0 not in shape
    _check_shape(shape, target)
    if dtype is None and _told_by_values(source, target):
        return False
    _image_dtype(source, dtype, target)
    return order == "F" or _is_line(shape)


def stream_image(
    path: Path,
    shape: Sequence[int],
    source: np.dtype[Any],
    order: Literal["C", "F"],
    *,
    affine: NDArray[np.float64] | None = None,
    header: Any = None,
    dtype: DTypeLike | None = None,
    inputs: Iterable[Path] = (),
) -> ImageStream:
    """What takes the voxels of an array block by block and makes the file of `write_image`.

    The array has this ``shape``, type and memory order, and `can_stream` said that it can; the
    rest is as in `write_image`. Raises WriteError as `check_output` does; touches nothing.
    """
    target = os.fspath(path)
    check_output(target, inputs)
    if not can_stream(target, shape, source, order, dtype):
        raise ValueError(f"{target}: this array can't be written block by block")
    fortran = order == "F" and not _is_line(shape)
    form = _form(target, shape, source, fortran, affine, header, dtype)
    return ImageStream(target, form, source, math.prod(shape))


class ImageStream:
    """An image file that is written while its voxels are computed.

    The file is made in a ``with`` block: `write` takes all of its voxels, one block after the
    other, in the order of the file, and then `finish` puts it in its place. If the block is left
    without that, after an error or an interrupt, nothing is left, and what stood at the path
    before still does. A compressed file is compressed by a thread while the caller goes on;
    no thread is left at the end of the ``with`` block. Methods are for one thread at a time.

    ``nbytes`` is what it holds at most, in bytes, besides what it is given.
    """

    def __init__(self, target: str, form: _Form, source: np.dtype[Any], size: int) -> None:
        self._target = target
        self._form = form
        self._conversion = Conversion(source, form.stored, target)
        self._left = size
        self._scratch = Scratch(target)
        self._open: list[_File] = []  # the last is the one that values go to
        self._behind: Behind | None = None
        # Of a compressed file the chunks that are compressed must not depend on the blocks that
        # come, else files of equal values differ.
        stored = form.stored.itemsize
        self._chunk = max(1, CHUNK_NBYTES // max(source.itemsize, stored)) * stored
        self._values_nbytes = size * stored
        self.nbytes = TRANSIENT if source != form.stored else 0
        if _is_compressed(target):
            chunk = min(self._chunk, self._values_nbytes)
            # Two, and what comes out of one, in memory that grows by doubling.
            self.nbytes += 2 * chunk + 3 * chunk // 2 + _COMPRESSOR_NBYTES

    def __enter__(self) -> ImageStream:
        try:
            with told(self._target):
                self._scratch.__enter__()
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        path, *header = sorted(files_of(self._scratch.path), key=_is_header)
        for name in header:
            with closing(_created(name)) as file:
                self._form.begin(file)
        self._open.append(_created(path))
        if _is_compressed(path):
            self._open.append(_gzip(self._open[0]))
            self._behind = Behind(self._open[1].write, self._chunk, self._values_nbytes)
        if not header:
            self._form.begin(self._open[-1])

    def write(self, values: NDArray[Any]) -> None:
        """Write the next ``values``: one axis without gaps, of the type that was announced.

        They may be changed as soon as this returns. Raises WriteError where the file can't be
        written, also for values of earlier calls; it can't be finished then.
        """
        if values.dtype != self._conversion.source or values.ndim != 1:
            raise ValueError(
                f"{self._target}: {self._conversion.source} values of one axis were announced, "
                f"not {values.dtype} ones of shape {values.shape}"
            )
        left, self._left = self._left - values.size, -1  # until this is over
        if left < 0:
            raise ValueError(f"{self._target}: more values than announced, or after an error")
        with told(self._target):
            for piece in self._conversion.convert(values):
                data = np.ascontiguousarray(piece).view(np.uint8)
                if self._behind is not None:
                    self._behind.write(data)
                else:
                    self._open[-1].write(data)
        self._left = left

    def finish(self) -> None:
        """All voxels were written: put the file in its place.

        Raises WriteError where it can't be written, or if values didn't fit into the type on disk.
        """
        if self._left:
            raise ValueError(f"{self._target}: not all of its voxels were written")
        self._left = -1
        with told(self._target):
            if self._behind is not None:
                self._behind.finish()
            self._conversion.check()
            self._form.end(self._open[-1])
            for file in reversed(self._open):
                file.close()
            move(self._scratch, self._target)

    def __exit__(self, *_: object) -> None:
        try:
            if self._behind is not None:
                self._behind.end()
        finally:
            try:
                for file in reversed(self._open):
                    with suppress(OSError, ValueError):  # it goes, if it isn't closed already
                        file.close()
            finally:
                self._scratch.__exit__()


def check_output(path: Path, inputs: Iterable[Path] = (), writer: Writer | None = None) -> None:
    """Raise WriteError if nothing could be written at ``path``; touches nothing.

    That is: an extension that can't be written (unless a ``writer`` takes it), a folder that is
    missing or can't be written to, a directory or a read-only file in the way, or one of
    ``inputs``, also under another name (links, the other file of an ``.img``/``.hdr`` pair).
    """
    target = os.fspath(path)
    name = os.path.basename(target).lower()
    if writer is None and (name in EXTENSIONS or not name.endswith(EXTENSIONS)):
        raise WriteError(
            f"{target}: can't write this kind of file; use a name that ends in "
            f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        )
    folder = os.path.dirname(target) or os.curdir
    if not os.path.isdir(folder):
        raise WriteError(f"{target}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(f"{target}: no permission to write in the folder {folder}")
    kept = [file for one in inputs for file in files_of(os.fspath(one))]
    for file in files_of(target):
        if os.path.isdir(file):
            raise WriteError(f"{file} is a directory; give the name of a file")
        for one in kept:
            if _same_file(file, one):
                raise WriteError(f"{file} is an input of this result ({one}); use another name")
        if os.path.exists(file) and not os.stat(file).st_mode & 0o222:
            raise WriteError(f"{file} exists and is read-only; remove it or use another name")


def files_of(path: str) -> tuple[str, ...]:
    """The files that writing ``path`` makes: it, and of a pair the other one."""
    root, extension = os.path.splitext(path)
    other = _PAIR.get(extension.lower())
    if other is None:
        return (path,)
    return path, root + (other.upper() if extension.isupper() else other)


def _same_file(first: str, second: str) -> bool:
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them doesn't exist
        return False


@contextmanager
def told(target: str) -> Iterator[None]:
    """What goes wrong with files is told as a WriteError of ``target``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        advice = "; free some space, nothing was left" if error.errno == errno.ENOSPC else ""
        reason = error.strerror or str(error)
        raise WriteError(f"{target}: can't be written: {reason}{advice}") from error


def move(scratch: Scratch, target: str) -> None:
    """Put the new files in their places, first those beside ``target``.

    A ``.hdr`` comes last, as it is the one that tells readers what the others are.
    """
    names = scratch.written()
    if scratch.name not in names:
        raise WriteError(f"{target}: the writer wrote no file of this name")
    for name in sorted(names, key=lambda name: (_is_header(name), name == scratch.name, name)):
        scratch.move(name)


def _is_header(name: str) -> bool:
    return name.lower().endswith(".hdr")


def _is_npy(path: str) -> bool:
    return path.lower().endswith(".npy")


def _is_mgh(path: str) -> bool:
    return path.lower().endswith((".mgh", ".mgz"))


def _is_compressed(path: str) -> bool:
    return path.lower().endswith((".gz", ".mgz"))


def _created(path: str) -> _File:
    # "x" creates with the permissions of any new file, as the umask says.
    return open(path, "xb")


def _gzip(file: _File) -> _File:
    from isal import igzip

    compressor: Any = igzip.IGzipFile  # isal doesn't annotate it
    # No name and no time in the stream: equal results are equal files.
    opened: _File = compressor("", "wb", compresslevel=1, fileobj=file, mtime=0)
    return opened


# -- formats --------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """How a file holds its voxels, and what writes what it has before and after them.

    Of a pair, what comes before is the header's file.
    """

    stored: np.dtype[Any]
    begin: Callable[[_File], None]
    end: Callable[[_File], None] = lambda file: None


def _form(
    target: str,
    shape: Sequence[int],
    source: np.dtype[Any],
    fortran: bool,
    affine: Any,
    header: Any,
    dtype: DTypeLike | None,
    array: NDArray[Any] | None = None,
) -> _Form:
    if _is_npy(target):
        return _npy(shape, source if dtype is None else np.dtype(dtype), fortran)
    stored = _image_dtype(source, dtype, target, array)
    if _is_mgh(target):
        return _mgh(tuple(shape), stored, affine, header)
    return _nifti(tuple(shape), stored, affine, header, pair=len(files_of(target)) > 1)


def _npy(shape: Sequence[int], stored: np.dtype[Any], fortran: bool) -> _Form:
    from numpy.lib import format as npy

    description = {
        "shape": tuple(shape),
        "fortran_order": fortran,
        "descr": npy.dtype_to_descr(stored),
    }
    return _Form(stored, lambda file: npy.write_array_header_1_0(file, description))


def _nifti(
    shape: tuple[int, ...], stored: np.dtype[Any], affine: Any, header: Any, *, pair: bool
) -> _Form:
    from lazycache.nibabel_image import nifti_header

    nifti: Any = nifti_header(shape, stored, affine, header, pair=pair)
    return _Form(stored, nifti.write_to)


def _mgh(shape: tuple[int, ...], stored: np.dtype[Any], affine: Any, header: Any) -> _Form:
    from lazycache.nibabel_image import mgh_header

    mgh: Any = mgh_header(shape, stored, affine, header)

    def begin(file: _File) -> None:
        mgh.writehdr_to(file)
        file.seek(mgh.get_data_offset())  # what is passed over becomes zeros, compressed or not

    return _Form(stored.newbyteorder(">"), begin, mgh.writeftr_to)


def _check_type(source: np.dtype[Any], target: str) -> None:
    if source.hasobject:
        raise WriteError(f"{target}: Python objects can't be written as an image")


def _check_shape(shape: Sequence[int], target: str) -> None:
    most = 4 if _is_mgh(target) else 7
    if len(shape) > most:
        raise WriteError(
            f"{target}: the result has {len(shape)} dimensions, and this format holds at most "
            f"{most}; write a .npy file"
        )
    if 0 in shape:
        raise WriteError(f"{target}: the result is empty (shape {tuple(shape)})")


def _is_line(shape: Sequence[int]) -> bool:
    """Whether both memory orders are one."""
    return sum(size != 1 for size in shape) < 2


# -- types ----------------------------------------------------------------------------------------


def _image_dtype(
    source: np.dtype[Any], dtype: DTypeLike | None, target: str, array: NDArray[Any] | None = None
) -> np.dtype[Any]:
    """The type on disk, in native byte order. Reads ``array`` where only its values can tell."""
    from lazycache.nibabel_image import holds, stored_dtype

    header_class = _header_class(target)
    if dtype is not None:
        wanted = np.dtype(dtype).newbyteorder("=")
        if wanted == np.bool_ and source == np.bool_:
            wanted = np.dtype(np.uint8)
        check_kinds(source, wanted, target)
        if not holds(header_class, wanted):
            raise WriteError(f"{target}: this format has no {wanted}; {_types_of(header_class)}")
        return wanted
    if array is not None and _told_by_values(source, target) and _fits_in_int32(array):
        return np.dtype(np.int32)
    stored = stored_dtype(source, header_class)
    if stored is None:
        raise WriteError(
            f"{target}: this format can't hold {source} values; {_types_of(header_class)}"
        )
    return stored


def _told_by_values(source: np.dtype[Any], target: str) -> bool:
    """Whether it is the values that tell their type in an image."""
    from lazycache.nibabel_image import stored_dtype

    if source.kind not in "iu":
        return False
    stored = stored_dtype(source, _header_class(target))
    return stored is None or stored.itemsize == 8


def _fits_in_int32(array: NDArray[Any]) -> bool:
    return bool(_INT32.min <= array.min() and array.max() <= _INT32.max)


def _header_class(target: str) -> Any:
    from nibabel.freesurfer.mghformat import MGHHeader
    from nibabel.nifti1 import Nifti1Header

    return MGHHeader if _is_mgh(target) else Nifti1Header


def _types_of(header_class: Any) -> str:
    from lazycache.nibabel_image import holds

    kinds = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16")
    names = [np.dtype(kind).name for kind in kinds if holds(header_class, np.dtype(kind))]
    return f"give dtype= one of {', '.join(names)}"


# -- arrays ---------------------------------------------------------------------------------------


def converted(array: NDArray[Any], dtype: DTypeLike | None, target: str) -> NDArray[Any]:
    """``array`` as ``dtype``, or itself when none is asked for."""
    if dtype is None or np.dtype(dtype) == array.dtype:
        return array
    result = np.empty(array.shape, dtype, order="F")
    conversion = Conversion(array.dtype, result.dtype, target)
    flat = result.reshape(-1, order="F")
    start = 0
    for block in _fortran_blocks(array, max(1, BLOCK_NBYTES // array.dtype.itemsize)):
        for piece in conversion.convert(block):
            flat[start : start + piece.size] = piece
            start += piece.size
    conversion.check()
    return result


def _fortran_blocks(array: NDArray[Any], count: int) -> Iterator[NDArray[Any]]:
    """One-dimensional pieces of at most ``count`` elements, in Fortran order.

    They are views where ``array`` is in that order, and copies of one piece at a time elsewhere.
    """
    if array.flags.f_contiguous:
        flat = array.reshape(-1, order="F")
        for start in range(0, flat.size, count):
            yield flat[start : start + count]
        return
    each = array.size // array.shape[-1]
    if each > count:
        for last in range(array.shape[-1]):
            yield from _fortran_blocks(array[..., last], count)
        return
    step = count // each
    for start in range(0, array.shape[-1], step):
        yield array[..., start : start + step].reshape(-1, order="F")
