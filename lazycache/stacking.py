"""Notices when NumPy turns a list of proxies into one array.

``np.mean([a, b, c])`` gives NumPy a plain list, whose elements it asks for their arrays one after
the other, holding all of them. It asks nobody before, so this is noticed from what can be seen
while it happens: two different proxies are converted by one and the same call of one frame, and
the first array is still alive although neither the variables of that frame nor any container hold
it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

from ._frames import user_frame, warn
from .errors import StackingWarning


class _Last(threading.local):
    place: tuple[int, int] | None = None
    proxy: int = 0
    array: weakref.ref[Any] | None = None


class Watch:
    """Follows conversions; warns once for each place in the code where a list is stacked."""

    def __init__(self) -> None:
        self._last = _Last()
        # (code, instruction) of places that were looked at, or warned of. Looking is slow.
        self._seen: set[tuple[Any, int]] = set()

    def converted(self, proxy: Any, array: Any) -> None:
        """``proxy`` was asked for its array and gives ``array``."""
        frame, _ = user_frame()
        if frame is None:
            return
        last = self._last
        place = (id(frame), frame.f_lasti)
        before = last.array() if last.array is not None else None
        same = last.place == place and last.proxy != id(proxy)
        last.place, last.proxy, last.array = place, id(proxy), weakref.ref(array)
        code = (frame.f_code, frame.f_lasti)
        if not same or before is None or code in self._seen:
            return
        self._seen.add(code)
        # No generator expression here: its cell would be a holder.
        if gc.get_referrers(before) or id(before) in map(id, frame.f_locals.values()):
            return
        warn(
            "NumPy loads every proxy of a list to make one array of them all: write lc.mean(list) "
            "(or lc.sum, lc.std, ...), or give it the proxies one at a time",
            StackingWarning,
        )
