"""Textures in formulas: AIMS has no operators for them, so formulas are given their values."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazycache import writing
from lazycache.errors import LazyCacheError
from lazycache.express import express
from lazycache.expression import FileNode, Op
from lazycache.proxy import LazyReadData

EXTENSIONS = (".tex", ".gii")


def is_texture(proxy: LazyReadData) -> bool:
    """Whether a proxy of a file is of a texture that AIMS reads."""
    node = proxy._node
    assert isinstance(node, FileNode)
    if not node.key.path.lower().endswith(EXTENSIONS):
        return False
    try:
        return node.key.probe().kind.startswith("TimeTexture_")
    except (OSError, LazyCacheError):
        return False  # it is told with all that is wrong with other files


def values_of(proxy: LazyReadData) -> Any:
    """The values of a texture: a proxy of an array of (time steps, vertices)."""
    return express(_VALUES, [proxy])


def texture_of(values: Any, path: str, dtype: np.dtype[Any] | None) -> Any:
    """A proxy of a texture of ``values``, (time steps, vertices) or (vertices,), for a file."""
    operand = values if isinstance(values, LazyReadData) else LazyReadData(np.asarray(values))
    return express(Op("texture", _Texture(path, dtype)), [operand])


def _values(texture: Any) -> NDArray[Any]:
    steps = [np.asarray(texture[time]) for time in texture.keys()]  # noqa: SIM118 - no dict
    return np.array(steps)


_VALUES = Op("values", _values)


@dataclass(frozen=True, slots=True)
class _Texture:
    path: str
    dtype: np.dtype[Any] | None

    def layout(self, layouts: Any) -> None:
        return None

    def __call__(self, values: Any) -> Any:
        array = np.asarray(values)
        dtype = self.dtype or _stored(array.dtype)
        steps = np.transpose(writing.converted(array, dtype, self.path))
        return importlib.import_module("soma.aims").TimeTexture(np.ascontiguousarray(steps))


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type that a texture has for values of ``dtype``: there are none of bool or 64 bits."""
    if dtype.kind == "f":
        return np.dtype(np.float32)
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    return np.dtype(np.int32) if dtype.itemsize > 4 else dtype
