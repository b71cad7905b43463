"""Surfaces and functions on them: GIFTI, given as nibabel's image.

Sizes come from the attributes of the XML elements: nothing is decoded to know them.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from lazycache import _buffers
from lazycache.errors import ReadError, UnknownFormatError

from .base import Probe, checkpoint
from .files import damaged, truncated
from .images import nibabel_module
from .streams import STEP, open_stream

_ENDED = ("no element found", "unclosed token", "unclosed CDATA section", "partial character")


def is_surface(path: str) -> bool:
    """Whether the name is that of a GIFTI file."""
    return path.lower().endswith((".gii", ".gii.gz", ".gii.bz2"))


_OBJECTS = 64 << 10


def probe(path: str) -> Probe:
    nbytes, text, external = _sizes(path)
    folder = os.path.dirname(path)
    return Probe(
        format="GIFTI",
        shape=None,
        dtype=None,
        nbytes=nbytes,
        # The parser holds the text of an array, and what it decompressed, beside the array; and
        # an image of several objects takes some memory even where its arrays are small.
        peak_nbytes=2 * nbytes + 2 * text + _OBJECTS,
        files=(path, *(os.path.join(folder, name) for name in external)),
    )


def read(path: str) -> Any:
    checkpoint()
    image, failure = None, Exception("it holds no image")
    try:
        image = nibabel_module("loadsave").load(path)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        failure = error
    if image is None:
        _sizes(path)  # says better what is wrong, where it is the XML
        raise damaged(path, failure) from failure
    checkpoint()
    for array in image.darrays:
        array.data = _buffers.readonly(np.asarray(array.data))
    return image


def _sizes(path: str) -> tuple[int, int, list[str]]:
    """(bytes of the arrays, bytes of text, names of files that hold arrays)."""
    from xml.parsers import expat

    codes = nibabel_module("nifti1").data_type_codes

    nbytes = 0
    external: list[str] = []
    root: list[str] = []

    def started(tag: str, attributes: dict[str, str]) -> None:
        nonlocal nbytes
        root.append(tag)
        if tag != "DataArray":
            return
        sizes = [int(attributes[f"Dim{i}"]) for i in range(int(attributes["Dimensionality"]))]
        itemsize = np.dtype(codes.dtype[attributes["DataType"]]).itemsize
        nbytes += math.prod(sizes) * itemsize
        name = attributes.get("ExternalFileName")
        if name and name not in external:
            external.append(name)

    parser = expat.ParserCreate()
    parser.StartElementHandler = started
    stream = open_stream(path)
    try:
        while chunk := stream.read(STEP):
            parser.Parse(chunk, False)
            checkpoint()
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        if expat.ErrorString(error.code) in _ENDED:
            raise truncated(path, "the end of its XML") from error
        if not root:
            raise UnknownFormatError(
                f"{path}: its name says GIFTI, its content is no XML"
            ) from error
        raise damaged(path, error) from error
    except (KeyError, ValueError) as error:
        raise ReadError(f"{path}: an array's attributes can't be understood ({error})") from error
    finally:
        stream.close()
    if root[0] != "GIFTI":
        raise UnknownFormatError(f"{path}: its name says GIFTI, its content is <{root[0]}>")
    return nbytes, stream.position, external
