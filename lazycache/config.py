"""What the environment says: ``LAZYCACHE_BUDGET`` and ``LAZYCACHE_STRICT``.

``LAZYCACHE_THREADS`` is read by `lazycache.memory.usable_cpus`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from .errors import SizeError

_YES = {"1", "true", "yes", "on"}
_NO = {"", "0", "false", "no", "off"}


def budget(environ: Mapping[str, str] = os.environ) -> str | int:
    """The budget of the global cache: bytes, or the text of a size, a share or ``"auto"``."""
    text = environ.get("LAZYCACHE_BUDGET", "").strip()
    if not text:
        return "auto"
    return int(text) if text.isdecimal() else text


def strict(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the global cache is strict. Raises `SizeError` for a value that is neither."""
    text = environ.get("LAZYCACHE_STRICT", "").strip().lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise SizeError(f"LAZYCACHE_STRICT is {text!r}: write 1 or 0")
