"""Threads that do tasks: they stay for the next one, end by themselves, and the caller helps."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import SOON

from lazycache import _tasks
from lazycache._tasks import Task, Threads


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that were started, in their order."""
    found: list[threading.Thread] = []

    def start(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        found.append(thread)
        thread.start()

    monkeypatch.setattr(_thread, "start_new_thread", start)
    return found


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline


def asked(threads: Threads, work: Callable[[], object]) -> Task:
    task = Task(work)
    threads.ask(task)
    return task


def test_a_thread_stays_for_the_next_task_and_ends_when_none_comes(
    started: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = _tasks._MOMENT
    monkeypatch.setattr(_tasks, "_MOMENT", SOON)
    threads = Threads(1)
    done: list[int] = []
    for number in range(50):
        asked(threads, lambda number=number: done.append(number)).wait()  # type: ignore[misc]
        if number % 2:
            until(lambda: threads._free != [])  # it waits for the next
    assert done == list(range(50))
    assert len(started) == 1
    monkeypatch.setattr(_tasks, "_MOMENT", moment)
    asked(threads, lambda: None).wait()
    started[0].join(SOON)
    assert not started[0].is_alive()
    asked(threads, lambda: done.append(50)).wait()
    assert done[-1] == 50
    assert len(started) == 2


def test_a_thread_that_an_interrupt_left_without_a_word_gives_its_place_back(
    started: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tasks, "_MOMENT", 0.5)
    threads = Threads(1)
    asked(threads, lambda: None).wait()
    until(lambda: threads._free != [])
    assert threads._free.pop() is not None  # who asks was about to wake it
    started[0].join(SOON)
    assert not started[0].is_alive()
    asked(threads, lambda: None).wait()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_so_many_tasks_are_done_at_once(count: int) -> None:
    """By one thread less, and by the caller while he waits."""
    threads = Threads(count)
    together = threading.Barrier(count)
    here: set[int] = set()

    def work() -> None:
        here.add(_thread.get_ident())
        together.wait(SOON)

    tasks = [asked(threads, work) for _ in range(3 * count)]
    for task in tasks:
        threads.wait(task)
    assert together.n_waiting == 0
    assert (_thread.get_ident() in here) == (count > 1)


def test_what_the_caller_does_for_others_is_in_vain_when_what_he_waits_for_fails() -> None:
    threads = Threads(2)
    begun, helping = threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        assert helping.wait(SOON)
        raise ZeroDivisionError

    def go_on() -> None:
        assert not threads.in_vain
        helping.set()
        until(lambda: threads.in_vain)

    failing = asked(threads, fail)
    assert begun.wait(SOON)
    other = asked(threads, go_on)
    with pytest.raises(ZeroDivisionError):
        threads.wait(failing)
    threads.wait(other)
    assert not threads.in_vain


def test_what_a_task_raises_in_the_caller_is_for_who_waits_for_it() -> None:
    threads = Threads(2)
    begun, end = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        assert end.wait(SOON)

    def interrupted() -> None:
        end.set()
        raise KeyboardInterrupt

    first = asked(threads, long)
    assert begun.wait(SOON)
    second = asked(threads, interrupted)
    threads.wait(first)
    with pytest.raises(KeyboardInterrupt):
        threads.wait(second)
    second.end()


def test_what_the_caller_was_interrupted_in_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_thread, "start_new_thread", lambda *_: None)  # it comes too late
    threads = Threads(2)
    task = asked(threads, lambda: None)
    task._first["first"] = "caller"  # and nothing more
    task.end()
