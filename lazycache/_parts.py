"""Basic indices: spelled out for every axis, with positive steps, and what they do to an affine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Index = tuple[int | slice, ...]


def normalise(part: tuple[Any, ...], shape: tuple[int, ...]) -> Index:
    """``part`` with its Ellipsis spelled out: one int or slice for each axis of ``shape``."""
    given = sum(item is not Ellipsis for item in part)
    if given > len(shape):
        raise IndexError(f"{given} indices for an image of {len(shape)} axes, shape {shape}")
    fill = (slice(None),) * (len(shape) - given)
    at = next((i for i, item in enumerate(part) if item is Ellipsis), len(part))
    index: list[int | slice] = []
    for axis, item in enumerate((*part[:at], *fill, *part[at + 1 :])):
        if isinstance(item, slice):
            index.append(item)
            continue
        position = int(item)
        if not -shape[axis] <= position < shape[axis]:
            raise IndexError(f"index {position} is outside axis {axis} of an image {shape}")
        index.append(position % shape[axis])
    return tuple(
        item if isinstance(item, int) else slice(*_bounds(item, size))
        for item, size in zip(index, shape, strict=True)
    )


def _bounds(item: slice, size: int) -> tuple[int, int | None, int]:
    start, stop, step = item.indices(size)
    # Downwards to the first voxel, indices() says -1, which a slice takes for the last one.
    return start, (None if stop < 0 else stop), step


def forward(index: Index) -> tuple[Index, Index]:
    """``index`` with positive steps only, and the flips that make its result the same."""
    onward: list[int | slice] = []
    flips: list[slice] = []
    for item in index:
        if isinstance(item, int):
            onward.append(item)
            continue
        step = item.step or 1
        if step > 0:
            onward.append(item)
            flips.append(slice(None))
            continue
        taken = range(item.start, -1 if item.stop is None else item.stop, step)
        onward.append(slice(taken[-1], taken[0] + 1, -step) if taken else slice(0, 0, 1))
        flips.append(slice(None, None, -1))
    if all(flip.step is None for flip in flips):
        return tuple(onward), ()
    return tuple(onward), tuple(flips)


def backwards(part: tuple[Any, ...], ndim: int) -> tuple[bool, ...]:
    """Which of the ``ndim`` axes that ``part`` leaves run from the last voxel to the first."""
    at = next((i for i, item in enumerate(part) if item is Ellipsis), len(part))
    left, right = (
        [(item.step or 1) < 0 for item in items if isinstance(item, slice)]
        for items in (part[:at], part[at + 1 :])
    )
    return (*left, *[False] * (ndim - len(left) - len(right)), *right)


def sliced_affine(
    affine: NDArray[np.float64] | None, index: tuple[Any, ...], shape: tuple[int, ...]
) -> NDArray[np.float64] | None:
    """The affine of ``image[index]``; None when an axis of space is gone or was never there."""
    if affine is None:
        return None
    full = normalise(index, shape)
    steps = np.eye(4)
    for axis, item in enumerate(full[:3]):
        if isinstance(item, int):
            return None
        start, _, step = item.indices(shape[axis])
        steps[axis, axis] = step
        steps[axis, 3] = start
    return np.asarray(affine @ steps, dtype=np.float64)


def index_text(part: tuple[Any, ...]) -> str:
    return ", ".join(_item_text(item) for item in part)


def _item_text(item: Any) -> str:
    if item is Ellipsis:
        return "..."
    if not isinstance(item, slice):
        return str(item)
    ends = ["" if end is None else str(end) for end in (item.start, item.stop)]
    return ":".join(ends if item.step is None else [*ends, str(item.step)])
