"""`LazyResampleVolume`: a proxy of a volume that is resampled and converted while it is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ._aims import dtype_of
from ._frames import location
from .aims_resampling import LARGEST_ORDER
from .cache import DataCache
from .expression import ONE, FileNode, GridMode, Info, Node, Op, OpNode, describe
from .inputs import path_of
from .layout import Layout, dense
from .proxy import LazyReadData
from .readers.aims import probe_of
from .readers.base import Probe
from .resampler import Place, Resampler, Resampling, Target
from .source import FileKey, file_key
from .transforms import as_transforms


class LazyResampleVolume(LazyReadData):
    """A `LazyReadData` of a volume that is put onto another grid, and converted, as it is loaded.

    ::

        volumes = [LazyResampleVolume(f, like="template.nii.gz", transform=t)
                   for f, t in zip(files, transforms)]
        mean = lazycache.mean(PreloadList(volumes))

    ``data_or_filename``, ``allocator_context``, ``read_options``, ``nops``, ``reader``, ``cache``,
    ``grid`` and further arguments are those of `LazyReadData`; the data are those of a file, or of
    a proxy of one. Runs of more than three axes are resampled volume by volume. Nothing is read
    here. It is a source as others are: loaded once for all who need it, in one request of memory
    for the source, what computing takes, and the result; preloaded, planned, pickled as a recipe.

    ``transform`` leads from the millimetres of the image to those of the result. It is a 4x4 array,
    a file, a transformation of AIMS, or a list of these, applied right to left. An array, an affine
    of ITK (``.txt``, ``.tfm``, ``.mat``) or FSL (``.mat``) is in the millimetres of the headers'
    affines, as in nibabel; a ``.trm`` file and AIMS's own object in those of AIMS, as everything is
    for volumes that AIMS reads.

    The grid of the result is, in this order: that of ``like``, an image, a path or a proxy (without
    a transform both headers' affines say how they lie to each other); or ``dims`` voxels of
    ``vox_size`` mm (1 mm without it) along the axes of the image, from its first voxel on
    (``vox_size`` alone: as many as cover the image); or that of the image.

    ``resampling_order`` is that of the splines: 0 takes the value of the nearest voxel, which keeps
    labels what they are, 1 is linear, 3 cubic; up to 5, or 7 for volumes that AIMS reads. A NaN
    spreads from order 2 on. ``default_value`` is for what lies outside of the image.

    ``dtype`` is the type of the result, a NumPy dtype or AIMS's name ("FLOAT", "S16"); without it
    that of the image. Integers get the nearest value that they can hold (halves the even one;
    never wrapped around, NaN becomes ``default_value``); of bool what rounds to 0 is False.

    Raises TypeError and ValueError for parameters that make no sense. What only headers tell (a
    ``default_value`` that the dtype can't hold, orders that scipy doesn't have, a file without
    orientation with ``like`` alone) is raised at the first use.
    """

    def __init__(
        self,
        data_or_filename: Any,
        allocator_context: Any = None,
        read_options: Mapping[str, Any] | None = None,
        nops: int = 0,
        reader: Any = None,
        dtype: DTypeLike | None = None,
        transform: Any = None,
        dims: Sequence[int] | None = None,
        vox_size: Sequence[float] | None = None,
        resampling_order: int = 1,
        default_value: Any = 0,
        *,
        like: Any = None,
        cache: DataCache | None = None,
        grid: GridMode = "error",
        **kwargs: Any,
    ) -> None:
        if like is not None and (dims is not None or vox_size is not None):
            raise TypeError("like= gives the whole grid: leave dims= and vox_size= out")
        super().__init__(
            data_or_filename,
            allocator_context,
            read_options,
            nops,
            reader,
            cache=cache,
            grid=grid,
            **kwargs,
        )
        target = Target(
            as_transforms(transform),
            None if like is None else _place_of(like),
            None if dims is None else _numbers("dims", dims, int),
            None if vox_size is None else _numbers("vox_size", vox_size, float),
            _order(resampling_order),
            _number(default_value),
            None if dtype is None else _dtype(dtype),
        )
        node, self._result = self._node, None
        if isinstance(node, FileNode):
            resampler = Resampler(node.key, target)
            self._stand_for(FileNode(file_key(node.key.path, resampler), nops, resampler))
        else:
            op = Op("resample", _Resample(target), "fold")
            self._stand_for(OpNode(op, (node,), ONE, location=location()))


@dataclass(frozen=True, slots=True)
class _Resample:
    """Resampling what isn't a file's: once its header is known, the operation that does it."""

    target: Target

    def __call__(self, node: OpNode, infos: Sequence[Info]) -> Node:
        [info] = infos
        layout = info.layout
        name = describe(node.operands[0])
        if layout is None:  # a volume of AIMS, or what can't be resampled
            call = _ResampleObject(self.target, name)
            return OpNode(Op("resample", call), node.operands, ONE, None, node.location)
        nbytes, affine, header = layout.nbytes, info.affine, info.header
        given = Probe(
            name, layout.shape, layout.dtype, nbytes, nbytes, (), affine=affine, header=header
        )
        todo = self.target.resampling(name, given)
        return OpNode(Op("resample", Resampled(todo)), node.operands, ONE, None, node.location)


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """The operation on an array."""

    todo: Resampling

    @property
    def transient(self) -> int:
        return self.todo.transient

    @property
    def place(self) -> tuple[Any, Any, str]:
        """The affine and header of the result, and what they are of."""
        return self.todo.affine, self.todo.header, "what was resampled"

    def layout(self, layouts: list[Layout]) -> Layout:
        return dense(self.todo.shape, self.todo.dtype, "F")

    def __call__(self, values: Any) -> NDArray[Any]:
        out = self.layout([]).empty()
        taken = [range(size) for size in self.todo.shape]
        for volume in np.ndindex(*self.todo.shape[3:]):
            self.todo.sample(values[(..., *volume)], taken, out[(..., *volume)])
        return out


@dataclass(frozen=True, slots=True)
class _ResampleObject:
    """The operation on what is no array, of which nothing is known before it is there."""

    target: Target
    name: str

    def __call__(self, value: Any) -> Any:
        given = probe_of(value)
        if given is None:
            raise TypeError(f"{self.name} is no array: only volumes can be resampled")
        return self.target.resampling(self.name, given).of_aims(self.name, value)


def _place_of(like: Any) -> FileKey | Place:
    if isinstance(like, LazyReadData) and isinstance(like._node, FileNode):
        return like._node.key
    path = path_of(like)
    if path is not None:
        return file_key(path)
    shape, affine = getattr(like, "shape", None), getattr(like, "affine", None)
    if shape is None or affine is None or len(shape) < 3 or not np.isfinite(affine).all():
        raise TypeError(f"like={like!r}: give an image with an affine, its path, or a proxy")
    numbers = np.asarray(affine, np.float64).ravel()
    return Place(tuple(map(int, shape)), tuple(map(float, numbers)))


def _numbers(name: str, given: Sequence[Any], kind: type) -> tuple[Any, ...]:
    numbers = tuple(given)
    right = len(numbers) >= 3 and all(
        isinstance(number, int | float | np.integer | np.floating)
        and number == kind(number)
        and 0 < number < math.inf
        for number in numbers
    )
    if not right:
        raise ValueError(f"{name}={given!r}: give three numbers above 0, for x, y and z")
    return tuple(map(kind, numbers))


def _order(order: Any) -> int:
    if isinstance(order, bool) or order not in range(LARGEST_ORDER + 1):
        raise ValueError(f"resampling_order={order!r}: give a number from 0 to {LARGEST_ORDER}")
    return int(order)


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, int | float | complex):
        raise TypeError(f"default_value={value!r}: give a number")
    return value


def _dtype(given: Any) -> np.dtype[Any]:
    of_aims = dtype_of(given) if isinstance(given, str) else None
    dtype: np.dtype[Any] = np.dtype(given) if of_aims is None else of_aims
    if dtype.kind not in "biufcV":
        raise TypeError(f"dtype={given!r}: voxels are numbers")
    return dtype.newbyteorder("=")
