"""Results that are written while they are computed are in the files as NumPy has them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from expressions import (
    ROOMY,
    THREADS,
    WAYS,
    Done,
    Library,
    Program,
    difference,
    eagerly,
    lazily,
    noted,
    programs,
    running,
)
from hypothesis import assume
from hypothesis import strategies as st
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

import lazycache as lc
from lazycache import DataCache, LazyReadData, Plan, WriteError
from lazycache.plan import plan_of
from lazycache.readers import Probe
from lazycache.readers.arrays import NumPyReader
from lazycache.saving import ImageFile

Array = NDArray[Any]

ENDINGS = [".nii", ".nii.gz", ".npy", ".img", ".mgz"]
TYPES = [None, None, None, "u1", "i2", "i4", "f4", "f8", ">i2", "c8", "?"]

# --- what has to be in a file --------------------------------------------------------------------

_KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "i8", "u8", "f4", "f8", "c8", "c16")


def _types(header: Any) -> set[np.dtype[Any]]:
    found = set()
    for kind in _KINDS:
        with contextlib.suppress(HeaderDataError, MGHError):
            header.set_data_dtype(np.dtype(kind))
            found.add(np.dtype(kind))
    return found


_NIFTI, _MGH = _types(nibabel.Nifti1Header()), _types(MGHHeader())


def converted(value: Array, dtype: Any) -> Array | None:
    """``value`` in another type, rounded; None if that would lose more than digits."""
    wanted = np.dtype(dtype)
    if wanted == value.dtype:
        return value
    kinds = value.dtype.kind + wanted.kind
    if not set(kinds) <= set("biufc") or wanted.kind == "b" or kinds[0] == "c" != kinds[1]:
        return None
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if wanted.kind in "fc":
            result = value.astype(wanted)
            lost = np.isfinite(value) & ~np.isfinite(result)
        else:
            limits = np.iinfo(wanted)
            whole = [round_half_to_even(item) for item in value.ravel().tolist()]
            kept = [item is not None and limits.min <= item <= limits.max for item in whole]
            lost = ~np.array(kept, bool)
            fine = [item if keep else 0 for item, keep in zip(whole, kept, strict=True)]
            result = np.empty_like(value, wanted)
            result[...] = np.array(fine, wanted).reshape(value.shape)
    return None if lost.any() else result


def round_half_to_even(item: Any) -> int | None:
    return round(item) if np.isfinite(item) else None


def on_disk(value: Any, ending: str, dtype: Any) -> Array | None:
    """The values that a file of ``value`` has to hold; None if it can't be written."""
    value = np.asarray(value)
    if ending == ".npy":
        return value if dtype is None else converted(value, dtype)
    # Images of MGH are of the other byte order, which is no other type.
    value = value.astype(value.dtype.newbyteorder("="), copy=False)
    types = _MGH if ending == ".mgz" else _NIFTI
    if not value.ndim or not value.size or value.ndim > (4 if ending == ".mgz" else 7):
        return None
    if dtype is not None:
        wanted = np.dtype(dtype).newbyteorder("=")
        if wanted == value.dtype == bool:
            wanted = np.dtype("u1")
        return converted(value, wanted) if wanted in types else None
    known = value.dtype in types
    if value.dtype.kind in "iu" and (value.dtype.itemsize == 8 or not known):
        fits = [one for one in ("u1", "i2", "u2", "i4", "u4") if np.can_cast(value.dtype, one)]
        small = [one for one in fits if np.dtype(one) in types]
        if value.dtype.itemsize < 4 and small:
            return value.astype(small[0])
        as_int32 = converted(value, "i4")
        if as_int32 is not None:
            return as_int32
        return value if known else None
    if known:
        return value
    kinds = {"b": ["u1"], "f": ["f4"] if value.dtype.itemsize < 4 else ["f8", "f4"], "c": ["c16"]}
    found = [one for one in kinds[value.dtype.kind] if np.dtype(one) in types]
    return converted(value, found[0]) if found else None


def check_file(path: Path, expected: Array, affine: Any) -> None:
    """The file at ``path`` holds ``expected``, and says where that lies."""
    if path.suffix == ".npy":
        found = np.load(path)
        # Whether an array has gaps in memory, and so goes to a file in C order, doesn't count.
        orders = {one.flags.f_contiguous for one in (expected, expected.copy(order="K"))}
        assert found.flags.f_contiguous in orders
        assert not difference(np.ascontiguousarray(found), np.ascontiguousarray(expected))
        return
    image = nibabel.load(path)
    found = np.asarray(image.dataobj)
    wrong = difference(np.ravel(found, "F"), np.ravel(expected, "F").astype(found.dtype))
    assert not wrong, wrong
    assert found.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
    sizes = [size for size in expected.shape if size != 1]
    assert [size for size in found.shape if size != 1] == sizes
    if path.suffix == ".mgz":
        assert affine is None or np.allclose(image.affine, affine, atol=1e-4)
        return
    assert found.shape == expected.shape
    assert (image.header["sform_code"] > 0) == (affine is not None)
    assert affine is None or np.allclose(image.affine, affine, atol=1e-5)


# --- at random -----------------------------------------------------------------------------------


def planned(results: dict[Path, Any], dtype: Any, cache: DataCache) -> Plan:
    """The plan of `save_all`."""
    outputs: dict[Any, list[ImageFile]] = {}
    for path, item in results.items():
        outputs.setdefault(item._node, []).append(ImageFile(path, dtype))
    return plan_of([item._node for item in results.values()], cache, outputs)


def least_for(done: Done, library: Library, targets: dict[Path, int], dtype: Any) -> int | None:
    """The smallest budget for a program; None where it can't be told exactly.

    What was computed at once, an element say, has no plan, and numbers, as objects of Python, take
    more than their bytes.
    """
    if any(leaf.kind in ("called", "scalar") for leaf in done.leaves):
        return None
    with DataCache(ROOMY) as cache:
        values = lazily(done, library, cache, targets.values())
        results = {path: values[number] for path, number in targets.items()}
        if done.at_once(values) or not all(item.ndim for item in results.values()):
            return None
        try:
            least = planned(results, dtype, cache).min_budget
        except WriteError:
            return None
    return least if least >= 1000 else None


def saved(
    done: Done,
    library: Library,
    folder: Path,
    targets: dict[Path, int],
    dtype: Any,
    budget: int | None,
) -> dict[str, bytes]:
    """Save the values with these numbers, within ``budget``; what is in the files then."""
    told = f"{ {path.name: number for path, number in targets.items()} }, dtype={dtype}\n{done}"
    old = list(targets)[::2]
    for path in old:
        path.write_bytes(b"old")
    expected = {path: on_disk(done.values[n], path.suffix, dtype) for path, n in targets.items()}
    refused = [path.name for path, holds in expected.items() if holds is None]
    with DataCache(budget or ROOMY, strict=budget is not None) as cache:
        values = lazily(done, library, cache, targets.values())
        results = {path: values[number] for path, number in targets.items()}
        affines = {path: item.affine for path, item in results.items()}
        if refused:
            with pytest.raises(WriteError, match="|".join(map(re.escape, refused))):
                lc.save_all(results, dtype=dtype)
        else:
            plan = planned(results, dtype, cache)
            lc.save_all(results, dtype=dtype)
            stats = cache.stats()
            if budget is not None:
                assert stats.peak_bytes <= budget, told
                assert (stats.loads, stats.overcommits) == (plan.reads, 0), told
        cache.check()
    found = contents_of(folder)
    assert not [name for name in found if name.startswith(".")], told
    for path in targets:
        if found.get(path.name) == (b"old" if path in old else None):
            assert refused, f"{path.name} was not written\n{told}"
            continue
        holds = expected[path]
        assert holds is not None, f"{path.name} was written\n{told}"
        try:
            check_file(path, holds, affines[path])
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}\n{told}") from None
    return {} if refused else found


def contents_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


SAVED = st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4)


def test_what_is_saved_is_what_numpy_makes_of_it(
    library: Library, storm: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("saved")
    counted = itertools.count()

    @storm(programs(), WAYS, THREADS, SAVED, st.sampled_from(TYPES), st.integers(1, 4), share=0.5)
    def check(
        drawn: Program, way: str, threads: int, endings: list[str], dtype: Any, times: int
    ) -> None:
        done = eagerly(drawn, library)
        with running(way, threads), noted():
            values = lazily(done, library, DataCache(ROOMY), done.wanted)
            lazy = [n for n in done.wanted if isinstance(values[n], LazyReadData)]
            assume(lazy)
            wanted = [lazy[at % len(lazy)] for at in range(max(len(lazy), len(endings)))]
            files = []
            for how in ("roomy", "least", "more"):
                folder = place / f"{next(counted)}"
                folder.mkdir()
                targets = {
                    folder / f"{at}{endings[at % len(endings)]}": number
                    for at, number in enumerate(wanted)
                }
                least = None if how == "roomy" else least_for(done, library, targets, dtype)
                budget = least and least * (times if how == "more" else 1)
                files.append(saved(done, library, folder, targets, dtype, budget))
            assert files[0] == files[1] == files[2], f"other files\n{done}"


# --- what goes wrong in the middle ---------------------------------------------------------------

SHAPE = (4, 5, 16)
SIZE = 4 * 5 * 16


class Breaking:
    """Reads ``.npy`` files; that of the name ``broken`` fails after so many elements."""

    name = "breaking"
    converts = True

    def __init__(self) -> None:
        self.broken: str | None = None
        self.after = 0
        self._inner = NumPyReader()

    def can_read(self, path: str) -> bool:
        return self._inner.can_read(path)

    def probe(self, path: str, **options: Any) -> Probe:
        return self._inner.probe(path, **options)

    def read(self, path: str, **options: Any) -> Any:
        if os.path.basename(path) == self.broken:
            raise OSError("the disk is gone")
        return self._inner.read(path, **options)

    def open_blocks(self, path: str, **options: Any) -> Any:
        blocks = self._inner.open_blocks(path, **options)
        return _Breaking(blocks, self.after) if os.path.basename(path) == self.broken else blocks


class _Breaking:
    def __init__(self, blocks: Any, left: int) -> None:
        self._blocks = blocks
        self._left = left

    def into(self, flat: Array) -> None:
        self._left -= flat.size
        if self._left < 0:
            raise OSError("the disk is gone")
        self._blocks.into(flat)

    def skip(self, count: int) -> None:
        self._left -= count
        self._blocks.skip(count)

    def close(self) -> None:
        self._blocks.close()


RESULTS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda v: v[0] + v[1] * v[2],
    "mean": lambda v: lc.mean(v),
    "deviation": lambda v: lc.std(v),
    "of a mean": lambda v: (v[0] - lc.mean(v)) / lc.std(v),
    "median": lambda v: lc.median(v),
    "map": lambda v: lc.map_voxels(lambda x: x.max(0), v),
    "along an axis": lambda v: (v[0] + v[1]).mean(-1),
    "scaled": lambda v: v[3] * 2 - v[3].mean(-1, keepdims=True),
    "file": lambda v: v[2],
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    dice = np.random.default_rng(0)
    for number in range(6):
        np.save(folder / f"{number}.npy", np.asfortranarray(dice.random(SHAPE, "f4")))
    return folder


def test_a_read_that_fails_in_the_middle_leaves_each_file_old_or_new(
    volumes: Path, storm: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("broken")
    counted = itertools.count()
    several = st.lists(st.sampled_from(sorted(RESULTS)), min_size=1, max_size=4)
    broken = st.integers(0, 5), st.integers(0, SIZE)

    @storm(several, SAVED, WAYS, THREADS, *broken, st.integers(0, 4), share=0.5)
    def check(
        names: list[str],
        endings: list[str],
        way: str,
        threads: int,
        number: int,
        after: int,
        more: int,
    ) -> None:
        reader = Breaking()
        folder = place / f"{next(counted)}"
        folder.mkdir()
        paths = [folder / f"{at}{endings[at % len(endings)]}" for at in range(len(names))]

        def results() -> dict[Path, Any]:
            images = [LazyReadData(volumes / f"{n}.npy", reader=reader) for n in range(6)]
            return {path: RESULTS[name](images) for path, name in zip(paths, names, strict=True)}

        with running(way, threads):
            with DataCache(ROOMY) as cache:
                plan = planned(results(), "f4", cache)
                uses = {os.path.basename(path) for path in plan.uses}
                lc.save_all(results(), dtype="f4")
            new = contents_of(folder)
            for file in new:
                (folder / file).write_bytes(b"old")
            steps = (plan.single_pass_budget - plan.min_budget) // 4
            with DataCache(plan.min_budget + more * steps, strict=True) as cache:
                wanted = results()
                reader.broken, reader.after = f"{number}.npy", after
                # A file that is used no further than that is not broken.
                with contextlib.suppress(OSError):
                    lc.save_all(wanted, dtype="f4")
                    assert f"{number}.npy" not in uses or after >= SIZE
                now = contents_of(folder)
                assert now.keys() == new.keys()
                assert all(content in (b"old", new[file]) for file, content in now.items())
                cache.check()
                reader.broken = None
                lc.save_all(wanted, dtype="f4")
                assert contents_of(folder) == new
                assert cache.stats().peak_bytes <= cache.budget
                assert cache.stats().overcommits == 0


# --- found before --------------------------------------------------------------------------------


@pytest.mark.parametrize("twice", [False, True])
def test_one_result_goes_to_a_file_in_blocks_and_to_one_that_needs_it_whole(
    twice: bool, tmp_path: Path
) -> None:
    dice = np.random.default_rng(0)
    arrays = [np.asfortranarray(dice.integers(0, 99, (50, 60, 40))) for _ in range(2)]
    for name, array in zip("ab", arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)

    def total() -> LazyReadData:
        return LazyReadData(tmp_path / "a.npy") + LazyReadData(tmp_path / "b.npy")

    with DataCache(ROOMY):
        least = lc.explain(total()).min_budget
    with DataCache(least, strict=True):
        one = total()
        # Only all of its values tell which integers an image holds.
        lc.save_all({tmp_path / "sum.npy": one, tmp_path / "sum.nii": total() if twice else one})
    assert np.array_equal(np.load(tmp_path / "sum.npy"), sum(arrays))
    assert np.array_equal(nibabel.load(tmp_path / "sum.nii").dataobj, sum(arrays))


def test_a_file_in_memory_that_is_in_the_way_goes(volumes: Path) -> None:
    """What the rest needs may be had only in many pieces, with nothing else in memory."""

    def images() -> list[LazyReadData]:
        return [LazyReadData(volumes / f"{n}.npy") for n in range(6)]

    with running("few", 1):
        with DataCache(ROOMY):
            least = lc.explain(lc.median(images())).min_budget
        with DataCache(least, strict=True) as cache:
            some = images()
            median = lc.median(some)
            some[0].data
            plan = lc.explain(median)
            assert plan.fits
            assert plan.peak_bytes <= least
            median.data
            assert cache.stats().peak_bytes <= least
            assert cache.stats().loads == plan.reads + 1


@pytest.mark.parametrize(
    ("one", "other"), [("o.npy", "./o.npy"), ("o.img", "o.hdr"), ("o.HDR", "o.IMG")]
)
def test_two_results_do_not_go_to_one_file_or_pair(one: str, other: str, tmp_path: Path) -> None:
    image = LazyReadData(np.ones((3, 4, 5)), cache=DataCache(ROOMY))
    results = {f"{tmp_path}/{one}": image + 1, f"{tmp_path}/{other}": image + 2}
    with pytest.raises(WriteError, match="two results can't go to one file"):
        lc.save_all(results)
    assert not os.listdir(tmp_path)
