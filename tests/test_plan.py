"""Plans: what is foretold from headers is what happens, and how it is said."""

from __future__ import annotations

import operator
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as remembered
from functools import reduce
from itertools import permutations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import lazycache as lc
from lazycache.cache import DataCache
from lazycache.errors import BudgetExceededError, ShapeMismatchError
from lazycache.execute import prepare
from lazycache.memory import usable_cpus
from lazycache.plan import Plan, explain, plan_of
from lazycache.planning import Planner
from lazycache.program import Manner, build
from lazycache.proxy import LazyReadData
from lazycache.readers.arrays import NumPyReader
from lazycache.readers.base import Probe
from lazycache.results import compute
from lazycache.saving import ImageFile
from lazycache.sizes import parse_size

SHAPE = (48, 52, 56)  # 546 KiB of float32: large enough to go by blocks
VOLUME = int(np.prod(SHAPE)) * 4
RUN = (32, 34, 20, 24)
# Readers' buffers and the counts of what is small.
SMALL = 64 << 10
ROOMY = 1 << 30


class Whole:
    """Reads as the reader of NumPy files does, but no blocks."""

    name = "whole"
    converts = True

    def __init__(self) -> None:
        self.inner = NumPyReader()

    def can_read(self, path: str) -> bool:
        return False

    def probe(self, path: str, **options: Any) -> Probe:
        return replace(self.inner.probe(path, **options), in_blocks=False)

    def read(self, path: str, **options: Any) -> Any:
        return self.inner.read(path, **options)


class HeadersOnly(NumPyReader):
    """Says what there is, and fails where anybody wants to have it."""

    def read(self, path: str, **options: Any) -> Any:
        raise AssertionError(f"{path} was read")

    read_part = open_blocks = read


WHOLE = Whole()
HEADERS_ONLY = HeadersOnly("headers only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A hundred float32 volumes, of ten contents, an int16 run, and what headers alone tell."""
    rng = np.random.default_rng(0)
    folder: Path = tmp_path_factory.mktemp("volumes")
    for i in range(10):
        np.save(folder / f"{i}.npy", np.asfortranarray(rng.random(SHAPE, "f4") * 100))
    for i in range(10, 100):
        os.link(folder / f"{i % 10}.npy", folder / f"{i}.npy")
    np.save(folder / "run.npy", np.asfortranarray(rng.integers(0, 1000, RUN).astype("i2")))
    return folder


def volumes(folder: Path, count: int, reader: Any = None, **kwargs: Any) -> list[LazyReadData]:
    return [LazyReadData(folder / f"{i}.npy", reader=reader, **kwargs) for i in range(count)]


def repeated(v: list[LazyReadData]) -> Any:
    """A formula of 20 operands, some of which come back soon and some late."""
    value = v[0] * 1.5
    pairs = [(1, 3), (2, 3), (0, 7), (3, 2), (4, 5), (1, 7), (5, 0), (6, 1), (0, 6)]
    for step, (i, k) in enumerate(pairs):
        value = value + v[i] * v[k] if step % 2 else value * (v[i] - v[k])
    return value + v[4]


CASES: dict[str, tuple[int, Callable[[Any], Sequence[Any]]]] = {
    "sum": (100, lambda v: [sum(v)]),
    "mean": (100, lambda v: [lc.mean(v)]),
    "formula": (3, lambda v: [(v[0] * 2 + v[1] * v[2]) / 1.2 + v[0]]),
    "repeated": (8, lambda v: [repeated(v)]),
    "several": (12, lambda v: [lc.mean(v), lc.std(v), lc.median(v)]),
    "mean and std": (12, lambda v: [lc.mean(v), lc.std(v, ddof=1)]),
    "overlapping": (6, lambda v: [v[0] + v[1] * v[2], v[1] - v[5], v[3]]),
    "files": (5, lambda v: [v[0].T * 2, v[1][..., :3], v[2], v[3], v[4]]),
    "run mean": (0, lambda run: [run.mean(-1)]),
    "run std": (0, lambda run: [run.std(-1)]),
    "z-score": (0, lambda run: [z_score(run)]),
}


def z_score(run: Any) -> Any:
    return (run - run.mean(-1, keepdims=True)) / run.std(-1, keepdims=True)


def made(name: str, folder: Path, reader: Any) -> list[Any]:
    count, make = CASES[name]
    images = (
        volumes(folder, count, reader) if count else LazyReadData(folder / "run.npy", reader=reader)
    )
    return list(make(images))


def budgets(plan: Plan) -> list[int]:
    """The smallest that works, the smallest with one pass, some between and some above."""
    low, high = plan.min_budget, plan.single_pass_budget
    between = {low + (high - low) * part // 4 for part in range(5)} | {high - 1}
    return [*sorted(budget for budget in between if budget >= low), 2 * high, ROOMY]


def same(plan: Plan, cache: DataCache) -> None:
    """What was foretold is what happened."""
    stats = cache.stats()
    assert (stats.overcommits, stats.load_failures) == (0, 0)
    assert stats.loads == plan.reads
    assert stats.loaded_bytes == plan.bytes_read
    assert abs(plan.peak_bytes - stats.peak_bytes) <= 0.02 * stats.peak_bytes


# --- what is foretold happens --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_explaining_reads_no_voxel(name: str, folder: Path) -> None:
    with DataCache("64MiB", strict=True) as cache:
        plan = explain(*made(name, folder, HEADERS_ONLY))
        assert plan.reads > 0
        assert plan.fits
        assert (cache.stats().misses, cache.used) == (0, 0)


@pytest.mark.parametrize("reader", [None, WHOLE], ids=["blocks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_reads_and_peak_are_those_foretold_whatever_the_budget(
    name: str, reader: Any, folder: Path
) -> None:
    with DataCache(ROOMY):
        tried = budgets(explain(*made(name, folder, reader)))
    values = None
    reads = []
    for budget in tried:
        with DataCache(budget, strict=True) as cache:
            expressions = made(name, folder, reader)
            plan = explain(*expressions)
            assert plan.fits
            found = [value.tobytes() for value in compute(*expressions)]
            same(plan, cache)
            reads.append(plan.reads)
            assert plan.peak_bytes <= budget
            assert (plan.passes == 1) == (budget >= plan.single_pass_budget)
            assert found == (values or found), "whatever the budget, the values are the same"
            values = found
    assert reads == sorted(reads, reverse=True), "more memory costs no read"
    assert reads[-1] == len(plan.uses)


@pytest.mark.parametrize("reader", [None, WHOLE], ids=["blocks", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_a_byte_less_than_the_smallest_budget_is_refused_before_reading(
    name: str, reader: Any, folder: Path
) -> None:
    with DataCache(ROOMY):
        least = explain(*made(name, folder, reader)).min_budget
    with DataCache(least - 1, strict=True) as cache:
        expressions = made(name, folder, reader)
        plan = explain(*expressions)
        assert (plan.fits, plan.min_budget) == (False, least)
        with pytest.raises(BudgetExceededError):
            compute(*expressions)
        assert cache.stats().loads == 0


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_files_that_are_results_need_no_more_than_reading_them_in_turn_takes(
    order: Sequence[int], tmp_path: Path
) -> None:
    for number, slices in enumerate((10, 40, 20)):
        data = np.full((64, 64, slices), number, np.int16)
        nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / f"{number}.nii.gz")
    with DataCache(ROOMY):
        least = explain(*[LazyReadData(tmp_path / f"{i}.nii.gz") for i in order]).min_budget
    with DataCache(least, strict=True) as cache:
        kept = compute(*[LazyReadData(tmp_path / f"{i}.nii.gz") for i in order])
        assert cache.stats().peak_bytes == least
    assert [value.flat[0] for value in kept] == list(order)
    del kept  # or it would be handed out again
    with DataCache(least - 1, strict=True), pytest.raises(BudgetExceededError):
        compute(*[LazyReadData(tmp_path / f"{i}.nii.gz") for i in order])


@pytest.mark.parametrize("reader", [None, WHOLE], ids=["blocks", "whole"])
@pytest.mark.parametrize("name", ["z-score", "run std", "mean", "mean and std"])
def test_what_is_saved_needs_what_is_foretold(
    name: str, reader: Any, folder: Path, tmp_path: Path
) -> None:
    def plan_for(results: dict[Path, Any], cache: DataCache) -> Plan:
        nodes = {item._node: [ImageFile(path, "f4")] for path, item in results.items()}
        return plan_of(list(nodes), cache, nodes)

    def results() -> dict[Path, Any]:
        made_now = made(name, folder, reader)
        return {tmp_path / f"{place}.npy": item for place, item in enumerate(made_now)}

    with DataCache(ROOMY) as cache:
        tried = budgets(plan_for(results(), cache))
        assert not list(tmp_path.iterdir()), "a plan writes nothing"
    for budget in tried:
        with DataCache(budget, strict=True) as cache:
            wanted = results()
            plan = plan_for(wanted, cache)
            assert plan.fits
            lc.save_all(wanted, dtype="f4")
            same(plan, cache)
    if name == "z-score":
        run = np.load(folder / "run.npy")
        assert np.array_equal(np.load(tmp_path / "0.npy"), z_score(run).astype("f4"))


@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_written_is_foretold(seed: int, folder: Path) -> None:
    with DataCache(ROOMY):
        plan = explain(*at_random(seed, folder))
    low, high = plan.min_budget, plan.single_pass_budget
    between = random.Random(seed).randint(low, high)
    found = None
    for budget in dict.fromkeys([low, between, high, ROOMY]):
        with DataCache(budget, strict=True) as cache:
            expressions = at_random(seed, folder)
            plan = explain(*expressions)
            assert plan.fits
            assert (plan.passes <= 1) == (budget >= high)
            values = [value.tobytes() for value in compute(*expressions)]
            same(plan, cache)
            assert values == (found or values)
            found = values


def at_random(seed: int, folder: Path) -> list[Any]:
    """Expressions of files that are read in blocks, as a whole, or as it comes."""
    chance = random.Random(seed)
    readers = chance.choice([[None], [WHOLE], [None, WHOLE]])
    values: list[Any] = [
        LazyReadData(folder / f"{i}.npy", reader=chance.choice(readers), nops=chance.choice([0, 1]))
        for i in chance.choices(range(8), k=6)
    ]
    binary = (operator.add, operator.sub, operator.mul, np.maximum)
    over = (lc.mean, lc.std, lc.max, lc.sum, lc.median)
    for _ in range(chance.randint(2, 9)):
        some = chance.choices(values, k=chance.randint(2, 4))
        if chance.random() < 0.7:
            values.append(chance.choice(binary)(some[0], some[1]))
        else:
            values.append(chance.choice(over)(some))
    return [values[-1], *chance.sample(values, chance.randint(0, 2))]


def test_results_that_are_only_saved_need_no_memory_of_their_size(tmp_path: Path) -> None:
    run = headers(tmp_path / "run.npy", (64, 64, 40, 300), "i2")
    with DataCache(ROOMY) as cache:
        score = z_score(LazyReadData(run, reader=HEADERS_ONLY))
        kept = explain(score)
        written = plan_of([score._node], cache, {score._node: [ImageFile(tmp_path / "z.npy")]})
        assert kept.min_budget > score.nbytes > 16 * written.min_budget


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_a_hundred_volumes_take_two_or_less(name: str, folder: Path) -> None:
    with DataCache(ROOMY):
        whole = explain(*made(name, folder, WHOLE))
        assert whole.min_budget == whole.single_pass_budget <= 2 * VOLUME + SMALL
        streamed = explain(*made(name, folder, None))
        assert streamed.min_budget == streamed.single_pass_budget < whole.min_budget


@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_large_volumes_that_are_streamed_take_the_result_and_a_few_mib(
    dtype: str, tmp_path: Path
) -> None:
    files = [headers(tmp_path / f"{i}.npy", (256, 256, 256), dtype) for i in range(100)]
    images = [LazyReadData(file, reader=HEADERS_ONLY) for file in files]
    for result in (sum(images), lc.mean(images)):
        plan = explain(result)
        assert plan.single_pass_budget <= result.nbytes + (16 << 20) + (3 << 20) * usable_cpus()
        assert (plan.reads, plan.passes) == (100, 1)


def headers(path: Path, shape: tuple[int, ...], dtype: str) -> Path:
    """A file that has the header of a large array, and none of its disk blocks."""
    with open(path, "wb") as file:
        descr = {"descr": np.dtype(dtype).str, "fortran_order": True, "shape": shape}
        np.lib.format.write_array_header_1_0(file, descr)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return path


# --- the choice ----------------------------------------------------------------------------------


def test_what_takes_more_for_itself_is_computed_first(folder: Path) -> None:
    a, b, c, d, e = volumes(folder, 5, WHOLE)
    value = a * 2 + (b * c + d * e) * ((a - c) * (b - d) + (c - e) * (a - d))
    with DataCache(ROOMY) as cache:
        plan = explain(value)
        outline = prepare([value._node], cache)
        as_written = build(outline, [value._node], Manner(0), outline.steps)
    assert plan.min_budget <= as_written.need - VOLUME
    with DataCache(plan.min_budget, strict=True):
        x, y, z, s, t = (np.load(folder / f"{i}.npy") for i in range(5))
        expected = x * 2 + (y * z + s * t) * ((x - z) * (y - s) + (z - t) * (x - s))
        assert np.array_equal(value.data, expected)


@pytest.mark.parametrize("name", ["formula", "repeated", "overlapping", "pairs", "ring"])
def test_there_are_no_fewer_reads_than_are_planned(name: str, folder: Path) -> None:
    def expressions() -> list[Any]:
        v = volumes(folder, 8, WHOLE)
        if name == "pairs":
            return [sum(v[i] * v[k] for i in range(5) for k in range(i))]
        if name == "ring":
            return [lc.std(v[:5])]
        return list(CASES[name][1](v))

    with DataCache(ROOMY):
        roomy = explain(*expressions())
    for budget in budgets(roomy):
        with DataCache(budget, strict=True) as cache:
            wanted = expressions()
            roots = [item._node for item in wanted]
            plan = explain(*wanted)
            outline = prepare(roots, cache)
            stood_for = [outline.stand_in(root) for root in roots]
            programs = [p for p in Planner(outline, stood_for)._programs() if p.need <= budget]
            fewest = min(_fewest(program, stood_for, budget) for program in programs)
            assert plan.reads == fewest
            compute(*wanted)
            assert cache.stats().loads == fewest


def _fewest(program: Any, roots: Sequence[Any], budget: int) -> int:
    """By trying everything that may be kept after each stage."""
    needs = [frozenset(n.key for n in stage.pinned) for stage in program.stages if stage.pinned]
    needs += [frozenset([root.key]) for root in roots if hasattr(root, "key")]
    room = (budget - program.workspace) // VOLUME  # all files take the same

    @remembered
    def following(place: int, there: frozenset[Any]) -> int:
        if place == len(needs):
            return 0
        wanted = needs[place]
        kept = there | wanted
        reads = len(wanted - there)
        rest = sorted(kept - wanted, key=id)
        if len(kept) <= room:
            return reads + following(place + 1, kept)
        ways = [frozenset(rest[:i] + rest[i + 1 :]) for i in range(len(rest))]
        while ways and len(ways[0]) + len(wanted) > room:
            ways = list({way - {key} for way in ways for key in way})
        return reads + min(following(place + 1, way | wanted) for way in ways)

    return following(0, frozenset())


def test_two_proxies_of_one_file_are_one_read(folder: Path) -> None:
    for reader in (None, WHOLE):
        [a], [b] = volumes(folder, 1, reader, nops=1), volumes(folder, 1, reader, nops=2)
        with DataCache(ROOMY):
            least = explain(a + b).min_budget
        with DataCache(least, strict=True) as cache:
            plan = explain(a + b)
            assert (plan.reads, plan.uses) == (1, {str(folder / "0.npy"): 1})
            assert np.array_equal((a + b).data, 2 * np.load(folder / "0.npy"))
            assert cache.stats().loads == 1
            assert (a._node.handle.left, b._node.handle.left) == (0, 1)


# --- what it says --------------------------------------------------------------------------------


def test_uses_count_operations_by_path(folder: Path) -> None:
    a, b = volumes(folder, 2)
    path, other, run = (str(folder / f"{name}.npy") for name in ("0", "1", "run"))
    with DataCache(ROOMY):
        assert explain(a * a + b).uses == {path: 1, other: 1}
        assert explain(a * 2 + a, a).uses == {path: 3}
        as_double = LazyReadData(folder / "0.npy", dtype="f8")
        plan = explain(a + as_double)
        assert (plan.uses, plan.reads, plan.passes) == ({path: 1}, 2, 1)
        series = LazyReadData(run)
        plan = explain(series[..., 0] + series[..., 1])
        assert (plan.uses, plan.reads, plan.passes) == ({run: 1}, 2, 1)
        assert "1 file, 2 reads: " in str(plan)


def test_what_is_in_memory_is_not_read_and_counts(folder: Path) -> None:
    with DataCache(ROOMY, strict=True) as cache:
        a, b = volumes(folder, 2)
        a.data
        plan = explain(a)
        assert (plan.reads, plan.passes, plan.peak_bytes) == (0, 0, VOLUME)
        assert "nothing is read: 1 file, in memory already" in str(plan)
        total = a + b
        assert explain(total).reads == 1
        total.data
        before = cache.stats().loads
        plan = explain(total * 2)
        assert (plan.reads, plan.uses) == (0, {})
        assert plan.min_budget >= 2 * VOLUME
        (total * 2).data
        assert cache.stats().loads == before


def test_arrays_count_once_wherever_they_stand(folder: Path) -> None:
    weights = np.asfortranarray(np.ones(SHAPE, "f4"))
    weights.flags.writeable = False
    [a] = volumes(folder, 1, WHOLE)
    with DataCache(ROOMY) as cache:
        proxy = LazyReadData(weights)
        value = (a * proxy + proxy) / weights
        plan = explain(value)
        assert plan.min_budget <= 3 * VOLUME + SMALL
        value.data
        same(plan, cache)
    with DataCache(plan.min_budget, strict=True) as cache:
        value = (a * LazyReadData(weights) + LazyReadData(weights)) / weights
        assert explain(value).fits
        value.data
        assert cache.stats().overcommits == 0


def test_it_fits_or_says_which_budget_would_do(folder: Path) -> None:
    with DataCache(ROOMY):
        roomy = explain(*made("mean and std", folder, None))
    assert roomy.fits
    assert "1 GiB: fits; the smallest budget that works is " in str(roomy)
    assert "12 files, each read once: 6.4 MiB of data" in str(roomy)
    with DataCache(roomy.min_budget):
        narrow = explain(*made("mean and std", folder, None))
    assert (narrow.fits, narrow.passes, narrow.reads) == (True, 2, 24)
    assert "12 files, 24 reads: 12.8 MiB of data" in str(narrow)
    assert "fits, but needs 2 passes; from " in str(narrow)
    assert "12 files (0.npy ...) 2 times each: no room to keep what is used again" in str(narrow)
    with DataCache(roomy.min_budget // 2):
        small = explain(*made("mean and std", folder, None))
    assert not small.fits
    assert f"does not fit; the smallest budget that works is {small.enough}; from " in str(small)


def test_the_budget_that_it_names_is_enough(folder: Path) -> None:
    for name in CASES:
        with DataCache("100 KiB"):
            plan = explain(*made(name, folder, None))
            assert not plan.fits
            assert plan.min_budget <= parse_size(plan.enough) <= 1.02 * plan.min_budget
        with DataCache(plan.enough, strict=True):
            assert explain(*made(name, folder, None)).fits
    for nbytes in (0, 1, 1023, 1024, 1029, 10_000, 1_047_552, 10**7 + 1, 10**12 + 1):
        plan = replace(plan, min_budget=nbytes)
        assert nbytes <= parse_size(plan.enough) <= 1.02 * nbytes


def test_data_held_for_something_else_is_named(folder: Path) -> None:
    with DataCache(4 * VOLUME, strict=True):
        a, b, c, d = volumes(folder, 4, WHOLE)
        mine = [c.data, d.data]
        plan = explain(a + b)
        assert plan.fits
        del mine
        mine = [(c * 2).data, (d * 2).data]
        held = sum(item.nbytes for item in mine)
        plan = explain(a * b + b)
        assert (plan.fits, plan.held) == (False, held)
        assert "are needed, and 1.07 MiB are in use for something else" in str(plan)
        assert parse_size(plan.enough) >= plan.min_budget + held


def test_the_reasons_for_types_are_told(tmp_path: Path) -> None:
    for number in range(4):
        image = nib.Nifti1Image(np.linspace(0, number + 1, 24).reshape(4, 3, 2), np.eye(4))
        image.set_data_dtype(np.int16)
        nib.save(image, tmp_path / f"{number}.nii")
    files = [tmp_path / f"{number}.nii" for number in range(4)]
    [text] = explain(lc.mean(map(lc.load, files))).dtypes
    assert text.startswith("float64 for 4 files (0.nii ...): int16 on disk, scaled by scl_slope ")
    assert text.endswith('; dtype="float32" would halve that')
    [text] = explain(lc.load(files[0]) + lc.load(files[1])).dtypes
    assert text.startswith("float64 for 0.nii and 1.nii: int16 on disk")
    assert explain(lc.mean(lc.load(file, dtype="f4") for file in files)).dtypes == ()


def test_operations_that_take_whole_operands_are_named(folder: Path) -> None:
    v = volumes(folder, 5)
    with DataCache(ROOMY):
        [text] = explain(lc.percentile(v[0], 95, axis=-1) * 2, lc.mean(v).mean(axis=-1)).whole
        assert text == "percentile of 0.npy ... along axis -1 takes whole operands of 546 KiB"
        assert explain(lc.mean(v), lc.median(v), v[0].std(axis=-1), v[0].T).whole == ()
        odd = [np.percentile(v[0], q, axis=-1) for q in range(8)]
        odd += [np.percentile(image, 5, axis=-1) for image in v]
        told = explain(*odd, np.percentile(v[1] * 2, 5, axis=-1)).whole
        assert (len(told), told[-1]) == (4, "so do 2 operations more")
    with DataCache(ROOMY):
        [text] = explain(sum(volumes(folder, 5, WHOLE))).whole
    assert text == (
        "5 files (0.npy ...) are loaded as a whole (546 KiB each at most): "
        "the reader gives no blocks"
    )


def test_it_is_short_for_five_hundred_files(tmp_path: Path) -> None:
    files = [headers(tmp_path / f"{i}.npy", (64, 64, 40), "i2") for i in range(500)]
    with DataCache("2MiB"):
        plan = explain(lc.mean(map(lc.load, files)), lc.median(map(lc.load, files)))
    lines = str(plan).splitlines()
    assert len(lines) <= 6
    assert max(map(len, lines)) <= 120
    assert len(plan.uses) == 500


@pytest.mark.parametrize(
    ("most", "work"), [(30, explain), (60, lambda total: total.data)], ids=["planned", "computed"]
)
def test_a_long_sum_of_small_arrays_takes_few_calls_a_term(
    most: int, work: Callable[[LazyReadData], Any]
) -> None:
    # Calls are counted, which nothing else on the machine changes; see benchmarks/planning.py.
    terms = 2000
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with DataCache(ROOMY):
        arrays = [LazyReadData(np.full((8, 8, 8), float(number))) for number in range(10)]
        total = reduce(operator.add, (arrays[number % 10] for number in range(terms)))
        work(arrays[0] + arrays[1])
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            work(total)
        finally:
            sys.setprofile(before)
    assert terms < calls < most * terms


def test_html_is_a_table_of_the_same(folder: Path) -> None:
    os.link(folder / "0.npy", folder / "<b>.npy")
    with DataCache("600 KiB"):
        image = LazyReadData(folder / "<b>.npy")
        plan = explain((image * 2 + LazyReadData(folder / "1.npy")) / image)
    text = plan._repr_html_()
    assert text.count("<tr>") == len(str(plan).splitlines())
    assert ("&lt;b&gt;.npy" in text, "<b>" in text) == (True, False)
    for label in ("files", "again", "peak", "budget"):
        assert f">{label}<" in text
        assert f"\n{label} " in f"\n{plan}"


def test_what_headers_tell_is_raised(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.ones((3, 4)))
    [a] = volumes(folder, 1)
    with pytest.raises(ShapeMismatchError, match=r"small\.npy"):
        explain(a + LazyReadData(tmp_path / "small.npy"))
    with pytest.raises(FileNotFoundError):
        explain(a, LazyReadData(tmp_path / "nothing.npy"))
    with pytest.raises(TypeError, match="none was given"):
        explain(1, np.ones(3))
