"""What proxies are made from: paths, images of nibabel, and any other data."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from ._volumes import kind_of
from .expression import ValueNode, frozen


def path_of(data: Any) -> str | None:
    """The path that ``data`` is, or was loaded from; None for data in memory."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    nibabel = sys.modules.get("nibabel")
    if nibabel is None or not isinstance(data, nibabel.filebasedimages.FileBasedImage):
        return None
    # Only while its data are those of the file: an array may have been put in their place.
    if isinstance(data, nibabel.dataobj_images.DataobjImage) and nibabel.is_proxy(data.dataobj):
        path: str | None = data.get_filename()
        return path
    return None


def value_node(value: Any, name: str = "") -> ValueNode:
    """The node of data in memory; of an image of nibabel, its array, affine and header."""
    nibabel = sys.modules.get("nibabel")
    if nibabel is not None and isinstance(value, nibabel.spatialimages.SpatialImage):
        return ValueNode(frozen(np.asarray(value.dataobj)), name, value.affine, value.header)
    held = isinstance(value, np.ndarray) or kind_of(value)
    return ValueNode(frozen(value) if held else value, name)
