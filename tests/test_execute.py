"""Computing: what is read when, how much memory it takes, and what an error says."""

from __future__ import annotations

import gc
import os
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import WHOLE

from lazycache import _buffers, execute, needs
from lazycache import functions as lc
from lazycache.cache import DataCache
from lazycache.errors import (
    BudgetExceededError,
    FileChangedError,
    FileChangedWarning,
    GridMismatchError,
    ShapeMismatchError,
)
from lazycache.expression import FileNode
from lazycache.plan import explain
from lazycache.proxy import LazyReadData
from lazycache.results import compute

SHAPE = (100, 110, 60)  # over 2 MiB of float32, so that memory of our own is used


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten float32 volumes."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("volumes")
    for i in range(10):
        np.save(folder / f"{i}.npy", np.asfortranarray(rng.random(SHAPE, "f4") * 100))
    return folder


@pytest.fixture
def cache():
    cache = DataCache("1GiB")
    yield cache
    cache.check()


def arrays_in(folder):
    return [np.load(folder / f"{i}.npy") for i in range(10)]


def proxies_in(folder, cache, **kwargs):
    return [LazyReadData(folder / f"{i}.npy", cache=cache, **kwargs) for i in range(10)]


def small(folder, name, array):
    np.save(folder / f"{name}.npy", array)
    return folder / f"{name}.npy"


VOLUME = int(np.prod(SHAPE)) * 4

NEEDED = {
    "sum": (2, lambda v: sum(v)),
    "lc.sum": (2, lambda v: lc.sum(v)),
    "mean": (2, lambda v: lc.mean(v)),
    "max": (2, lambda v: lc.max(v)),
    "std": (3.1, lambda v: lc.std(v)),
    "nanmean": (5, lambda v: lc.nanmean(v)),
    "formula": (3.1, lambda v: (v[0] * 2 + v[1] * v[2]) / 1.2),
    "in place": (3, lambda v: in_place(v)),
    "view": (1, lambda v: v[3].T),
    "slice of half": (1.5, lambda v: v[0][..., 30:] * 2),
    "repeated": (2, lambda v: v[0] * v[0] + v[0]),
    "comparison": (2.25, lambda v: v[0] > v[1]),
    "power": (2, lambda v: v[0] ** 2),
    "chain": (2, lambda v: np.sqrt(np.abs(-v[0]) + 1)),
    "item assignment": (2.02, lambda v: assigned(v)),
    "where": (3.25, lambda v: lc.where(v[0] > 50, v[1], v[2])),
    "clip": (2, lambda v: v[0].clip(3, 50) / 2),
    "astype": (3, lambda v: v[0].astype("f8")),
}


def in_place(v):
    total = LazyReadData(v[0])
    for other in v[1:]:
        total += other
    total /= 10
    return total


def assigned(v):
    changed = LazyReadData(v[0])
    for i in range(5):
        changed[i] = i
        changed[i : i + 2, ...] = changed[50]
    return changed


@pytest.mark.parametrize("name", NEEDED)
def test_no_more_volumes_than_needed_are_in_memory_at_once(name, folder):
    volumes, make = NEEDED[name]
    expected = make(arrays_in(folder)) if name not in ("in place", "item assignment") else None
    enough = DataCache(int(VOLUME * volumes) + 4096, strict=True)
    found = make(proxies_in(folder, enough, reader=WHOLE)).data
    stats = enough.stats()
    assert (stats.overcommits, stats.load_failures) == (0, 0)
    if isinstance(expected, np.ndarray):
        assert found.tobytes() == expected.tobytes()
        assert found.strides == expected.strides
    less = DataCache(int(VOLUME * (volumes - 0.3)), strict=True)
    with pytest.raises(BudgetExceededError):
        make(proxies_in(folder, less, reader=WHOLE)).data
    assert less.stats().loads == 0, "refused before anything was read"


BY_BLOCKS = NEEDED.keys() - {"view", "slice of half", "item assignment"}


@pytest.mark.parametrize("name", sorted(BY_BLOCKS))
def test_what_goes_by_blocks_needs_less_than_with_whole_volumes(name, folder):
    volumes, make = NEEDED[name]
    expected = None if name == "in place" else make(arrays_in(folder))
    cache = DataCache("1GiB")
    budget = explain(make(proxies_in(folder, cache))).min_budget
    cache = DataCache(budget, strict=True)
    found = make(proxies_in(folder, cache)).data
    stats = cache.stats()
    assert (stats.overcommits, stats.load_failures) == (0, 0)
    assert stats.peak_bytes <= budget < VOLUME * volumes
    if isinstance(expected, np.ndarray):
        assert found.tobytes() == expected.tobytes()
        assert found.strides == expected.strides
    less = DataCache(budget - 1, strict=True)
    with pytest.raises(BudgetExceededError):
        make(proxies_in(folder, less)).data
    assert less.stats().loads == 0, "refused before anything was read"


@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_each_file_is_read_once(name, folder):
    cache = DataCache(VOLUME * 2 + 4096)
    NEEDED[name][1](proxies_in(folder, cache)).data
    assert cache.stats().loads == 10


def test_a_shared_subexpression_is_computed_once(folder, cache, monkeypatch):
    calls = []
    monkeypatch.setattr(needs, "_WORTH_IT", 1 << 40)
    a, b, *_ = proxies_in(folder, cache)
    shared = a + b
    step = execute._Run._step

    def counted(self, node, operation):
        calls.append(node.op.name)
        step(self, node, operation)

    monkeypatch.setattr(execute._Run, "_step", counted)
    found = ((shared * shared) + shared).data
    assert sorted(calls) == ["*", "+", "+"]
    x, y, *_ = arrays_in(folder)
    assert np.array_equal(found, (x + y) * (x + y) + (x + y))


def test_several_expressions_are_computed_together(folder, cache):
    v = proxies_in(folder, cache)
    x = arrays_in(folder)
    both = v[0] + v[1]
    nodes = [both._node, (both * 2)._node, v[2]._node, both._node]
    values = [value for value, _ in execute.compute(nodes, cache)]
    assert np.array_equal(values[0], x[0] + x[1])
    assert np.array_equal(values[1], (x[0] + x[1]) * 2)
    assert np.array_equal(values[2], x[2])
    assert values[3] is values[0]


def test_a_result_is_kept_as_long_as_its_proxy(folder, cache):
    v = proxies_in(folder, cache)
    total = v[0] + v[1]
    first = total.data
    loads = cache.stats().loads
    cache.clear()
    assert np.shares_memory(total.data, first)
    assert (total * 1).data.shape == SHAPE
    assert cache.stats().loads == loads
    owner = weakref.ref(_buffers.owner_of(first))
    gc.disable()
    try:
        del total, first
        assert owner() is None, "freed by reference count alone"
    finally:
        gc.enable()


def test_temporaries_are_freed_without_garbage_collection(folder):
    cache = DataCache("1GiB")
    v = proxies_in(folder, cache)
    gc.disable()
    try:
        found = lc.std(v)
        data = found.data
        cache.clear()
        assert cache.used == data.nbytes
        del found, data
        assert cache.used == 0
    finally:
        gc.enable()


def test_a_result_that_was_evicted_is_computed_again(folder):
    cache = DataCache(VOLUME * 3 + 4096)
    v = proxies_in(folder, cache)
    total = v[0] + v[1]
    expected = total.data.copy()
    other = (v[2] + v[3]).data
    assert cache.stats().overcommits == 0
    del other
    assert np.array_equal(total.data, expected)


def test_a_result_is_not_computed_again_from_other_content(tmp_path):
    cache = DataCache("1GiB")
    file = small(tmp_path, "a", np.ones((3, 4)))
    doubled = LazyReadData(file, cache=cache) * 2
    kept = LazyReadData(file, cache=cache) + 1
    assert doubled.data[0, 0] == 2
    assert kept.data[0, 0] == 2
    np.save(file, np.full((3, 4), 5.0))
    os.utime(file, ns=(1, 1))
    assert (kept * 1).data[0, 0] == 2, "a value that is still there is used"
    doubled.release()
    with (
        pytest.warns(FileChangedWarning, match=r"a\.npy"),
        pytest.raises(FileChangedError, match="write the expression again"),
    ):
        doubled.data
    assert (LazyReadData(file, cache=cache) * 2).data[0, 0] == 10


def test_a_file_that_changed_between_two_plans_is_warned_of(tmp_path, cache):
    file = small(tmp_path, "a", np.ones((3, 4)))
    proxy = LazyReadData(file, cache=cache)
    assert (proxy + 0).data.sum() == 12
    np.save(file, np.zeros((2, 2)))
    with pytest.warns(FileChangedWarning, match=r"a\.npy"):
        assert (proxy + 0).data.sum() == 0


def test_one_missing_file_is_a_filenotfounderror_with_its_filename(tmp_path, cache):
    good = LazyReadData(small(tmp_path, "a", np.ones(3)), cache=cache)
    bad = LazyReadData(tmp_path / "nothing.npy", cache=cache)
    with pytest.raises(FileNotFoundError) as caught:
        (good + bad).data
    assert caught.value.filename == str(tmp_path / "nothing.npy")
    assert cache.stats().loads == 0


def test_several_missing_files_are_listed_in_one_error(tmp_path, cache):
    good = [LazyReadData(small(tmp_path, "a", np.ones(3)), cache=cache)]
    bad = [LazyReadData(tmp_path / f"no{i}.npy", cache=cache) for i in range(25)]
    with pytest.raises(FileNotFoundError) as caught:
        sum(good + bad).data
    text = str(caught.value)
    assert "25 of 26 files" in text
    assert "no0.npy" in text
    assert "no19.npy" in text
    assert "no20.npy" not in text
    assert "and 5 more" in text


def test_files_of_other_shapes_are_listed_in_one_error_before_reading(tmp_path, cache):
    names = [small(tmp_path, f"s{i}", np.ones((2, 3 + i // 2))) for i in range(4)]
    with pytest.raises(ShapeMismatchError) as caught:
        sum(LazyReadData(name, cache=cache) for name in names).data  # here
    text = str(caught.value)
    assert "s2.npy (2, 4)" in text
    assert "s3.npy (2, 4)" in text
    assert "s1.npy (2, 3)" not in text
    assert f'{__file__}", line' in text
    assert cache.stats().loads == 0


def test_an_error_of_numpy_names_operator_operands_and_line(tmp_path, cache):
    proxy = LazyReadData(small(tmp_path, "b", np.ones(3, bool)), cache=cache)
    negative = -proxy
    with pytest.raises(TypeError, match="boolean negative") as caught:
        negative.data
    [note] = caught.value.__notes__
    assert "b.npy" in note
    assert __file__ in note
    assert cache.stats().loads == 0


def test_an_error_that_only_values_make_names_them_too(tmp_path, cache):
    proxy = LazyReadData(small(tmp_path, "i", np.array([1, 2])), cache=cache)
    exponent = LazyReadData(small(tmp_path, "j", np.array([1, -2])), cache=cache)
    with pytest.raises(ValueError, match="negative integer powers") as caught:
        (proxy**exponent).data
    assert "i.npy" in caught.value.__notes__[0]
    assert "j.npy" in caught.value.__notes__[0]


def test_after_an_error_the_same_expression_can_be_computed(tmp_path, cache):
    file = tmp_path / "late.npy"
    total = LazyReadData(file, cache=cache) + 1
    with pytest.raises(FileNotFoundError):
        total.data
    np.save(file, np.ones(3))
    assert np.array_equal(total.data, [2, 2, 2])


def test_errstate_of_the_asking_thread_applies(cache):
    ratio = LazyReadData(np.ones(3), cache=cache) / np.zeros(3)
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        ratio.data
    with np.errstate(divide="ignore"):
        assert np.isinf(ratio.data).all()


def test_a_chain_of_100_000_operators_works(cache):
    total = LazyReadData(np.zeros(3), cache=cache)
    for _ in range(100_000):
        total = total + 1
    assert np.array_equal(total.data, [100_000] * 3)


def test_many_threads_compute_one_expression(folder, cache):
    v = proxies_in(folder, cache)
    total = v[0] * 2 + v[1]
    x = arrays_in(folder)
    expected = (x[0] * 2 + x[1]).tobytes()
    barrier = threading.Barrier(8)
    found = []

    def work():
        barrier.wait(10)
        found.append(total.data.tobytes() == expected)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 8
    assert cache.stats().loads == 2


def test_probing_leaves_no_thread(folder, cache):
    sum(proxies_in(folder, cache)).shape
    assert not [t for t in threading.enumerate() if t.name.startswith("lazycache-probe")]


def test_data_with_used_up_nops_go_at_once_and_come_back(folder, cache):
    v = proxies_in(folder, cache, nops=2)
    once = (v[0] + v[1]).data
    assert v[0].loaded()
    assert v[0].nops == 2
    del once
    twice = (v[0] * 2).data
    assert not v[0].loaded()
    assert v[1].loaded()
    assert (v[0] - v[0]).data.max() == 0
    assert cache.stats().releases == 1
    assert twice.shape == SHAPE


def test_nothing_is_released_before_its_last_use_in_the_plan(folder, cache):
    v = proxies_in(folder, cache, nops=1)
    found = (v[0] * 2 + v[1] - v[0]).data
    x = arrays_in(folder)
    assert np.array_equal(found, x[0] * 2 + x[1] - x[0])
    assert cache.stats().loads == 2


def test_a_view_keeps_its_file_pinned_as_long_as_it_is_used(folder):
    # Room for two: the view of the first must not be evicted for the second, nor counted twice.
    cache = DataCache(VOLUME * 3 + 4096, strict=True)
    v = proxies_in(folder, cache)
    x = arrays_in(folder)
    found = (v[0].T + v[1].T).data
    assert np.array_equal(found, x[0].T + x[1].T)
    assert cache.stats().overcommits == 0
    cache.check()


def test_a_small_slice_does_not_hold_what_it_was_cut_from(cache):
    array = LazyReadData(np.zeros((100, 1000)), cache=cache)
    part = (array + 1)[:10].data
    assert _buffers.owner_of(part).nbytes == part.nbytes


def test_a_constant_is_charged_until_it_dies(cache):
    proxy = LazyReadData(np.zeros((1000, 1000)), cache=cache)
    proxy.data
    assert cache.used == 8_000_000
    del proxy
    assert cache.used == 0


class Thing:
    """Data of another kind, with operators of its own, as AIMS volumes have."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Thing(self.value + getattr(other, "value", other))

    def __radd__(self, other):
        return Thing(other + self.value)

    def __neg__(self):
        return Thing(-self.value)

    def __getitem__(self, index):
        return (self.value, index)

    def mean(self, axis=None):
        return ("mean", axis)


def test_objects_use_their_own_operators(tmp_path, cache):
    for i in range(3):
        (tmp_path / f"{i}.thing").write_text(str(i))

    def read(path):
        with open(path) as file:
            return Thing(int(file.read()))

    things = [LazyReadData(tmp_path / f"{i}.thing", reader=read, cache=cache) for i in range(3)]
    assert sum(things).data.value == 3
    assert (-(things[2] + Thing(5))).data.value == -7
    assert things[1].value == 1
    assert things[2]["x"] == (2, "x")
    assert things[2].mean(axis=3).data == ("mean", 3)
    total = LazyReadData(things[2])
    total += 10
    assert (total.data.value, things[2].data.value) == (12, 2)


def test_readers_that_say_no_shape_give_numpys_values(tmp_path, cache):
    arrays = [np.asfortranarray(np.full((2, 3), i, "i2")) for i in range(3)]
    files = [small(tmp_path, f"r{i}", array) for i, array in enumerate(arrays)]

    def read(path):
        return np.load(path)

    v = [LazyReadData(file, reader=read, cache=cache) for file in files]
    mean = lc.mean(v).data
    assert mean.tobytes() == np.ones((2, 3)).tobytes()
    assert mean.flags.f_contiguous
    assert v[0].shape == (2, 3)
    assert np.array_equal(v[1][:1].data, [[1, 1, 1]])


nibabel = pytest.importorskip("nibabel")


def nifti(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_a_3d_mask_applies_to_every_volume_of_a_4d_run(tmp_path, cache):
    run = np.arange(4 * 3 * 2 * 5, dtype="f4").reshape(4, 3, 2, 5)
    mask = np.arange(24).reshape(4, 3, 2) % 2
    bold = LazyReadData(nifti(tmp_path / "bold.nii", run), cache=cache)
    m = LazyReadData(nifti(tmp_path / "mask.nii.gz", mask.astype("u1")), cache=cache)
    assert (bold * m).shape == run.shape
    assert np.array_equal((bold * m).data, run * mask[..., None])
    assert np.array_equal(lc.where(m, bold, 0).data, np.where(mask[..., None], run, 0))
    bold -= m
    assert np.array_equal(bold.data, run - mask[..., None])


def test_arrays_without_a_grid_align_as_in_numpy(tmp_path, cache):
    run = np.ones((4, 3, 2, 5), "f4")
    bold = LazyReadData(nifti(tmp_path / "bold.nii", run), cache=cache)
    weights = np.arange(5)
    assert np.array_equal((bold * weights).data, run * weights)
    with pytest.raises(ShapeMismatchError):
        (bold * np.ones((4, 3, 2))).data


def test_images_on_other_grids_are_an_error_before_reading(tmp_path, cache):
    array = np.ones((4, 3, 2), "f4")
    shifted = np.eye(4)
    shifted[1, 3] = 0.5
    a = LazyReadData(nifti(tmp_path / "a.nii", array), cache=cache)
    b = LazyReadData(nifti(tmp_path / "b.nii", array, shifted), cache=cache)
    with pytest.raises(GridMismatchError, match=r"b\.nii.*a\.nii"):
        (a * 2 + b / 2).data
    assert cache.stats().loads == 0
    assert (LazyReadData(a, grid="ignore") + b).data.max() == 2


def test_affines_follow_slices_reductions_and_operators(tmp_path, cache):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    bold = LazyReadData(nifti(tmp_path / "r.nii", np.ones((4, 3, 2, 5), "f4"), affine), cache=cache)
    assert np.array_equal((2 * bold + 1).affine, affine)
    assert np.array_equal(bold.mean(axis=-1).affine, affine)
    assert np.array_equal(bold[..., 2].affine, affine)
    assert bold[1:, ..., 2].affine[0, 3] == 2
    assert (bold + 1)[2:].affine[0, 3] == 4
    assert bold.mean(axis=0).affine is None
    assert bold.T.affine is None


@pytest.mark.parametrize("count", [2, 5])
def test_the_affine_is_the_first_operands_that_has_one_and_so_is_the_header(count, tmp_path, cache):
    without = nibabel.Nifti1Image(np.ones((4, 3, 2), "f4"), None)
    without.header.set_zooms((9, 9, 9))
    nibabel.save(without, tmp_path / "without.nii")
    array = nifti(tmp_path / "with.nii", np.ones((4, 3, 2), "f4"), np.diag([2.0, 2.0, 2.0, 1.0]))
    alone, placed = (LazyReadData(path, cache=cache) for path in (tmp_path / "without.nii", array))
    assert alone.affine is None
    for found in (sum([alone] * (count - 1) + [placed]), lc.mean([alone] * (count - 1) + [placed])):
        assert np.array_equal(found.affine, np.diag([2.0, 2.0, 2.0, 1.0]))
        assert found.header.get_zooms() == (2, 2, 2)
    assert (alone + alone).header.get_zooms() == (9, 9, 9)
    assert cache.stats().loads == 0


def test_a_part_of_a_file_is_read_alone_and_cut_from_the_whole_where_that_is_there(tmp_path):
    cache = DataCache("1GiB")
    run = np.random.default_rng(0).random((40, 30, 20, 5)).astype("f4")
    bold = LazyReadData(nifti(tmp_path / "run.nii.gz", run), cache=cache)
    part = bold[..., 2]
    assert isinstance(part._node, FileNode)
    assert np.array_equal(part.data, run[..., 2])
    assert cache.used < run.nbytes
    bold.data
    loads = cache.stats().loads
    assert np.array_equal(bold[..., 3].data, run[..., 3])
    gradient = bold[1:, ..., 3] - bold[:-1, ..., 1]
    assert np.array_equal(gradient.data, run[1:, ..., 3] - run[:-1, ..., 1])
    assert cache.stats().loads == loads
    total = sum(image for image in (bold[..., t] for t in range(5)))
    assert np.allclose(total.data, run.sum(-1))


def test_warnings_of_numpy_reach_the_user(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="divide by zero"):
            (1 / LazyReadData(np.zeros(2), cache=cache)).data


def test_what_several_results_share_is_computed_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    for number, path in enumerate(paths):
        np.save(path, np.full(1000, number, np.float32))
    with DataCache(1 << 20) as cache:
        images = [LazyReadData(path, nops=1) for path in paths]
        mean, sd = compute(lc.mean(images), lc.std(images))
        assert np.array_equal(mean, np.full(1000, 1.5, np.float32))
        assert np.array_equal(sd, np.std([image.data for image in images], axis=0))
        outline = execute.prepare([lc.mean(images)._node, lc.std(images)._node], cache)
        alone = execute.prepare([lc.std(images)._node], cache)
        assert len(outline.nodes) == len(alone.nodes)


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, 1.0), (1, True), (2, np.int64(2))])
def test_constants_that_only_look_alike_are_told_apart(
    tmp_path: Path, one: Any, other: Any
) -> None:
    data = np.array([-1, 0, 100], np.int8)
    np.save(tmp_path / "a.npy", data)
    image = LazyReadData(tmp_path / "a.npy")
    for result, constant in zip(compute(image * one, image * other), (one, other), strict=True):
        assert result.tobytes() == (data * constant).tobytes()
        assert result.dtype == (data * constant).dtype
