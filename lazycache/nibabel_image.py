"""Results as nibabel knows them: headers to write, and images that load when they are asked.

Imports nibabel at once, so it is itself imported only where a result is written or handed over.
"""

# nibabel's headers and images carry few annotations:
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from nibabel import imageclasses
from nibabel.analyze import AnalyzeHeader
from nibabel.brikhead import AFNIHeader
from nibabel.freesurfer.mghformat import MGHError, MGHHeader, MGHImage
from nibabel.nifti1 import Nifti1Header, Nifti1Image, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.parrec import PARRECHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike, NDArray

from . import _buffers

Shape = tuple[int, ...]
Affine = NDArray[np.float64]

LONGEST_NIFTI1_AXIS = 32767
_SPACE_UNITS, _TIME_UNITS = 0x07, 0x38  # of xyzt_units
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6, 0: 1.0}  # of a unit of xyzt_units; unknown is seconds
_MM, _S = 2, 8
_ALIGNED = 2
_ORIENTATION_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def stored_dtype(dtype: DTypeLike, header_class: Any = Nifti1Header) -> np.dtype[Any] | None:
    """The type in which files with such headers hold values of ``dtype``, or None if they can't.

    It is ``dtype`` where the format has it, else the smallest that holds all of its values, else
    (floating point only) the widest that there is. In native byte order.
    """
    dtype = np.dtype(dtype).newbyteorder("=")
    stand_ins: tuple[str, ...] = ()
    if dtype.kind in "biu":
        stand_ins = tuple(
            name for name in ("u1", "i2", "u2", "i4", "u4", "i8") if np.can_cast(dtype, name)
        )
    elif dtype.kind == "f":
        stand_ins = ("f4",) if dtype.itemsize < 4 else ("f8", "f4")
    elif dtype.kind == "c":
        stand_ins = ("c16",)
    candidates = (dtype, *map(np.dtype, stand_ins))
    return next((one for one in candidates if holds(header_class, one)), None)


def holds(header_class: Any, dtype: np.dtype[Any]) -> bool:
    """Whether files with such headers have a code for ``dtype`` itself."""
    try:
        header_class().set_data_dtype(dtype)
    except (HeaderDataError, MGHError):
        return False
    return True


def nifti_header(
    shape: Shape,
    dtype: np.dtype[Any],
    affine: Affine | None,
    template: Any = None,
    *,
    pair: bool = False,
) -> Nifti1Header:
    """A fresh NIfTI header for such a result, with what still holds of ``template``.

    Kept: both orientations with their codes where ``affine`` is that of the template (else
    ``affine`` under the template's code), the units, and the repetition time and steps of later
    axes where both have them. Everything else is as in a new file: no scaling, no display range,
    no intent, no description. Without an affine the codes are 0. ``template`` is a nibabel
    header of any format; what isn't one is ignored. An axis over 32767 makes it NIfTI-2, which
    is a `Nifti1Header` to nibabel.
    """
    header: Nifti1Header
    if max(shape) > LONGEST_NIFTI1_AXIS:
        header = Nifti2PairHeader() if pair else Nifti2Header()
    else:
        header = Nifti1PairHeader() if pair else Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    _set_orientation(header, affine, template)
    _set_steps(header, len(shape), template)
    return header


def moved_header(
    shape: Shape, dtype: np.dtype[Any], affine: Affine, template: Any, model: Any
) -> Nifti1Header:
    """`nifti_header` for what was moved from where ``template`` has it to where ``model`` is.

    The orientation and its codes are those of ``model``, a header too; without one the codes say
    that it is aligned to something else.
    """
    header = nifti_header(shape, dtype, affine, template)
    _set_orientation(header, affine, model)
    return header


def _set_orientation(header: Nifti1Header, affine: Affine | None, template: Any) -> None:
    known = template if isinstance(template, Nifti1Header) else None
    code = int(known["sform_code"] or known["qform_code"]) if known is not None else 0
    if affine is None:
        if isinstance(template, AnalyzeHeader) and not code:
            header["pixdim"][1:4] = template["pixdim"][1:4]
        return
    if known is not None and np.allclose(affine, known.get_best_affine()):
        for field in _ORIENTATION_FIELDS:
            header[field] = known[field]
        header["pixdim"][:4] = known["pixdim"][:4]
        return
    code = code or _ALIGNED
    header.set_sform(affine, code)
    if np.linalg.det(affine[:3, :3]) != 0:
        header.set_qform(affine, code)
        if not np.allclose(header.get_qform(), affine, atol=1e-4):
            header["qform_code"] = 0  # shears: a quaternion can't say them


def _set_steps(header: Nifti1Header, ndim: int, template: Any) -> None:
    if isinstance(template, Nifti1Header):
        units = int(template["xyzt_units"])
        last = min(ndim, int(template["dim"][0]))
        header["xyzt_units"] = units & (_SPACE_UNITS | (_TIME_UNITS if last > 3 else 0))
        header["pixdim"][4 : last + 1] = template["pixdim"][4 : last + 1]
        return
    if header["sform_code"]:
        header["xyzt_units"] = _MM
    seconds = _repetition_time(template)
    if ndim > 3 and seconds is not None:
        header["pixdim"][4] = seconds
        header["xyzt_units"] = int(header["xyzt_units"]) | _S


def _repetition_time(template: Any) -> float | None:
    """Seconds between two volumes of a 4D file with this header, or None if it doesn't say."""
    if isinstance(template, Nifti1Header):
        scale = _SECONDS.get(int(template["xyzt_units"]) & _TIME_UNITS)
        if int(template["dim"][0]) < 4 or scale is None:
            return None
        return float(template["pixdim"][4]) * scale
    if isinstance(template, MGHHeader | AFNIHeader | PARRECHeader):
        zooms = template.get_zooms()
        if len(zooms) > 3 and len(template.get_data_shape()) > 3:
            return float(zooms[3]) * (1e-3 if isinstance(template, MGHHeader) else 1.0)
    return None


def mgh_header(
    shape: Shape, dtype: np.dtype[Any], affine: Affine | None, template: Any = None
) -> MGHHeader:
    """A FreeSurfer header for such a result; of ``template`` the repetition time is kept."""
    # The image class computes the fields of the affine from a shape alone: no voxel is stored.
    voxels = np.broadcast_to(np.zeros((), np.uint8), shape)
    header: MGHHeader = MGHImage(voxels, affine).header
    header.set_data_dtype(dtype)
    if affine is None:
        header["goodRASFlag"] = 0
    if len(shape) > 3:
        header["tr"] = 1000.0 * (_repetition_time(template) or 0.0)
    return header


class ArraySource(Protocol):
    """What an image can be made over: a proxy, or anything else that loads when asked."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class SourceData:
    """The ``dataobj`` of an image over a source: nibabel's array proxy, keeping nothing itself.

    Every conversion to an array gives a new one that is the caller's to write to. The dtype is
    the one that a NIfTI file would hold (uint8 for bool, float32 for float16).
    """

    is_proxy = True
    slope = 1.0
    inter = 0.0

    def __init__(self, source: ArraySource, dtype: np.dtype[Any]) -> None:
        self._source = source
        self.shape = tuple(source.shape)
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an image's data are always a copy; write np.asarray(image.dataobj)")
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        return _copied(self._source, wanted)

    def __getitem__(self, index: Any) -> Any:
        return _copied(self._source[index], self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceData:
        return self  # nothing in it can change, and nilearn copies images before it reads them


def _copied(values: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """``values`` as ``ndarray.astype`` gives them, in memory that goes back to the system."""
    array = np.asarray(values)
    flags = array.flags
    if not flags.forc:
        return array.astype(dtype)
    out = _buffers.empty(array.shape, dtype, "C" if flags.c_contiguous else "F")
    np.copyto(out, array, casting="unsafe")
    return out


class _NeverKept:
    """An attribute where nibabel and nilearn keep the data that they read from a `dataobj`.

    Over a source it stays None: the cache behind the source keeps the data, and counts them.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, image: Any, owner: type | None = None) -> Any:
        return image.__dict__.get(self._name)

    def __set__(self, image: Any, value: Any) -> None:
        image.__dict__[self._name] = None if isinstance(image.dataobj, SourceData) else value


class SourceImage(Nifti1Image):
    """A NIfTI-1 image whose voxels are loaded each time that they are asked for, and not kept.

    Images that nibabel or nilearn make from it over plain arrays behave as any `Nifti1Image`.
    """

    _data_cache = _NeverKept()
    _fdata_cache = _NeverKept()


# The list where nibabel asks for new classes to be added; it looks up the exact type, and
# without it a 4D image has no `slicer` and can't be resampled.
imageclasses.KNOWN_SPATIAL_FIRST += (SourceImage,)


def as_nibabel(source: ArraySource, affine: Affine | None, header: Any = None) -> Nifti1Image:
    """An image over ``source`` that nibabel and nilearn accept; nothing is loaded by this.

    ``affine`` None means the identity. ``header`` is a nibabel header of any format; `nifti_header`
    says what is taken from it. Raises TypeError for a dtype that no NIfTI file holds, ValueError
    for a single number or more than 7 dimensions.
    """
    shape = tuple(source.shape)
    if not 1 <= len(shape) <= 7:
        raise ValueError(f"an image has 1 to 7 dimensions, not {len(shape)}: {shape}")
    dtype = stored_dtype(source.dtype)
    if dtype is None:
        raise TypeError(f"no NIfTI image holds {source.dtype}: convert it with .astype(...)")
    voxels_to_mm = np.eye(4) if affine is None else affine
    nifti = nifti_header(shape, dtype, voxels_to_mm, header)
    return SourceImage(SourceData(source, dtype), voxels_to_mm, nifti)
