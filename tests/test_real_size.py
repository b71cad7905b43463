"""The main promise at real size: 60 int16 volumes of 17 MB, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lazycache as lc
from benchmarks.volumes import make_subjects
from lazycache.memory import usable_cpus

COUNT = 60
SHAPE = (197, 233, 189)
VOLUME = int(np.prod(SHAPE)) * 2
RESULT = VOLUME * 4  # float64

pytestmark = pytest.mark.timeout(300)

PRELUDE = """
import gc, hashlib, json, sys, threading
import numpy as np
import nibabel
import lazycache as lc

def resident(field):
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024

folder, budget = sys.argv[1], int(sys.argv[2])
lc.set_budget(budget)
images = lc.glob(folder + "/*.nii.gz", npreload=int(sys.argv[3]) if len(sys.argv) > 3 else None)
images[0].shape, images[0].data
lc.get_cache().clear()
images[:] = [lc.load(image.filename) for image in list.__iter__(images)]
before = lc.get_cache().stats()
start = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark of the resident size begins here

def tell(**more):
    stats = lc.get_cache().stats() - before
    for thread in threading.enumerate():
        assert not thread.name.startswith("lazycache"), thread
    print(json.dumps(dict(
        start=start, peak=resident("VmHWM"), accounted=stats.peak_bytes, loads=stats.loads,
        overcommits=stats.overcommits, preloads=stats.preloads, **more)))
"""

MEAN = (
    PRELUDE
    + """
mean = lc.mean(images).data
digest = hashlib.sha256(mean.T)  # of the memory itself: no copy
tell(digest=digest.hexdigest(), strides=mean.strides, dtype=str(mean.dtype))
"""
)

LOOP = (
    PRELUDE
    + """
total = 0
for image in images:
    total += int(image.data[100, 100].sum(dtype="i8"))
tell(total=total)
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 20 subjects, each under three names: to make them takes longer than to use them."""
    folder = tmp_path_factory.mktemp("subjects")
    for number, path in enumerate(make_subjects(folder, COUNT // 3)):
        for again in (1, 2):
            os.link(path, folder / f"sub-{number + 1 + again * COUNT // 3:02d}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="module")
def stack(folder: Path) -> list[np.ndarray]:
    import nibabel

    paths = sorted(folder.glob("*.nii.gz"))
    assert len(paths) == COUNT
    data = [np.asarray(nibabel.load(path).dataobj) for path in paths[: COUNT // 3]]
    return data * 3


def run(code: str, folder: Path, budget: int, *more: int) -> dict:
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder), str(budget), *map(str, more)],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return json.loads(process.stdout)


def smallest(folder: Path) -> int:
    """What the plan of the mean asks for: the result, and a bit for reading and computing."""
    least = lc.explain(lc.mean(lc.glob(folder / "*.nii.gz"))).min_budget
    assert RESULT < least <= RESULT + (16 << 20) + (3 << 20) * usable_cpus()
    return least


@pytest.fixture(scope="module")
def expected(stack: list[np.ndarray]) -> np.ndarray:
    return np.mean(np.stack(stack), axis=0)


@pytest.mark.parametrize("room", [0, 2, 10, COUNT])
def test_the_mean_is_numpys_and_the_process_stays_within_the_budget(
    folder: Path, expected: np.ndarray, room: int
) -> None:
    import hashlib

    budget = smallest(folder) + room * VOLUME
    found = run(MEAN, folder, budget)
    assert found["digest"] == hashlib.sha256(expected.tobytes(order="A")).hexdigest()
    assert tuple(found["strides"]) == expected.strides
    assert found["dtype"] == str(expected.dtype)
    assert found["loads"] == COUNT
    assert found["overcommits"] == 0
    assert found["accounted"] <= budget
    assert found["peak"] <= found["start"] + budget * 1.05


def test_one_byte_less_than_the_smallest_budget_is_too_little(folder: Path) -> None:
    code = MEAN.replace("mean = lc", "lc.get_cache().subscribe(print)\nmean = lc")
    code = code.replace("lc.set_budget(budget)", "")
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder), "0"],
        env={"LAZYCACHE_BUDGET": str(smallest(folder) - 1), "LAZYCACHE_STRICT": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "BudgetExceededError" in process.stderr
    assert "load" not in process.stdout


@pytest.mark.parametrize("volumes", [4, 8, COUNT])
@pytest.mark.parametrize("npreload", [1, 8, 100])
def test_a_loop_stays_within_the_budget(
    folder: Path, stack: list[np.ndarray], volumes: int, npreload: int
) -> None:
    budget = volumes * VOLUME
    found = run(LOOP, folder, budget, npreload)
    assert found["total"] == sum(int(data[100, 100].sum(dtype="i8")) for data in stack)
    assert found["loads"] == COUNT
    assert found["overcommits"] == 0
    assert found["accounted"] <= budget
    assert found["peak"] <= found["start"] + budget * 1.05
    assert found["preloads"] > COUNT // 2


def test_a_sum_of_integers_that_wrap_is_warned_of(folder: Path, stack: list[np.ndarray]) -> None:
    import lazycache as lc

    with lc.DataCache(8 * VOLUME):
        images = lc.glob(folder / "*.nii.gz")
        total = sum(images)
        with pytest.warns(lc.IntegerWrapWarning, match="lc.mean"):
            data = total.data
        assert np.array_equal(data, sum(stack))
