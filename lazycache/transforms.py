"""Where voxels lie, and the transformations that bring an image from one place to another.

A `Grid` is three axes of voxels and their affine. `combined` makes, of everything that users give
as ``transform=``, the one matrix from the millimetres of the image to those of the result. Two
kinds of millimetres are in use:

- those of the headers' affines, as in nibabel: matrices given as arrays, ITK's and FSL's files;
- those of AIMS, counted in voxels times voxel size from the first voxel, the axes leading to the
  left, to the back and down: ``.trm`` files and the transformations of AIMS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import ReadError
from .grid import says_place
from .readers.base import Probe
from .readers.files import check_file

Affine = NDArray[Any]
Shape3 = tuple[int, int, int]

_INSIGHT = b"#Insight Transform File"


class Grid(NamedTuple):
    """Voxels in space: how many along each axis, and the affine from their indices to millimetres.

    Where a file says nothing of space (``placed`` is False) the millimetres are the indices times
    the size of a voxel. ``of_aims`` says that AIMS read it, so that its axes are as AIMS has them.
    """

    shape: Shape3
    affine: Affine
    placed: bool = True
    of_aims: bool = False

    @property
    def voxel_size(self) -> NDArray[Any]:
        lengths: NDArray[Any] = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return lengths

    @property
    def backwards(self) -> NDArray[np.bool_]:
        """Which axes AIMS counts from their end."""
        turned = self.placed and not self.of_aims
        return _aims_axes(self.affine)[1] if turned else np.zeros(3, bool)


def grid_of(probe: Probe, name: str) -> Grid:
    """The grid of an image of which ``probe`` tells. Raises `ReadError` for what is no volume."""
    if probe.shape is None or len(probe.shape) < 3 or 0 in probe.shape:
        what = "no array" if probe.shape is None else f"of shape {probe.shape}"
        raise ReadError(f"{name} is {what}: only volumes of three axes or more can be resampled")
    x, y, z = probe.shape[:3]
    of_aims = bool(probe.kind)
    if says_place(probe.affine):
        return Grid((x, y, z), np.array(probe.affine, np.float64), of_aims=of_aims)
    zooms: Any = (1.0,) * 3
    if of_aims:
        zooms = probe.header["voxel_size"]
    elif hasattr(probe.header, "get_zooms"):
        zooms = probe.header.get_zooms()
    sizes = [float(size) if np.isfinite(size) and size > 0 else 1.0 for size in zooms[:3]]
    return Grid((x, y, z), np.diag([*sizes, 1.0]), False, of_aims)


def resized(grid: Grid, shape: Shape3, voxel_size: Sequence[float], *, as_aims: bool) -> Grid:
    """The grid of ``shape`` along the axes of another, from the same first voxel on.

    The first one is that of the file, or the one that AIMS takes for the first.
    """
    factors = np.array(voxel_size, np.float64) / grid.voxel_size
    ends = (np.array(grid.shape) - 1) - (np.array(shape) - 1) * factors
    step = np.diag([*factors, 1.0])
    step[:3, 3] = np.where(grid.backwards, ends, 0) if as_aims else 0
    return Grid(shape, grid.affine @ step, grid.placed, grid.of_aims)


def in_aims_order(grid: Grid) -> Grid:
    """The same grid with its axes in the order and the directions in which AIMS has them."""
    if grid.of_aims or not grid.placed:
        return grid
    axes, backwards = _aims_axes(grid.affine)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for place, axis in enumerate(axes):
        turn[axis, place] = -1 if backwards[axis] else 1
        turn[axis, 3] = grid.shape[axis] - 1 if backwards[axis] else 0
    x, y, z = (grid.shape[axis] for axis in axes)
    return Grid((x, y, z), grid.affine @ turn, of_aims=True)


def aims_to_world(grid: Grid) -> Affine:
    """From the millimetres of AIMS to those of the affine."""
    if not grid.placed:
        return np.eye(4)
    turned = in_aims_order(grid)
    return turned.affine @ np.diag([*(1 / turned.voxel_size), 1.0])


def _aims_axes(affine: Affine) -> tuple[list[int], NDArray[np.bool_]]:
    """The axes that lead most along x, y and z, and which axes don't lead left, back or down."""
    cosines = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    left = np.abs(cosines)
    axes = [0, 0, 0]
    backwards = np.zeros(3, bool)
    for _ in range(3):
        world, axis = divmod(int(left.argmax()), 3)
        axes[world] = axis
        backwards[axis] = cosines[world, axis] > 0
        left[world] = left[:, axis] = -1
    return axes, backwards


# --- what users give -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix from input to output, row by row; ``of_aims`` says in whose millimetres."""

    numbers: tuple[float, ...]
    of_aims: bool = False

    def array(self) -> Affine:
        return np.array(self.numbers).reshape(4, 4)


@dataclass(frozen=True, slots=True)
class File:
    """A transformation in a file, by its absolute path."""

    path: str


Transform = Matrix | File


def as_transforms(given: Any) -> tuple[Transform, ...]:
    """What was given as ``transform=``, such that it can be compared, hashed and pickled.

    Nothing is read. Raises TypeError or ValueError for what is no transformation.
    """
    if given is None:
        return ()
    if isinstance(given, list | tuple) and not _is_matrix(given):
        return tuple(one for item in given for one in as_transforms(item))
    if isinstance(given, str | os.PathLike):
        return (File(os.path.abspath(os.fspath(given))),)
    if hasattr(given, "toMatrix"):
        return (_matrix(given.toMatrix(), of_aims=True),)
    if hasattr(given, "matrix"):  # nitransforms: from the reference to the moving image
        return (_matrix(np.linalg.inv(np.asarray(given.matrix, np.float64))),)
    return (_matrix(given),)


def _is_matrix(given: Sequence[Any]) -> bool:
    return len(given) == 4 and all(isinstance(row, list | tuple) and len(row) == 4 for row in given)


def _matrix(given: Any, *, of_aims: bool = False) -> Matrix:
    try:
        matrix = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (4, 4):
        raise TypeError(
            f"transform={given!r}: give a 4x4 matrix, a file (.trm, ITK's .txt, .tfm and .mat, "
            "FSL's .mat), a transformation of AIMS, or a list of these"
        )
    regular = np.isfinite(matrix).all() and abs(np.linalg.det(matrix[:3, :3])) > 1e-12
    if not regular or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(
            f"this is no affine transformation that can be inverted, with 0 0 0 1 as its last row: "
            f"{matrix.tolist()}"
        )
    return Matrix(tuple(map(float, matrix.ravel())), of_aims)


def read(transforms: Sequence[Transform]) -> list[Transform]:
    """``transforms`` with the matrices of files in their place, but for FSL's.

    Raises `ReadError` for a file that can't be read.
    """
    return [_read(one.path) if isinstance(one, File) else one for one in transforms]


def uses_aims(transforms: Sequence[Transform]) -> bool:
    """Whether any of those that were `read` is in the millimetres of AIMS."""
    return any(isinstance(one, Matrix) and one.of_aims for one in transforms)


def combined(transforms: Sequence[Transform], image: Grid, result: Grid) -> Affine:
    """The matrix from the millimetres of ``image`` to those of ``result``: the last applied first.

    Both are those of the affines. Matrices given as such are in them, unless AIMS read the image.
    ``transforms`` have been `read`. Raises ValueError for kinds that don't go together.
    """
    world: list[Affine] = []
    of_aims: list[Affine] = []
    for one in transforms:
        if isinstance(one, Matrix):
            (of_aims if one.of_aims or image.of_aims else world).append(one.array())
        elif len(transforms) == 1:
            world.append(_read_fsl(one.path, image, result))
        else:
            raise ValueError(
                f"{one.path}: FSL's matrices hold between two given images, and can't be combined "
                "in a list; give it alone, or the matrices"
            )
    if world and of_aims:
        raise ValueError(
            "transform= mixes transformations of AIMS (.trm) with matrices or files in the "
            "millimetres of the headers: convert them to one kind"
        )
    if not of_aims:
        return _product(world)
    return aims_to_world(result) @ _product(of_aims) @ np.linalg.inv(aims_to_world(image))


def _product(matrices: Sequence[Affine]) -> Affine:
    product = np.eye(4)
    for matrix in matrices:
        product = product @ matrix
    return product


def _read(path: str) -> Transform:
    """The matrix in a file; the file itself where that needs to know the two images."""
    check_file(path)
    content = Path(path).read_bytes()
    numbers = _numbers(content)
    if path.lower().endswith(".trm") or (numbers is not None and len(numbers) == 12):
        return _trm(path, numbers)
    if path.lower().endswith(".mat") and numbers is not None:
        return File(path)
    if not path.lower().endswith(".mat") and not content.startswith(_INSIGHT):
        raise ReadError(
            f"{path}: expected AIMS's .trm, ITK's text (it begins with '#Insight') or a .mat of "
            "ITK or FSL; read it yourself and give the 4x4 matrix"
        )
    with _told(path):
        return _matrix(np.linalg.inv(_from_itk(path)))


def _numbers(content: bytes) -> list[float] | None:
    try:
        return [float(word) for word in content.decode("ascii").split()]
    except ValueError:
        return None


def _trm(path: str, numbers: list[float] | None) -> Matrix:
    if numbers is None or len(numbers) != 12:
        raise ReadError(
            f"{path}: expected the 12 numbers of a .trm file, a translation and then three rows of "
            "a matrix"
        )
    matrix = np.eye(4)
    matrix[:3, 3] = numbers[:3]
    matrix[:3, :3] = np.reshape(numbers[3:], (3, 3))
    with _told(path):
        return _matrix(matrix, of_aims=True)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """One error for all that can be wrong with a file."""
    try:
        yield
    except ImportError as error:
        raise ReadError(
            f"{path}: reading it needs nitransforms: install it (lazycache-volumes[resample]), or "
            "give the 4x4 matrix"
        ) from error
    except Exception as error:
        raise ReadError(f"{path}: this affine transformation can't be read ({error})") from error


def _from_itk(path: str) -> Affine:
    from nitransforms.io.itk import ITKLinearTransform

    return np.asarray(ITKLinearTransform.from_filename(path).to_ras(), np.float64)


def _read_fsl(path: str, image: Grid, result: Grid) -> Affine:
    moving, reference = (
        SimpleNamespace(shape=grid.shape, affine=grid.affine) for grid in (image, result)
    )
    with _told(path):
        from nitransforms.io.fsl import FSLLinearTransform

        transform = FSLLinearTransform.from_filename(path)
        return np.linalg.inv(transform.to_ras(moving=moving, reference=reference))
