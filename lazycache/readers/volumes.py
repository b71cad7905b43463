"""All that nibabel loads.

nibabel parses the headers. Where it says that the voxels are one block of a file (NIfTI, Analyze,
SPM, MGH, CIFTI-2) `slabs` reads them; other volumes are read by nibabel and copied into memory of
ours. A surface (GIFTI) is given as nibabel's own image.

Every probe and every read opens an image of its own: nothing of nibabel is shared by threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache import _buffers
from lazycache.errors import ReadError

from . import slabs, surfaces
from .base import Probe, checkpoint
from .files import check_file, damaged, truncated
from .images import array_proxy, extensions, format_of, opened
from .streams import is_compressed


@dataclass(frozen=True, slots=True)
class NibabelReader:
    """Reads what nibabel loads; options are those of `nibabel.load` for the format."""

    name: str = "nibabel"
    converts: bool = True

    def can_read(self, path: str) -> bool:
        return path.lower().endswith(extensions())

    def probe(self, path: str, *, dtype: DTypeLike | None = None, **options: Any) -> Probe:
        check_file(path)
        if surfaces.is_surface(path):
            _refuse_dtype(path, dtype)
            return surfaces.probe(path)
        with opened(path, options) as image:
            return _probe(path, image, None if dtype is None else np.dtype(dtype))

    def read(self, path: str, *, dtype: DTypeLike | None = None, **options: Any) -> Any:
        check_file(path)
        if surfaces.is_surface(path):
            _refuse_dtype(path, dtype)
            return surfaces.read(path)
        wanted = None if dtype is None else np.dtype(dtype)
        with opened(path, options) as image:
            layout = _layout(path, image)
            if layout is None:
                return _read_by_nibabel(path, image, None, wanted)
        return slabs.read(layout, wanted)

    def read_part(
        self, path: str, index: slabs.Index, *, dtype: DTypeLike | None = None, **options: Any
    ) -> NDArray[Any]:
        check_file(path)
        if surfaces.is_surface(path):
            raise ReadError(f"{path} is a surface: only arrays have parts; read all of it")
        wanted = None if dtype is None else np.dtype(dtype)
        with opened(path, options) as image:
            layout = _layout(path, image)
            if layout is None:
                return _read_by_nibabel(path, image, index, wanted)
        return slabs.read_part(layout, index, wanted)

    def open_blocks(
        self, path: str, *, dtype: DTypeLike | None = None, **options: Any
    ) -> slabs.Blocks:
        check_file(path)
        with opened(path, options) as image:
            layout = _layout(path, image)
        if layout is None:
            raise ReadError(f"{path} can't be read in blocks; read all of it")
        return slabs.Blocks(layout, None if dtype is None else np.dtype(dtype))


def _refuse_dtype(path: str, dtype: DTypeLike | None) -> None:
    if dtype is not None:
        raise ReadError(f"{path} is a surface, which can't be converted: leave dtype={dtype!r} out")


def _layout(path: str, image: Any) -> slabs.Layout | None:
    """Where the voxels are, if they are one block of a file."""
    proxy = image.dataobj
    file = image.file_map["image"].filename
    if type(proxy) is not array_proxy() or file.lower().endswith(".zst"):
        return None
    layout = slabs.Layout(
        path=file,
        shape=tuple(int(size) for size in proxy.shape),
        dtype=proxy.dtype,
        offset=int(proxy.offset),
        order=proxy.order,
        slope=float(proxy.slope),
        inter=float(proxy.inter),
    )
    if any(size < 0 for size in layout.shape):
        raise ReadError(f"{path}: its header is damaged, it gives the shape {layout.shape}")
    try:
        layout.value_dtype  # noqa: B018 - asked for its error
    except TypeError as error:
        raise ReadError(f"{path}: {layout.dtype} voxels can't be scaled") from error
    if not is_compressed(file) and os.path.getsize(file) < layout.end:
        raise truncated(file, f"the {layout.stored_nbytes} bytes of its voxels")
    return layout


def _probe(path: str, image: Any, wanted: np.dtype[Any] | None) -> Probe:
    layout = _layout(path, image)
    order: Literal["C", "F"]
    if layout is not None:
        shape, stored, values = layout.shape, layout.dtype, layout.value_dtype
        order, peak_nbytes = layout.order, layout.peak_nbytes(wanted)
        scaling = f"scl_slope {layout.slope:g} and scl_inter {layout.inter:g}"
    else:
        shape = tuple(int(size) for size in image.shape)
        stored, values, order = _as_nibabel_reads(path, image)
        voxels = int(np.prod(shape, dtype=np.int64))
        # What nibabel holds while it scales, and then the whole beside the copy that stays.
        whole = voxels * values.itemsize
        peak_nbytes = 2 * voxels * stored.itemsize + 3 * whole
        if wanted is not None:
            peak_nbytes += voxels * wanted.itemsize
        scaling = "factors in its header"
    if wanted is not None and wanted != values:
        reason = "asked for"
    elif stored != values:
        reason = f"{stored} on disk, scaled by {scaling}"
    else:
        reason = ""
    dtype = values if wanted is None else wanted
    return Probe(
        format=format_of(type(image)),
        shape=shape,
        dtype=dtype,
        nbytes=int(np.prod(shape, dtype=np.int64)) * dtype.itemsize,
        peak_nbytes=peak_nbytes,
        files=_files(path, image),
        order=order,
        affine=_affine(image),
        header=image.header,
        dtype_reason=reason,
        in_blocks=layout is not None,
    )


def _files(path: str, image: Any) -> tuple[str, ...]:
    names = [holder.filename for holder in image.file_map.values()]
    return (path, *sorted({n for n in names if n and n != path and os.path.exists(n)}))


def _affine(image: Any) -> NDArray[np.float64] | None:
    """The affine, unless the file states none and nibabel made one up."""
    kind, header = type(image).__name__, image.header
    if kind.startswith("Nifti"):
        stated = bool(header["sform_code"] or header["qform_code"])
    elif kind.startswith("Spm"):
        mat = image.file_map["mat"].filename
        stated = os.path.exists(mat) or bool(np.any(header["origin"][:3]))
    elif kind == "MGHImage":
        stated = bool(header["goodRASFlag"])
    else:
        stated = kind != "AnalyzeImage"
    affine = getattr(image, "affine", None)
    if not stated or affine is None:
        return None
    affine = np.array(affine, np.float64)
    affine.flags.writeable = False
    return affine


def _as_nibabel_reads(
    path: str, image: Any
) -> tuple[np.dtype[Any], np.dtype[Any], Literal["C", "F"]]:
    """(dtype on disk, dtype of the values, order of the axes) of a format that nibabel reads."""
    kind, proxy = type(image).__name__, image.dataobj
    double = np.dtype(np.float64)
    if kind == "EcatImage":
        return np.dtype(image.get_data_dtype(0)), double, "C"
    stored = np.dtype(image.get_data_dtype())
    if kind.startswith("Minc"):
        return stored, (stored if stored.kind == "f" else double), "C"
    file = image.file_map["image"].filename
    nbytes = int(np.prod(image.shape, dtype=np.int64)) * stored.itemsize
    if not file.lower().endswith((".gz", ".bz2", ".zst", ".z")) and os.path.getsize(file) < nbytes:
        raise truncated(file, f"the {nbytes} bytes of its voxels")
    if kind == "AFNIImage" and proxy.scaling is None:
        return stored, stored, "F"
    if kind in ("AFNIImage", "PARRECImage"):
        return stored, np.result_type(stored, double), "C"
    return stored, np.asarray(proxy[(slice(0, 1),) * len(image.shape)]).dtype, "F"


def _read_by_nibabel(
    path: str, image: Any, index: slabs.Index | None, wanted: np.dtype[Any] | None
) -> NDArray[Any]:
    checkpoint()
    file = image.file_map["image"].filename
    try:
        if index is None:
            values = np.asarray(image.dataobj)
        elif 0 in (part := np.broadcast_to(np.empty(()), image.shape)[index]).shape:
            # nibabel can't read nothing from a file
            values = np.zeros(part.shape, _as_nibabel_reads(path, image)[1])
        elif type(image).__name__ == "EcatImage":  # its own slicing only knows the first frames
            values = np.asarray(image.dataobj)[index]
        else:
            values = np.asarray(image.dataobj[index])
    except (ReadError, MemoryError):
        raise
    except EOFError as error:
        raise truncated(file, "the end of its voxels") from error
    except Exception as error:
        raise damaged(file, error) from error
    checkpoint()
    return _owned(values, values.dtype if wanted is None else wanted)


def _owned(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """``values`` as ``dtype`` in memory of ours, read-only, its axes in the same order."""
    if values.nbytes == 0:
        return _buffers.readonly(values.astype(dtype))
    slowest_first = sorted(range(values.ndim), key=lambda axis: -abs(values.strides[axis]))
    back = np.argsort(slowest_first) if values.ndim else ()
    shape = tuple(values.shape[axis] for axis in slowest_first)
    buffer = _buffers.Buffer(values.size * dtype.itemsize)
    buffer.writable(shape, dtype)[...] = values.transpose(slowest_first)
    return buffer.readonly(shape, dtype).transpose(back)
