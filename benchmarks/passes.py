"""How often is a file read by loops over more data than fit?

Files that take no time to read: only reads are counted. Beside what is read here stand what a
cache that drops the least recently used would read, and the optimum for the order of the uses
(Belady's: what is used again last goes first, with the future known). For all pairs the optimum
isn't known: beside it stands a lower bound, the first reads filling the room and each later one
making a new pair with all that is there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

UNIT = 1 << 12


class Reader:
    """Files that aren't there, all of one size."""

    name = "numbered"
    converts = False

    def can_read(self, path: str) -> bool:
        return True

    def probe(self, path: str) -> Any:
        from lazycache.readers import Probe

        return Probe("numbered", (UNIT,), np.dtype(np.uint8), UNIT, UNIT, (), order="C")

    def read(self, path: str) -> Any:
        return np.zeros(UNIT, np.uint8)


def optimum(trace: Sequence[int], room: int) -> int:
    """The fewest reads for the uses in ``trace``."""
    following: dict[int, float] = {}
    again = [math.inf] * len(trace)
    for position in reversed(range(len(trace))):
        again[position] = following.get(trace[position], math.inf)
        following[trace[position]] = position
    present: dict[int, float] = {}
    reads = 0
    for position, key in enumerate(trace):
        if key not in present:
            reads += 1
            if len(present) == room:
                del present[max(present, key=lambda other: present[other])]
        present[key] = again[position]
    return reads


def least_recently_used(trace: Sequence[int], room: int) -> int:
    """The reads where what was used longest ago goes first."""
    present: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for key in trace:
        if key not in present:
            reads += 1
            if len(present) == room:
                present.popitem(last=False)
        present[key] = None
        present.move_to_end(key)
    return reads


def ours(loops: Callable[[list[Any], Callable[[Any], None]], None], count: int, room: int) -> Any:
    """(reads, the uses in their order) of ``loops`` over ``count`` volumes."""
    import lazycache as lc

    reader = Reader()
    volumes = [lc.LazyReadData(f"/{number}", reader=reader) for number in range(count)]
    trace: list[int] = []

    def use(volume: Any) -> None:
        volume.data  # noqa: B018 - read for its effect
        trace.append(int(os.path.basename(volume.filename)))

    with lc.DataCache(room * UNIT, strict=True) as cache:
        loops(volumes, use)
        return cache.stats().loads, trace


def rounds(passes: int, npreload: int, order: Any = "given") -> Any:
    from lazycache import PreloadList

    def loops(volumes: list[Any], use: Callable[[Any], None]) -> None:
        for _ in range(passes):
            for volume in PreloadList(volumes, npreload, order):
                use(volume)

    return loops


def all_pairs(npreload: int | None) -> Any:
    import lazycache as lc

    def loops(volumes: list[Any], use: Callable[[Any], None]) -> None:
        for a, b in lc.pairs(volumes, npreload=npreload):
            use(a)
            use(b)

    return loops


def line(what: str, lru: int, reads: int, least: int) -> None:
    print(f"{what:<44}{lru:>9,}{reads:>9,}{least:>9,}{reads / least:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="volumes that rounds go over")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=200, help="volumes that are paired")
    arguments = parser.parse_args()
    count, passes = arguments.count, arguments.passes
    print(f"{f'{passes} rounds over {count} volumes':<44}{'LRU':>9}{'here':>9}{'optimum':>9}")
    for percent, npreload in itertools.product((90, 80, 50, 20), (0, 2, 8)):
        room = max(2, count * percent // 100)
        reads, trace = ours(rounds(passes, npreload), count, room)
        what = f"room for {percent} %, {npreload} ahead"
        line(what, least_recently_used(trace, room), reads, optimum(trace, room))
    for percent in (80, 20):
        room = max(2, count * percent // 100)
        reads, trace = ours(rounds(passes, 8, "any"), count, room)
        lru = least_recently_used([*range(count)] * passes, room)
        what = f"room for {percent} %, 8 ahead, in any order"
        line(what, lru, reads, count + (passes - 1) * (count - room))
    print(f"\n{f'all pairs of {arguments.pairs} volumes':<44}{'rows':>9}{'here':>9}{'bound':>9}")
    for room, ahead in itertools.product((10, 20, 50), (0, None)):
        reads, _ = ours(all_pairs(ahead), arguments.pairs, room)
        rows = [key for pair in itertools.combinations(range(arguments.pairs), 2) for key in pair]
        left = math.comb(arguments.pairs, 2) - math.comb(room, 2)
        what = f"room for {room}, " + ("none ahead" if ahead == 0 else "as by default")
        line(what, least_recently_used(rows, room), reads, room + -(-left // (room - 1)))


if __name__ == "__main__":
    main()
