"""Writing results: the one place that creates files.

`write_image` writes into a hidden folder beside the target and renames at the end, so a reader
of the target sees the old file or the whole new one. Data go out by blocks of `BLOCK_NBYTES`
in the order of the file, whatever the order in memory, so that writing takes a few MiB more
than the data. `check_output` finds beforehand, before anything is computed, what would make the
writing fail.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache.errors import WriteError

BLOCK_NBYTES = 2 << 20
EXTENSIONS = (".nii.gz", ".nii", ".img", ".hdr", ".mgz", ".mgh", ".npy")
_PAIR = {".img": ".hdr", ".hdr": ".img"}
_INT32 = np.iinfo(np.int32)

Path = str | os.PathLike[str]
Writer = Callable[[str, NDArray[Any], NDArray[np.float64] | None, Any], None]


class _Sink(Protocol):
    """What blocks are written to: a file, or a compressor in front of one."""

    def write(self, data: Any, /) -> int: ...

    def seek(self, offset: int, /) -> int: ...


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
    if array.dtype.hasobject:
        raise WriteError(f"{target}: Python objects can't be written as an image")
    with _renamed_at_end(target) as scratch:
        if writer is not None:
            writer(scratch, _converted(array, dtype, target), affine, header)
        elif target.lower().endswith(".npy"):
            _write_npy(scratch, array, dtype, target)
        else:
            _check_image(array, target)
            if target.lower().endswith((".mgh", ".mgz")):
                _write_mgh(scratch, array, affine, header, dtype, target)
            else:
                _write_nifti(scratch, array, affine, header, dtype, target)


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
    kept = [file for one in inputs for file in _with_side_file(os.fspath(one))]
    for file in _with_side_file(target):
        if os.path.isdir(file):
            raise WriteError(f"{file} is a directory; give the name of a file")
        for one in kept:
            if _same_file(file, one):
                raise WriteError(f"{file} is an input of this result ({one}); use another name")
        if os.path.exists(file) and not os.stat(file).st_mode & 0o222:
            raise WriteError(f"{file} exists and is read-only; remove it or use another name")


def _with_side_file(path: str) -> tuple[str, ...]:
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
def _renamed_at_end(target: str) -> Iterator[str]:
    """A path of the same name in a folder of its own, whose files move to the target's folder.

    The block may create other files beside the path. They are moved first, and a ``.hdr`` last,
    as it is the one that tells readers what the others are.
    """
    folder, name = os.path.split(os.path.abspath(target))
    try:
        with tempfile.TemporaryDirectory(
            prefix=".lazycache-", dir=folder, ignore_cleanup_errors=True
        ) as scratch:
            yield os.path.join(scratch, name)
            written = os.listdir(scratch)
            if name not in written:
                raise WriteError(f"{target}: the writer wrote no file of this name")
            for one in sorted(written, key=lambda file: (_is_header(file), file == name, file)):
                os.replace(os.path.join(scratch, one), os.path.join(folder, one))
    except WriteError:
        raise
    except OSError as error:
        advice = "; free some space, nothing was left" if error.errno == errno.ENOSPC else ""
        reason = error.strerror or str(error)
        raise WriteError(f"{target}: can't be written: {reason}{advice}") from error


def _is_header(name: str) -> bool:
    return name.lower().endswith(".hdr")


@contextmanager
def _opened(path: str) -> Iterator[_Sink]:
    # "x" creates with the permissions of any new file, as the umask says.
    with open(path, "xb") as file:
        if path.lower().endswith((".gz", ".mgz")):
            with _gzip(file) as compressor:
                yield compressor
        else:
            yield file


def _gzip(file: BinaryIO) -> Any:
    from isal import igzip

    compressor: Any = igzip.IGzipFile  # isal doesn't annotate it
    # No name and no time in the stream: equal results are equal files.
    return compressor("", "wb", compresslevel=1, fileobj=file, mtime=0)


# -- formats --------------------------------------------------------------------------------------


def _check_image(array: NDArray[Any], target: str) -> None:
    most = 4 if target.lower().endswith((".mgh", ".mgz")) else 7
    if array.ndim == 0:
        raise WriteError(f"{target}: the result is a number ({array}), not an image")
    if array.ndim > most:
        raise WriteError(
            f"{target}: the result has {array.ndim} dimensions, and this format holds at most "
            f"{most}; write a .npy file"
        )
    if array.size == 0:
        raise WriteError(f"{target}: the result is empty (shape {array.shape})")


def _write_npy(path: str, array: NDArray[Any], dtype: DTypeLike | None, target: str) -> None:
    from numpy.lib import format as npy

    stored = array.dtype if dtype is None else np.dtype(dtype)
    description = npy.header_data_from_array_1_0(array)
    description["descr"] = npy.dtype_to_descr(stored)
    in_file_order = array if description["fortran_order"] else array.T
    with open(path, "xb") as file:
        npy.write_array_header_1_0(file, description)
        _write_values(file, in_file_order, stored, target)


def _write_nifti(
    path: str, array: NDArray[Any], affine: Any, header: Any, dtype: DTypeLike | None, target: str
) -> None:
    from nibabel.nifti1 import Nifti1Header

    from lazycache.nibabel_image import nifti_header

    stored = _image_dtype(array, dtype, Nifti1Header, target)
    files = _with_side_file(path)
    pair = len(files) > 1
    nifti: Any = nifti_header(array.shape, stored, affine, header, pair=pair)
    for name in files:
        with _opened(name) as file:
            if not pair or _is_header(name):
                nifti.write_to(file)
            if not _is_header(name):
                _write_values(file, array, stored, target)


def _write_mgh(
    path: str, array: NDArray[Any], affine: Any, header: Any, dtype: DTypeLike | None, target: str
) -> None:
    from nibabel.freesurfer.mghformat import MGHHeader

    from lazycache.nibabel_image import mgh_header

    stored = _image_dtype(array, dtype, MGHHeader, target)
    mgh: Any = mgh_header(array.shape, stored, affine, header)
    with _opened(path) as file:
        mgh.writehdr_to(file)
        file.seek(mgh.get_data_offset())  # what is passed over becomes zeros, compressed or not
        _write_values(file, array, stored.newbyteorder(">"), target)
        mgh.writeftr_to(file)


# -- values ---------------------------------------------------------------------------------------


def _image_dtype(
    array: NDArray[Any], dtype: DTypeLike | None, header_class: Any, target: str
) -> np.dtype[Any]:
    """The type on disk, in native byte order. Reads ``array`` where only its values can tell."""
    from lazycache.nibabel_image import holds, stored_dtype

    if dtype is not None:
        wanted = np.dtype(dtype).newbyteorder("=")
        if wanted == np.bool_ and array.dtype == np.bool_:
            wanted = np.dtype(np.uint8)
        _check_kinds(array.dtype, wanted, target)
        if not holds(header_class, wanted):
            raise WriteError(f"{target}: this format has no {wanted}; {_types_of(header_class)}")
        return wanted
    stored = stored_dtype(array.dtype, header_class)
    wide = array.dtype.kind in "iu" and (stored is None or stored.itemsize == 8)
    if wide and _INT32.min <= array.min() and array.max() <= _INT32.max:
        return np.dtype(np.int32)
    if stored is None:
        raise WriteError(
            f"{target}: this format can't hold {array.dtype} values; {_types_of(header_class)}"
        )
    return stored


def _types_of(header_class: Any) -> str:
    from lazycache.nibabel_image import holds

    kinds = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "c8", "c16")
    names = [np.dtype(kind).name for kind in kinds if holds(header_class, np.dtype(kind))]
    return f"give dtype= one of {', '.join(names)}"


def _write_values(file: _Sink, array: NDArray[Any], stored: np.dtype[Any], target: str) -> None:
    """Write ``array`` in Fortran order as ``stored``, and then fail if a value didn't fit."""
    for block in _conversions(array, stored, target):
        file.write(block.tobytes())


def _converted(array: NDArray[Any], dtype: DTypeLike | None, target: str) -> NDArray[Any]:
    """``array`` as ``dtype``, or itself when none is asked for."""
    if dtype is None or np.dtype(dtype) == array.dtype:
        return array
    result = np.empty(array.shape, dtype, order="F")
    flat = result.reshape(-1, order="F")
    start = 0
    for block in _conversions(array, result.dtype, target):
        flat[start : start + block.size] = block
        start += block.size
    return result


def _conversions(array: NDArray[Any], stored: np.dtype[Any], target: str) -> Iterator[NDArray[Any]]:
    """The blocks of ``array`` in Fortran order as ``stored``; WriteError at the end, if at all."""
    _check_kinds(array.dtype, stored, target)
    exact = np.can_cast(array.dtype, stored)
    lost = 0
    for block in _fortran_blocks(array, max(1, BLOCK_NBYTES // array.dtype.itemsize)):
        if not exact:
            block, misfits = _convert(block, stored)
            lost += misfits
        yield block.astype(stored, copy=False)
    if lost:
        raise WriteError(
            f"{target}: {lost} of {array.size} values are NaN or out of the range of {stored}; "
            "clip or replace them, or use a wider dtype="
        )


def _check_kinds(source: np.dtype[Any], stored: np.dtype[Any], target: str) -> None:
    if source == stored:
        return
    if not {source.kind, stored.kind} <= set("biufc"):
        raise WriteError(f"{target}: {source} values can't be written as {stored}")
    if stored.kind == "b":
        raise WriteError(f"{target}: say which values are True, for example (result > 0)")
    if source.kind == "c" and stored.kind != "c":
        raise WriteError(f"{target}: {stored} would lose the imaginary part; write .real or abs()")


def _convert(block: NDArray[Any], stored: np.dtype[Any]) -> tuple[NDArray[Any], int]:
    """``block`` as ``stored``, and how many of its values that type can't hold."""
    with np.errstate(invalid="ignore", over="ignore"):
        if stored.kind in "fc":
            result = block.astype(stored)
            return result, int(np.count_nonzero(np.isfinite(block) & ~np.isfinite(result)))
        limits = np.iinfo(stored)
        if block.dtype.kind != "f":
            fits = (block >= limits.min) & (block <= limits.max)
        else:
            # float16 can't say the limits. One above the largest integer is a power of two,
            # exact in every wider type; the largest integer itself may not be.
            block = np.rint(block.astype(np.float32) if block.itemsize < 4 else block)
            fits = (block >= float(limits.min)) & (block < float(limits.max + 1))
        return block.astype(stored), block.size - int(np.count_nonzero(fits))


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
