"""An interrupt at any line of the core leaves the cache whole, and the next request right.

`KeyboardInterrupt` is raised by a trace function, once in each run of a scenario: at each line of
the core that the scenario runs, the first time and the last time that it runs it.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support import SOON, UNIT, Made, load, table_of

import lazycache
from lazycache.cache import DataCache
from lazycache.source import Handle, Result

CORE = {
    str(Path(lazycache.__file__).parent / name)
    for name in (
        "_accounts.py",
        "_closing.py",
        "_flight.py",
        "_ledger.py",
        "_operation.py",
        "_pool.py",
        "_preloading.py",
        "_records.py",
        "_request.py",
        "_table.py",
        "_victims.py",
        "cache.py",
    )
}


class World:
    """A cache with something in it, made anew for each interrupt."""

    def __init__(self) -> None:
        self.cache = DataCache(6 * UNIT)
        self.keys = [Made(str(i), fill=i) for i in range(8)]
        self.handles = [Handle(self.keys[0], 1)]
        for key in self.keys[:6]:
            self.cache.load(key)
        self.view = self.cache.load(self.keys[5])[1:]
        self.result = Result("a result")


def hit(world: World) -> None:
    world.cache.lookup(world.keys[1])
    world.cache.lookup(world.keys[1])


def miss_and_evict(world: World) -> None:
    world.cache.load(world.keys[6])


def pin_several(world: World) -> None:
    order = [world.keys[1], world.keys[7], world.keys[1]]
    with world.cache.operation("a test", workspace=UNIT, room=2 * UNIT, order=order) as operation:
        operation.pin([world.keys[1], world.keys[7]])
        operation.unpin([world.keys[1]])


def keep(world: World) -> None:
    with world.cache.operation("a test", workspace=UNIT, room=0) as operation:
        operation.keep(world.result, np.ones(UNIT, np.uint8), 1.0)
    world.cache.budget = 2 * UNIT


def release(world: World) -> None:
    world.cache.used_up(world.handles[0], 1)
    world.cache.release(world.keys[5])
    world.cache.load(world.keys[5])
    world.view = None
    world.handles.clear()
    world.cache.clear()


def scope(world: World) -> None:
    inner = DataCache(3 * UNIT)
    inner._bind(world.cache)
    inner.load(world.keys[6])
    innermost = DataCache(2 * UNIT)
    innermost._bind(inner)
    held = innermost.load(world.keys[7])[1:]
    inner.close()
    innermost.close()
    del held


def preload(world: World) -> None:
    class Loop:
        pass

    loop = Loop()
    ahead = world.cache.preloading(loop, 2)
    ahead.expect(world.keys[5:])
    ahead.want(world.keys[5:])
    world.cache.load(world.keys[6])
    ahead.done([world.keys[5], world.keys[6]])
    ahead.close()


def failing(world: World) -> None:
    def fail() -> None:
        raise ValueError("bad header")

    with pytest.raises(ValueError, match="bad header"):
        world.cache.load(Made("bad", during=fail))


def closes_a_block(frame: FrameType) -> bool:
    """Whether this is a ``with`` line, which is traced again at the end of its block.

    No real interrupt comes between the end of a block and the call of a built-in ``__exit__``.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith("with ")


def interrupt_at(number: int, scenario: Callable[[World], None], world: World) -> list[str]:
    """Run the scenario, interrupted at its ``number``-th line; the lines that ran."""
    monkeypatch = pytest.MonkeyPatch()
    places: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in CORE:
            return None
        if event == "line" and not closes_a_block(frame):
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(places) == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    # What is raised in a callback of a dying object is only told, with all its frames.
    monkeypatch.setattr(sys, "unraisablehook", lambda told: None)
    sys.settrace(trace)
    try:
        scenario(world)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(outer)
        monkeypatch.undo()
    return places


SCENARIOS = [hit, miss_and_evict, pin_several, keep, release, scope, preload, failing]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_an_interrupt_at_any_line_leaves_the_cache_whole(
    scenario: Callable[[World], None],
) -> None:
    places = interrupt_at(0, scenario, World())
    first = {place: number for number, place in reversed(list(enumerate(places, start=1)))}
    last = {place: number for number, place in enumerate(places, start=1)}
    assert len(first) >= 10
    for number in sorted({*first.values(), *last.values()}):
        world = World()
        place = interrupt_at(number, scenario, world)[-1]
        try:
            look(world)
        except BaseException as error:
            error.add_note(f"after an interrupt at {place}")
            raise


def look(world: World) -> None:
    """The cache is whole, nothing is left over, and every file can be had, here and elsewhere."""
    cache, table = world.cache, table_of(world.cache)
    assert not table.lock.locked()
    cache.check()  # takes note of what died
    table.pool.join_threads(SOON)
    cache.check()
    assert not table.uses
    assert not table.flights
    assert not table.blocked
    assert not table.streams
    assert not table.schedules
    assert not any(level.closed for level in table.root.tree())
    cache.budget = 6 * UNIT
    answers: list[int] = []
    thread = threading.Thread(
        target=lambda: answers.extend(load(cache, key) for key in world.keys), daemon=True
    )
    thread.start()
    thread.join(SOON)
    assert answers == list(range(8))
    assert [load(cache, key) for key in world.keys] == list(range(8))
    cache.check()
    assert cache.stats().overcommits == 0
    world.view = None
    world.result = Result("another")
    cache.clear()
    assert cache.used == 0
