from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as npst
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.freesurfer.mghformat import MGHHeader
from numpy.testing import assert_array_equal

from lazycache import writing
from lazycache.errors import WriteError
from lazycache.writing import check_output, write_image

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
IMAGES = (".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz")


def volume(dtype: Any = "i2", shape: tuple[int, ...] = (5, 4, 3), order: Any = "C") -> Any:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype, order=order)


def bold_header() -> nib.Nifti1Header:
    """The header of a scaled int16 run of 2.5 s, with everything set that could be kept."""
    header = nib.Nifti1Header()
    header.set_data_shape((5, 4, 3, 7))
    header.set_data_dtype(np.int16)
    header.set_sform(AFFINE, "mni")
    header.set_qform(AFFINE + np.diag([0, 0, 0, 0]), "scanner")
    header.set_zooms((2, 2, 2.5, 2.5))
    header.set_xyzt_units("mm", "sec")
    header.set_slope_inter(0.5, 10)
    header["cal_min"], header["cal_max"] = 3, 900
    header["descrip"], header["aux_file"] = b"FSL5.0", b"lut.txt"
    header["db_name"] = b"secret"
    header.set_intent("t test", (12,), name="task")
    header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"from the scanner"))
    return header


def load(path: str | Path) -> Any:
    """nibabel's image of a file; of FreeSurfer's through bytes, as nibabel leaves those open."""
    if not str(path).endswith((".mgh", ".mgz")):
        return nib.load(path)
    content = Path(path).read_bytes()
    return nib.MGHImage.from_bytes(gzip.decompress(content) if path.suffix == ".mgz" else content)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [*IMAGES, ".npy"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_written_reads_back_equal_in_value_and_type(tmp_path, extension, order):
    data = volume("i2", order=order)
    path = tmp_path / f"out{extension}"
    write_image(path, data, affine=AFFINE)
    back = np.load(path) if extension == ".npy" else np.asarray(load(path).dataobj)
    assert_array_equal(back, data)
    assert back.dtype.newbyteorder("=") == data.dtype


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        *((kind, kind) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "c8", "c16")),
        *(("?", "u1"), ("f2", "f4"), ("i8", "i4"), ("u8", "i4"), (">i2", "i2"), (">f8", "f8")),
    ],
)
def test_nifti_stores_the_results_own_type_unscaled(tmp_path, dtype, stored):
    data = volume(dtype)
    write_image(tmp_path / "out.nii", data, header=bold_header())
    image = load(tmp_path / "out.nii")
    assert image.get_data_dtype() == np.dtype(stored)
    assert (image.dataobj.slope, image.dataobj.inter) == (1.0, 0.0)
    assert np.asarray(image.dataobj).dtype == np.dtype(stored)
    assert_array_equal(np.asarray(image.dataobj), data)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        *((kind, kind) for kind in ("u1", "i2", "u2", "i4", "f4")),
        *(("?", "u1"), ("i1", "i2"), ("u4", "i4"), ("i8", "i4"), ("f2", "f4"), ("f8", "f4")),
    ],
)
def test_mgh_stores_the_nearest_type_that_it_has(tmp_path, dtype, stored):
    data = volume(dtype)
    write_image(tmp_path / "out.mgz", data)
    back = np.asarray(load(tmp_path / "out.mgz").dataobj)
    assert back.dtype.newbyteorder("=") == np.dtype(stored)
    assert_array_equal(back, data)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**62])
def test_64_bit_integers_that_do_not_fit_in_32_keep_64_bits(tmp_path, value):
    data = volume("i8")
    data[1, 2, 1] = value
    write_image(tmp_path / "out.nii.gz", data)
    image = load(tmp_path / "out.nii.gz")
    assert image.get_data_dtype() == np.int64
    assert_array_equal(np.asarray(image.dataobj), data)
    with pytest.raises(WriteError, match=r"can't hold int64 .*one of uint8, .*float32"):
        write_image(tmp_path / "out.mgh", data)


def test_long_doubles_are_stored_as_doubles_unless_they_do_not_fit(tmp_path):
    data = volume(np.longdouble) / 3
    write_image(tmp_path / "out.nii", data)
    assert_array_equal(np.asarray(load(tmp_path / "out.nii").dataobj), data.astype("f8"))
    if np.finfo(np.longdouble).max > np.finfo(np.float64).max:
        data[0, 0, 0] = np.finfo(np.longdouble).max
        with pytest.raises(WriteError, match=r"1 of 60 values .* range of float64"):
            write_image(tmp_path / "big.nii", data)


def test_colours_are_stored_as_rgb_and_refused_where_the_format_has_none(tmp_path):
    data = np.zeros((4, 3, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    data["G"] = volume("u1", (4, 3, 2))
    write_image(tmp_path / "out.nii.gz", data)
    assert_array_equal(np.asarray(load(tmp_path / "out.nii.gz").dataobj), data)
    with pytest.raises(WriteError, match="can't hold"):
        write_image(tmp_path / "out.mgz", data)


@pytest.mark.parametrize("extension", [".nii", ".mgz", ".npy"])
def test_an_explicit_integer_type_rounds_to_the_nearest(tmp_path, extension):
    data = np.array([[[-1.5, -0.6, 0.4, 2.5, 3.51, 32767.4]]], order="F")
    path = tmp_path / f"out{extension}"
    write_image(path, data, dtype="int16")
    back = np.load(path) if extension == ".npy" else np.asarray(load(path).dataobj)
    assert back.dtype.newbyteorder("=") == np.int16
    assert back.ravel().tolist() == [-2, -1, 0, 2, 4, 32767]


@pytest.mark.parametrize("source", ["f2", "f4", "f8", np.longdouble])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_limits_of_integer_types_are_exact_for_every_float_type(tmp_path, source, dtype):
    limits = np.iinfo(dtype)
    values = [limits.min, limits.max, float(limits.max) + 1, limits.min * 2.0 - 1, np.nan, np.inf]
    with np.errstate(over="ignore"):
        data = np.array(values).astype(source).reshape(-1, 1, 1)
    with np.errstate(invalid="ignore"):
        exact = [None if not np.isfinite(x) else int(np.rint(x)) for x in data.ravel()]
    bad = sum(x is None or not limits.min <= x <= limits.max for x in exact)
    with pytest.raises(WriteError, match=f"{bad} of 6 values are NaN or out of the range"):
        write_image(tmp_path / "out.nii", data, dtype=dtype)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "dtype", "bad"),
    [
        (volume("i4") + 200, "u1", 4),
        (volume("i8") - 1, "u4", 1),
        (np.full((2, 2), 2**63, np.uint64), "i8", 4),
        (np.full((2, 2), 1e39), "f4", 4),
        (np.array([[1e39 + 0j, 1, np.nan, np.inf]]), "c8", 1),
    ],
)
def test_a_conversion_never_wraps_but_counts_what_does_not_fit(tmp_path, data, dtype, bad):
    path = str(tmp_path / "out.nii")
    message = f"^{re.escape(path)}: {bad} of {data.size} values .*{np.dtype(dtype)}"
    with pytest.raises(WriteError, match=message):
        write_image(path, data, dtype=dtype)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data", "dtype", "message"),
    [
        ("o.nii", volume("c8"), "f4", r"imaginary part; write \.real"),
        ("o.nii", volume("f4"), bool, r"\(result > 0\)"),
        ("o.nii", volume("f4"), "f2", "no float16; give dtype= one of .*float32"),
        ("o.mgz", volume("f4"), "f8", "no float64; give dtype= one of .*float32"),
        ("o.npy", volume("f4"), [("R", "u1")], "can't be written as"),
        ("o.npy", np.array([None]), None, "Python objects"),
        ("o.nii", np.array(["a", "b"]), None, "can't hold"),
        ("o.nii", np.float64(3.5), None, r"is a number \(3.5\)"),
        ("o.nii", np.zeros((1,) * 8), None, r"8 dimensions.*at most 7.*\.npy"),
        ("o.mgz", np.zeros((1,) * 5, "f4"), None, "5 dimensions.*at most 4"),
        ("o.nii", np.zeros((3, 0, 2)), None, r"empty \(shape \(3, 0, 2\)\)"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_what_to_do(tmp_path, name, data, dtype, message):
    with pytest.raises(WriteError, match=message):
        write_image(tmp_path / name, data, dtype=dtype)
    assert names(tmp_path) == []


@pytest.mark.parametrize("dtype", ["?", "f2", "i8", ">i2", "c16", np.longdouble, "S3"])
@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (3, 0)])
def test_npy_keeps_every_type_shape_and_memory_order(tmp_path, dtype, shape):
    for order in "CF":
        data = volume(dtype, shape, order)
        path = tmp_path / f"{order}.npy"
        write_image(path, data)
        np.save(tmp_path / "numpy.npy", data)
        assert path.read_bytes() == (tmp_path / "numpy.npy").read_bytes()


arrays = npst.arrays(
    st.sampled_from([np.uint8, np.int16, np.float64]),
    npst.array_shapes(min_dims=1, max_dims=5, max_side=6),
)


@given(data=arrays, count=st.integers(1, 40), axes=st.randoms(), flip=st.booleans())
def test_blocks_are_the_array_in_fortran_order_and_no_larger_than_asked(data, count, axes, flip):
    order = list(range(data.ndim))
    axes.shuffle(order)
    data = data.transpose(order)
    data = data[::-1] if flip else data
    blocks = list(writing._fortran_blocks(data, count))
    assert max(block.size for block in blocks) <= count
    assert b"".join(block.tobytes() for block in blocks) == data.tobytes(order="F")


@pytest.mark.parametrize("make", ["C", "F", "reversed", "strided", "broadcast", "readonly"])
def test_any_layout_in_memory_gives_the_same_file(tmp_path, monkeypatch, make):
    monkeypatch.setattr(writing, "BLOCK_NBYTES", 64)
    plain = volume("f4", (6, 5, 4, 3))
    data = {
        "C": plain,
        "F": np.asfortranarray(plain),
        "reversed": plain[::-1, :, ::-1].copy()[::-1, :, ::-1],
        "strided": np.repeat(plain, 2, axis=1)[:, ::2],
        "broadcast": np.broadcast_to(plain[..., :1], plain.shape),
        "readonly": plain,
    }[make]
    if make == "readonly":
        data.flags.writeable = False
    write_image(tmp_path / "out.nii", data)
    assert (tmp_path / "out.nii").read_bytes()[352:] == data.tobytes(order="F")
    write_image(tmp_path / "one.nii", np.broadcast_to(np.float32(3), (1, 1, 1)))
    assert load(tmp_path / "one.nii").get_fdata() == 3


def test_gzip_files_are_reproducible_and_readable_by_zlib(tmp_path):
    data = volume("f8")
    write_image(tmp_path / "a.nii.gz", data)
    write_image(tmp_path / "b.nii.gz", data)
    write_image(tmp_path / "c.nii", data)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    flags_and_time = (tmp_path / "a.nii.gz").read_bytes()[3:8]
    assert flags_and_time == bytes(5)  # neither a name nor a time
    plain = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    assert plain == (tmp_path / "c.nii").read_bytes()


# -- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.nii.gz", "out.img"])
def test_orientation_codes_units_and_time_step_are_kept_and_the_rest_is_reset(tmp_path, name):
    template = bold_header()
    data = volume("f4", (5, 4, 3, 2))
    write_image(tmp_path / name, data, affine=template.get_best_affine(), header=template)
    image = load(tmp_path / name)
    header = image.header
    assert_array_equal(image.affine, template.get_best_affine())
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 1)
    assert_array_equal(header.get_qform(), template.get_qform())
    assert header.get_xyzt_units() == ("mm", "sec")
    assert header.get_zooms() == (2, 2, 2.5, 2.5)
    fresh = nib.Nifti1Header()
    for field in ("cal_min", "cal_max", "descrip", "aux_file", "db_name", "toffset"):
        assert header[field] == fresh[field]
    assert header.get_intent() == fresh.get_intent()
    assert list(header.extensions) == []


def test_a_3d_result_of_a_4d_file_has_no_time_step_left(tmp_path):
    template = bold_header()
    write_image(tmp_path / "o.nii", volume("f4"), affine=AFFINE, header=template)
    header = load(tmp_path / "o.nii").header
    assert header.get_xyzt_units() == ("mm", "unknown")
    assert header["pixdim"][4] == 1
    assert header.get_data_shape() == (5, 4, 3)


def test_a_4d_result_of_3d_files_invents_no_time_step(tmp_path):
    template = bold_header()
    template.set_data_shape((5, 4, 3))
    write_image(tmp_path / "o.nii", volume("f4", (5, 4, 3, 2)), affine=AFFINE, header=template)
    header = load(tmp_path / "o.nii").header
    assert header.get_zooms()[3] == 1
    assert header.get_xyzt_units() == ("mm", "unknown")


def test_a_new_affine_replaces_both_orientations_and_keeps_the_code(tmp_path):
    moved = AFFINE.copy()
    moved[:3, 3] += (4, 6, 10)
    write_image(tmp_path / "o.nii", volume(), affine=moved, header=bold_header())
    header = load(tmp_path / "o.nii").header
    assert_array_equal(header.get_sform(coded=True)[0], moved)
    np.testing.assert_allclose(header.get_qform(coded=True)[0], moved, atol=1e-5)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (4, 4)


def test_a_sheared_affine_goes_to_the_sform_alone(tmp_path):
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.8
    write_image(tmp_path / "o.nii", volume(), affine=sheared)
    image = load(tmp_path / "o.nii")
    np.testing.assert_allclose(image.affine, sheared, rtol=1e-6)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (2, 0)


def test_a_singular_affine_is_written_without_a_warning(tmp_path):
    flat = np.diag([2.0, 2.0, 0.0, 1.0])
    write_image(tmp_path / "o.nii", volume(), affine=flat)
    assert_array_equal(load(tmp_path / "o.nii").header.get_sform(), flat)


@pytest.mark.parametrize("header", [None, {"vendor": 1}, nib.gifti.GiftiMetaData()])
def test_without_a_nibabel_header_the_affine_is_written_in_millimetres(tmp_path, header):
    write_image(tmp_path / "o.nii", volume(), affine=AFFINE, header=header)
    image = load(tmp_path / "o.nii")
    assert_array_equal(image.affine, AFFINE)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_without_an_affine_no_orientation_is_claimed(tmp_path):
    sizes = nib.Nifti1Header()
    sizes.set_data_shape((5, 4, 3))
    sizes.set_zooms((1, 2, 3))
    for header, zooms in [(None, (1, 1, 1)), (sizes, (1, 2, 3)), (bold_header(), (1, 1, 1))]:
        write_image(tmp_path / "o.nii", volume(), header=header)
        written = load(tmp_path / "o.nii").header
        assert (int(written["sform_code"]), int(written["qform_code"])) == (0, 0)
        assert written.get_zooms() == zooms
    write_image(tmp_path / "o.mgz", volume())
    raw = gzip.decompress((tmp_path / "o.mgz").read_bytes())
    assert raw[28:30] == b"\0\0"  # FreeSurfer's "this has an orientation"


def test_a_big_endian_template_gives_the_same_file(tmp_path):
    data = volume("f4", (5, 4, 3, 2))
    write_image(tmp_path / "a.nii", data, affine=AFFINE, header=bold_header())
    swapped = bold_header().as_byteswapped()
    write_image(tmp_path / "b.nii", data, affine=AFFINE, header=swapped)
    assert (tmp_path / "a.nii").read_bytes() == (tmp_path / "b.nii").read_bytes()


def test_long_axes_are_written_as_nifti_2(tmp_path):
    data = volume("u1", (40000, 2, 1))
    write_image(tmp_path / "o.nii.gz", data, affine=AFFINE, header=bold_header())
    write_image(tmp_path / "p.img", data, affine=AFFINE, header=bold_header())
    for name, kind in [("o.nii.gz", nib.Nifti2Image), ("p.img", nib.Nifti2Pair)]:
        image = load(tmp_path / name)
        assert type(image) is kind
        assert_array_equal(np.asarray(image.dataobj), data)
        assert int(image.header["sform_code"]) == 4


@pytest.mark.parametrize("name", ["x.nii", "x.mgz"])
@pytest.mark.parametrize("unit", ["sec", "msec", "usec"])
def test_the_repetition_time_survives_a_change_of_format(tmp_path, name, unit):
    scale = {"sec": 1, "msec": 1e3, "usec": 1e6}[unit]
    template = bold_header()
    template.set_zooms((2, 2, 2.5, 2.5 * scale))
    template.set_xyzt_units("mm", unit)
    data = volume("f4", (5, 4, 3, 2))
    write_image(tmp_path / "a.mgh", data, affine=AFFINE, header=template)
    mgh = load(tmp_path / "a.mgh")
    assert mgh.header.get_zooms() == (2, 2, 2.5, 2500)
    write_image(tmp_path / name, data, affine=mgh.affine, header=mgh.header)
    back = load(tmp_path / name)
    seconds = back.header.get_zooms()[3] / (1000 if isinstance(back.header, MGHHeader) else 1)
    assert seconds == 2.5
    if name == "x.nii":
        assert back.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4, 3, 2)])
def test_a_mgh_file_is_the_one_that_nibabel_writes(tmp_path, shape):
    data = volume("f4", shape)
    write_image(tmp_path / "o.mgh", data, affine=AFFINE)
    assert (tmp_path / "o.mgh").read_bytes() == nib.MGHImage(data, AFFINE).to_bytes()


def test_a_mgh_of_a_nifti_lies_at_the_same_place(tmp_path):
    oblique = AFFINE.copy()
    angle = np.deg2rad(12)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])
    oblique[:2, :3] = (turn[:, :2] @ AFFINE[:2, :2]) @ np.eye(2, 3)
    write_image(tmp_path / "o.mgz", volume("f4"), affine=oblique, header=bold_header())
    np.testing.assert_allclose(load(tmp_path / "o.mgz").affine, oblique, atol=1e-4)


@pytest.mark.parametrize("kind", [nib.Spm99AnalyzeImage, nib.AnalyzeImage])
def test_an_analyze_header_gives_its_voxel_sizes(tmp_path, kind):
    image = kind(volume("i2"), None)
    image.header.set_zooms((2, 3, 4))
    write_image(tmp_path / "o.nii", volume("i2"), header=image.header)
    assert load(tmp_path / "o.nii").header.get_zooms() == (2, 3, 4)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 4, 3, 2)])
def test_results_of_other_dimensions_are_written(tmp_path, shape):
    data = volume("f4", shape)
    write_image(tmp_path / "o.nii", data, affine=AFFINE, header=bold_header())
    image = load(tmp_path / "o.nii")
    assert_array_equal(np.asarray(image.dataobj), data)
    assert_array_equal(image.affine, AFFINE)


# -- where it is written ------------------------------------------------------------------------


def test_both_files_of_a_pair_are_written_whichever_is_named(tmp_path):
    for name in ("a.img", "b.hdr", "C.IMG"):
        write_image(tmp_path / name, volume(), affine=AFFINE)
    assert names(tmp_path) == ["C.HDR", "C.IMG", "a.hdr", "a.img", "b.hdr", "b.img"]
    assert type(load(tmp_path / "a.hdr")) is nib.Nifti1Pair
    assert_array_equal(np.asarray(load(tmp_path / "b.img").dataobj), volume())


def test_the_header_of_a_pair_appears_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    write_image(tmp_path / "a.hdr", volume())
    write_image(tmp_path / "z.img", volume())
    assert moved == ["a.img", "a.hdr", "z.img", "z.hdr"]


def test_a_relative_path_and_a_path_object_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image("a.nii", volume())
    write_image(Path("b.NII.GZ"), volume())
    assert_array_equal(load("b.NII.GZ").get_fdata(), volume())
    assert names(tmp_path) == ["a.nii", "b.NII.GZ"]


def test_a_relative_path_stays_where_it_was_when_the_process_moves(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moving(path: str, *rest: Any) -> None:
        os.chdir("elsewhere")
        Path(path).write_text("written")

    write_image("o.txt", volume(), writer=moving)
    assert names(tmp_path) == ["elsewhere", "o.txt"]


@pytest.mark.parametrize("name", ["o.txt", "o", "o.nii.zip", "o.gz", ".nii.gz", "nii"])
def test_an_unknown_extension_lists_what_can_be_written(tmp_path, name):
    with pytest.raises(WriteError, match=r"\.nii\.gz, \.nii, \.img.* or \.npy"):
        check_output(tmp_path / name)
    with pytest.raises(WriteError):
        write_image(tmp_path / name, volume())
    assert names(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(WriteError, match=r"there is no folder .*missing; make it first"):
        write_image(tmp_path / "missing" / "o.nii", volume())


def test_a_directory_or_a_read_only_file_is_not_replaced(tmp_path):
    (tmp_path / "d.nii").mkdir()
    (tmp_path / "p.hdr").mkdir()
    protected = tmp_path / "r.nii"
    protected.write_bytes(b"keep")
    protected.chmod(0o444)
    (tmp_path / "link.nii").symlink_to(protected)
    for name, message in [
        ("d.nii", "d.nii is a directory"),
        ("p.img", "p.hdr is a directory"),
        ("r.nii", "read-only"),
        ("link.nii", "read-only"),
    ]:
        with pytest.raises(WriteError, match=message):
            write_image(tmp_path / name, volume())
    assert protected.read_bytes() == b"keep"


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path):
    (tmp_path / "real.nii").write_bytes(b"keep")
    (tmp_path / "link.nii").symlink_to("real.nii")
    (tmp_path / "dangling.nii").symlink_to("nowhere.nii")
    for name in ("link.nii", "dangling.nii"):
        write_image(tmp_path / name, volume())
        assert not (tmp_path / name).is_symlink()
        assert_array_equal(load(tmp_path / name).get_fdata(), volume())
    assert (tmp_path / "real.nii").read_bytes() == b"keep"
    assert names(tmp_path) == ["dangling.nii", "link.nii", "real.nii"]


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("in.nii", "in.nii"),
        ("sub/../in.nii", "in.nii"),
        ("symbolic.nii", "in.nii"),
        ("in.nii", "symbolic.nii"),
        ("hard.nii", "in.nii"),
        ("folder/in.nii", "in.nii"),
        ("pair.hdr", "pair.img"),
        ("pair.img", "pair.hdr"),
        ("pair.img", "pair.img"),
        ("pairlink.img", "pair.hdr"),
        ("datalink.img", "pair.hdr"),
        ("absent.nii", "sub/../absent.nii"),
    ],
)
def test_an_input_is_never_overwritten_under_any_name(tmp_path, output, source):
    (tmp_path / "sub").mkdir()
    for name in ("in.nii", "pair.img", "pair.hdr"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "symbolic.nii").symlink_to("in.nii")
    os.link(tmp_path / "in.nii", tmp_path / "hard.nii")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "pairlink.hdr").symlink_to("pair.hdr")
    (tmp_path / "datalink.img").symlink_to("pair.img")
    before = names(tmp_path)
    with pytest.raises(WriteError, match=r"is an input of this result .*use another name"):
        write_image(tmp_path / output, volume(), inputs=["other.nii", tmp_path / source])
    assert (tmp_path / "in.nii").read_bytes() == b"in.nii"
    assert names(tmp_path) == before


def test_a_neighbour_of_an_input_may_be_written(tmp_path):
    (tmp_path / "pair.img").write_bytes(b"x")
    (tmp_path / "pair.hdr").write_bytes(b"x")
    inputs = [tmp_path / "pair.img"]
    write_image(tmp_path / "pair.nii", volume(), inputs=inputs)
    write_image(tmp_path / "pair2.img", volume(), inputs=inputs)


@pytest.mark.parametrize("extension", [*IMAGES, ".npy"])
def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path, extension):
    umask = os.umask(0o027)
    try:
        write_image(tmp_path / f"o{extension}", volume())
    finally:
        os.umask(umask)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in names(tmp_path)} == {0o640}


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [*IMAGES, ".npy"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, extension, error
):
    path = tmp_path / f"o{extension}"
    write_image(path, volume())
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    seen = []

    def interrupted(array: Any, count: int) -> Any:
        yield array.reshape(-1, order="F")[:10]
        seen.extend(names(tmp_path))
        raise error

    monkeypatch.setattr(writing, "_fortran_blocks", interrupted)
    with pytest.raises(error):
        write_image(path, volume("f4"))
    assert any(name.startswith(".lazycache-") for name in seen)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def in_a_process(code: str, *arguments: object) -> str:
    root = os.path.dirname(os.path.dirname(writing.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the size of files are POSIX")
@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".img", ".mgz", ".npy"])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, extension):
    code = """
import resource, sys
import numpy as np
from lazycache.errors import WriteError
from lazycache.writing import write_image
data = np.random.default_rng(0).normal(size=(64, 64, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))  # as a quota that is used up
try:
    write_image(sys.argv[1], data, dtype="float32")
except WriteError as error:
    print(error)
"""
    message = in_a_process(code, tmp_path / f"o{extension}")
    assert f"o{extension}: can't be written" in message
    assert names(tmp_path) == []


def test_importing_it_leaves_nibabel_and_isal_for_the_first_writing():
    code = "import sys, lazycache.writing; print({'nibabel', 'isal'} & set(sys.modules))"
    assert in_a_process(code) == "set()\n"


PEAK = """
import sys
import numpy as np
import nibabel, isal.igzip, lazycache.nibabel_image
from lazycache.writing import write_image

def kib(field):
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(field)))

path, order, dtype = sys.argv[1:4]
data = np.empty((256, 256, 256), np.float32, order)
data[...] = np.random.default_rng(0).integers(0, 60, (256, 256, 1))
write_image(path, data[:8, :8, :8], dtype=dtype or None)  # what is made once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is the present again
before = kib("VmRSS")
write_image(path, data, dtype=dtype or None)
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is Linux's")
@pytest.mark.parametrize(
    ("name", "order", "dtype"),
    [
        ("o.nii.gz", "C", ""),
        ("o.nii.gz", "F", ""),
        ("o.nii.gz", "C", "int16"),
        ("o.npy", "C", "int16"),
    ],
)
def test_writing_64_mib_takes_a_few_mib_more_in_either_memory_order(tmp_path, name, order, dtype):
    grown = int(in_a_process(PEAK, tmp_path / name, order, dtype))
    assert grown < 8 << 10


# -- writers of other formats -------------------------------------------------------------------


def write_text(path: str, data: Any, affine: Any, header: Any) -> None:
    """A format in two files: the shape beside the values."""
    Path(path + ".shape").write_text(repr(data.shape))
    Path(path).write_text(f"{header} {data.dtype} {data.ravel(order='F').tolist()}")


def test_a_readers_own_format_is_written_with_all_of_its_files(tmp_path):
    path = tmp_path / "o.txt"
    write_image(path, volume("f4", (2, 2)), header="h", writer=write_text)
    assert path.read_text() == "h float32 [0.0, 2.0, 1.0, 3.0]"
    assert names(tmp_path) == ["o.txt", "o.txt.shape"]
    write_image(path, volume("f4", (2, 2)) + 0.6, dtype="i2", writer=write_text)
    assert path.read_text() == "None int16 [1, 3, 2, 4]"
    with pytest.raises(WriteError, match="1 of 4 values"):
        write_image(path, np.array([1, 2, 3, np.nan]), dtype="i2", writer=write_text)
    assert path.read_text() == "None int16 [1, 3, 2, 4]"


@pytest.mark.parametrize("error", [OSError("the tape is full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing(tmp_path, error):
    def failing(path: str, *rest: Any) -> None:
        write_text(path, *rest)
        raise error

    wanted = WriteError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="the tape is full" if wanted is WriteError else None):
        write_image(tmp_path / "o.txt", volume(), writer=failing)
    assert names(tmp_path) == []


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(WriteError, match="wrote no file"):
        write_image(tmp_path / "o.txt", volume(), writer=lambda *_: None)
    assert names(tmp_path) == []
