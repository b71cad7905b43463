"""What a hit costs, and whether operations cost the same whatever the number of entries.

    python benchmarks/hit_cost.py [--most 1000000]

Prints the time of `DataCache.lookup` over that of a look-up in a `cachetools.LRUCache` under a
lock, in the same run (to be at most 3), and, for 100 entries up to the most, the time of each
operation over its time at 100 entries (to be flat). A look-up at random among very many entries
misses the caches of the processor, in an LRUCache as well, which is shown beside it. Exits with 1
if a hit costs more.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from cachetools import LRUCache

from lazycache.cache import DataCache
from lazycache.sizes import nbytes_of
from lazycache.source import Handle, Key

LIMIT = 3.0
ROUNDS = 7


class Datum(bytearray):
    """A value that can be weakly referenced."""


NBYTES = nbytes_of(Datum(8))


class Small(Key):
    """A key whose data cost nothing to load, so that what is left is the cache's own work."""

    __slots__ = ()

    def estimate(self) -> tuple[int, int]:
        return NBYTES, NBYTES

    def load(self) -> Any:
        return Datum(8)


def best(function: Callable[[], object], count: int) -> float:
    """The shortest time of ``function`` over some rounds, in seconds for each of ``count``."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) / count)
    return min(times)


def hit_ratio(count: int = 1000, turns: int = 100) -> tuple[float, float]:
    """Seconds of a hit here, and in a locked LRUCache of as many entries."""
    keys = [Small(str(i)) for i in range(count)]
    cache = DataCache("1 GiB")
    other: LRUCache[Key, Any] = LRUCache(count)
    for key in keys:
        other[key] = cache.load(key)
    lock = threading.Lock()
    asked = random.Random(1).choices(keys, k=count)

    def ours() -> None:
        for _ in range(turns):
            for key in asked:
                cache.lookup(key)

    def theirs() -> None:
        for _ in range(turns):
            for key in asked:
                with lock:
                    other[key]

    return best(ours, turns * count), best(theirs, turns * count)


def operations(count: int) -> dict[str, float]:
    """Seconds of each operation in a cache of ``count`` entries."""
    some = 2000
    cache = DataCache("8 GiB")
    keys = [Small(str(i)) for i in range(count)]
    other: LRUCache[Key, Any] = LRUCache(count)
    for key in keys:
        cache.load(key)
        other[key] = Datum(8)  # what is held outside can't be evicted
    lock = threading.Lock()
    cache.budget = cache.used  # full: each new entry sends another away
    asked = random.Random(1).choices(keys, k=some)
    fresh = [[Small(f"new {turn} {i}") for i in range(some)] for turn in range(ROUNDS)]
    handles = [Handle(key) for key in asked]

    def look() -> None:
        for key in asked:
            cache.lookup(key)

    def look_elsewhere() -> None:
        for key in asked:
            with lock:
                other[key]

    def pin() -> None:
        for key in asked:
            with cache.operation("pin", workspace=0, room=0) as operation:
                operation.pin([key])

    def evict() -> None:
        for key in fresh.pop():
            cache.load(key)

    def use_up() -> None:
        for handle in handles:
            cache.used_up(handle, 1)

    measured = {
        "look up": look,
        "look up in an LRUCache": look_elsewhere,
        "pin and unpin": pin,
        "use up": use_up,
        "load and evict": evict,
    }
    gc.collect()
    gc.disable()
    try:
        return {name: best(function, some) for name, function in measured.items()}
    finally:
        gc.enable()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=1_000_000, help="entries of the largest cache")
    most = parser.parse_args().most
    ours, theirs = hit_ratio()
    ratio = ours / theirs
    print(f"a hit: {ours * 1e9:.0f} ns, a locked LRUCache: {theirs * 1e9:.0f} ns", end="")
    print(f", ratio {ratio:.2f} (at most {LIMIT:.0f})")
    base: dict[str, float] = {}
    count = 100
    while count <= most:
        seconds = operations(count)
        base = base or seconds
        told = (f"{name} {s * 1e6:.1f} µs ({s / base[name]:.2f}x)" for name, s in seconds.items())
        print(f"{count:>9,} entries: {', '.join(told)}")
        count *= 10
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
