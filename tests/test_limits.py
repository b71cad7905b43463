"""Real limits: in a group of 256 MiB, and with little address space, jobs end by themselves.

Each job is a process of its own that is put under its limit before it imports the package. The
group is made below the one that the tests run in, by whoever may do that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.volumes import make_subjects

COUNT = 60
DIFFERENT = 4
MIB = 1 << 20
LIMIT = 256 * MIB

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

JOB = """
import hashlib, json, os, sys

prelude, job, folder, budget = sys.argv[1:]
exec(prelude)

import lazycache as lc

lc.set_budget(budget)
cache = lc.get_cache()
images = lc.glob(folder + "/*.nii.gz", npreload=100)
if job == "mean":
    # Of the memory itself: no copy.
    found = hashlib.sha256(lc.mean(images).data.T).hexdigest()
else:
    found = 0
    for image in images:
        found += int(image.data[100, 100].sum(dtype="i8"))
stats = cache.stats()
print(json.dumps(dict(
    found=found, budget=cache.budget, peak=stats.peak_bytes, loads=stats.loads,
    overcommits=stats.overcommits)))
"""

ENTER = """
with open({group!r} + "/cgroup.procs", "w") as file:
    file.write("0")
"""

# Read again and again, the pages of a file count as lately used.
FILL = """
with open({big!r}, "rb", buffering=0) as file:
    for _ in range(5):
        file.seek(0)
        while file.read(1 << 20):
            pass
with open({group!r} + "/memory.stat") as file:
    numbers = dict(line.split() for line in file)
if int(numbers.get("total_active_file", numbers["active_file"])) < 100 << 20:
    sys.exit("the page cache of this file system does not fill the group")
"""

NARROW = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1536 << 20, 1536 << 20))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 real-size volumes, of which 4 differ."""
    folder = tmp_path_factory.mktemp("subjects")
    made = make_subjects(folder, DIFFERENT)
    for number in range(DIFFERENT, COUNT):
        shutil.copy(made[number % DIFFERENT], folder / f"sub-{number + 1:02d}_T1w.nii.gz")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, object]:
    """What each job finds: whole numbers, so exact in whatever order they are added."""
    import nibabel

    total, plane = np.zeros(()), 0
    for path in sorted(folder.iterdir())[:DIFFERENT]:
        data = np.asarray(nibabel.load(path).dataobj)
        total = total + np.asarray(data, np.float64)
        plane += int(data[100, 100].sum(dtype="i8"))
    each = COUNT // DIFFERENT
    return {"mean": hashlib.sha256((total * each / COUNT).T).hexdigest(), "loop": plane * each}


def places() -> Iterator[tuple[Path, str, str]]:
    """Where a group may be made, and the names of its limits of memory and of swap."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            yield Path(f"/sys/fs/cgroup/memory{path}"), *names
        elif not controllers:
            own = Path(f"/sys/fs/cgroup{path}")
            # Version 2 lets no group that has processes of its own limit those below.
            for parent in (own, own.parent):
                yield parent, "memory.max", "memory.swap.max"


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A group of this many bytes, without swap; skips the test where none can be made."""
    refusals = []
    for parent, memory, swap in places():
        group = parent / f"lazycache-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            refusals.append(str(error))
            continue
        try:
            try:
                (group / memory).write_text(f"{limit}")
            except OSError as error:
                refusals.append(str(error))
                continue
            if (group / swap).exists():
                (group / swap).write_text("0" if memory == "memory.max" else f"{limit}")
            yield group
            return
        finally:
            group.rmdir()
    pytest.skip(f"no control group can be made here: {'; '.join(refusals)}")


@pytest.fixture
def group() -> Iterator[Path]:
    with control_group(LIMIT) as group:
        yield group


def run(prelude: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", JOB, prelude, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def finishes(
    prelude: str, job: str, folder: Path, budget: str, found: object, *, short: bool = False
) -> int:
    """Run a job that must end well, within its budget; the budget in bytes.

    Where the machine is ``short`` of more than the budget knows, what was read ahead may have to
    go again before it is used.
    """
    process = run(prelude, job, folder, budget)
    assert process.returncode == 0, (process.returncode, process.stderr[-2000:])
    told = json.loads(process.stdout)
    assert told["found"] == found
    assert told["loads"] == COUNT or (short and told["loads"] > COUNT)
    assert told["overcommits"] == 0
    assert told["peak"] <= told["budget"]
    return int(told["budget"])


def test_the_limit_of_the_group_is_a_real_one(group: Path) -> None:
    process = run(ENTER.format(group=str(group)) + "bytearray(300 << 20)", "", "", "")
    # Without this, none of the tests below would say anything.
    assert process.returncode == -9


@pytest.mark.parametrize(
    ("job", "budget", "share"),
    [
        ("mean", "auto", 0.5),
        ("mean", "50%", 0.5),
        ("mean", "80%", 0.8),
        ("loop", "auto", 0.5),
        ("loop", "80%", 0.8),
    ],
)
def test_a_share_of_a_control_group_is_enough_and_not_too_much(
    group: Path, folder: Path, expected: dict[str, object], job: str, budget: str, share: float
) -> None:
    prelude = ENTER.format(group=str(group))
    given = finishes(prelude, job, folder, budget, expected[job])
    assert 0.8 * share * LIMIT < given < share * LIMIT


@pytest.mark.parametrize(("job", "budget"), [("mean", "auto"), ("loop", "80%")])
def test_page_cache_that_fills_the_group_takes_nothing_from_the_budget(
    group: Path, folder: Path, expected: dict[str, object], tmp_path: Path, job: str, budget: str
) -> None:
    # Files that were read before, by this job or the one before it in the group, stay in its page
    # cache, and count as used. The kernel gives them up before it kills.
    big = tmp_path / "big"
    with open(big, "wb") as file:
        file.truncate(230 * MIB)
    prelude = (ENTER + FILL).format(group=str(group), big=str(big))
    process = run(prelude + "sys.exit()", "", "", "")
    if "page cache" in process.stderr:
        pytest.skip(process.stderr)
    given = finishes(prelude, job, folder, budget, expected[job])
    assert given > (0.4 if budget == "auto" else 0.65) * LIMIT


@pytest.mark.parametrize(("job", "budget"), [("mean", "auto"), ("mean", "80%"), ("loop", "80%")])
def test_a_share_of_the_address_space_leaves_some_to_threads(
    folder: Path, expected: dict[str, object], job: str, budget: str
) -> None:
    # Each thread that allocates takes addresses beside its data: with as many threads as the loop
    # may start there would be none left.
    given = finishes(NARROW, job, folder, budget, expected[job], short=job == "loop")
    assert given < 1536 * MIB
