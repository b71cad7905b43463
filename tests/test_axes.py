"""Reductions along axes, and of all elements, go by blocks and are NumPy's to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lazycache as lc
from lazycache import needs, program, spaces, totals
from lazycache.plan import explain

SHAPE = (13, 11, 9, 16)
DTYPES = ("?", "u1", "i2", "i8", "f2", "f4", "f8", "c8")
NAMES = ("mean", "std", "var", "sum", "prod", "min", "max", "any", "all", "median", "ptp")
AXES = (-1, 0, 1, (0, 1, 2), (2, 3), (1, 2, 3), (0, 3), (3, 2))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these were large files."""
    monkeypatch.setattr(needs, "_WORTH_IT", 0)
    monkeypatch.setattr(program, "_SHORTEST", 64)
    monkeypatch.setattr(program, "BLOCK", 300)
    monkeypatch.setattr(spaces, "FEWEST", 2)
    monkeypatch.setattr(totals, "_LEAF", 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for order in "CF":
        for dtype in DTYPES:
            values = rng.standard_normal(SHAPE) * 50
            with np.errstate(invalid="ignore"):
                run = values.astype(dtype) if dtype != "c8" else (values + 1j).astype(dtype)
            run[rng.random(SHAPE) < 0.1] = -0.0 if dtype[0] in "fc" else 0
            np.save(folder / f"{order}{np.dtype(dtype)}.npy", np.asarray(run, order=order))
    return folder


def same(found: Any, expected: Any) -> bool:
    """In value, type and memory order; the stride of an axis of length 1 says nothing."""
    assert type(found) is type(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    steps = [
        [step for step, size in zip(one.strides, one.shape, strict=True) if size > 1]
        for one in (found, expected)
    ]
    assert steps[0] == steps[1]
    return bool(found.tobytes() == expected.tobytes())


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_along_axes_they_are_numpys(folder: Path, name: str, dtype: str, order: str) -> None:
    path = folder / f"{order}{np.dtype(dtype)}.npy"
    run = np.load(path)
    for axis in AXES:
        for kwargs in ({}, {"keepdims": True}):
            if name == "ptp" and dtype == "?":
                continue
            with np.errstate(all="ignore"):
                expected = getattr(np, name)(run, axis=axis, **kwargs)
                found = getattr(np, name)(lc.load(path), axis=axis, **kwargs).data
            assert same(found, expected), (axis, kwargs)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[:9])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_of_all_elements_they_are_numpys(folder: Path, name: str, dtype: str, order: str) -> None:
    path = folder / f"{order}{np.dtype(dtype)}.npy"
    run = np.load(path)
    for kwargs in ({}, {"keepdims": True}, {"axis": (0, 1, 2, 3)}):
        with np.errstate(all="ignore"):
            expected = getattr(np, name)(run, **kwargs)
            found = getattr(np, name)(lc.load(path), **kwargs)
            found = found.data if isinstance(found, lc.LazyReadData) else found
        assert same(found, expected), kwargs


@pytest.mark.parametrize(
    ("make", "whole"),
    [
        (lambda run: run.mean(-1), False),
        (lambda run: run.std(-1, ddof=1), False),
        (lambda run: run.max((2, 3)), False),
        (lambda run: np.median(run, axis=0), False),
        (lambda run: run.mean((0, 1, 2)), False),
        (lambda run: np.mean(run, axis=(0, 1, 2, 3)), False),
        (lambda run: np.max(run, axis=(0, 1, 2, 3)), True),  # zeros of both signs have no order
        (lambda run: np.median(run, axis=-1), True),
    ],
)
def test_a_plan_says_which_of_them_take_the_whole_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Any, whole: bool
) -> None:
    monkeypatch.setattr(needs, "_WORTH_IT", 1000)
    with lc.DataCache("1GiB"):
        plan = explain(make(lc.load(folder / "Ffloat64.npy")))
    assert bool(plan.whole) is whole


def test_sums_follow_numpys_tree_whatever_comes_at_once() -> None:
    rng = np.random.default_rng(1)
    for dtype, size in (("f4", 9_999), ("f8", 70_003), ("i2", 20_001)):
        values = (rng.standard_normal(size) * 1000).astype(dtype)
        result = np.dtype("f8") if dtype == "i2" else values.dtype
        for most in (1, 7, 300, 9_000, size):
            total = totals.total(np.add, size, values.dtype, result)
            assert total is not None
            at = 0
            while at < size:
                count = int(rng.integers(1, most + 1))
                total.take(values[at : at + count])
                at += count
            assert total.value.tobytes() == np.add.reduce(values, dtype=result).tobytes()


@pytest.mark.parametrize("name", ["sum", "max", "any"])
def test_what_is_reduced_is_complete_before_it_is_used(folder: Path, name: str) -> None:
    path = folder / "Fint16.npy"
    run, image = np.load(path), lc.load(path)
    with lc.DataCache(run.nbytes * 20, strict=True):
        found = (image - getattr(image, name)(-1, keepdims=True)).data
    assert same(found, run - getattr(run, name)(-1, keepdims=True))


def test_a_z_scored_run_needs_little_more_than_its_mean(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_SHORTEST", 1 << 10)
    path = folder / "Fint16.npy"
    run = np.load(path)
    expected = ((run - run.mean(-1, keepdims=True)) / run.std(-1, keepdims=True)).astype("f4")
    with lc.DataCache(run.nbytes * 3, strict=True) as cache:
        image = lc.load(path)
        score = (image - image.mean(-1, keepdims=True)) / image.std(-1, keepdims=True)
        score.astype("f4").save(tmp_path / "z.npy")
        stats = cache.stats()
    assert stats.loads <= 3
    assert np.load(tmp_path / "z.npy").tobytes() == expected.tobytes()
