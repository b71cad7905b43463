"""Headers: like dicts; their lists lie in the memory of the object that they are of."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any


class Values:
    """A list in a header: garbage once the object that the header is of is gone."""

    def __init__(self, owner: Any, values: list[Any]) -> None:
        self._owner = weakref.ref(owner)
        self._values = values

    def _look(self) -> list[Any]:
        if self._owner() is None:
            return [-606348325] * len(self._values)
        return self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Any:
        return self._look()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._look()))

    def __repr__(self) -> str:
        return repr(self._look())


class Header:
    """What ``header()`` gives: it keeps the object alive, what is taken out of it doesn't."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, owner: Any, fields: dict[str, Any]) -> None:
        self._owner = owner
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._given(self._fields[name])

    def _given(self, value: Any) -> Any:
        if isinstance(value, list):
            owner = self if self._owner is None else self._owner
            return Values(owner, [self._given(item) for item in value])
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        self._fields[name] = plain(value)

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __len__(self) -> int:
        return len(self._fields)

    def get(self, name: str, default: Any = None) -> Any:
        return self._given(self._fields.get(name, default))

    def keys(self) -> list[str]:
        return list(self._fields)

    def __repr__(self) -> str:
        return repr(self._fields)


def plain(value: Any) -> Any:
    """A copy of a value of a header that depends on nothing."""
    if isinstance(value, Values | list | tuple):
        return [plain(item) for item in value]
    return value


def fields_of(header: Any) -> dict[str, Any]:
    """A copy of all that a header, or a dict, holds."""
    return {name: plain(header[name]) for name in header.keys()}  # noqa: SIM118 - no iterator
