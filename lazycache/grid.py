"""Whether images lie on one grid, and how their axes go together.

An affine is the 4x4 matrix from voxel indices to millimetres, as in nibabel. Two affines put a
grid at the same place if they put each of its eight corners at the same place, to within a
twentieth of the smallest voxel edge: rounding in headers stays below that, a shift by half a
voxel or a flipped axis doesn't.

What has no affine, or one with NaN or infinities, says nothing of space and is never compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ._frames import warn
from .errors import GridMismatchError, GridMismatchWarning, ShapeMismatchError

Affine = NDArray[Any]
Shape = tuple[int, ...]
GridMode = Literal["error", "warn", "ignore"]

# Of the smallest voxel edge: how far apart two grids may be and still be one.
TOLERANCE = 0.05
# How many mismatches one message lists.
LISTED = 20

_CORNERS = np.array(list(product((0, 1), repeat=3)), np.float64)


def displacement(a: Affine, b: Affine, shape: Shape) -> float:
    """The millimetres by which two affines put the farthest corner of a grid apart.

    The corners are the outer ones of the corner voxels of the first three axes of ``shape``;
    axes that aren't there count as one voxel.
    """
    sides = np.array((*shape[:3], 1, 1, 1)[:3], np.float64)
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    moved = (_CORNERS * sides - 0.5) @ difference[:3, :3].T + difference[:3, 3]
    return float(np.sqrt((moved**2).sum(axis=1)).max())


def smallest_edge(affine: Affine) -> float:
    """The shortest edge of a voxel, in millimetres; edges of no length aside, 0 if all are so."""
    edges = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(axis=0))
    return float(min(edges[edges > 0], default=0.0))


def same_grid(a: Affine | None, b: Affine | None, shape: Shape) -> bool:
    """Whether two affines put a grid of ``shape`` at one place; True if one says nothing."""
    if a is b or (a is not None and b is not None and a.tobytes() == b.tobytes()):
        return True
    if says_place(a) and says_place(b):
        return displacement(a, b, shape) <= TOLERANCE * min(smallest_edge(a), smallest_edge(b))
    return True


def says_place(affine: Affine | None) -> TypeGuard[Affine]:
    """Whether an affine says where its voxels are: it is there, and all its numbers are finite."""
    return affine is not None and bool(np.isfinite(np.asarray(affine, np.float64)).all())


def orientation(affine: Affine) -> str:
    """Where the first three axes lead, as in "RAS"; "?" for an axis that leads nowhere."""
    matrix = np.asarray(affine, np.float64)[:3, :3]
    lengths = np.sqrt((matrix**2).sum(axis=0))
    cosines = matrix / np.where(lengths > 0, lengths, 1)
    left = np.abs(cosines)
    codes = ["?", "?", "?"]
    while left.any():
        world, axis = divmod(int(left.argmax()), 3)
        codes[axis] = ("LR", "PA", "IS")[world][int(cosines[world, axis] > 0)]
        left[world] = left[:, axis] = 0
    return "".join(codes)


def grid_mismatches(items: Sequence[tuple[str, Affine | None, Shape]]) -> list[str]:
    """One line for each item that lies elsewhere than the first item that says a place.

    An item is the name of a file, its affine or None, and its shape. Names are told once.
    """
    placed = [(name, affine, shape) for name, affine, shape in items if says_place(affine)]
    lines: dict[str, str] = {}
    for name, affine, shape in placed[1:]:
        first_name, first, first_shape = placed[0]
        corners = _larger(shape, first_shape)
        if not same_grid(affine, first, corners):
            lines[name] = (
                f"{name} ({orientation(affine)}) lies up to "
                f"{displacement(affine, first, corners):.4g} mm from "
                f"{first_name} ({orientation(first)})"
            )
    return list(lines.values())


def _larger(a: Shape, b: Shape) -> Shape:
    return tuple(max(pair) for pair in zip(align(a[:3], 3), align(b[:3], 3), strict=True))


def check_grids(
    items: Sequence[tuple[str, Affine | None, Shape]], mode: GridMode = "error"
) -> None:
    """Raise `GridMismatchError`, or warn or do nothing, unless all items lie on one grid.

    An item is the name of a file, its affine or None, and its shape; each is compared with the
    first that has an affine. One message lists the first 20 that lie elsewhere: the
    millimetres, the orientations, and what to write.
    """
    if mode not in ("error", "warn", "ignore"):
        raise ValueError(f'grid={mode!r} is not known: write "error", "warn" or "ignore"')
    if mode == "ignore":
        return
    lines = grid_mismatches(items)
    if not lines:
        return
    found = f"images lie on different grids: {listed(lines)}. "
    if mode == "warn":
        warn(f"{found}They are combined voxel by voxel all the same.", GridMismatchWarning)
    else:
        first = next(name for name, affine, _ in items if says_place(affine))
        raise GridMismatchError(
            f'{found}Resample them onto one with like={first!r}, or write grid="warn" or '
            'grid="ignore" to combine them voxel by voxel'
        )


def listed(lines: Sequence[str]) -> str:
    """The first 20 of ``lines`` in one text, and how many more there are."""
    more = len(lines) - LISTED
    return "; ".join(lines[:LISTED]) + (f"; and {more} more" if more > 0 else "")


# --- shapes --------------------------------------------------------------------------------------


def align(shape: Shape, ndim: int) -> Shape:
    """``shape`` with axes of length 1 behind it, up to ``ndim``: x, y, z stay where they are."""
    return shape + (1,) * (ndim - len(shape))


def aligned_shapes(shapes: Sequence[tuple[Shape, bool]]) -> list[Shape]:
    """The shapes that operands must be given so that NumPy's broadcasting is right.

    The flag says whether the operand has a grid. Those that do align at x, y, z: a 3D mask
    with a 4D run becomes (x, y, z, 1). The others align at their last axes, as NumPy does, and
    stay as they are.
    """
    ndim = max((len(shape) for shape, has_grid in shapes if has_grid), default=0)
    return [align(shape, ndim) if has_grid else shape for shape, has_grid in shapes]


def common_shape(items: Sequence[tuple[str, Shape, bool]]) -> Shape:
    """The shape of an element-wise operation on operands (name, shape, has a grid).

    Raises `ShapeMismatchError`, which lists the first 20 operands that don't go with one before
    them, both with their names and shapes.
    """
    lines = list(_shape_mismatches(items))
    if lines:
        raise ShapeMismatchError(
            f"shapes don't go together: {listed(lines)}. Each axis must have one length, or 1; "
            "images align at x, y, z, arrays without a grid at their last axes (array[..., None] "
            "adds one)"
        )
    return np.broadcast_shapes(*aligned_shapes([item[1:] for item in items]))


def _shape_mismatches(items: Sequence[tuple[str, Shape, bool]]) -> Iterator[str]:
    # The axes from the last to the first, each with the first operand that is longer than 1.
    decided: dict[int, int] = {}
    aligned = aligned_shapes([item[1:] for item in items])
    for number, shape in enumerate(aligned):
        for axis, length in enumerate(reversed(shape)):
            if length == 1:
                continue
            first = decided.setdefault(axis, number)
            if aligned[first][-1 - axis] != length:
                (a, a_shape, _), (b, b_shape, _) = items[number], items[first]
                yield f"{a} {a_shape} with {b} {b_shape}"
                break
