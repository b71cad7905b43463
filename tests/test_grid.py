"""Images in one expression lie on one grid, and their axes go together."""

from __future__ import annotations

import warnings
from itertools import permutations, product
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.orientations import aff2axcodes

from lazycache.errors import GridMismatchError, GridMismatchWarning, ShapeMismatchError
from lazycache.grid import (
    align,
    aligned_shapes,
    check_grids,
    common_shape,
    displacement,
    grid_mismatches,
    listed,
    orientation,
    same_grid,
    says_place,
    smallest_edge,
)

SHAPE = (182, 218, 182)


def affine(diagonal: Any = (1, 1, 1), origin: Any = (0, 0, 0)) -> np.ndarray:
    matrix = np.diag([*map(float, diagonal), 1.0])
    matrix[:3, 3] = origin
    return matrix


def rotation(degrees: float) -> np.ndarray:
    turned = np.eye(4)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned[:2, :2] = [[c, -s], [s, c]]
    return turned


RAS = affine(origin=(-90, -126, -72))
LAS = affine((-1, 1, 1), (91, -126, -72))  # the same anatomy, the first axis stored backwards


# --- displacement --------------------------------------------------------------------------------


def test_a_shift_displaces_by_its_length() -> None:
    assert displacement(affine(), affine(origin=(3, 0, 4)), SHAPE) == pytest.approx(5)


def test_a_flip_displaces_by_the_width_of_the_image() -> None:
    assert displacement(RAS, LAS, SHAPE) == pytest.approx(182)


def test_the_farthest_corner_counts() -> None:
    # A rotation about voxel 0 hardly moves the near corner.
    moved = displacement(affine(), rotation(1), (100, 1, 1))
    assert moved == pytest.approx(2 * np.sin(np.radians(0.5)) * np.hypot(99.5, 0.5))


def test_a_thicker_slice_is_seen_in_an_image_of_one_slice() -> None:
    assert displacement(affine(), affine((1, 1, 3)), (64, 64, 1)) == pytest.approx(1)
    assert displacement(affine(), affine((1, 1, 3)), (64, 64)) == pytest.approx(1)


def test_time_is_no_axis_of_space() -> None:
    turned = rotation(0.1)
    assert displacement(RAS, turned, SHAPE) == displacement(RAS, turned, (*SHAPE, 400))


MATRICES = hnp.arrays(np.float64, (3, 4), elements=st.floats(-100, 100))


@given(MATRICES, MATRICES, st.tuples(*[st.integers(1, 300)] * 3))
def test_displacement_is_the_largest_over_the_corners_and_symmetric(
    a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]
) -> None:
    a, b = np.vstack([a, [0, 0, 0, 1]]), np.vstack([b, [0, 0, 0, 1]])
    corners = product(*[(-0.5, n - 0.5) for n in shape])
    apart = [float(np.linalg.norm(a @ [*c, 1] - b @ [*c, 1])) for c in corners]
    assert displacement(a, b, shape) == pytest.approx(max(apart), rel=1e-6, abs=1e-6)
    assert displacement(a, b, shape) == displacement(b, a, shape)
    assert same_grid(a, a, shape)


# --- one grid ------------------------------------------------------------------------------------


def test_rounding_in_a_header_is_the_same_grid() -> None:
    rounded = RAS + np.array([[0, 0, 0, 5e-4]] * 3 + [[0] * 4])
    assert same_grid(RAS, rounded, SHAPE)
    assert same_grid(RAS, RAS.astype(np.float32), SHAPE)
    # A quaternion in single precision, as the qform of a NIfTI header keeps it.
    oblique = rotation(17.3)
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), None)
    image.set_qform(oblique)
    assert same_grid(oblique, image.header.get_qform(), SHAPE)


@pytest.mark.parametrize(
    ("shift", "edge", "same"),
    [(0.049, 1, True), (0.051, 1, False), (0.024, 0.5, True), (0.026, 0.5, False), (0.5, 1, False)],
)
def test_the_limit_is_a_twentieth_of_the_smallest_voxel_edge(
    shift: float, edge: float, same: bool
) -> None:
    grid = affine((edge, 2, 3))
    moved = affine((edge, 2, 3), (0, shift, 0))
    assert same_grid(grid, moved, SHAPE) is same


def test_the_smaller_voxels_of_two_images_decide() -> None:
    a, b = affine((1, 1, 1)), affine((1.0001, 1, 1))
    assert same_grid(a, b, (100, 100, 100))
    assert not same_grid(a, b, (1000, 100, 100))
    # 0.0475 mm apart: a twentieth of 1 mm, but more than a twentieth of 0.905 mm.
    a, b = affine((1, 1, 1)), affine((0.905, 1, 1))
    assert not same_grid(a, b, (1, 1, 1))
    assert not same_grid(b, a, (1, 1, 1))


@pytest.mark.parametrize("nothing", [None, np.full((4, 4), np.nan), affine(origin=(np.inf, 0, 0))])
def test_what_says_nothing_of_space_is_on_every_grid(nothing: Any) -> None:
    assert not says_place(nothing)
    assert same_grid(nothing, RAS, SHAPE)
    assert same_grid(RAS, nothing, SHAPE)
    assert same_grid(nothing, None, SHAPE)
    check_grids([("a", nothing, SHAPE), ("b", RAS, SHAPE), ("c", nothing, SHAPE)])


def test_singular_affines_are_compared_as_they_are() -> None:
    flat = affine((1, 1, 0))
    assert same_grid(flat, flat, SHAPE)
    assert same_grid(flat, affine((1, 1, 0), (0.04, 0, 0)), SHAPE)
    assert not same_grid(flat, affine(), SHAPE)
    assert same_grid(np.zeros((4, 4)), np.zeros((4, 4)), SHAPE)
    assert smallest_edge(flat) == 1
    assert smallest_edge(np.zeros((4, 4))) == 0


# --- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_orientations_are_those_of_nibabel(axes: tuple[int, ...]) -> None:
    tilt = rotation(20)[:3, :3] @ np.roll(rotation(11)[:3, :3], 1, (0, 1))
    for signs in product((-1, 1), repeat=3):
        matrix = np.eye(4)
        matrix[:3, :3] = (tilt @ np.eye(3)[:, axes]) * signs * (0.7, 1, 5)
        assert orientation(matrix) == "".join(aff2axcodes(matrix))


def test_each_direction_is_given_to_one_axis_whatever_its_voxel_size() -> None:
    sheared = np.eye(4)
    sheared[:3, :3] = np.transpose([(0.9, 0.1, 0), (0, 1, 0), (4, 0, 3)])
    assert orientation(sheared) == "RAS"


def test_an_axis_that_leads_nowhere_has_no_letter() -> None:
    assert orientation(affine((1, -1, 0))) == "RP?"
    assert orientation(np.zeros((4, 4))) == "???"


# --- checking a list -----------------------------------------------------------------------------


def test_images_on_one_grid_pass_in_every_mode() -> None:
    items = [(f"{i}.nii", RAS, (*SHAPE, 5)[: 3 + i]) for i in range(2)]
    for mode in ("error", "warn", "ignore"):
        check_grids(items, mode)
    check_grids([])


def test_a_mismatch_names_files_millimetres_orientations_and_what_to_write() -> None:
    items = [("mask.npy", None, SHAPE), ("a.nii.gz", RAS, SHAPE), ("b.nii.gz", LAS, SHAPE)]
    with pytest.raises(GridMismatchError) as error:
        check_grids(items)
    message = str(error.value)
    for word in ("a.nii.gz (RAS)", "b.nii.gz (LAS)", "182 mm", "like='a.nii.gz'"):
        assert word in message
    assert 'grid="warn"' in message
    assert 'grid="ignore"' in message
    assert "mask.npy" not in message
    assert isinstance(error.value, ValueError)


def test_a_small_shift_is_told_in_its_own_size() -> None:
    (line,) = grid_mismatches([("a", RAS, SHAPE), ("b", affine(origin=(-90.06, -126, -72)), SHAPE)])
    assert "0.06 mm" in line


def test_warn_warns_and_goes_on() -> None:
    with pytest.warns(GridMismatchWarning, match="182 mm"):
        check_grids([("a", RAS, SHAPE), ("b", LAS, SHAPE)], "warn")


def test_ignore_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_grids([("a", RAS, SHAPE), ("b", LAS, SHAPE)], "ignore")


def test_an_unknown_mode_is_refused_even_where_all_grids_agree() -> None:
    with pytest.raises(ValueError, match=r"grid='maybe'.*\"ignore\""):
        check_grids([("a", RAS, SHAPE)], "maybe")  # type: ignore[arg-type]


def test_all_mismatches_come_in_one_error_and_twenty_are_listed() -> None:
    items = [("first", RAS, SHAPE), *((f"sub-{i:02}", LAS, SHAPE) for i in range(25))]
    with pytest.raises(GridMismatchError) as error:
        check_grids(items)
    assert str(error.value).count(" lies up to ") == 20
    assert "sub-19" in str(error.value)
    assert "sub-20" not in str(error.value)
    assert "and 5 more" in str(error.value)


def test_a_file_used_twice_is_told_once() -> None:
    assert len(grid_mismatches([("a", RAS, SHAPE), *[("b", LAS, SHAPE)] * 3])) == 1


def test_the_larger_of_two_shapes_has_the_corners() -> None:
    a, b = affine((1, 1, 1)), affine((1.0001, 1, 1))
    assert grid_mismatches([("a", a, (1, 9, 9)), ("b", b, (1000, 9, 9))])
    assert grid_mismatches([("a", a, (1000, 9)), ("b", b, (1, 9, 9))])


def test_twenty_lines_are_listed_whole() -> None:
    lines = [str(i) for i in range(20)]
    assert listed(lines) == "; ".join(lines)
    assert listed([*lines, "x"]).endswith("19; and 1 more")


# --- shapes --------------------------------------------------------------------------------------


def test_a_3d_mask_applies_to_every_volume_of_a_4d_run() -> None:
    assert aligned_shapes([((4, 5, 6), True), ((4, 5, 6, 7), True)])[0] == (4, 5, 6, 1)
    items = [("mask.nii", (4, 5, 6), True), ("run.nii", (4, 5, 6, 7), True)]
    assert common_shape(items) == (4, 5, 6, 7)


def test_a_volume_and_a_run_of_one_volume_make_no_giant() -> None:
    items = [("a.nii", (256, 256, 256), True), ("b.nii", (256, 256, 256, 1), True)]
    assert common_shape(items) == (256, 256, 256, 1)


def test_arrays_without_a_grid_align_as_in_numpy() -> None:
    run = ("run.nii", (4, 5, 6, 7), True)
    assert common_shape([run, ("weights", (7,), False)]) == (4, 5, 6, 7)
    assert common_shape([run, ("2.5", (), False)]) == (4, 5, 6, 7)
    assert common_shape([("a", (3, 1), False), ("b", (4,), False)]) == (3, 4)
    with pytest.raises(ShapeMismatchError, match=r"\[\.\.\., None\]"):
        common_shape([run, ("mask", (4, 5, 6), False)])


def test_a_longer_array_without_a_grid_does_not_move_the_images() -> None:
    items = [("a", (5, 6), True), ("b", (5, 6, 2), True), ("c", (3, 5, 6, 2), False)]
    assert common_shape(items) == (3, 5, 6, 2)


def test_shapes_that_do_not_go_together_are_named_with_their_files() -> None:
    items = [("a.nii", (4, 5, 6), True), ("b.nii", (4, 5, 6), True), ("c.nii", (4, 5, 8), True)]
    with pytest.raises(ShapeMismatchError) as error:
        common_shape(items)
    assert "c.nii (4, 5, 8) with a.nii (4, 5, 6)" in str(error.value)
    assert "b.nii" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_an_operand_that_clashes_on_several_axes_is_told_once() -> None:
    with pytest.raises(ShapeMismatchError) as error:
        common_shape([("a", (4, 4, 4), True), ("b", (5, 5, 5), True)])
    assert str(error.value).count("b (5, 5, 5)") == 1


def test_an_operand_is_named_with_the_one_that_it_really_clashes_with() -> None:
    items = [("one", (1, 5), False), ("three", (3, 5), False), ("four", (4, 5), False)]
    with pytest.raises(ShapeMismatchError, match=r"four \(4, 5\) with three \(3, 5\)"):
        common_shape(items)


def test_all_shape_mismatches_come_in_one_error_and_twenty_are_listed() -> None:
    items = [("first", (4, 4, 4), True), *((f"s{i}", (4, 4, 5), True) for i in range(30))]
    with pytest.raises(ShapeMismatchError, match=r"s19 .*; and 10 more"):
        common_shape(items)


@given(hnp.mutually_broadcastable_shapes(num_shapes=4, max_dims=4, min_side=0))
def test_without_grids_the_shape_is_that_of_numpy(broadcast: Any) -> None:
    items = [(str(i), shape, False) for i, shape in enumerate(broadcast.input_shapes)]
    assert common_shape(items) == broadcast.result_shape


@given(st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4))
def test_shapes_are_refused_just_where_numpy_refuses_them(shapes: Any) -> None:
    items = [(str(i), shape, False) for i, shape in enumerate(shapes)]
    try:
        expected = np.broadcast_shapes(*shapes)
    except ValueError:
        with pytest.raises(ShapeMismatchError):
            common_shape(items)
    else:
        assert common_shape(items) == expected


def test_hundreds_of_operands_have_a_shape() -> None:
    assert common_shape([("a.nii", (2, 3, 4), True)] * 500) == (2, 3, 4)


def test_aligning_adds_axes_behind() -> None:
    assert align((2, 3), 4) == (2, 3, 1, 1)
    assert align((2, 3), 1) == (2, 3)
    assert align((), 2) == (1, 1)
