"""Volumes that AIMS reads, resampled by AIMS while they are loaded."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aims_support import RECORDS, SAMPLES

import lazycache as lc
from lazycache import DataCache, LazyReadData, LazyResampleVolume, PreloadList

CASES = json.loads((RECORDS / "resample.json").read_text())
ARRAYS = np.load(RECORDS / "resample.npz")


def write(aims: Any, path: Path, array: np.ndarray, voxel_size: Any = (1, 1, 1, 1)) -> Path:
    volume = aims.Volume(aims.Volume(np.asfortranarray(array)))
    volume.header()["voxel_size"] = [float(size) for size in voxel_size]
    aims.write(volume, str(path))
    return path


@pytest.fixture
def path(aims: Any, tmp_path: Path) -> Path:
    values = np.random.default_rng(2).normal(50, 20, (9, 8, 7, 1)).astype("f4")
    return write(aims, tmp_path / "a.ima", values, (2, 2, 3, 1))


def moved(aims: Any) -> Any:
    matrix = np.array([[1, 0.1, 0, 1], [-0.1, 1, 0, 0], [0, 0, 1, -2], [0, 0, 0, 1]])
    return aims.AffineTransformation3d(matrix)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_resampler_of_the_stand_in_gives_what_was_recorded(
    aims: Any, case: dict[str, Any]
) -> None:
    from soma import aimsalgo

    volume, result = (
        aims.Volume(aims.Volume(np.asfortranarray(array)))
        for array in (ARRAYS[case["input"]], np.zeros_like(ARRAYS[case["output"]]))
    )
    volume.header()["voxel_size"] = case["voxel_size"]
    result.header()["voxel_size"] = case["out_voxel_size"]
    resampler = aimsalgo.ResamplerFactory(volume).getResampler(case["order"])
    transform = aims.AffineTransformation3d(np.array(case["transform"]))
    resampler.resample(volume, transform, case["default_value"], result)
    error = np.abs(np.asarray(result) - ARRAYS[case["output"]].astype(float))
    if "labels_i2_scale_1" in case["name"]:  # halves in single precision
        assert (error < 1e-4).mean() > 0.95
        assert error.max() <= 1
    else:
        assert error.max() < 1e-4


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case["name"])
def test_aims_volumes_are_resampled_by_aims(
    aims: Any, case: dict[str, Any], tmp_path: Path
) -> None:
    path = write(aims, tmp_path / "in.ima", ARRAYS[case["input"]], case["voxel_size"])
    trm = tmp_path / "move.trm"
    matrix = np.array(case["transform"])
    np.savetxt(trm, [matrix[:3, 3], *matrix[:3, :3]])
    wanted = ARRAYS[case["output"]]
    for transform in (trm, matrix, [aims.AffineTransformation3d(matrix), np.eye(4)]):
        volume = LazyResampleVolume(
            path,
            transform=transform,
            dims=case["dims"],
            vox_size=case["out_voxel_size"],
            resampling_order=case["order"],
            default_value=case["default_value"],
        )
        data = volume.data
        assert type(data).__name__ == f"Volume_{'FLOAT' if wanted.dtype == 'f4' else 'S16'}"
        error = np.abs(np.asarray(data) - wanted.astype(float))
        assert (error < 1e-4).mean() > (0.95 if "labels_i2_scale_1" in case["name"] else 0.999)
        assert list(data.header()["voxel_size"]) == case["out_voxel_size"]
        assert list(data.header()["volume_dimension"]) == case["dims"]


def test_a_transform_without_dims_resamples_on_the_grid_of_the_image(aims: Any, path: Path) -> None:
    raw = np.asarray(LazyReadData(path).data)
    volume = LazyResampleVolume(path, transform=moved(aims))
    assert np.asarray(volume.data).shape == raw.shape
    assert not np.array_equal(np.asarray(volume.data), raw)
    assert np.array_equal(np.asarray(LazyResampleVolume(path, transform=np.eye(4)).data), raw)


def test_its_size_is_known_reserved_and_true(aims: Any, path: Path) -> None:
    volume = LazyResampleVolume(path, transform=moved(aims), dims=(12, 11, 10, 1), dtype="DOUBLE")
    [nbytes, peak] = volume._node.key.estimate()
    assert nbytes == 12 * 11 * 10 * 8
    assert peak >= nbytes + 9 * 8 * 7 * (4 + 8)  # the source, and what it is converted to
    plan = lc.explain(LazyResampleVolume(path, transform=moved(aims), dims=(12, 11, 10)))
    assert plan.reads == 1
    with DataCache(10**6) as cache:
        small = LazyResampleVolume(path, transform=moved(aims), dims=(12, 11, 10))
        small.data
        assert cache.used == 12 * 11 * 10 * 4
        assert cache.stats().overcommits == 0


def test_types_are_converted_with_rounding_and_clipping(aims: Any, path: Path) -> None:
    raw = np.asarray(LazyReadData(path).data)
    whole = LazyResampleVolume(path, dtype="S16")
    assert type(whole.data).__name__ == "Volume_S16"
    assert np.array_equal(np.asarray(whole.data), np.rint(raw))
    # S32 on S16 as well: the original took one for the other.
    wide = LazyResampleVolume(SAMPLES / "vol_S16.ima", dtype="S32")
    assert type(wide.data).__name__ == "Volume_S32"
    assert np.array_equal(
        np.asarray(wide.data), np.asarray(LazyReadData(SAMPLES / "vol_S16.ima").data)
    )
    both = LazyResampleVolume(path, transform=moved(aims), dtype=np.int16, default_value=-7)
    values = np.asarray(LazyResampleVolume(path, transform=moved(aims), default_value=-7).data)
    assert np.array_equal(np.asarray(both.data), np.rint(values))


def test_like_brings_it_where_another_image_is(aims: Any, tmp_path: Path) -> None:
    # AIMS turns both as it reads them; nibabel doesn't.
    source = SAMPLES / "vol_FLOAT.nii"
    for like in (source, LazyReadData(source), LazyReadData(source, reader="aims")):
        volume = LazyResampleVolume(source, reader="aims", like=like)
        assert np.array_equal(
            np.asarray(volume.data), np.asarray(LazyReadData(source, reader="aims").data)
        )
    with pytest.raises(lc.ReadError, match="doesn't say where its voxels lie"):
        LazyResampleVolume(
            write(aims, tmp_path / "b.ima", np.ones((4, 4, 4, 1), "f4")), like=source
        ).data
    volume = LazyResampleVolume(source, reader="aims", transform=moved(aims), like=source)
    [found], [affine] = (
        list(one.data.header()["transformations"])
        for one in (volume, LazyReadData(source, reader="aims"))
    )
    assert np.allclose(found, affine)


def test_volumes_in_memory_and_computed_ones_are_resampled_too(aims: Any, path: Path) -> None:
    wanted = np.asarray(LazyResampleVolume(path, transform=moved(aims), default_value=3).data)
    read = LazyReadData(path)
    for source in (aims.read(str(path)), read, read * 1):
        volume = LazyResampleVolume(source, transform=moved(aims), default_value=3)
        assert type(volume.data).__name__ == "Volume_FLOAT"
        assert np.array_equal(np.asarray(volume.data), wanted)
    with pytest.raises(TypeError, match="no array"):
        LazyResampleVolume(moved(aims)).data


def test_parts_are_arrays_cut_from_the_whole(aims: Any, path: Path) -> None:
    volume = LazyResampleVolume(path, transform=moved(aims))
    cut = volume[2:5, :, 3]
    part = np.asarray(cut.data)
    # To have it, all of the result is there, beside the source.
    nbytes, peak = cut._node.key.estimate()
    assert peak >= nbytes + 2 * 9 * 8 * 7 * 4
    assert np.array_equal(part, np.asarray(volume.data)[2:5, :, 3])


def test_it_is_cached_preloaded_and_pickled(aims: Any, path: Path, tmp_path: Path) -> None:
    trm = tmp_path / "move.trm"
    trm.write_text("1 2 3\n1 0 0\n0 1 0\n0 0 1\n")
    volumes = PreloadList(
        [LazyResampleVolume(path, transform=trm, default_value=n, nops=0) for n in range(4)],
        npreload=2,
    )
    corners = [np.asarray(volume.data).flat[0] for volume in volumes]
    assert corners == [0, 1, 2, 3]
    assert lc.get_cache().stats().loads == 4
    again = pickle.loads(pickle.dumps(list.__getitem__(volumes, 2)))
    assert len(pickle.dumps(again)) < 1024
    assert again.loaded()
    trm.write_text("1 2 4\n1 0 0\n0 1 0\n0 0 1\n\n")
    with pytest.warns(lc.FileChangedWarning):
        LazyResampleVolume(path, transform=trm, default_value=2).data


def test_aims_prints_nothing_meanwhile(
    aims: Any, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from soma import aimsalgo

    LazyResampleVolume(path, transform=moved(aims), resampling_order=3).data
    assert capfd.readouterr() == ("", "")
    # Afterwards it may: its stream is as it was.
    volume = aims.read(str(path))
    resampler = aimsalgo.ResamplerFactory(volume).getResampler(0)
    resampler.resample(volume, moved(aims), 0.0, aims.Volume(volume))
    if sys.platform.startswith("linux"):
        assert "100 %" in capfd.readouterr().out


def test_orders_that_scipy_has_not_are_left_to_aims(aims: Any, path: Path) -> None:
    assert LazyResampleVolume(path, resampling_order=7).data is not None
    with pytest.raises(ValueError, match="from 0 to 7"):
        LazyResampleVolume(path, resampling_order=8)


def test_without_aimsalgo_it_says_what_to_install(
    aims: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soma.aimsalgo", None)
    with pytest.raises(lc.ReadError, match=r"a\.ima: soma\.aimsalgo.*install BrainVISA's aimsalgo"):
        LazyResampleVolume(path, transform=moved(aims)).data
