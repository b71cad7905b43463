"""Plug-ins and allocators."""

from __future__ import annotations

import threading

from ._limits import NotRecordedError, unknown


class PluginLoader:
    """Reading in other threads than the main one goes wrong until plug-ins were loaded."""

    _loaded = False
    _calls = 0

    @classmethod
    def load(cls) -> None:
        cls._calls += 1
        cls._loaded = True

    @classmethod
    def _check(cls) -> None:
        if not cls._loaded and threading.current_thread() is not threading.main_thread():
            raise unknown("a plug-in was half loaded")


class AllocatorStrategy:
    class DataAccess(int):
        """How data will be used."""

    InternalModif, ReadOnly, ReadWrite, NotOwner = map(DataAccess, range(4))


class AllocatorContext:
    """Where memory comes from."""

    def __init__(self, access: AllocatorStrategy.DataAccess | None = None) -> None:
        if access is not None and not isinstance(access, AllocatorStrategy.DataAccess):
            raise NotRecordedError(f"AllocatorContext({access!r})")
        self.access = access
