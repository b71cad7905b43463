"""Functions of users over many images, voxel by voxel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .expression import GridMode, Op
from .functions import over_images
from .proxy import LazyReadData
from .voxelwise import MapVoxels


def map_voxels(
    function: Callable[..., Any],
    images: Iterable[Any],
    *,
    mask: Any = None,
    args: Sequence[Any] = (),
    grid: GridMode | None = None,
) -> LazyReadData:
    """The values that ``function`` gives for each voxel of many ``images``, as one image.

    ``function(block, *args)`` is called with an (n, voxels) array, a row for each of the n images,
    and gives an array of (voxels,), or of (k, voxels) for k values of each voxel: the result has
    the shape of the images, with k as its last axis then. What it gives for a voxel must depend on
    the values of that voxel alone: it is called for one block of voxels after the other, however
    many there are in it. The type of the result is that of what it gives, found by a call with
    made-up values for a few voxels.

    With a ``mask`` (an image or an array of their shape) it sees only the voxels where that isn't
    0, and the result is 0 elsewhere. ``args`` are passed on as they are. ``grid`` says what to do
    where images lie on different grids, as in `LazyReadData`.

    All images are read block by block, together. An error of the function, or in what it gives,
    is raised when the result is computed.
    """
    # A list is not asked for its iterator: that of a PreloadList would begin to load.
    given = list.copy(images) if isinstance(images, list) else list(images)
    if not given:
        raise ValueError("map_voxels of an empty list: no image was given")
    items = given if mask is None else [*given, mask]
    name = getattr(function, "__name__", "function")
    op = Op(name, MapVoxels(function, tuple(args), mask is not None), "fold")
    return over_images(op, items, grid)
