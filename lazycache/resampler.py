"""The reader of a volume that is resampled, and converted, as it is loaded.

It wraps the key of its source, so that all that a cache does with a file holds for what comes of
resampling it: its size is known from headers, one load serves all who ask, loads run ahead. What a
load takes at once, the source included, is its ``peak_nbytes``: it is asked for in one request.

A source of more than three axes is read and resampled a volume at a time, where its reader can
read parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _buffers, sampling
from .errors import ReadError
from .readers.base import Probe, checkpoint
from .source import FileKey
from .transforms import File, Grid, Shape3, Transform, combined, grid_of, resized, uses_aims

Index = tuple[int | slice, ...]

_ALL = (slice(None),) * 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image in memory lies: its affine as 16 numbers."""

    shape: tuple[int, ...]
    affine: tuple[float, ...]

    def grid(self) -> Grid:
        x, y, z = self.shape[:3]
        return Grid((x, y, z), np.reshape(self.affine, (4, 4)))


class _Work(NamedTuple):
    """What is to be done, as headers tell it."""

    source: FileKey
    shape: Shape3  # of the source, its first three axes
    by_volumes: bool  # whether its volumes are read one by one
    matrix: NDArray[Any]  # from the indices of the result to those of the source
    result: Probe


@dataclass(frozen=True, slots=True)
class Resampler:
    """Reads ``source`` onto another grid; `LazyResampleVolume` says what each parameter means.

    The keys in it are recipes: files may have changed, so each look at them is a new one.
    """

    source: FileKey
    transforms: tuple[Transform, ...] = ()
    like: FileKey | Place | None = None
    dims: tuple[int, ...] | None = None
    voxel_size: tuple[float, ...] | None = None
    spline: int = 1
    fill: Any = 0
    dtype: np.dtype[Any] | None = None
    name: str = "resample"

    def can_read(self, path: str) -> bool:
        return path == self.source.path

    def probe(self, path: str) -> Probe:
        return self._work().result

    def read(self, path: str) -> NDArray[Any]:
        work = self._work()
        assert work.result.shape is not None
        return self._part(work, (slice(None),) * len(work.result.shape))

    def read_part(self, path: str, index: Index) -> NDArray[Any]:
        return self._part(self._work(), index)

    def _part(self, work: _Work, index: Index) -> NDArray[Any]:
        shape, dtype = work.result.shape, work.result.dtype
        assert shape is not None
        assert dtype is not None
        taken = [
            range(size)[item] if isinstance(item, slice) else range(item, item + 1)
            for item, size in zip(index, shape, strict=True)
        ]
        counts = [len(places) for places in taken]
        kept = tuple(
            count for count, item in zip(counts, index, strict=True) if isinstance(item, slice)
        )
        buffer = _buffers.Buffer(math.prod(counts) * dtype.itemsize)
        values = buffer.writable(tuple(counts), dtype, "F")
        if values.size:
            whole = None if work.by_volumes else work.source.load()
            later = zip(product(*taken[3:]), np.ndindex(*counts[3:]), strict=True)
            for volume, place in later:
                out = values[(..., *place)]
                if whole is None:
                    self._sample(work, work.source.anew((*_ALL, *volume)).load(), taken, out)
                else:
                    self._sample(work, whole[(..., *volume)], taken, out)
        return buffer.readonly(kept, dtype, "F")

    def _sample(
        self, work: _Work, volume: NDArray[Any], taken: list[range], out: NDArray[Any]
    ) -> None:
        """Put those voxels of the result that are ``taken`` along each axis into ``out``."""
        assert work.result.shape is not None
        nx, ny, nz = work.result.shape[:3]
        plane = np.empty((nx, ny), out.dtype, "F")
        x, y, numbers = taken[:3]
        rows = (slice(x.start, x.stop, x.step), slice(y.start, y.stop, y.step))
        for given, values, wanted, fill in zip(
            *map(sampling.channels, (volume, plane, out)), _fills(self.fill, out.dtype), strict=True
        ):
            sampler = sampling.Sampler(given, work.matrix, (nx, ny, nz), self.spline, fill)
            for at, number in enumerate(numbers):
                checkpoint()
                sampler.plane(number, values)
                wanted[:, :, at] = values[rows]
            del sampler  # before the next one is made

    # What headers tell

    def _work(self) -> _Work:
        source = self.source.anew()
        given = source.probe()
        image = grid_of(given, source.name)
        like = self.like.anew() if isinstance(self.like, FileKey) else self.like
        grid = self._grid(source.name, image, like)
        moved = np.eye(4)
        if self.transforms:
            moved = combined(self.transforms, image, grid)
        matrix = np.linalg.inv(moved @ image.affine) @ grid.affine
        assert given.shape is not None
        by_volumes = (
            len(given.shape) > 3
            and source.part is None
            and given.order == "F"
            and hasattr(source.reader, "read_part")
        )
        files = [*given.files, *(one.path for one in self.transforms if isinstance(one, File))]
        model = like.probe() if isinstance(like, FileKey) else None
        if model is not None:
            files += model.files
        shape = (*grid.shape, *given.shape[3:])
        dtype = self._dtype(source.name, given)
        nbytes = math.prod(shape) * dtype.itemsize
        one = source.anew((*_ALL, *[0] * (len(given.shape) - 3))) if by_volumes else source
        result = Probe(
            format=f"{given.format}, resampled",
            shape=shape,
            dtype=dtype,
            nbytes=nbytes,
            peak_nbytes=nbytes + self._beside(one.probe(), image.shape, matrix, grid.shape),
            files=tuple(dict.fromkeys(files)),
            order="F",
            affine=grid.affine if grid.placed else None,
            header=self._header(shape, dtype, grid, given, model),
            dtype_reason=given.dtype_reason if self.dtype is None else "",
        )
        return _Work(source, image.shape, by_volumes, matrix, result)

    def _grid(self, name: str, image: Grid, like: FileKey | Place | None) -> Grid:
        """The grid of the result."""
        if like is not None:
            model = like.grid() if isinstance(like, Place) else grid_of(like.probe(), like.name)
            if not self.transforms and not (image.placed and model.placed):
                where = name if not image.placed else getattr(like, "name", "the other image")
                raise ReadError(
                    f"{where} doesn't say where its voxels lie, so like= alone can't bring {name} "
                    "there: give transform= as well"
                )
            return model
        if self.dims is None and self.voxel_size is None:
            return image
        sizes = (1.0, 1.0, 1.0) if self.voxel_size is None else self.voxel_size[:3]
        if self.dims is None:  # as many as reach as far, to a thousandth of a voxel
            lengths = np.array(image.shape) * image.voxel_size / sizes
            x, y, z = (max(1, math.ceil(length - 1e-3)) for length in lengths)
        else:
            x, y, z = self.dims[:3]
        return resized(image, (x, y, z), sizes, as_aims=uses_aims(self.transforms))

    def _dtype(self, name: str, given: Probe) -> np.dtype[Any]:
        """The dtype of the result. Raises ValueError for what doesn't go with the source."""
        assert given.dtype is not None
        assert given.shape is not None
        dtype = given.dtype.newbyteorder("=") if self.dtype is None else self.dtype
        later = given.shape[3:]
        wanted = () if self.dims is None else self.dims[3:]
        if _without_ones(wanted) != _without_ones(later if wanted else ()):
            raise ValueError(
                f"dims={self.dims}: {name} has the shape {given.shape}, and only its first three "
                "axes are resampled: give three numbers"
            )
        if _kind(dtype) != _kind(given.dtype):
            raise ValueError(f"{name} holds {given.dtype} voxels, which can't be made {dtype}")
        if self.spline > sampling.LARGEST_ORDER:
            raise ValueError(
                f"resampling_order={self.spline}: with scipy it is 0 to {sampling.LARGEST_ORDER}; "
                "6 and 7 are for volumes read by AIMS"
            )
        if not sampling.holds(dtype, self.fill):
            raise ValueError(
                f"default_value={self.fill!r} can't be had in the {dtype} voxels of {name}: give "
                "another one, or a dtype= that has it"
            )
        return dtype

    def _beside(self, source: Probe, shape: Shape3, matrix: Any, grid: Shape3) -> int:
        """The most bytes that a load takes beside its result: those of the source among them."""
        assert source.dtype is not None
        sampling_it = max(
            sampling.transient_nbytes(channel.dtype, shape, matrix, grid, self.spline)
            for channel in sampling.channels(np.empty(0, source.dtype))
        )
        plane = grid[0] * grid[1] * (self.dtype or source.dtype).itemsize
        return max(source.peak_nbytes, source.nbytes + sampling_it + plane)

    def _header(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], grid: Grid, given: Probe, model: Any
    ) -> Any:
        """A NIfTI header for the result, with what still holds of that of the source."""
        if given.header is None and (model is None or model.header is None):
            return None
        from .nibabel_image import moved_header, nifti_header, stored_dtype

        stored = stored_dtype(dtype)
        if stored is None:
            return None
        if not grid.placed:
            header = nifti_header(shape, stored, None, given.header)
            header["pixdim"][1:4] = grid.voxel_size
        elif self.like is None and not self.transforms:
            header = nifti_header(shape, stored, grid.affine, given.header)
        else:
            to = None if model is None else model.header
            header = moved_header(shape, stored, grid.affine, given.header, to)
        return header


def _fills(fill: Any, dtype: np.dtype[Any]) -> list[Any]:
    """The value of each channel of a voxel that lies outside."""
    if dtype.kind == "c":
        return [complex(fill).real, complex(fill).imag]
    return [fill] * len(dtype.names or [dtype])


def _kind(dtype: np.dtype[Any]) -> str:
    """What voxels can be converted within: colours only as they are."""
    return {"c": "complex", "V": str(dtype)}.get(dtype.kind, "real")


def _without_ones(sizes: tuple[int, ...]) -> list[int]:
    return [size for size in sizes if size != 1]
