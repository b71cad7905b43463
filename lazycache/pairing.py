"""All pairs of many volumes, in an order that reads each as seldom as the room allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .preload import PreloadList, checked, quietly, room_for

_Block = list[Any]

# To leave a place for the next volume costs about one read in as many as are held at once: too
# much where these are few.
_ENOUGH = 20
# Few: what is read before its time takes the place of a volume of the block.
_AHEAD = 4


def pairs(
    volumes: Iterable[Any], others: Iterable[Any] | None = None, *, npreload: int | None = None
) -> PreloadList:
    """All pairs of ``volumes``, or of one of ``volumes`` and one of ``others``, to loop over.

    The result is a list of tuples ``(a, b)``, each pair once: a before b in ``volumes``; of two
    lists, a from ``volumes`` and b from ``others``. Items are those of a `PreloadIterator`.

    The pairs don't come in the order of rows. As many volumes as fit, by the sizes in their headers
    and what the budget can give now, make a block: its own pairs come first, then those of each
    volume after it with all of the block, then the next block. So a volume is read about once a
    block, in place of once a pair. Of two lists the one is cut into blocks for which that makes
    fewer reads. Where all fit, each is read once.

    ``npreload`` is how many pairs ahead volumes are loaded, 0 for none; by default 4. Where a block
    has more than 20 volumes it leaves a place for the next one.
    """
    first = list(quietly(volumes))
    second = None if others is None else list(quietly(others))
    keep = 0 if npreload is not None and checked(npreload) == 0 else 1
    if second is None:
        blocks = _blocks(first, first, keep)
        order = list(_among(blocks))
    else:
        down, across = _blocks(first, second, keep), _blocks(second, first, keep)
        if len(first) + len(down) * len(second) <= len(second) + len(across) * len(first):
            blocks = down
            order = list(_between(blocks, second))
        else:
            blocks = across
            order = [(a, b) for b, a in _between(blocks, first)]
    return PreloadList(order, _AHEAD if npreload is None else npreload)


def _blocks(items: list[Any], streamed: list[Any], keep: int) -> list[_Block]:
    """``items`` cut into blocks that fit beside one of ``streamed``, and the next one."""
    room, sizes = room_for(items)
    _, passing = room_for(streamed)
    largest = max(passing, default=0)
    if sum(sizes) + (0 if items is streamed else largest) <= room:
        return [items] if items else []
    room -= largest
    if keep and room - largest > _ENOUGH * largest:
        room -= largest
    blocks: list[_Block] = []
    left = 0
    for item, nbytes in zip(items, sizes, strict=True):
        if not blocks or nbytes > left:
            blocks.append([])
            left = room
        blocks[-1].append(item)
        left -= nbytes
    return blocks


def _among(blocks: list[_Block]) -> Iterator[tuple[Any, Any]]:
    """The pairs of all items of the blocks, the earlier item first."""
    for number, block in enumerate(blocks):
        for at, b in enumerate(block):
            for a in block[:at]:
                yield a, b
        rest = [item for later in blocks[number + 1 :] for item in later]
        # There and back: what comes last is still there when it comes first.
        for b in rest if number % 2 == 0 else reversed(rest):
            for a in block:
                yield a, b


def _between(blocks: list[_Block], streamed: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of an item of the blocks and one of ``streamed``."""
    for number, block in enumerate(blocks):
        for b in streamed if number % 2 == 0 else reversed(streamed):
            for a in block:
                yield a, b
