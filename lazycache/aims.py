"""The names of ``soma.aims.lazy_read_data``, for programs that used it: change the import only.

::

    from lazycache.aims import LazyReadData, LazyResampleVolume, PreloadIterator, PreloadList

They are lazycache's own, except that files are read by AIMS, whatever their format, so that data
are AIMS objects, as they were. Importing this doesn't import AIMS; reading does.
``docs/coming-from-aims.md`` tells what is the same, what is better and what differs.
"""

from __future__ import annotations

from . import proxy, resampling
from .preload import PreloadIterator, PreloadList

__all__ = ["LazyReadData", "LazyResampleVolume", "PreloadIterator", "PreloadList"]


class LazyReadData(proxy.LazyReadData):
    """`lazycache.LazyReadData` whose files are read by AIMS, unless ``reader`` says otherwise."""

    _default_reader = "aims"

    @classmethod
    def _plain(cls) -> type[LazyReadData]:
        return LazyReadData


class LazyResampleVolume(resampling.LazyResampleVolume, LazyReadData):
    """`lazycache.LazyResampleVolume` of volumes that are read, and resampled, by AIMS."""
