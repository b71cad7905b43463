"""What files of AIMS' own formats hold, seen without AIMS.

AIMS believes the counts in a file: cut short, a mesh may eat all memory, and the reading of a graph
never ends. So counts are held against the length of the file first; they also tell, exactly, what a
mesh or a texture will take in memory, and of a bucket how many voxels it has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from lazycache._aims import VOXEL_IN_BUCKET, itemsize_of
from lazycache.errors import ReadError

from .files import missing, truncated

_TOKEN = re.compile(r"\([^()]*\)|[^\s()]+")
# Text of a graph against what it becomes in memory, and voxels of its buckets likewise.
_GRAPH_GROWTH = 8
_SMALL = 512


class _Steps:
    """The counts in a file of time steps, passing over what they count."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._left = os.fstat(file.fileno()).st_size
        self._tokens: Iterator[str] | None = None
        start = self._take(5, "its header")
        if start == b"ascii":
            text = file.read().decode("ascii", "replace")
            self._tokens = (found.group() for found in _TOKEN.finditer(text))
            self.code = self._word("its header").strip()
            return
        order = self._take(4, "its header")
        if start != b"binar" or order not in (b"DCBA", b"ABCD"):
            raise ReadError(f"{path}: its header is not that of its format; get another copy of it")
        self._order = "<u4" if order == b"DCBA" else ">u4"
        self.code = self._take(self.count("its header"), "its header").decode("ascii", "replace")

    def count(self, what: str) -> int:
        if self._tokens is None:
            return int(np.frombuffer(self._take(4, what), self._order)[0])
        word = self._word(what)
        while re.match(r"-[a-z]", word):  # the name of what comes
            word = self._word(what)
        try:
            return int(float(word))
        except ValueError:
            raise ReadError(f"{self.path}: {word!r} where a number of {what} should be") from None

    def skip(self, count: int, itemsize: int, what: str) -> None:
        """Pass over ``count`` items, each a number or a point."""
        if self._tokens is not None:
            for _ in range(count):
                self._word(what)
            return
        nbytes = count * itemsize
        self._left -= nbytes
        if self._left < 0:
            raise truncated(self.path, f"the {count} items of {what}")
        self._file.seek(nbytes, os.SEEK_CUR)

    def _take(self, count: int, what: str) -> bytes:
        self._left -= count
        if self._left < 0:
            raise truncated(self.path, what)
        return self._file.read(count)

    def _word(self, what: str) -> str:
        assert self._tokens is not None
        word = next(self._tokens, None)
        if word is None:
            raise truncated(self.path, what)
        return word


def _looked(path: str, look: Callable[[_Steps], int]) -> int:
    with open(path, "rb") as file:
        return look(_Steps(path, file))


def mesh(path: str) -> int:
    """The bytes in memory of a ``.mesh``; raises what is wrong with it."""

    def look(steps: _Steps) -> int:
        sides = steps.count("its header")
        item = itemsize_of(steps.code) or 0
        nbytes = 0
        for _ in range(steps.count("its time steps")):
            steps.count("a time step")
            vertices = steps.count("a time step")
            steps.skip(vertices, 12, "the vertices")
            normals = steps.count("the normals")
            steps.skip(normals, 12, "the normals")
            steps.skip(steps.count("the texture"), item, "the texture")
            polygons = steps.count("the polygons")
            steps.skip(polygons, 4 * sides, "the polygons")
            # Normals that aren't there are made.
            nbytes += 24 * vertices + 4 * sides * polygons
        return nbytes

    return _looked(path, look)


def texture(path: str) -> int:
    """The bytes in memory of a ``.tex``; raises what is wrong with it."""

    def look(steps: _Steps) -> int:
        item = itemsize_of(steps.code) or 8
        nbytes = 0
        for _ in range(steps.count("its time steps")):
            steps.count("a time step")
            values = steps.count("a time step")
            steps.skip(values, item, "the values")
            nbytes += item * values
        return nbytes

    return _looked(path, look)


def bucket(path: str) -> int:
    """About the bytes in memory of a ``.bck``; raises what is wrong with it."""

    def look(steps: _Steps) -> int:
        item = itemsize_of(steps.code) or 0
        voxels = 0
        for _ in range(4):
            steps.count("its voxel size")
        for _ in range(steps.count("its time steps")):
            steps.count("a time step")
            count = steps.count("a time step")
            steps.skip(count, 6 + item, "the voxels")
            voxels += count
        return _SMALL + (VOXEL_IN_BUCKET + item) * voxels

    return _looked(path, look)


def transformation(path: str) -> int:
    """The bytes in memory of a ``.trm``; raises what is wrong with it."""
    with open(path, errors="replace") as file:
        words = file.read().split()
    if len(words) < 12:
        raise truncated(path, "its 12 numbers")
    return _SMALL


def graph(path: str) -> tuple[int, tuple[str, ...]]:
    """About the bytes in memory of an ``.arg``, and the files that are a part of it.

    Raises what is wrong with it.
    """
    folders = {"*"}
    depth = ended = 0
    with open(path, errors="replace") as file:
        for line in file:
            word, _, rest = line.strip().partition(" ")
            if word == "*BEGIN":
                depth += 1
            elif word == "*END":
                depth -= 1
                ended += 1
            elif word == "filename_base":
                folders.add(rest.strip())
    if depth > 0 or not ended:
        raise truncated(path, "the *END of its graph")
    base = os.path.splitext(path)[0]
    beside = os.path.dirname(path)
    places = [base + ".data" if name == "*" else os.path.join(beside, name) for name in folders]
    parts = sorted({file for place in places for file in _files_in(place)})
    nbytes = _GRAPH_GROWTH * os.path.getsize(path)
    for part in parts:
        nbytes += os.path.getsize(part) * (_GRAPH_GROWTH if part.endswith(".bck") else 1)
    return _SMALL + nbytes, tuple(parts)


def _files_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_file()]
    except OSError:
        return []


def gis(path: str, header: dict[str, Any], stored: int) -> tuple[str, ...]:
    """The files of a volume of GIS, of which ``path`` is one; raises if voxels are missing."""
    base = os.path.splitext(path)[0]
    image = base + ".ima"
    if not header.get("ascii"):
        _hold(image, 0, stored)
    return image, base + ".dim"


def check_side_files(path: str) -> None:
    """Raise for a ``.ima`` without its ``.dim``, and the other way round."""
    base, extension = os.path.splitext(path)
    other = base + {".ima": ".dim", ".dim": ".ima"}.get(extension.lower(), extension)
    if not os.path.exists(other):
        raise missing(other, path)


def nifti(path: str, stored: int) -> None:
    """Raise if voxels are missing in an uncompressed ``.nii``."""
    with open(path, "rb") as file:
        start = file.read(112)
    if len(start) < 112:
        raise truncated(path, "the end of its header")
    order = "<" if int.from_bytes(start[:4], "little") in (348, 540) else ">"
    if int(np.frombuffer(start, order + "i4", 1)[0]) == 348:
        offset = int(np.frombuffer(start, order + "f4", 1, 108)[0])
        _hold(path, offset, stored)


def _hold(path: str, offset: int, stored: int) -> None:
    if os.path.getsize(path) < offset + stored:
        raise truncated(path, f"the {stored} bytes of its voxels")
