"""What is to be done to resample a volume, as headers tell it, and the reader that does it.

A `Target` says onto which grid, and how; `Target.resampling` makes of it, and of the header of a
volume, a `Resampling`. `Resampler` is a reader that wraps the key of its source, so that all that a
cache does with a file holds for what comes of resampling it: its size is known from headers, one
load serves all who ask, loads run ahead. What a load takes at once, the source included, is its
``peak_nbytes``: it is asked for in one request.

A source of more than three axes is read and resampled a volume at a time, where its reader can
read parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _buffers, aims_resampling, sampling
from ._aims import VOLUME, code_of
from .errors import ReadError
from .readers.base import Probe, checkpoint
from .source import FileKey
from .transforms import (
    File,
    Grid,
    Transform,
    combined,
    grid_of,
    in_aims_order,
    read,
    resized,
    uses_aims,
)

Index = tuple[int | slice, ...]

_VOLUME = (slice(None),) * 3


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image in memory lies: its shape, and its affine as 16 numbers."""

    shape: tuple[int, ...]
    affine: tuple[float, ...]

    def grid(self) -> Grid:
        x, y, z = self.shape[:3]
        return Grid((x, y, z), np.reshape(self.affine, (4, 4)))


class Resampling(NamedTuple):
    """What is to be done to a volume.

    ``image`` and ``grid`` are where it is and where it is to be; ``matrix`` leads from the indices
    of the result to those of the source. ``transient`` is what that takes beside the source and the
    result. ``files`` are those that it was taken from, besides those of the source.
    """

    image: Grid
    grid: Grid
    matrix: NDArray[Any]
    spline: int
    fill: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: Any
    transient: int
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def affine(self) -> NDArray[Any] | None:
        return self.grid.affine if self.grid.placed else None

    def of_aims(self, name: str, volume: Any) -> Any:
        """The result of a volume of AIMS, a new one."""
        # In AIMS's millimetres, which are indices times voxel sizes.
        sizes = [np.diag([*one.voxel_size, 1.0]) for one in (self.image, self.grid)]
        transform = sizes[1] @ np.linalg.inv(sizes[0] @ self.matrix)
        return aims_resampling.resample(
            name,
            volume,
            self.dtype,
            transform,
            self.shape,
            self.grid.voxel_size,
            self.spline,
            self.fill,
            self.affine,
        )

    def sample(self, volume: NDArray[Any], taken: list[range], out: NDArray[Any]) -> None:
        """Put those voxels of the result that are ``taken`` along each axis into ``out``."""
        nx, ny, nz = self.shape[:3]
        plane = np.empty((nx, ny), out.dtype, "F")
        x, y, numbers = taken[:3]
        rows = (slice(x.start, x.stop, x.step), slice(y.start, y.stop, y.step))
        for given, values, wanted, fill in zip(
            *map(sampling.channels, (volume, plane, out)), _fills(self.fill, out.dtype), strict=True
        ):
            sampler = sampling.Sampler(given, self.matrix, (nx, ny, nz), self.spline, fill)
            for at, number in enumerate(numbers):
                checkpoint()
                sampler.plane(number, values)
                wanted[:, :, at] = values[rows]
            del sampler  # before the next one is made


@dataclass(frozen=True, slots=True)
class Target:
    """Onto which grid, and how; `LazyResampleVolume` says what each parameter means."""

    transforms: tuple[Transform, ...] = ()
    like: FileKey | Place | None = None
    dims: tuple[int, ...] | None = None
    voxel_size: tuple[float, ...] | None = None
    spline: int = 1
    fill: Any = 0
    dtype: np.dtype[Any] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The files that it is taken from, as far as that is known without looking at them."""
        files = [one.path for one in self.transforms if isinstance(one, File)]
        return (*files, *(self.like.inputs if isinstance(self.like, FileKey) else ()))

    def resampling(self, name: str, given: Probe) -> Resampling:
        """What is to be done to the volume called ``name``.

        Raises what reading headers and transformations raises, and ValueError for parameters that
        don't go with the volume.
        """
        image = grid_of(given, name)
        model = self.like.anew().probe() if isinstance(self.like, FileKey) else None
        transforms = read(self.transforms)
        grid = self._grid(name, image, model, as_aims=uses_aims(transforms))
        moved = combined(transforms, image, grid)
        matrix = np.linalg.inv(moved @ image.affine) @ grid.affine
        assert given.shape is not None
        assert given.dtype is not None
        shape = (*grid.shape, *given.shape[3:])
        dtype = self._dtype(name, given.shape, given.dtype, of_aims=image.of_aims)
        if image.of_aims:
            voxels, results = math.prod(given.shape), math.prod(shape)
            transient = aims_resampling.transient_nbytes(
                given.dtype, dtype, voxels, results, self.spline
            )
        else:
            transient = grid.shape[0] * grid.shape[1] * dtype.itemsize + max(
                sampling.transient_nbytes(part.dtype, image.shape, matrix, grid.shape, self.spline)
                for part in sampling.channels(np.empty(0, given.dtype))
            )
        files = [one.path for one in self.transforms if isinstance(one, File)]
        return Resampling(
            image,
            grid,
            matrix,
            self.spline,
            self.fill,
            shape,
            dtype,
            self._header(shape, dtype, grid, given.header, model),
            transient,
            (*files, *(model.files if model else ())),
        )

    def _grid(self, name: str, image: Grid, model: Probe | None, *, as_aims: bool) -> Grid:
        """The grid of the result."""
        if self.like is not None:
            if isinstance(self.like, Place):
                grid, other = self.like.grid(), ""
            else:
                assert model is not None
                grid, other = grid_of(model, self.like.name), self.like.name
            if not self.transforms and not (image.placed and grid.placed):
                raise ReadError(
                    f"{other if image.placed else name} doesn't say where its voxels lie, so "
                    f"like= alone can't bring {name} there: give transform= as well"
                )
            return in_aims_order(grid) if image.of_aims else grid
        if self.dims is None and self.voxel_size is None:
            return image
        sizes = (1.0, 1.0, 1.0) if self.voxel_size is None else self.voxel_size[:3]
        if self.dims is None:  # as many as reach as far, to a thousandth of a voxel
            lengths = np.array(image.shape) * image.voxel_size / sizes
            x, y, z = (max(1, math.ceil(length - 1e-3)) for length in lengths)
        else:
            x, y, z = self.dims[:3]
        return resized(image, (x, y, z), sizes, as_aims=as_aims)

    def _dtype(
        self, name: str, shape: tuple[int, ...], given: np.dtype[Any], *, of_aims: bool
    ) -> np.dtype[Any]:
        """The dtype of the result."""
        dtype = given.newbyteorder("=") if self.dtype is None else self.dtype
        later = () if self.dims is None else self.dims[3:]
        if later and _without_ones(later) != _without_ones(shape[3:]):
            raise ValueError(
                f"dims={self.dims}: {name} has the shape {shape}, and only its first three axes "
                "are resampled: give three numbers"
            )
        if _kind(dtype) != _kind(given) or (of_aims and code_of(dtype) is None):
            raise ValueError(f"{name} holds {given} voxels, which can't be made {dtype}")
        if self.spline > sampling.LARGEST_ORDER and not of_aims:
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

    def _header(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        grid: Grid,
        own: Any,
        model: Probe | None,
    ) -> Any:
        """A header for the result, with what still holds of the volume's ``own``.

        Of AIMS, that of the file; else one of NIfTI.
        """
        other = None if model is None or model.kind else model.header
        if grid.of_aims or (own is None and other is None):
            return own
        from .nibabel_image import moved_header, nifti_header, stored_dtype

        stored = stored_dtype(dtype)
        if stored is None:
            return None
        if grid.placed and (self.like is not None or self.transforms):
            return moved_header(shape, stored, grid.affine, own, other)
        header = nifti_header(shape, stored, grid.affine if grid.placed else None, own)
        if not grid.placed:
            header["pixdim"][1:4] = grid.voxel_size
        return header


@dataclass(frozen=True, slots=True)
class Resampler:
    """Reads ``source`` onto another grid.

    The keys in it are recipes: files may have changed, so each look at them is a new one.
    """

    source: FileKey
    target: Target

    name: ClassVar[str] = "resample"
    label: ClassVar[str] = " (resampled)"

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.source.inputs, *self.target.inputs)

    def can_read(self, path: str) -> bool:
        return path == self.source.path

    def probe(self, path: str) -> Probe:
        source = self.source.anew()
        given = source.probe()
        todo = self.target.resampling(source.name, given)
        if _by_volumes(source, given):
            assert given.shape is not None
            given = source.anew((*_VOLUME, *[0] * len(given.shape[3:]))).probe()
        return Probe(
            format=f"{given.format}, resampled",
            shape=todo.shape,
            dtype=todo.dtype,
            nbytes=todo.nbytes,
            peak_nbytes=todo.nbytes + max(given.peak_nbytes, given.nbytes + todo.transient),
            files=tuple(dict.fromkeys((*given.files, *todo.files))),
            order="F",
            affine=todo.affine,
            header=todo.header,
            dtype_reason=given.dtype_reason if self.target.dtype is None else "",
            kind=f"{VOLUME}{code_of(todo.dtype)}" if given.kind else "",
        )

    def read(self, path: str) -> Any:
        return self.read_part(path, ())

    def read_part(self, path: str, index: Index) -> Any:
        source = self.source.anew()
        given = source.probe()
        todo = self.target.resampling(source.name, given)
        if given.kind:
            volume = todo.of_aims(source.name, source.load())
            return np.asarray(volume)[index].copy(order="K") if index else volume
        index = index or (slice(None),) * len(todo.shape)
        taken = [
            range(size)[item] if isinstance(item, slice) else range(item, item + 1)
            for item, size in zip(index, todo.shape, strict=True)
        ]
        counts = [len(places) for places in taken]
        buffer = _buffers.Buffer(math.prod(counts) * todo.dtype.itemsize)
        result = buffer.writable(tuple(counts), todo.dtype, "F")
        if result.size:
            whole = None if _by_volumes(source, given) else source.load()
            later = zip(product(*taken[3:]), np.ndindex(*counts[3:]), strict=True)
            for volume, place in later:
                out = result[(..., *place)]
                if whole is None:
                    todo.sample(source.anew((*_VOLUME, *volume)).load(), taken, out)
                else:
                    todo.sample(whole[(..., *volume)], taken, out)
        kept = [count for count, item in zip(counts, index, strict=True) if isinstance(item, slice)]
        return buffer.readonly(tuple(kept), todo.dtype, "F")


def _by_volumes(source: FileKey, given: Probe) -> bool:
    """Whether the volumes of ``source`` are read one by one."""
    assert given.shape is not None
    in_rows = len(given.shape) > 3 and given.order == "F"
    return in_rows and source.part is None and hasattr(source.reader, "read_part")


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
