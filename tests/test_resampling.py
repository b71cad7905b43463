"""Volumes that are resampled while they are loaded, as sources among others."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from aims_support import RECORDS
from nibabel.processing import resample_from_to
from support import Gate, Running, preload_threads, together

import lazycache as lc
from lazycache import DataCache, LazyReadData, LazyResampleVolume, PreloadList
from lazycache.readers.base import LoadCancelled, cancellable
from lazycache.source import file_key
from lazycache.testing import FaultyReader
from lazycache.transforms import aims_to_world, grid_of

CASES = json.loads((RECORDS / "resample.json").read_text())
OBLIQUE = np.array([[1.9, 0.2, 0.1, -20], [-0.2, 2.1, 0.05, -30], [0, 0.1, 2.4, -10], [0, 0, 0, 1]])
FLIPPED = np.array([[-2.0, 0.1, 0, 30], [0, 1.8, 0.3, -25], [0.1, -0.2, 2, -15], [0, 0, 0, 1]])
MOVE = np.array([[1.0, 0.05, 0, 2], [-0.05, 0.9, 0, -3], [0, 0.02, 1.1, 1], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def records() -> Any:
    return np.load(RECORDS / "resample.npz")


def save(path: Path, array: np.ndarray, affine: Any, code: int = 1, tr: float = 0) -> Path:
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code)
    image.set_qform(affine if abs(np.linalg.det(affine)) == 1 else None, 0)
    if tr:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr, *[1] * (array.ndim - 4)))
        image.header.set_xyzt_units("mm", "sec")
    image.to_filename(path)
    return path


@pytest.fixture
def moving(tmp_path: Path) -> Path:
    values = np.random.default_rng(1).normal(100, 30, (20, 22, 18)).astype("f4")
    return save(tmp_path / "moving.nii.gz", values, OBLIQUE)


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    return save(tmp_path / "fixed.nii", np.zeros((16, 21, 23), "i2"), FLIPPED, code=4)


def nearby(path: Path, like: Path, **kwargs: Any) -> np.ndarray:
    """What nibabel gives."""
    return np.asarray(resample_from_to(nib.load(path), nib.load(like), **kwargs).dataobj)


def inside(case: dict[str, Any]) -> np.ndarray:
    """Which voxels of a recorded result have their centre between those of the image."""
    sizes, steps = np.diag(case["voxel_size"]), np.diag(case["out_voxel_size"])
    matrix = np.linalg.inv(np.array(case["transform"]) @ sizes) @ steps
    x, y, z, _ = case["dims"]
    indices = np.indices((x, y, z)).reshape(3, -1)
    places = (matrix[:3, :3] @ indices + matrix[:3, 3:]).reshape(3, x, y, z)
    ends = np.reshape(np.array((12, 10, 8)) - 1, (3, 1, 1, 1))
    return ((places > -1e-6) & (places < ends + 1e-6)).all(axis=0)


def resampled(path: Path, case: dict[str, Any], **kwargs: Any) -> LazyResampleVolume:
    return LazyResampleVolume(
        path,
        transform=kwargs.pop("transform", np.array(case["transform"])),
        dims=case["dims"],
        vox_size=case["out_voxel_size"],
        resampling_order=case["order"],
        default_value=case["default_value"],
        **kwargs,
    )


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_cases_of_aims_agree_inside_the_volume(
    case: dict[str, Any], records: Any, tmp_path: Path
) -> None:
    given, wanted = records[case["input"]], records[case["output"]][..., 0]
    path = save(tmp_path / "in.nii", given[..., 0], np.diag(case["voxel_size"]))
    volume, exact = (resampled(path, case, dtype=dtype) for dtype in (None, "f8"))
    assert (volume.shape, volume.dtype) == (wanted.shape, given.dtype)
    assert np.allclose(volume.affine, np.diag(case["out_voxel_size"]))
    there = inside(case)
    wrong = there & (np.abs(volume.data - wanted.astype(float)) > 1e-4)
    if "labels_i2_scale_1" in case["name"]:
        # Which way AIMS rounds some halves depends on the last bit of the float32 that it uses.
        assert np.allclose(np.abs(exact.data[wrong] % 1), 0.5, atol=1e-6)
        assert wrong.sum() < 0.04 * there.sum()
    else:
        assert not wrong.any()
    assert (volume.data[~there] == case["default_value"]).all()


@pytest.mark.parametrize("order", range(6))
def test_like_alone_gives_what_nibabel_gives(moving: Path, fixed: Path, order: int) -> None:
    volume = LazyResampleVolume(moving, like=fixed, resampling_order=order, default_value=-3)
    wanted = nearby(moving, fixed, order=order, cval=-3)
    assert (volume.shape, volume.dtype) == (wanted.shape, wanted.dtype)
    assert ((volume.data == -3) == (wanted == -3)).all()
    assert 0.2 < (wanted != -3).mean() < 0.9
    assert np.abs(volume.data - wanted).max() < 1e-4
    assert volume.data.flags.f_contiguous
    assert not volume.data.flags.writeable


def test_a_transform_moves_the_image_in_the_millimetres_of_the_headers(
    moving: Path, fixed: Path, tmp_path: Path
) -> None:
    image = nib.load(moving)
    moved = save(tmp_path / "moved.nii", np.asarray(image.dataobj), MOVE @ OBLIQUE)
    volume = LazyResampleVolume(moving, transform=MOVE, like=fixed)
    assert np.abs(volume.data - nearby(moved, fixed, order=1)).max() < 1e-3
    # Without a grid it stays on its own.
    volume = LazyResampleVolume(moving, transform=MOVE)
    assert volume.shape == image.shape
    assert np.allclose(volume.affine, OBLIQUE)
    assert np.abs(volume.data - nearby(moved, moving, order=1)).max() < 1e-3


def test_a_list_of_transforms_is_applied_from_right_to_left(moving: Path, fixed: Path) -> None:
    turn = np.array([[0.0, -1, 0, 3], [1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])
    together = LazyResampleVolume(moving, transform=MOVE @ turn, like=fixed)
    listed = LazyResampleVolume(moving, transform=[MOVE, turn.tolist()], like=fixed)
    other = LazyResampleVolume(moving, transform=[turn, MOVE], like=fixed)
    assert np.array_equal(listed.data, together.data)
    assert not np.array_equal(other.data, together.data)


def test_a_grid_of_its_own_begins_at_the_first_voxel(moving: Path) -> None:
    values = np.asarray(nib.load(moving).dataobj)
    sizes = np.sqrt((OBLIQUE[:3, :3] ** 2).sum(axis=0))
    half = LazyResampleVolume(moving, dims=(10, 11, 9), vox_size=2 * sizes)
    assert np.allclose(half.affine, OBLIQUE @ np.diag([2, 2, 2, 1]))
    assert np.allclose(half.data, values[::2, ::2, ::2], atol=1e-3)
    # Without dims, as many as cover the image.
    assert LazyResampleVolume(moving, vox_size=2 * sizes).shape == (10, 11, 9)
    assert LazyResampleVolume(moving, vox_size=sizes / 3).shape == (60, 66, 54)
    assert LazyResampleVolume(moving, dims=(4, 5, 6)).affine[:3, 0] @ OBLIQUE[:3, 0] == (
        pytest.approx(sizes[0])
    )


@pytest.mark.parametrize("order", [0, 1, 3])
def test_on_its_own_grid_an_image_stays_what_it_is(moving: Path, order: int) -> None:
    values = np.asarray(nib.load(moving).dataobj)
    for options in ({}, {"like": moving}, {"transform": np.eye(4)}):
        volume = LazyResampleVolume(moving, resampling_order=order, **options)
        assert volume.data.tobytes() == values.tobytes()
    # A shift by whole voxels loses no more than what leaves the grid.
    shift = OBLIQUE @ np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, -2], [0, 0, 0, 1]])
    shifted = LazyResampleVolume(
        moving, transform=shift @ np.linalg.inv(OBLIQUE), resampling_order=order
    )
    assert np.allclose(shifted.data[3:, :, :-2], values[:-3, :, 2:], atol=1e-3)
    assert not shifted.data[:3].any()


def test_a_tenth_of_a_millimetre_is_halfway_although_headers_hold_float32(tmp_path: Path) -> None:
    # 0.8 mm voxels on a grid of 1 mm: every fourth one lies halfway between two others.
    labels = np.arange(500, dtype="i4").reshape(500, 1, 1)
    path = save(tmp_path / "labels.nii", labels, np.diag(np.float32([0.8, 1, 1, 1])))
    volume = LazyResampleVolume(path, dims=(400, 1, 1), resampling_order=0)
    assert volume.data[2::4, 0, 0].tolist() == list(range(3, 500, 5))


@pytest.mark.parametrize(
    "dtype", ["?", "u1", "i2", ">i4", "i8", "u8", "f2", "f4", ">f8", "c8", "c16"]
)
def test_labels_stay_labels_with_order_0(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    if np.dtype(dtype).kind in "iu":
        ends = np.iinfo(dtype)
        labels = random.integers(
            ends.min, ends.max, (9, 8, 7), dtype=np.dtype(dtype).newbyteorder("=")
        )
        labels = labels.astype(dtype)
    else:
        labels = (random.normal(size=(9, 8, 7)) * (1 - 2j * (dtype[0] == "c"))).real.astype(dtype)
    path = tmp_path / "labels.npy"
    np.save(path, labels)
    turn = np.array([[0.9, 0.1, 0, -1], [-0.1, 0.9, 0, 1], [0, 0, 1.2, -0.7], [0, 0, 0, 1]])
    volume = LazyResampleVolume(path, transform=turn, resampling_order=0)
    assert volume.dtype == np.dtype(dtype).newbyteorder("=")
    assert set(volume.data.ravel().tolist()) <= {*labels.ravel().tolist(), 0}
    assert len(set(volume.data.ravel().tolist())) > min(100, len(set(labels.ravel().tolist())) - 1)


def test_colours_and_complex_numbers_are_resampled_part_by_part(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    parts = random.integers(0, 255, (3, 9, 8, 7), dtype="u1")
    colours = np.empty((9, 8, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for name, part in zip("RGB", parts, strict=True):
        colours[name] = part
    for name, array in (
        ("rgb", colours),
        ("complex", (parts[0] + 1j * parts[1]).astype("c8")),
        ("r", parts[0]),
        ("real", parts[0].astype("f4")),
        ("imag", parts[1].astype("f4")),
    ):
        np.save(tmp_path / f"{name}.npy", array)

    def of(name: str, fill: Any = 0) -> np.ndarray:
        path = tmp_path / f"{name}.npy"
        return LazyResampleVolume(path, transform=MOVE, resampling_order=3, default_value=fill).data

    assert np.array_equal(of("rgb", 7)["R"], of("r", 7))
    assert np.array_equal(of("complex", 3 + 4j).real, of("real", 3))
    assert np.array_equal(of("complex", 3 + 4j).imag, of("imag", 4))


# --- types ---------------------------------------------------------------------------------------


def test_integers_get_the_nearest_value_that_they_can_hold(tmp_path: Path) -> None:
    values = np.array([-300, -0.6, 0.5, 1.5, 2.5, 254.7, 1e30, np.nan, np.inf]).reshape(-1, 1, 1)
    np.save(tmp_path / "a.npy", values)

    def of(dtype: Any, name: str = "a.npy", **options: Any) -> list[Any]:
        volume = LazyResampleVolume(tmp_path / name, dtype=dtype, **options)
        assert volume.dtype == volume.data.dtype
        return volume.data.ravel().tolist()

    assert of("u1", default_value=9) == [0, 0, 0, 2, 2, 255, 255, 9, 255]
    assert of("i2") == [-300, -1, 0, 2, 2, 255, 2**15 - 1, 0, 2**15 - 1]
    assert of("i4")[6] == 2**31 - 1
    assert 0 < 2**63 - of("i8")[6] < 2**11
    assert of("?") == [True, True, False, True, True, True, True, False, True]
    assert of("f4")[:2] == [-300, np.float32(-0.6)]
    assert of("f4")[6:] == [np.float32(1e30), pytest.approx(np.nan, nan_ok=True), np.inf]
    integers = np.array([-200, -1, 0, 1, 127, 300], "i2").reshape(-1, 1, 1)
    np.save(tmp_path / "b.npy", integers)
    assert of("u1", name="b.npy") == [0, 0, 0, 1, 127, 255]
    assert of("i1", name="b.npy") == [-128, -1, 0, 1, 127, 127]
    assert of("?", name="b.npy") == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "dtype"), [("FLOAT", "f4"), ("S16", "i2"), ("Volume_DOUBLE", "f8"), ("float32", "f4")]
)
def test_types_may_be_named_as_in_aims(moving: Path, name: str, dtype: str) -> None:
    volume = LazyResampleVolume(moving, dtype=name)
    assert (volume.dtype, volume.data.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", ["?", ">i2", ">f8", "f2", "g"])
@pytest.mark.parametrize("order", [1, 3])
def test_types_that_scipy_doesnt_know_are_resampled_as_others(
    dtype: str, order: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(11).integers(0, 2, (9, 8, 7)) * (1 if dtype == "?" else 100)
    for name, one in (("a", values.astype(dtype)), ("b", values.astype("f8"))):
        np.save(tmp_path / f"{name}.npy", np.asfortranarray(one))
    volume, wanted = (
        LazyResampleVolume(tmp_path / name, transform=MOVE, resampling_order=order, dtype="f4")
        for name in ("a.npy", "b.npy")
    )
    assert np.array_equal(volume.data, wanted.data)
    beside = volume._node.key.estimate()[1] - volume.nbytes
    assert beside >= values.size * (np.dtype(dtype).itemsize + 8)
    as_it_is = LazyResampleVolume(tmp_path / "a.npy", transform=MOVE, resampling_order=order)
    assert as_it_is.data.dtype == np.dtype(dtype).newbyteorder("=")


def test_interpolation_isnt_rounded_before_it_is_converted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(8, dtype="u1").reshape(8, 1, 1))
    shift = np.eye(4)
    shift[0, 3] = -0.25
    volume = LazyResampleVolume(tmp_path / "a.npy", transform=shift, dtype="f4")
    assert volume.data.ravel().tolist() == [*(np.arange(7) + 0.25), 0]


# --- runs ----------------------------------------------------------------------------------------


def test_runs_are_resampled_volume_by_volume(tmp_path: Path, fixed: Path) -> None:
    run = np.random.default_rng(5).normal(size=(10, 11, 9, 4, 2)).astype("f4")
    path = save(tmp_path / "run.nii", run, OBLIQUE, tr=2.5)
    volume = LazyResampleVolume(path, like=fixed, resampling_order=3)
    wanted = nearby(save(tmp_path / "one.nii", run[..., 2, 1], OBLIQUE), fixed, order=3)
    assert volume.shape == (*wanted.shape, 4, 2)
    assert np.abs(volume.data[..., 2, 1] - wanted).max() < 1e-4
    # One volume of it at a time: the source, its coefficients, and some planes.
    one = run[..., 0, 0]
    beside = file_key(path, volume._node.reader).probe().peak_nbytes - volume.nbytes
    planes = 80 * 16 * 21
    assert one.nbytes + 8 * one.size <= beside < one.nbytes + 8 * one.size + planes
    assert volume.header.get_zooms()[3] == 2.5


def test_parts_are_those_of_the_whole_and_need_no_more_than_they_are(
    tmp_path: Path, fixed: Path
) -> None:
    run = np.random.default_rng(6).normal(size=(10, 11, 9, 5)).astype("f4")
    path = save(tmp_path / "run.nii.gz", run, OBLIQUE)
    whole = LazyResampleVolume(path, like=fixed).data.copy()
    lc.get_cache().clear()
    volume = LazyResampleVolume(path, like=fixed)
    for index in [
        np.s_[..., 3],
        np.s_[..., ::-2],
        np.s_[3:9, 2, ::3, 1:4],
        np.s_[5],
        np.s_[:, :, 4, 0],
        np.s_[2:2],
    ]:
        part = volume[index]
        assert np.array_equal(part.data, whole[index])
        assert part.shape == whole[index].shape
    assert not volume.loaded()
    one = np.prod(whole.shape[:3]) * whole.itemsize
    assert volume[..., 3]._node.key.estimate()[0] == one


def test_arrays_in_c_order_are_resampled_too(tmp_path: Path) -> None:
    run = np.random.default_rng(7).normal(size=(6, 7, 8, 3))
    np.save(tmp_path / "run.npy", run)
    np.save(tmp_path / "one.npy", run[..., 1])
    volume = LazyResampleVolume(tmp_path / "run.npy", transform=MOVE)
    assert np.array_equal(
        volume.data[..., 1], LazyResampleVolume(tmp_path / "one.npy", transform=MOVE).data
    )


# --- space ---------------------------------------------------------------------------------------


def test_the_result_lies_where_it_says(moving: Path, fixed: Path, tmp_path: Path) -> None:
    on_grid = LazyResampleVolume(moving, like=fixed)
    assert np.array_equal(on_grid.affine, nib.load(fixed).affine)
    total = on_grid + LazyReadData(fixed)  # one grid
    total.save(tmp_path / "total.nii.gz")
    saved = nib.load(tmp_path / "total.nii.gz")
    assert np.allclose(saved.affine, FLIPPED)
    assert int(saved.header["sform_code"]) == 4
    moved = LazyResampleVolume(moving, transform=MOVE)
    assert int(moved.header["sform_code"]) == 2  # aligned, no longer that of the scanner
    assert int(LazyResampleVolume(moving, vox_size=(2, 2, 2)).header["sform_code"]) == 1
    assert moved.header.get_data_shape() == moved.shape


def test_what_was_moved_is_not_on_the_grid_of_its_file(moving: Path) -> None:
    steps = np.sqrt((OBLIQUE[:3, :3] ** 2).sum(axis=0))
    coarse = LazyResampleVolume(moving, dims=(20, 22, 18), vox_size=2 * steps)
    with pytest.raises(lc.GridMismatchError, match=r"moving.nii.gz.*\(resampled\)"):
        (LazyReadData(moving) - coarse).data


def test_files_without_orientation_have_voxels_times_their_size(tmp_path: Path) -> None:
    values = np.random.default_rng(8).normal(size=(6, 7, 8))
    image = nib.Nifti1Image(values, None)
    image.header.set_zooms((2, 2, 2))
    image.to_filename(tmp_path / "a.nii")
    volume = LazyResampleVolume(tmp_path / "a.nii", dims=(3, 4, 4), vox_size=(4, 4, 4))
    assert np.allclose(volume.data, values[::2, ::2, ::2])
    assert volume.affine is None
    assert volume.header.get_zooms() == (4, 4, 4)
    with pytest.raises(lc.ReadError, match="doesn't say where its voxels lie"):
        LazyResampleVolume(tmp_path / "a.nii", like=tmp_path / "a.nii").data


# --- transformations in files --------------------------------------------------------------------


def test_trm_files_are_in_the_millimetres_of_aims(records: Any, tmp_path: Path) -> None:
    # Recorded of AIMS: such a file is turned as it is read, and its voxels counted from there.
    turned = np.diag([-1.5, -2, -2.5, 1])
    turned[:3, 3] = 20, 30, 40
    case = next(case for case in CASES if case["name"] == "smooth_f4_rotation_1_9")
    wanted, there = records[case["output"]][..., 0], inside(case)
    trm = tmp_path / "rotation.trm"
    matrix = np.array(case["transform"])
    np.savetxt(trm, [matrix[:3, 3], *matrix[:3, :3]])
    given = records[case["input"]][..., 0]
    path = save(tmp_path / "as-aims.nii", given, turned)
    volume = resampled(path, case, transform=trm)
    assert np.abs(volume.data - wanted)[there].max() < 1e-4
    (tmp_path / "rotation").write_bytes(trm.read_bytes())  # known by its 12 numbers as well
    again = resampled(path, case, transform=tmp_path / "rotation")
    assert again.data.tobytes() == volume.data.tobytes()
    # The same image with its voxels stored the other way round.
    flip = np.diag([-1.0, 1, -1, 1])
    flip[:3, 3] = 11, 0, 7
    other = save(tmp_path / "flipped.nii", given[::-1, :, ::-1], turned @ flip)
    again = resampled(other, case, transform=[str(trm)])
    assert np.abs(again.data[::-1, :, ::-1] - wanted)[there].max() < 1e-4
    assert np.allclose(again.affine @ [8, 0, 5, 1], volume.affine @ [0, 0, 0, 1], atol=1e-4)


def test_the_millimetres_of_aims_are_those_that_its_headers_tell() -> None:
    observed = json.loads((RECORDS / "observed.json").read_text())
    for name in ("vol_S16.nii", "vol4d_S16.nii.gz"):
        [told] = observed[name]["finder"]["header"]["transformations"]
        probe = file_key(RECORDS / "samples" / name).probe()
        found = aims_to_world(grid_of(probe, name))
        assert np.allclose(found, np.reshape(told, (4, 4)), atol=1e-5)


def itk(path: Path, matrix: np.ndarray, centre: Any = (0, 0, 0)) -> Path:
    """ITK's text of an affine from the reference's points to the image's, its axes L, P, S."""
    turned = np.diag([-1, -1, 1, 1]) @ np.linalg.inv(matrix) @ np.diag([-1, -1, 1, 1])
    linear, centre = turned[:3, :3], np.array(centre, float)
    shift = turned[:3, 3] + linear @ centre - centre
    numbers = " ".join(f"{number:.17g}" for number in [*linear.ravel(), *shift])
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {numbers}\nFixedParameters: {' '.join(map(str, centre))}\n"
    )
    return path


def test_affines_of_itk_are_read(moving: Path, fixed: Path, tmp_path: Path) -> None:
    from scipy.io import savemat

    wanted = LazyResampleVolume(moving, transform=MOVE, like=fixed).data
    for text in (itk(tmp_path / "a.txt", MOVE), itk(tmp_path / "b.tfm", MOVE, (9, -5, 3))):
        volume = LazyResampleVolume(moving, transform=text, like=fixed)
        assert np.abs(volume.data - wanted).max() < 0.05
    turned = np.diag([-1, -1, 1, 1]) @ np.linalg.inv(MOVE) @ np.diag([-1, -1, 1, 1])
    numbers = np.concatenate([turned[:3, :3].ravel(), turned[:3, 3]])[:, None]
    binary = tmp_path / "0GenericAffine.mat"
    savemat(binary, {"AffineTransform_double_3_3": numbers, "fixed": np.zeros((3, 1))}, format="4")
    volume = LazyResampleVolume(moving, transform=binary, like=fixed)
    assert np.abs(volume.data - wanted).max() < 0.05


def test_affines_of_fsl_are_read_between_the_two_images(
    moving: Path, fixed: Path, tmp_path: Path
) -> None:
    # FSL counts in voxels times their size, the first axis backwards where it leads to the right.
    def to_fsl(path: Path) -> np.ndarray:
        image = nib.load(path)
        sizes = np.diag([*image.header.get_zooms()[:3], 1.0])
        if np.linalg.det(image.affine) > 0:
            flip = np.diag([-1.0, 1, 1, 1])
            flip[0, 3] = (image.shape[0] - 1) * sizes[0, 0]
            sizes = flip @ sizes
        return sizes @ np.linalg.inv(image.affine)

    assert np.linalg.det(OBLIQUE) > 0 > np.linalg.det(FLIPPED)
    matrix = tmp_path / "flirt.mat"
    np.savetxt(matrix, to_fsl(fixed) @ MOVE @ np.linalg.inv(to_fsl(moving)))
    wanted = LazyResampleVolume(moving, transform=MOVE, like=fixed).data
    assert (
        np.abs(LazyResampleVolume(moving, transform=matrix, like=fixed).data - wanted).max() < 0.01
    )
    with pytest.raises(ValueError, match=r"flirt\.mat: FSL's matrices hold between two"):
        LazyResampleVolume(moving, transform=[matrix, MOVE], like=fixed).data


def test_transformations_that_cant_be_read_say_which_and_why(
    moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content, message in (
        ("a.trm", "1 2 3", "a.trm: expected the 12 numbers"),
        ("b.trm", "0 0 0 1 0 0 0 1 0 0 0 0", "b.trm: .* no affine transformation that can be"),
        ("c.txt", "1 0 0 0", "c.txt: expected AIMS's .trm"),
        ("d.mat", "1 0 0 0", "d.mat: this affine transformation can't be read"),
        ("e.tfm", "#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3D\n", "e.tfm"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises((lc.ReadError, ValueError), match=message):
            LazyResampleVolume(moving, transform=tmp_path / name).data
    with pytest.raises(FileNotFoundError, match=r"gone\.trm"):
        LazyResampleVolume(moving, transform=tmp_path / "gone.trm").data
    (tmp_path / "f.trm").write_text("0 0 0 1 0 0 0 1 0 0 0 1")
    with pytest.raises(ValueError, match="mixes transformations of AIMS"):
        LazyResampleVolume(moving, transform=[tmp_path / "f.trm", MOVE]).data
    monkeypatch.setitem(sys.modules, "nitransforms.io.itk", None)
    with pytest.raises(lc.ReadError, match=r"a\.txt: reading it needs nitransforms: install it"):
        LazyResampleVolume(moving, transform=itk(tmp_path / "a.txt", MOVE)).data


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"transform": np.eye(3)}, TypeError, "give a 4x4 matrix"),
        ({"transform": object()}, TypeError, "give a 4x4 matrix"),
        ({"transform": np.zeros((4, 4))}, ValueError, "can be inverted"),
        ({"dims": (1, 2)}, ValueError, "dims="),
        ({"dims": (1, 2, 0)}, ValueError, "dims="),
        ({"dims": (1, 2, 3.5)}, ValueError, "dims="),
        ({"vox_size": (1, 1, np.nan)}, ValueError, "vox_size="),
        ({"vox_size": "111"}, ValueError, "vox_size="),
        ({"resampling_order": 8}, ValueError, "from 0 to 7"),
        ({"resampling_order": True}, ValueError, "from 0 to 7"),
        ({"default_value": "0"}, TypeError, "default_value="),
        ({"like": 3}, TypeError, "like="),
        ({"like": "x.nii", "dims": (1, 2, 3)}, TypeError, "leave dims= and vox_size= out"),
        ({"dtype": "S17"}, TypeError, "S17"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_at_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LazyResampleVolume("nowhere.nii", **options)


def test_parameters_that_dont_go_with_the_file_are_refused_before_reading(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5, 2), "u1"), np.eye(4))
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    reads: list[str] = []
    reader = FaultyReader(during=reads.append)
    for options, message in (
        ({"default_value": -1}, r"default_value=-1 can't be had in the uint8 voxels of .*a\.nii"),
        ({"default_value": np.nan, "dtype": "i4"}, "default_value=nan can't be had in the int32"),
        ({"resampling_order": 6}, "with scipy it is 0 to 5"),
        ({"dims": (3, 4, 5, 7)}, r"dims=\(3, 4, 5, 7\): .*only its first three"),
        ({"dtype": "c8"}, "can't be made complex64"),
    ):
        with pytest.raises(ValueError, match=message):
            LazyResampleVolume(path, reader=reader, **options).data
    with pytest.raises(lc.ReadError, match="three axes or more"):
        LazyResampleVolume(tmp_path / "flat.npy").data
    assert not reads
    assert LazyResampleVolume(path, dims=(2, 2, 2, 2)).shape == (2, 2, 2, 2)
    assert LazyResampleVolume(path, default_value=-1, dtype="i2").data.dtype == np.int16


# --- a source as others --------------------------------------------------------------------------


def test_what_is_known_of_it_is_known_before_anything_is_read(moving: Path, fixed: Path) -> None:
    reads: list[str] = []
    reader = FaultyReader(during=reads.append)
    volume = LazyResampleVolume(moving, reader=reader, like=fixed, dtype="f8")
    assert (volume.shape, volume.dtype, volume.nbytes) == ((16, 21, 23), "f8", 16 * 21 * 23 * 8)
    plan = lc.explain(volume * 2 + LazyReadData(fixed))
    assert plan.reads == 2
    assert plan.uses == {str(moving): 1, str(fixed): 1}
    assert "(resampled)" in repr(volume)
    assert not reads
    assert volume.not_started()


def test_explain_says_that_it_is_loaded_as_a_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "large.nii.gz", np.zeros((128, 128, 80), "f4"), np.eye(4))
    plan = lc.explain(LazyResampleVolume(path, transform=MOVE) * 2)
    assert "large.nii.gz (resampled) is loaded as a whole" in str(plan)
    least = plan.min_budget
    with DataCache(least, strict=True) as cache:
        LazyResampleVolume(path, transform=MOVE).data
        assert cache.stats().peak_bytes <= least
    with DataCache(2 * 128 * 128 * 80 * 4, strict=True), pytest.raises(lc.BudgetExceededError):
        LazyResampleVolume(path, transform=MOVE).data


def test_it_is_cached_under_all_of_its_parameters(moving: Path, fixed: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"like": fixed},
        {"like": moving},
        {"transform": MOVE},
        {"transform": [MOVE, MOVE]},
        {"dims": (5, 6, 7)},
        {"dims": (5, 6, 7), "vox_size": (2, 2, 2)},
        {"vox_size": (2, 2, 2)},
        {"resampling_order": 0},
        {"default_value": 1},
        {"dtype": "f8"},
        {"like": fixed, "dtype": "S16"},
    ]
    kept = [LazyResampleVolume(moving, **one) for one in options]
    again = [LazyResampleVolume(moving, **one) for one in options]
    raw = LazyReadData(moving)
    assert len({volume._node.key for volume in [raw, *kept]}) == len(kept) + 1
    assert [one._node.key for one in kept] == [one._node.key for one in again]
    first = kept[1].data
    assert again[1].loaded()
    assert again[1].data is first
    assert lc.get_cache().stats().loads == 1


def test_threads_that_need_it_share_one_load_and_never_see_the_raw_volume(
    moving: Path, fixed: Path
) -> None:
    gate = Gate()
    volumes = [
        LazyResampleVolume(moving, like=fixed, reader=reader)
        for reader in [FaultyReader(during=lambda path: gate(), when="after")]
        for _ in range(4)
    ]
    readers = [Running(lambda volume=volume: volume.data) for volume in volumes]
    gate.reached()  # the raw volume has been read
    assert all(volume.preloading() and not volume.loaded() for volume in volumes)
    gate.open()
    values = [reader.result() for reader in readers]
    assert all(value is values[0] for value in values)
    assert values[0].shape == (16, 21, 23)
    assert lc.get_cache().stats().loads == 1


def test_loops_preload_it_and_plans_take_it(moving: Path, fixed: Path, tmp_path: Path) -> None:
    values = np.asarray(nib.load(moving).dataobj)
    paths = [save(tmp_path / f"{n}.nii.gz", values + n, OBLIQUE) for n in range(5)]
    volumes = [LazyResampleVolume(path, like=fixed) for path in paths]
    wanted = [nearby(path, fixed, order=1) for path in paths]
    for volume, value in zip(PreloadList(volumes, npreload=3), wanted, strict=True):
        assert np.abs(volume.data - value).max() < 1e-4
    assert lc.get_cache().stats().preloads > 0
    lc.get_cache().clear()
    least = lc.explain(lc.mean(volumes)).min_budget
    with DataCache(least, strict=True) as cache:
        fresh = [LazyResampleVolume(path, like=fixed) for path in paths]
        mean = lc.mean(fresh).data
        assert cache.stats().loads == len(paths)
        assert cache.stats().peak_bytes <= least
    assert np.abs(mean - np.mean(wanted, axis=0)).max() < 1e-4
    assert not preload_threads()


def test_it_pickles_as_a_recipe(moving: Path, fixed: Path) -> None:
    for options in (
        {"like": fixed, "transform": MOVE, "dtype": "S16"},
        {"dims": (5, 6, 7), "vox_size": (1, 2, 3), "resampling_order": 3, "default_value": np.nan},
        {"like": nib.Nifti1Image(np.zeros((4, 5, 6)), FLIPPED)},
    ):
        volume = LazyResampleVolume(moving, **options)
        data = volume.data
        content = pickle.dumps(volume)
        assert len(content) < 1024
        again = pickle.loads(content)
        assert type(again) is LazyResampleVolume
        assert again.data.tobytes() == data.tobytes()
        assert again.loaded()
    assert pickle.loads(pickle.dumps(volume[..., 2])).data.shape == (4, 5)


def test_changes_of_any_of_its_files_are_noticed(moving: Path, fixed: Path, tmp_path: Path) -> None:
    trm = tmp_path / "move.trm"
    trm.write_text("0 0 0 1 0 0 0 1 0 0 0 1")
    volume = LazyResampleVolume(moving, like=fixed, transform=trm)
    before = volume.data.copy()
    for change in (
        lambda: trm.write_text("5 0 0 1 0 0 0 1 0 0 0 1.0"),
        lambda: save(fixed, np.zeros((9, 9, 9), "u1"), FLIPPED),
        lambda: save(moving, np.ones((20, 22, 18), "f4"), OBLIQUE),
    ):
        change()
        with pytest.warns(lc.FileChangedWarning):
            fresh = LazyResampleVolume(moving, like=fixed, transform=trm).data
        assert fresh.tobytes() != before.tobytes()
        before = fresh.copy()


def test_a_change_while_it_is_read_is_an_error(moving: Path, fixed: Path) -> None:
    reader = FaultyReader(during=lambda path: save(fixed, np.zeros((9, 9, 9), "u1"), FLIPPED))
    with pytest.raises(lc.FileChangedError, match=r"moving\.nii\.gz changed while it was read"):
        LazyResampleVolume(moving, like=fixed, reader=reader).data


def test_results_are_not_saved_over_what_they_come_from(moving: Path, fixed: Path) -> None:
    volume = LazyResampleVolume(moving, like=fixed)
    for path in (moving, fixed):
        with pytest.raises(lc.WriteError, match="input"):
            volume.save(path)


def test_errors_name_the_file_and_nothing_is_kept(moving: Path, fixed: Path) -> None:
    reader = FaultyReader(fail_every=1, error=OSError("broken"))
    volume = LazyResampleVolume(moving, like=fixed, reader=reader)
    with pytest.raises(OSError, match="broken") as caught:
        volume.data
    assert str(moving) in "".join(traceback.format_exception(caught.value))
    assert lc.get_cache().used == 0
    reader.fail_every = 0
    assert volume.data.shape == (16, 21, 23)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LazyResampleVolume(moving, like="nowhere.nii").data


def test_a_prefetch_that_nobody_wants_stops_between_planes(moving: Path, fixed: Path) -> None:
    reader = LazyResampleVolume(moving, like=fixed)._node.reader
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    with cancellable(cancelled), pytest.raises(LoadCancelled):
        reader.read(str(moving))
    assert asked == 11


def test_proxies_are_resampled_as_their_files_are(moving: Path, fixed: Path) -> None:
    wanted = LazyResampleVolume(moving, like=fixed).data
    grid = LazyReadData(fixed)
    for source in (moving, str(moving), nib.load(moving), LazyReadData(moving)):
        for like in (grid, grid * 2, nib.load(fixed), LazyResampleVolume(moving, like=fixed)):
            assert LazyResampleVolume(source, like=like).data.tobytes() == wanted.tobytes()
    # Parts and conversions of them, and what was resampled before, are sources as well.
    part = LazyResampleVolume(LazyReadData(moving)[3:, ::2], like=fixed)
    assert np.abs(part.data - wanted)[part.data != 0].max() < 200
    assert LazyResampleVolume(LazyReadData(moving, dtype="i2"), like=fixed).dtype == np.int16
    there_and_back = LazyResampleVolume(LazyResampleVolume(moving, dtype="f8"), like=fixed)
    assert np.abs(there_and_back.data - wanted).max() < 1e-4


def test_what_is_in_memory_or_computed_is_resampled_when_it_is_asked_for(
    moving: Path, fixed: Path
) -> None:
    image = nib.load(moving)
    values = np.asarray(image.dataobj)
    wanted = LazyResampleVolume(moving, like=fixed, default_value=5).data
    held = nib.Nifti1Image(values, image.affine)
    twice = LazyReadData(moving) * 2 / 2
    for source in (held, twice):
        volume = LazyResampleVolume(source, like=fixed, default_value=5)
        assert volume.not_started()
        assert (volume.shape, volume.dtype) == (wanted.shape, wanted.dtype)
        assert np.allclose(volume.affine, FLIPPED)
        assert volume.data.tobytes() == wanted.tobytes()
        assert (volume + LazyReadData(fixed)).data.shape == wanted.shape
    assert pickle.loads(pickle.dumps(LazyResampleVolume(twice, like=fixed))).shape == wanted.shape
    array = LazyResampleVolume(values, dims=(10, 11, 9), vox_size=(2, 2, 2))
    assert np.array_equal(array.data, values[::2, ::2, ::2])
    with pytest.raises(TypeError, match="no array"):
        LazyResampleVolume({"a": 1}).data


def test_nothing_is_printed(moving: Path, fixed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LazyResampleVolume(moving, like=fixed, transform=MOVE, resampling_order=3, dtype="S32").data
    assert capfd.readouterr() == ("", "")


def test_iterators_leave_no_half_done_volume(moving: Path, fixed: Path) -> None:
    volumes = [LazyResampleVolume(moving, like=fixed, default_value=n) for n in range(20)]

    def outside(number: int) -> list[float]:
        return [float(volume.data[0, 0, 0]) for volume in volumes[number::-1]]

    with DataCache(4 * volumes[0].nbytes + 10**6):
        for number, found in enumerate(together(4, lambda n: outside(16 + n))):
            assert found == list(range(16 + number, -1, -1))


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys
import numpy as np
import lazycache as lc

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) * 1024

def volume(path, order, dtype):
    turn = np.array([[.9, .1, 0, 2], [-.1, .9, 0, 1], [0, 0, 1.1, -3], [0, 0, 0, 1]])
    n = 170 if "large" in path else 9
    return lc.LazyResampleVolume(
        path, transform=turn, dims=(n, n, n), resampling_order=order, dtype=dtype
    )

small, large, order, dtype = sys.argv[1:]
volume(small, int(order), dtype).data  # scipy is there, and its buffers
lc.get_cache().clear()
resampled = volume(large, int(order), dtype)
announced = resampled._node.key.estimate()[1]
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
with lc.DataCache(announced, strict=True) as cache:
    resampled.data
    taken = resident("VmHWM") - before
    assert cache.stats().peak_bytes == announced
print(taken, announced)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("order", "dtype", "later"),
    [(0, "i2", ()), (1, "i2", ()), (3, "f4", ()), (1, "f4", (3,))],
    ids=["labels", "integers", "splines", "run"],
)
def test_what_it_announces_is_what_the_process_takes(
    order: int, dtype: str, later: tuple[int, ...], tmp_path: Path
) -> None:
    random = np.random.default_rng(9)
    save(tmp_path / "small.nii.gz", np.ones((9, 9, 9, *later), "i2"), np.eye(4))
    values = random.integers(0, 99, (160, 170, 150, *later), dtype="i2")
    save(tmp_path / "large.nii.gz", values, np.eye(4))
    paths = [str(tmp_path / f"{name}.nii.gz") for name in ("small", "large")]
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths, str(order), dtype],
        env={**os.environ, "PYTHONPATH": str(Path(lc.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    taken, announced = map(int, process.stdout.split())
    assert taken < announced + (2 << 20)
    assert taken > 0.85 * announced
