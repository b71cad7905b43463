"""Whatever AIMS reads, as its own objects, where ``soma.aims`` is installed.

It is chosen for what nobody else reads, and for other files by ``reader="aims"``, an
``aims.Reader(...)``, or an argument that only AIMS knows. AIMS' Finder tells what a file holds.
Files that AIMS can't be left alone with are looked at first, see `aims_files`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lazycache._aims import VOLUME, code_of, dtype_of, header_of, itemsize_of, kind_of
from lazycache.errors import ReadError, UnknownFormatError

from . import aims_files, surfaces
from .base import Probe, checkpoint
from .files import check_file

# What only AIMS reads, and what it reads as well.
ALONE = (".ima", ".dim", ".mesh", ".tex", ".trm", ".bck", ".arg", ".bundles", ".ply")
_ALSO = (".nii", ".nii.gz", ".img", ".hdr", ".gii", ".mnc", ".v", ".dcm", ".tif", ".tiff")
_PARTS = tuple(first + axis for axis in "xyzt" for first in "os")
# Arguments that nobody but AIMS knows.
_ARGUMENTS = frozenset({"allocator_context", "allocmode", "border", "frame", "options", *_PARTS})

_TYPES = {
    "Mesh": "AimsTimeSurface_3",
    "Segments": "AimsTimeSurface_2",
    "Mesh4": "AimsTimeSurface_4",
    "Texture": "TimeTexture",
    "Bucket": "BucketMap",
}
_ALONE_STANDING = ("Graph", "AffineTransformation3d")
_GROWTH = 4  # of a file of which nothing more is known

_lock = threading.RLock()
_ready: Any = None


def _unlock_in_child() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def module(path: str) -> Any:
    """``soma.aims`` with its plug-ins loaded, which must have ended before any thread reads."""
    global _ready
    try:
        aims = importlib.import_module("soma.aims")
    except ImportError as error:
        raise UnknownFormatError(
            f"{path}: AIMS reads it, and soma.aims isn't installed here ({error}). It is a part of "
            "BrainVISA (https://brainvisa.info): install it from BrainVISA's conda or pixi "
            "channel; it is not on PyPI"
        ) from error
    if _ready is not aims:
        with _lock:
            if _ready is not aims:
                aims.carto.PluginLoader.load()
                _ready = aims
    return aims


def get_ready() -> None:
    """Load AIMS in the main thread, where its plug-ins are best loaded, if it is installed."""
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(Exception):  # who reads is told
            module("")


def asked_for(options: Mapping[str, Any], dtype: Any) -> bool:
    """Whether these are arguments that only AIMS knows."""
    named = isinstance(dtype, str) and dtype.startswith(VOLUME)
    return named or not _ARGUMENTS.isdisjoint(options)


def reads_alone(path: str) -> bool:
    """Whether nobody but AIMS reads a file of this name, or a part of a file so written."""
    file, part, _ = path.partition("?")
    return file.lower().endswith(ALONE) or (bool(part) and file.lower().endswith(_ALSO))


def is_reader(obj: Any) -> bool:
    """Whether ``obj`` is an ``aims.Reader``."""
    kinds = type(obj).__mro__
    return any(kind.__module__ == "soma.aims" and kind.__name__ == "Reader" for kind in kinds)


class AimsReader:
    """Reads what AIMS reads, through ``given``, an ``aims.Reader``, if there is one.

    Options are those of ``aims.read``: ``border``, ``frame``, ``allocator_context`` (or
    ``allocmode``), and all others as its ``options``, of which each read gets a copy. ``dtype``
    converts volumes.
    """

    __slots__ = ("given",)

    name = "aims"
    converts = True

    def __init__(self, given: Any = None) -> None:
        self.given = given

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AimsReader) and other.given is self.given

    def __hash__(self) -> int:
        return hash((AimsReader, id(self.given)))

    def __repr__(self) -> str:
        return "<reader aims>"

    def __reduce__(self) -> tuple[Any, ...]:
        return AimsReader, (self.given,)

    def can_read(self, path: str) -> bool:
        return path.partition("?")[0].lower().endswith((*ALONE, *_ALSO))

    def probe(self, path: str, *, dtype: DTypeLike | None = None, **options: Any) -> Probe:
        return self._look(_Request.of(path, dtype, options, self.given))

    def read(self, path: str, *, dtype: DTypeLike | None = None, **options: Any) -> Any:
        request = _Request.of(path, dtype, options, self.given)
        # Before AIMS sees the file: some would never be read to an end.
        probe = self._look(request)
        checkpoint()
        aims = module(request.file)
        if self.given is None:
            reader = aims.Reader(allocmode=request.allocmode, options=request.options)
        else:
            reader = copy.copy(self.given)
            reader.options = request.options or None
            if request.allocmode is not None:
                reader.allocmode = request.allocmode
        arguments = dict(request.arguments)
        if request.dtype is not None:
            arguments["dtype"] = probe.kind
        with _noise() as noise:
            try:
                value = reader.read(request.path, **arguments)
            except MemoryError:
                raise
            except Exception as error:
                raise _failure(request.file, error, noise()) from error
        checkpoint()
        return value

    def _look(self, request: _Request) -> Probe:
        path = request.file
        check_file(path)
        finder = module(path).Finder()
        aims_files.check_side_files(path)
        try:
            known = finder.check(path)
        except Exception as error:
            raise _failure(path, error, "") from error
        if not known:
            raise UnknownFormatError(
                f"{path}: AIMS doesn't know its format; its content isn't what its name says, or "
                f"it is damaged"
            )
        header = header_of(finder)
        found = _Found(path, finder.format(), finder.objectType(), finder.dataType(), header)
        if found.object == "Volume":
            return _volume(request, found)
        if request.dtype is not None:
            raise ReadError(
                f"{path} is a {found.object}, which can't be converted: leave dtype={request.dtype}"
                " out"
            )
        return _thing(found)


@dataclass(slots=True)
class _Request:
    """What of a file is asked for: ``arguments`` and ``options`` for ``aims.read``."""

    path: str
    file: str
    dtype: np.dtype[Any] | None
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    allocmode: Any = None
    part: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, path: str, dtype: DTypeLike | None, options: dict[str, Any], given: Any
    ) -> _Request:
        file, _, query = path.partition("?")
        request = cls(path, file, None if dtype is None else np.dtype(dtype))
        if given is not None:
            request.options |= getattr(given, "options", None) or {}
        for name, value in options.items():
            if name in ("allocator_context", "allocmode"):
                request.allocmode = value
            elif name == "options":
                request.options |= value or {}
            elif name == "frame" or (name == "border" and value):
                request.arguments[name] = value
            elif name == "object":
                raise TypeError("object= fills an object of yours, which can't be cached; leave it")
            else:
                request.options[name] = value
        asked = {**dict(pair.partition("=")[::2] for pair in query.split("&")), **request.options}
        asked |= request.arguments
        for name in (*_PARTS, "border", "frame"):
            if name in asked:
                request.part[name] = _whole(path, name, asked[name])
        return request


def _whole(path: str, name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ReadError(f"{path}: {name}={value!r} is no whole number") from None


@dataclass(slots=True)
class _Found:
    """What AIMS' Finder says."""

    path: str
    format: str
    object: str
    data: str
    header: dict[str, Any]

    def probe(
        self, nbytes: int, peak_nbytes: int, files: tuple[str, ...] = (), **more: Any
    ) -> Probe:
        kind = self.object
        if kind not in _ALONE_STANDING:
            kind = f"{_TYPES.get(kind, kind)}_{self.data}"
        side = self.path + ".minf"
        files = tuple(dict.fromkeys((self.path, *files, *([side] if os.path.exists(side) else []))))
        more = {"kind": kind, "header": self.header, **more}
        return Probe(
            format=self.format,
            nbytes=nbytes,
            peak_nbytes=max(nbytes, peak_nbytes),
            files=files,
            **{"shape": None, "dtype": None, **more},
        )


def _volume(request: _Request, found: _Found) -> Probe:
    path, header = found.path, found.header
    whole = tuple(int(size) for size in header["volume_dimension"])
    shape, start = _part(request, whole)
    code = found.data
    if request.dtype is not None:
        wanted = code_of(request.dtype)
        if wanted is None:
            raise ReadError(f"{path}: AIMS has no volumes of {request.dtype}; convert once loaded")
        code = wanted
    item = itemsize_of(code) or 8
    border = 2 * max(0, request.part.get("border", 0))
    voxels = math.prod(size + border * (axis < 3) for axis, size in enumerate(shape))
    nbytes = voxels * item
    disk = str(header.get("disk_data_type", found.data))
    item_on_disk = int(header.get("bits_allocated", 8 * (itemsize_of(disk) or 8))) // 8
    stored = math.prod(whole) * item_on_disk
    files: tuple[str, ...] = ()
    if found.format == "GIS":
        files = aims_files.gis(path, header, stored)
        peak = nbytes + nbytes // 20 + (stored if code != found.data else 0)
    else:
        if path.lower().endswith(".nii"):
            aims_files.nifti(path, stored)
        # All that is on the disk, uncompressed, beside the data.
        peak = nbytes + nbytes // 100 + stored
    reason = ""
    if request.dtype is not None and code != found.data:
        reason = "asked for"
    elif disk != code:
        reason = f"{disk} on disk, with a scl_slope"
    dtype = dtype_of(code)
    return found.probe(
        nbytes,
        peak,
        files,
        shape=None if dtype is None else shape,
        dtype=dtype,
        order="F",
        affine=_affine(header, start),
        dtype_reason=reason,
        kind=VOLUME + code,
    )


def _part(request: _Request, whole: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
    """(sizes, first voxel) of what is asked for."""
    part = request.part
    sizes, start = list(whole), [0] * len(whole)
    for axis, letter in enumerate("xyzt"[: len(whole)]):
        start[axis] = part.get("o" + letter, 0)
        sizes[axis] = part.get("s" + letter, whole[axis] - start[axis])
        if not 0 <= start[axis] < start[axis] + sizes[axis] <= whole[axis]:
            raise ReadError(
                f"{request.path}: from {start[axis]} on there are no {sizes[axis]} voxels along "
                f"{letter}, where the file has {whole[axis]}"
            )
    frame = part.get("frame", -1)
    if frame >= 0 and len(whole) > 3:
        if frame >= whole[3]:
            raise ReadError(f"{request.path}: no frame {frame}, where the file has {whole[3]}")
        start[3], sizes[3] = frame, 1
    return tuple(sizes), start


def probe_of(volume: Any) -> Probe | None:
    """What a file would tell of a volume of AIMS; None for any other object."""
    if not kind_of(volume).startswith(VOLUME):
        return None
    values, header = np.asarray(volume), header_of(volume)
    affine = _affine(header, [0, 0, 0])
    return Probe(
        "AIMS", values.shape, values.dtype, values.nbytes, values.nbytes, (), "F", affine, header,
        kind=kind_of(volume),
    )  # fmt: skip


def _affine(header: dict[str, Any], start: list[int]) -> NDArray[np.float64] | None:
    """Voxels to millimetres, in the first space that the header knows."""
    spaces = header.get("transformations") or []
    if not spaces:
        return None
    affine = np.array(spaces[0], np.float64).reshape(4, 4)
    affine[:3, :3] *= [float(size) for size in header["voxel_size"][:3]]
    affine[:3, 3] += affine[:3, :3] @ start[:3]
    affine.flags.writeable = False
    return affine


def _thing(found: _Found) -> Probe:
    """Of what is no volume."""
    path, header = found.path, found.header
    size = os.path.getsize(path)
    files: tuple[str, ...] = ()
    extension = os.path.splitext(path)[1].lower()
    small = 1 << 16
    if extension == ".gii":
        known = surfaces.probe(path)
        nbytes, more = known.nbytes, known.peak_nbytes - known.nbytes
        if found.object == "Mesh":
            nbytes = _counted(header) or nbytes
    elif extension == ".mesh":
        nbytes = aims_files.mesh(path)
        more = nbytes // 20 + small
    elif extension == ".tex":
        nbytes = aims_files.texture(path)
        more = nbytes // 20 + small
    elif extension == ".bck":
        nbytes = aims_files.bucket(path)
        more = nbytes
    elif extension == ".trm":
        nbytes = aims_files.transformation(path)
        more = nbytes
    elif extension == ".arg":
        nbytes, files = aims_files.graph(path)
        more = nbytes
    else:
        nbytes = _counted(header) or _GROWTH * size
        more = nbytes + small
    return found.probe(nbytes, nbytes + more, files)


def _counted(header: dict[str, Any]) -> int:
    """The bytes of a mesh whose header counts everything, else 0."""
    names = ("vertex_number", "polygon_number", "polygon_dimension")
    if not all(name in header for name in names):
        return 0
    vertices, polygons, sides = (int(header[name]) for name in names)
    return int(header.get("nb_t_pos", 1)) * (24 * vertices + 4 * sides * polygons)


def _failure(path: str, error: Exception, noise: str) -> ReadError:
    """The one error for all that AIMS says of a file that it can't read."""
    text = str(error)
    if "Unknown file format" in text or "Unsupported object type" in text:
        return UnknownFormatError(f"{path}: AIMS doesn't read it ({text})")
    said = "; ".join(dict.fromkeys(filter(None, (line.strip() for line in noise.splitlines()))))
    reason = f"{text}; {said}" if said else text
    if text == "unknown":
        reason = (
            f"AIMS can't read it and doesn't say why: it may be truncated or damaged ({reason})"
        )
        return ReadError(f"{path}: {reason}; get another copy of it")
    return ReadError(f"{path}: AIMS can't read it ({reason}); get another copy of it")


@contextlib.contextmanager
def _noise() -> Iterator[Any]:
    """What is written to the standard error of the process meanwhile, for an error to tell.

    Only where this is the only thread: the file belongs to all. What no error told is written
    there afterwards.
    """
    if threading.active_count() > 1:
        yield lambda: ""
        return
    told = False
    with tempfile.TemporaryFile() as kept:

        def noise() -> str:
            nonlocal told
            told = True
            kept.seek(0)
            return kept.read().decode("utf-8", "replace")

        sys.stderr.flush()
        real = os.dup(2)
        try:
            os.dup2(kept.fileno(), 2)
            yield noise
        finally:
            os.dup2(real, 2)
            os.close(real)
            if not told:
                kept.seek(0)
                os.write(2, kept.read())
