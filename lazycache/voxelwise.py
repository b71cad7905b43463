"""A function of users over many images, voxel by voxel, as an operation.

The function is given an (n, voxels) array, one row for each image, and gives an array of (voxels,)
or, with several values for each voxel, of (k, voxels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .expression import Info, Node, Op, OpNode, Slot
from .folds import check_shapes, in_volume
from .layout import Layout, dense, like
from .operations import ASTYPE

# The function is tried on as many made-up voxels, to see what it gives.
_SAMPLE = 4


@dataclass(frozen=True, slots=True, eq=False)
class MapVoxels:
    """Expands into the operation once the headers are known; the last operand may be a mask."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    masked: bool

    def __call__(self, node: OpNode, infos: Sequence[Info]) -> Node:
        check_shapes(node, infos)
        count = len(infos) - self.masked
        layouts = [info.layout for info in infos]
        if any(layout is None for layout in layouts):
            raise TypeError("map_voxels takes images; one of these is no array")
        sample = self._sample([layout.dtype for layout in layouts[:count]])
        several = len(sample) if sample.ndim > 1 else 0
        call = Voxelwise(self.function, self.args, count, several, sample.dtype)
        slots = [Slot(index) for index in range(count)]
        args = (slots, Slot(count)) if self.masked else (slots,)
        name = getattr(self.function, "__name__", "function")
        op = Op(name, call, into=call.into)
        operands = node.operands
        if self.masked:
            operands = (*operands[:-1], _turned(operands[-1], layouts[-1], layouts[0]))
        result = OpNode(op, operands, args, None, node.location, "ignore")
        return result if several else in_volume(node, result, infos)

    def _sample(self, dtypes: list[np.dtype[Any]]) -> NDArray[Any]:
        random = np.random.default_rng(0).random((len(dtypes), _SAMPLE)) * 100
        voxels = random.astype(np.result_type(*set(dtypes)))
        with np.errstate(all="ignore"):
            values = np.asarray(self.function(voxels, *self.args))
        if values.ndim not in (1, 2) or values.shape[-1] != _SAMPLE or values.dtype.hasobject:
            raise ValueError(
                f"the function of map_voxels was given an array of {voxels.shape} (images, voxels) "
                f"and must give one of ({_SAMPLE},) or (values, {_SAMPLE}); it gave "
                f"{values.dtype} {values.shape}"
            )
        return values


def _turned(mask: Node, layout: Layout, image: Layout) -> Node:
    """``mask`` in the memory order of an ``image``: in another it can't go by blocks with it."""
    wanted = like(image, layout.dtype)
    orders = (order for order in "CF" if dense(image.shape, layout.dtype, order) == wanted)
    order = next(orders, None)
    if layout == wanted or order is None:
        return mask
    return OpNode(ASTYPE, (mask,), (Slot(0), np.bool_), {"order": order})


@dataclass(frozen=True, slots=True, eq=False)
class Voxelwise:
    """``function`` of the values of each voxel in ``count`` images; 0 where the mask is 0."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    count: int
    several: int
    dtype: np.dtype[Any]

    def layout(self, layouts: list[Layout]) -> Layout:
        """That of the first image; several values for each voxel make a last, slowest axis."""
        plain = like(layouts[0], self.dtype)
        if not self.several:
            return plain
        strides = (*plain.strides, plain.nbytes)
        return Layout((*plain.shape, self.several), strides, self.dtype)

    def voxel_nbytes(self, dtypes: list[np.dtype[Any]]) -> int:
        """Bytes for each voxel of images (and a mask) of ``dtypes``: an estimate.

        Those of the block, of what the function gives, and as much again for what it takes.
        """
        common = np.result_type(*set(dtypes[: self.count])).itemsize
        values = max(1, self.several) * self.dtype.itemsize
        return 3 * (self.count * common + values)

    def transient(self, layouts: list[Layout]) -> int:
        """The bytes that it takes for all voxels at once."""
        each = self.voxel_nbytes([layout.dtype for layout in layouts])
        return each * math.prod(layouts[0].shape)

    def __call__(self, images: list[Any], mask: Any = None) -> NDArray[Any]:
        first = Layout(images[0].shape, images[0].strides, images[0].dtype)
        out = self.layout([first]).empty()
        self.into(out, images, mask)
        return out

    def into(self, out: NDArray[Any], images: list[Any], mask: Any = None) -> None:
        """The same, into an array of the shape of the images, and of the values at its end."""
        inside = ... if mask is None else np.asarray(mask, bool)
        voxels = np.stack([image[inside] for image in images])
        voxels = voxels.reshape(len(images), -1)
        if mask is not None:
            out.fill(0)
        count = voxels.shape[1]
        if count == 1:  # which NumPy would add up in another order than two
            voxels = np.repeat(voxels, 2, axis=1)
        if count:
            values = np.asarray(self.function(voxels, *self.args))
            expected = (self.several,) * bool(self.several) + voxels.shape[1:]
            if values.shape != expected:
                raise ValueError(
                    f"the function of map_voxels gave an array of {values.shape} for "
                    f"{voxels.shape} (images, voxels) where {expected} was expected"
                )
            values = values[..., :count]
            out[inside] = (values.T if self.several else values).reshape(out[inside].shape)
