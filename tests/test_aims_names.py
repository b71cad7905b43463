"""`lazycache.aims`: what programs that used ``soma.aims.lazy_read_data`` find.

The examples are those that its documentation gives, with 20 volumes of 8 MB.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SOON, Gate, Running, preload_threads

import lazycache as lc
from lazycache.aims import LazyReadData, LazyResampleVolume, PreloadIterator, PreloadList

SHAPE = (128, 128, 128, 1)
VOLUME = 4 * 128**3


@pytest.fixture
def filenames(aims: Any, tmp_path: Path) -> list[str]:
    """20 volumes of 8 MB; the values of number i are i + 1."""
    paths = []
    for number in range(20):
        volume = aims.Volume_FLOAT(*SHAPE)
        np.asarray(volume)[:] = number + 1
        paths.append(str(tmp_path / f"{number:02d}.ima"))
        aims.write(volume, paths[-1])
    return paths


@pytest.fixture
def small(aims: Any, tmp_path: Path) -> list[str]:
    """6 volumes of a few voxels; the values of number i are i + 1."""
    paths = []
    for number in range(6):
        volume = aims.Volume_FLOAT(5, 4, 3, 1)
        np.asarray(volume)[:] = number + 1
        paths.append(str(tmp_path / f"small{number}.nii"))
        aims.write(volume, paths[-1])
    return paths


def add_one(lazy: Any, gate: Gate) -> Any:
    gate()
    return (lazy + 1).data


def holds(volume: Any, value: float) -> bool:
    return type(volume).__name__ == "Volume_FLOAT" and bool((np.asarray(volume) == value).all())


def test_the_signatures_are_those_that_programs_call() -> None:
    names = {
        LazyReadData: ["data_or_filename", "allocator_context", "read_options", "nops", "reader"],
        PreloadIterator: ["iterable", "npreload"],
        PreloadList: ["iterable", "npreload"],
    }
    names[LazyResampleVolume] = [*names[LazyReadData], "dtype", "transform", "dims", "vox_size"]
    names[LazyResampleVolume] += ["resampling_order", "default_value"]
    for kind, expected in names.items():
        assert list(inspect.signature(kind).parameters)[: len(expected)] == expected
    defaults = inspect.signature(LazyReadData).parameters
    assert [defaults[name].default for name in names[LazyReadData][1:]] == [None, None, 0, None]


def test_a_nifti_file_is_read_by_aims(small: list[str]) -> None:
    lazy = LazyReadData(small[2], nops=1)
    assert lazy.filename == small[2]
    assert lazy.not_started()
    assert not lazy.loaded()
    assert holds(lazy.get_data(), 3)
    assert lazy.loaded()
    assert lazy.preloading()
    assert isinstance(lc.load(small[2]).data, np.ndarray)


def test_results_are_proxies_of_the_same_class(small: list[str]) -> None:
    first, second = map(LazyReadData, small[:2])
    for result in (first + second, 2 * first, -first, sum([first, second])):
        assert isinstance(result, LazyReadData)
    assert holds((first + second).data, 3)


def test_attributes_and_methods_are_those_of_the_data(aims: Any, small: list[str]) -> None:
    lazy = LazyReadData(small[4])
    assert lazy.np[1, 2, 0, 0] == 5
    assert not lazy.refVolume()
    assert lazy.header()["volume_dimension"] == [5, 4, 3, 1]


@pytest.mark.parametrize("nops", [0, 1])
def test_the_sum_of_a_list_takes_two_volumes(filenames: list[str], nops: int) -> None:
    with lc.DataCache("1GiB") as cache:
        volumes = [LazyReadData(f, nops=nops) for f in filenames]
        plan = lc.explain(sum(volumes))
        assert (plan.reads, plan.passes) == (20, 1)
        cache.budget = plan.min_budget
        res = sum(volumes).data
        assert holds(res, 210)
        stats = cache.stats()
        assert (stats.loads, stats.overcommits) == (20, 0)
        assert stats.peak_bytes <= plan.min_budget <= 2.1 * VOLUME


def test_a_formula_by_hand(small: list[str]) -> None:
    with lc.DataCache("1GiB") as cache:
        vol1, vol2, vol3, vol4, vol5, vol6 = (LazyReadData(f, nops=1) for f in small)
        res = vol1 + vol2 + vol3 - vol4 * vol5 + vol6  # etc.
        res = res.data  # get actual Volume object
        assert holds(res, 1 + 2 + 3 - 4 * 5 + 6)
        assert cache.stats().loads == 6


def test_a_sum_over_a_preload_iterator(small: list[str]) -> None:
    volumes = [LazyReadData(f, nops=1) for f in small]
    res = sum(PreloadIterator(volumes, npreload=8))
    assert holds(res.data, 21)


def test_a_preload_list_of_eight_runs_in_the_memory_of_four_volumes(filenames: list[str]) -> None:
    with lc.DataCache(4 * VOLUME, strict=True) as cache:
        volumes = PreloadList((LazyReadData(f, nops=1) for f in filenames), npreload=8)
        assert holds(sum(volumes).data, 210)
        seen = [float(np.asarray(volume.data)[0, 0, 0, 0]) for volume in volumes]
        assert seen == list(range(1, 21))
        assert cache.stats().overcommits == 0
        assert cache.stats().peak_bytes <= cache.budget


def test_a_subclass_may_set_data_in_lazy_read(aims: Any, small: list[str]) -> None:
    class Doubled(LazyReadData):
        def _lazy_read(self) -> Any:
            if self.data is None or not self.loaded():
                super()._lazy_read()
                self.data = self.data * 2
            return self.data

    assert holds((Doubled(small[1]) + LazyReadData(small[0])).data, 5)


def test_a_proxy_pickles_as_its_recipe(small: list[str]) -> None:
    lazy = LazyReadData(small[3], nops=2)
    assert holds(lazy.data, 4)
    text = pickle.dumps(lazy)
    assert len(text) < 1024
    again = pickle.loads(text)
    assert type(again) is LazyReadData
    assert again.nops == 2
    assert holds(again.data, 4)


def test_resampled_volumes_are_averaged(aims: Any, tmp_path: Path, small: list[str]) -> None:
    shift = str(tmp_path / "shift.trm")
    Path(shift).write_text("1 0 0\n1 0 0\n0 1 0\n0 0 1\n")
    rvols = [
        LazyResampleVolume(
            f, transform=t, nops=1, dims=(4, 4, 3, 1), vox_size=(1, 1, 1, 1), dtype="FLOAT"
        )
        for f, t in zip(small[:2], (shift, [shift]), strict=True)
    ]
    assert all(isinstance(volume, LazyReadData) for volume in rvols)
    res = sum(rvols) / len(rvols)
    assert isinstance(res, LazyReadData)
    assert type(res.data).__name__ == "Volume_FLOAT"
    values = np.asarray(res.data)[..., 0]
    assert values.shape == (4, 4, 3)
    assert (values[1:3, :3, :2] == 1.5).all()
    assert (values[0] == 0).all()


# -- the faults of the original ------------------------------------------------------------------


def test_nops_stays_what_it_is_after_a_release(small: list[str]) -> None:
    with lc.DataCache("1MiB") as cache:
        lazy = LazyReadData(small[0], nops=2)
        for _ in range(3):
            (lazy + 1).data
            assert lazy.loaded()
            (lazy + 1).data
            assert not lazy.loaded()
        assert lazy.nops == 2
        assert cache.stats().loads == 3


def test_a_result_is_never_the_file_of_its_operand(small: list[str]) -> None:
    total = LazyReadData(small[1], nops=1) + LazyReadData(small[2], nops=1)
    for _ in range(3):
        assert holds((total + 1).data, 6)
        total.release()
    assert holds(total.data, 5)


def test_an_object_in_memory_stays_whatever_nops(aims: Any, small: list[str]) -> None:
    lazy = LazyReadData(aims.read(small[1]), nops=1)
    for _ in range(3):
        assert holds((lazy + 1).data, 3)
    assert holds(lazy.data, 2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, LazyReadData])
def test_a_proxy_can_be_copied(small: list[str], copied: Callable[[Any], Any]) -> None:
    lazy = LazyReadData(small[1])
    for _ in range(2):  # not loaded, and loaded
        other = copied(lazy)
        assert type(other) is LazyReadData
        assert holds(other.data, 2)


def test_a_failed_read_is_told_each_time(tmp_path: Path, aims: Any, small: list[str]) -> None:
    path = Path(small[0])
    whole = path.read_bytes()
    lazy = LazyReadData(str(path))
    path.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"small0\.nii"):
            lazy.data
    path.write_bytes(whole)
    assert holds(lazy.data, 1)


def test_what_fails_in_a_preload_is_raised_at_its_place(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr("threading.excepthook", told.append)
    Path(small[2]).write_bytes(b"no image")
    volumes = PreloadList(map(LazyReadData, small), npreload=4)
    for number, volume in enumerate(volumes):
        if number == 2:
            with pytest.raises(OSError, match=r"small2\.nii"):
                volume.data
        else:
            assert holds(volume.data, number + 1)
    assert not told


def test_lists_made_of_a_preload_list_preload(small: list[str]) -> None:
    volumes = PreloadList(map(LazyReadData, small), npreload=3)
    for other in (volumes[1:4], volumes + volumes, volumes.copy(), volumes * 2):
        assert type(other) is PreloadList
        assert other.npreload == 3


def test_an_empty_preload_list_can_be_made() -> None:
    volumes = PreloadList()
    assert (len(volumes), list(volumes)) == (0, [])


def test_what_a_loop_leaves_unused_is_given_back(small: list[str]) -> None:
    with lc.DataCache("1MiB") as cache:
        loop = PreloadIterator(map(LazyReadData, small), npreload=4)
        next(loop).data
        del loop
        gc.collect()
        for thread in preload_threads():
            thread.join(SOON)
        assert cache.used == 5 * 4 * 3 * 4  # the first: it was used


def test_two_threads_that_use_one_proxy_with_nops_each_get_the_data(aims: Any, small: Any) -> None:
    with lc.DataCache("1MiB"):
        for _ in range(20):
            lazy = LazyReadData(small[3], nops=1)
            gate = Gate()
            both = [
                Running(lambda lazy=lazy, gate=gate: (gate(), (lazy + 1).data)[1]) for _ in "ab"
            ]
            gate.reached()
            gate.open()
            assert all(holds(one.result(), 5) for one in both)
