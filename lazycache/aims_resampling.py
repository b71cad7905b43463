"""Volumes of AIMS, resampled by AIMS's own resamplers (``soma.aimsalgo``)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._aims import VOLUME, code_of
from ._cout import quiet
from .errors import ReadError
from .readers.aims import module
from .readers.base import checkpoint
from .sampling import convert

LARGEST_ORDER = 7

_ALIGNED = "Coordinates aligned to another file or to anatomical truth"


def converts_first(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Whether voxels are converted before they are resampled: where that loses nothing."""
    return given != wanted and np.can_cast(given, wanted)


def transient_nbytes(
    given: np.dtype[Any], wanted: np.dtype[Any], voxels: int, result: int, order: int
) -> int:
    """The most bytes taken beside a source of so many ``voxels`` and a result of ``result``."""
    nbytes = 0
    if converts_first(given, wanted):
        nbytes += voxels * wanted.itemsize
    elif given != wanted:
        nbytes += result * given.itemsize
    if order > 1:  # the coefficients of splines, of one volume in double precision
        nbytes += 8 * voxels
    return nbytes


def resample(
    name: str,
    volume: Any,
    dtype: np.dtype[Any],
    transform: NDArray[Any],
    shape: tuple[int, ...],
    voxel_size: NDArray[Any],
    order: int,
    fill: Any,
    affine: NDArray[Any] | None,
) -> Any:
    """A new volume of ``shape`` with ``volume`` brought there by ``transform``, in AIMS's mm.

    ``affine`` is where the result lies, None if that isn't known.
    """
    aims = module(name)
    given = np.asarray(volume).dtype
    if converts_first(given, dtype):
        volume = _converted(aims, volume, dtype, fill)
    if np.asarray(volume).shape != shape or not np.allclose(transform, np.eye(4), atol=1e-6):
        result = type(volume)(list(shape))
        result.copyHeaderFrom(volume.header())
        header = result.header()
        later = [float(size) for size in list(header["voxel_size"])[3:]]
        header["voxel_size"] = [*map(float, voxel_size), *later]
        if affine is not None:
            header["transformations"] = [_in_millimetres(affine, voxel_size)]
            header["referentials"] = [_ALIGNED]
        kind = np.asarray(volume).dtype.kind
        number = complex(fill) if kind == "c" else float(fill) if kind == "f" else int(fill)
        resampler = _aimsalgo(name).ResamplerFactory(volume).getResampler(order)
        resampler.setDefaultValue(number)
        checkpoint()
        with quiet():
            resampler.resample(volume, aims.AffineTransformation3d(transform), number, result)
        checkpoint()
        volume = result
    return _converted(aims, volume, dtype, fill)


def _aimsalgo(name: str) -> Any:
    try:
        return importlib.import_module("soma.aimsalgo")
    except ImportError as error:
        raise ReadError(
            f"{name}: soma.aimsalgo, which resamples what AIMS reads, isn't installed here "
            f"({error}): install BrainVISA's aimsalgo"
        ) from error


def _converted(aims: Any, volume: Any, dtype: np.dtype[Any], fill: Any) -> Any:
    values = np.asarray(volume)
    if values.dtype == dtype:
        return volume
    result = getattr(aims, f"{VOLUME}{code_of(dtype)}")(list(values.shape))
    result.copyHeaderFrom(volume.header())
    out = np.asarray(result)
    for place in np.ndindex(*values.shape[2:]):
        convert(values[(..., *place)], out[(..., *place)], fill)
    return result


def _in_millimetres(affine: NDArray[Any], voxel_size: NDArray[Any]) -> list[float]:
    """``affine`` from the millimetres of AIMS, as headers have it."""
    matrix = affine @ np.diag([*(1 / voxel_size), 1.0])
    return [float(number) for number in matrix.ravel()]
