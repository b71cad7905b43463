"""Files that are read again within one plan: as often as foretold, and the same files each time."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expressions import ROOMY, THREADS, difference, running
from hypothesis import strategies as st
from numpy.typing import NDArray

import lazycache as lc
from lazycache import DataCache, FileChangedError, LazyReadData, Plan, planning
from lazycache.readers import Probe
from lazycache.readers.arrays import NumPyReader

Array = NDArray[Any]

SHAPE = (4, 5, 16)
COUNT = 12


class Counting:
    """Reads ``.npy`` files and counts how often each is read, and how many are open at once.

    ``during`` is called with the name of a file and the number of the read, before it.
    """

    name = "counting"
    converts = True

    def __init__(self) -> None:
        self.during: Callable[[str, int], object] = lambda name, number: None
        self.reads: Counter[str] = Counter()
        self.opened = self.most = 0
        self._inner = NumPyReader()
        self._counting = threading.Lock()

    def can_read(self, path: str) -> bool:
        return self._inner.can_read(path)

    def probe(self, path: str, **options: Any) -> Probe:
        return self._inner.probe(path, **options)

    def read(self, path: str, **options: Any) -> Any:
        with self._reading(path):
            return self._inner.read(path, **options)

    def open_blocks(self, path: str, **options: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._reading(path))
            blocks = self._inner.open_blocks(path, **options)
            stack.callback(blocks.close)
            return _Counted(blocks, stack.pop_all())

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        name = os.path.basename(path)
        with self._counting:
            number = self.reads[name]
            self.reads[name] += 1
            self.opened += 1
            self.most = max(self.most, self.opened)
        try:
            self.during(name, number)
            yield
        finally:
            with self._counting:
                self.opened -= 1


class _Counted:
    def __init__(self, blocks: Any, end: contextlib.ExitStack) -> None:
        self.into, self.skip, self.close = blocks.into, blocks.skip, end.close


RESULTS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "median": (lc.median, lambda a: np.median(a, 0)),
    "percentile": (lambda v: lc.percentile(v, 30), lambda a: np.percentile(a, 30, 0)),
    "mean": (lc.mean, lambda a: np.mean(a, 0)),
    "deviation": (lc.std, lambda a: np.std(a, 0)),
    "difference": (lambda v: v[0] - lc.mean(v), lambda a: a[0] - np.mean(a, 0)),
    "score": (
        lambda v: (v[-1] - lc.mean(v)) / lc.std(v),
        lambda a: (a[-1] - np.mean(a, 0)) / np.std(a, 0),
    ),
    "map": (
        lambda v: lc.map_voxels(lambda x: np.stack([x.min(0), x.max(0)]), v),
        lambda a: np.stack([a.min(0), a.max(0)], -1),
    ),
    "product": (lambda v: v[0] * v[-1] + v[1] * v[0], lambda a: a[0] * a[-1] + a[1] * a[0]),
    "along an axis": (
        lambda v: v[1] - v[1].mean(-1, keepdims=True),
        lambda a: a[1] - a[1].mean(-1, keepdims=True),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dice = np.random.default_rng(0)
    for number in range(COUNT):
        np.save(tmp_path / f"{number}.npy", np.asfortranarray(dice.random(SHAPE, "f4")))
    return tmp_path


@st.composite
def cases(draw: Any) -> tuple[list[int], list[str]]:
    """Which files, and what is made of them."""
    numbers = draw(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=COUNT))
    return numbers, draw(st.lists(st.sampled_from(sorted(RESULTS)), min_size=1, max_size=3))


@contextlib.contextmanager
def openable(limit: int) -> Iterator[None]:
    """No more than ``limit`` files may be open at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "openable_files", lambda wanted: max(1, min(wanted, limit)))
        yield


def made(folder: Path, reader: Counting, case: tuple[list[int], list[str]]) -> list[Any]:
    numbers, names = case
    images = [LazyReadData(folder / f"{number}.npy", reader=reader) for number in numbers]
    return [RESULTS[name][0](images) for name in names]


def expected(folder: Path, case: tuple[list[int], list[str]]) -> list[Array]:
    numbers, names = case
    stack = np.stack([np.load(folder / f"{number}.npy") for number in numbers])
    with np.errstate(invalid="ignore"):
        return [RESULTS[name][1](stack) for name in names]


def check_told(plan: Plan, reads: Counter[str]) -> None:
    """What a plan says in words of files that are read again is what was counted."""
    again = {name: count for name, count in reads.items() if count > 1}
    told: Counter[int] = Counter()
    for text in plan.again:
        found = re.fullmatch(r"(.*) (\d+) times( each)?: no room (to .*)", text)
        assert found, text
        names, count = found[1], int(found[2])
        several = re.fullmatch(r"(\d+) files \((\S+) \.\.\.\)", names)
        listed = re.split(r", | and ", names) if several is None else [several[2]]
        assert all(again[name] == count for name in listed), (text, reads)
        told[count] += len(listed) if several is None else int(several[1])
    if len(plan.again) < 3:  # the rest isn't listed
        assert told == Counter(again.values()), (plan.again, reads)
    assert bool(plan.again) == bool(again)
    assert f"needs {plan.passes} passes" in str(plan) or plan.passes == 1


def test_files_are_read_as_often_as_is_foretold(folder: Path, storm: Any) -> None:
    limits = st.integers(1, COUNT)

    @storm(cases(), st.sampled_from(["whole", "blocks", "few"]), THREADS, limits, st.integers(0, 4))
    def check(
        case: tuple[list[int], list[str]], way: str, threads: int, limit: int, more: int
    ) -> None:
        true = expected(folder, case)
        with running(way, threads), openable(limit), np.errstate(invalid="ignore"):
            with DataCache(ROOMY):
                plan = lc.explain(*made(folder, Counting(), case))
            least, once = plan.min_budget, plan.single_pass_budget
            for budget in {least + (once - least) * more // 4, max(least, once - 1)}:
                reader = Counting()
                with DataCache(budget, strict=True) as cache:
                    results = made(folder, reader, case)
                    plan = lc.explain(*results)
                    assert plan.fits
                    for found, value in zip(lc.compute(*results), true, strict=True):
                        wrong = difference(np.ascontiguousarray(found), np.ascontiguousarray(value))
                        assert not wrong, wrong
                    stats = cache.stats()
                    assert stats.peak_bytes <= budget
                    assert stats.overcommits == 0
                    assert stats.loads == plan.reads == reader.reads.total()
                    assert plan.passes == max(reader.reads.values())
                    # Keeping one of many files may be enough where few can be open at once.
                    assert plan.passes == 1 or budget < once
                    assert plan.passes > 1 or budget >= once or limit < COUNT
                    assert {os.path.basename(path) for path in plan.uses} == set(reader.reads)
                    check_told(plan, reader.reads)
                assert reader.most <= 16
                assert reader.opened == 0


def test_a_file_that_changes_before_it_is_read_again_is_noticed(folder: Path, storm: Any) -> None:
    which = st.integers(0, COUNT - 1), st.integers(1, 8)
    target = folder / "out.nii.gz"
    moments = itertools.count(1)  # the size is the same

    @storm(cases(), st.sampled_from(["whole", "blocks", "few"]), *which, st.booleans(), share=0.5)
    def check(
        case: tuple[list[int], list[str]], way: str, place: int, number: int, saved: bool
    ) -> None:
        name = f"{case[0][place % len(case[0])]}.npy"
        changed = []

        def change(file: str, count: int) -> None:
            if file == name and count == number:
                path = folder / name
                np.save(path, -np.load(path))
                os.utime(path, ns=(1, next(moments)))
                changed.append(file)

        reader = Counting()
        reader.during = change
        target.write_bytes(b"old")
        with running(way, 2), np.errstate(invalid="ignore"):
            with DataCache(ROOMY):
                least = lc.explain(*made(folder, reader, case)).min_budget
            with DataCache(least, strict=True) as cache:
                results = made(folder, reader, case)
                told = ""
                try:
                    if saved:
                        lc.save_all({target: results[0]})
                    else:
                        lc.compute(*results)
                except FileChangedError as error:
                    told = str(error)
                assert name in told if changed else not told
                assert (target.read_bytes() == b"old") == (bool(changed) or not saved)
                cache.check()
                if changed:
                    found = lc.compute(*made(folder, reader, case))
                    for value, true in zip(found, expected(folder, case), strict=True):
                        wrong = difference(np.ascontiguousarray(value), np.ascontiguousarray(true))
                        assert not wrong, wrong
