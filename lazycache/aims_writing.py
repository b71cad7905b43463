"""Writing the objects of AIMS through AIMS, which keeps their headers.

AIMS says little of what goes wrong, and takes any name for a success: so names are checked before,
and what was written is looked at before it is put in its place.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import _aims, _volumes, writing
from ._sinks import Scratch
from .errors import WriteError

# What AIMS writes of each kind of object, by the beginning of the name of its type.
_WRITES = {
    _aims.VOLUME: (".ima", ".nii", ".nii.gz"),
    "AimsTimeSurface_": (".mesh", ".gii"),
    "TimeTexture_": (".tex", ".gii"),
    "BucketMap_": (".bck",),
    "AffineTransformation3d": (".trm",),
    "Graph": (".arg",),
}
_ALL = tuple(dict.fromkeys(name for names in _WRITES.values() for name in names))


def is_for_aims(path: str) -> bool:
    """Whether only AIMS writes a file of this name."""
    name = os.path.basename(path).lower()
    return name.endswith(_ALL) and name not in _ALL and not name.endswith(writing.EXTENSIONS)


def writer_for(path: str) -> Any:
    """What writes files that only AIMS writes; None for others. Raises WriteError without AIMS."""
    if not is_for_aims(path):
        return None
    try:
        importlib.import_module("soma.aims")
    except ImportError as error:
        raise WriteError(
            f"{path}: AIMS writes this, and soma.aims isn't installed here ({error}); use a name "
            "that ends in .nii.gz"
        ) from error
    return write


def takes(path: str, kind: str) -> bool:
    """Whether AIMS writes an object of the type called ``kind`` to a file of this name."""
    return path.lower().endswith(_extensions(kind))


def check_kind(path: str, kind: str) -> None:
    """Raise WriteError where an object of this type, or "" for an array, can't go to the file."""
    if kind and not takes(path, kind) and not (_volumes.is_known(kind) and not is_for_aims(path)):
        known = ", ".join(_extensions(kind)) or "nothing"
        raise WriteError(f"{path}: can't write a {kind} there; AIMS writes it as {known}")
    if not kind and is_for_aims(path):
        raise WriteError(
            f"{path}: the result is an array, and this holds objects of AIMS: use a name that ends "
            f'in .nii.gz or .npy, or read the files with reader="aims"'
        )


def _extensions(kind: str) -> tuple[str, ...]:
    return next((names for start, names in _WRITES.items() if kind.startswith(start)), ())


def write(path: str, value: Any, dtype: DTypeLike | None = None) -> None:
    """Write an object of AIMS, volumes as ``dtype`` if one is given.

    Its files come into their places when all are whole. Raises WriteError; what stood at ``path``
    before does so then.
    """
    options: dict[str, Any] = {}
    if _volumes.kind_of(value):
        value = _converted(path, value, dtype)
        # Else NIfTI gets numbers at equal distances as scaled int16, and not quite the same ones.
        options["options"] = {"force_disk_data_type": True}
    elif dtype is not None:
        raise WriteError(f"{path}: a {_aims.kind_of(value)} can't be converted: leave dtype out")
    aims = importlib.import_module("soma.aims")
    with writing.told(path), Scratch(path) as scratch:
        try:
            aims.write(value, scratch.path, **options)
        except OSError:
            raise
        except Exception as error:
            raise WriteError(f"{path}: AIMS can't write it ({error})") from error
        if not os.path.exists(scratch.path) or not os.path.getsize(scratch.path):
            raise WriteError(f"{path}: AIMS wrote nothing, and says nothing of it")
        writing.move(scratch, path)


def _converted(path: str, volume: Any, dtype: DTypeLike | None) -> Any:
    array = np.asarray(volume)
    if dtype is None and array.dtype != np.bool_:
        return volume
    wanted = np.dtype(np.uint8 if dtype is None else dtype)
    if wanted == array.dtype:
        return volume
    if _aims.code_of(wanted) is None:
        raise WriteError(f"{path}: AIMS has no volumes of {wanted}; use another dtype")
    return _volumes.with_header(writing.converted(array, wanted, path), volume)
