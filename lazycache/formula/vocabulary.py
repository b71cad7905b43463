"""The names that a formula may use; everything else is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache

import numpy as np

from lazycache import functions

from .syntax import is_keyword


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = frozenset(functions.__all__)
"""Functions of `lazycache.functions`, over a list of images or one image, by their bare names."""

ELEMENTWISE = frozenset(
    name
    for name in FUNCTIONS
    if name in ("where", "clip", "round") or isinstance(getattr(np, name, None), np.ufunc)
)
"""Those of them that take images one by one, and no list."""

BUILTINS = frozenset(("len", "range", "zip", "enumerate"))

TYPES = {"float": float, "int": int, "bool": bool}
"""Names that say a dtype; they can't be called."""

METHODS = _words("""
    mean sum std var min max prod any all argmin argmax cumsum round clip astype
    transpose swapaxes squeeze reshape ravel conj
    """)
ATTRIBUTES = frozenset(("shape", "ndim", "size", "dtype", "T", "real", "imag"))

KEYWORDS = _words("""
    axis dtype ddof keepdims where initial q method decimals nan posinf neginf a_min a_max min max
    casting order axes strict start like
    """)
"""Names of arguments. ``out`` is missing: nothing in a formula is written to."""

TEXT_KEYWORDS = frozenset(("dtype", "method", "casting", "order"))
"""Arguments whose value may be a text."""

_NUMPY_CONSTANTS = frozenset(("pi", "e", "nan", "inf", "newaxis"))
_NUMPY_TYPES = _words("""
    bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 intp float16 float32 float64
    longdouble single double half complex64 complex128
    """)
_NUMPY_FUNCTIONS = _words("""
    where clip select nan_to_num round around fix sinc i0 angle real imag interp isclose isneginf
    isposinf isreal iscomplex digitize heaviside
    sum prod mean std var min max amin amax ptp median average percentile quantile any all
    argmin argmax count_nonzero cumsum cumprod
    nansum nanprod nanmean nanstd nanvar nanmin nanmax nanmedian nanpercentile nanquantile
    nanargmin nanargmax
    array asarray stack concatenate transpose moveaxis swapaxes squeeze expand_dims reshape ravel
    flip roll rot90 zeros_like ones_like full_like dtype result_type
    """)
# These give two arrays, or work on whole matrices.
_NOT_ELEMENTWISE = frozenset(("divmod", "modf", "frexp", "matmul", "vecdot", "matvec", "vecmat"))


@cache
def numpy_names() -> frozenset[str]:
    """What may follow ``np.``: element-wise functions, reductions, dtypes and constants."""
    ufuncs = {name for name in np.__all__ if isinstance(getattr(np, name), np.ufunc)}
    listed = _NUMPY_CONSTANTS | _NUMPY_TYPES | _NUMPY_FUNCTIONS
    present = {name for name in listed if hasattr(np, name)}
    return frozenset(ufuncs - _NOT_ELEMENTWISE | present)


def is_numpy_function(name: str) -> bool:
    """Whether ``np.<name>`` can be called on images (a dtype takes numbers only)."""
    return name not in _NUMPY_CONSTANTS and name not in _NUMPY_TYPES


def is_numpy_type(name: str) -> bool:
    return name in _NUMPY_TYPES


_NUMBERED = re.compile(r"I(0|[1-9]\d{0,8})")
_RESERVED = FUNCTIONS | BUILTINS | TYPES.keys() | {"np", "numpy", "image", "images"}


def image_number(name: str) -> int | None:
    """7 for ``I7``; None for any other name."""
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def naming_fault(name: str) -> str | None:
    """Why ``name`` can't name an input or a loop's variable; None if it can."""
    if not name.isidentifier() or is_keyword(name):
        return f"{name!r} is no name: use letters, digits and _, not a digit first"
    if name.startswith("_"):
        return f"{name!r} begins with an underscore: choose another name"
    if name in _RESERVED or image_number(name) is not None:
        return f"{name!r} already has a meaning in formulas: choose another name"
    return None


def close(name: str, known: Iterable[str]) -> str:
    """``": did you mean a or b?"`` for the names like ``name``, or nothing."""
    candidates = sorted(known)
    found = [other for other in candidates if other.lower() == name.lower()]
    found = found or difflib.get_close_matches(name, candidates, 3, 0.7)
    return f": did you mean {' or '.join(found)}?" if found else ""
