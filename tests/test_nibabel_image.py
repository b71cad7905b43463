from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
from nibabel.funcs import as_closest_canonical, concat_images, four_to_three
from numpy.testing import assert_array_equal

from lazycache.nibabel_image import SourceData, as_nibabel, nifti_header, stored_dtype

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])


class Source:
    """Data that are loaded when asked for, read-only, with a list of what was loaded."""

    def __init__(self, data: Any) -> None:
        self._data = data.copy(order="K")
        self._data.flags.writeable = False
        self.shape, self.dtype = data.shape, data.dtype
        self.loads: list[Any] = []

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self.loads.append("all")
        return self._data if dtype is None else self._data.astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        self.loads.append(index)
        return self._data[index]


def run(dtype: Any = "i2", shape: tuple[int, ...] = (5, 4, 3, 6)) -> Any:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def test_nothing_is_loaded_until_voxels_are_asked_for():
    source = Source(run())
    image = as_nibabel(source, AFFINE)
    assert isinstance(image, nib.Nifti1Image)
    assert (image.shape, image.ndim) == ((5, 4, 3, 6), 4)
    assert image.get_data_dtype() == image.dataobj.dtype == np.int16
    assert_array_equal(image.affine, AFFINE)
    str(image), repr(image), image.header.get_zooms(), copy.copy(image), copy.deepcopy(image)
    assert not image.in_memory
    assert nib.is_proxy(image.dataobj)
    assert source.loads == []
    assert_array_equal(image.get_fdata(), run())
    assert source.loads == ["all"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda image: np.asarray(image.dataobj),
        lambda image: np.array(image.dataobj, copy=True),
        lambda image: np.asanyarray(image.dataobj, dtype="i2"),
        lambda image: np.asarray(image.dataobj, dtype="f8"),
        lambda image: image.get_fdata(),
        lambda image: image.get_fdata(dtype=np.float32),
        lambda image: image.dataobj[1:3],
        lambda image: image.slicer[1:3].get_fdata(),
    ],
)
def test_what_is_handed_out_may_be_written_to_and_changes_nothing_else(ask):
    image = as_nibabel(Source(run()), AFFINE)
    first = ask(image)
    wanted = first.copy()
    first[...] = -1
    assert_array_equal(ask(image), wanted)


def test_a_view_is_refused_as_there_is_none():
    with pytest.raises(ValueError, match="always a copy"):
        np.array(as_nibabel(Source(run()), AFFINE).dataobj, copy=False)


@pytest.mark.parametrize("caching", ["fill", "unchanged"])
def test_no_copy_stays_hidden_in_the_image(caching):
    source = Source(run())
    image = as_nibabel(source, AFFINE)
    owner = weakref.ref(image.get_fdata(caching=caching))
    assert owner() is None
    assert not image.in_memory
    image.get_fdata(caching=caching)
    assert source.loads == ["all", "all"]


def test_images_made_of_it_over_plain_arrays_cache_as_nibabels_do():
    image = as_nibabel(Source(run()), AFFINE)
    made = image.__class__(run("f4"), AFFINE, image.header)
    assert made.get_fdata() is made.get_fdata()
    assert_array_equal(made.get_fdata(), run())


def test_the_image_dies_without_the_collector_and_lets_its_source_go():
    source = Source(run())
    image = as_nibabel(source, AFFINE)
    image.get_fdata()
    watched, data = weakref.ref(image), weakref.ref(source)
    gc.disable()
    try:
        del image, source
        assert watched() is None
        assert data() is None
    finally:
        gc.enable()


def test_a_slice_loads_its_part_alone():
    source = Source(run())
    image = as_nibabel(source, AFFINE)
    assert_array_equal(image.dataobj[..., 2], run()[..., 2])
    part = image.slicer[1:3, :, :, 4]
    assert "all" not in source.loads
    assert_array_equal(part.get_fdata(), run()[1:3, :, :, 4])
    assert_array_equal(part.affine @ [0, 0, 0, 1], AFFINE @ [1, 0, 0, 1])


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [
        *(("?", "u1"), ("f2", "f4"), ("i8", "i8"), ("u8", "u8"), (">i2", "i2"), ("i1", "i1")),
        *(("c8", "c8"), (np.longdouble, stored_dtype(np.longdouble))),
    ],
)
def test_types_that_nifti_lacks_are_shown_as_they_would_be_saved(tmp_path, dtype, shown):
    data = run(dtype, (5, 4, 3))
    image = as_nibabel(Source(data), AFFINE)
    back = np.asarray(image.dataobj)
    assert back.dtype == image.dataobj.dtype == image.get_data_dtype() == np.dtype(shown)
    assert image.dataobj[0].dtype == back.dtype
    assert_array_equal(back, data)
    nib.save(image, tmp_path / "saved.nii")
    saved = nib.load(tmp_path / "saved.nii")
    assert saved.get_data_dtype() == np.dtype(shown)
    assert_array_equal(np.asarray(saved.dataobj), data)


def test_colours_are_shown_as_they_are():
    data = np.zeros((4, 3, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = as_nibabel(Source(data), AFFINE)
    assert np.asarray(image.dataobj).dtype == data.dtype


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.array(["a"]), TypeError, "no NIfTI image holds <U1"),
        (np.array(1.0), ValueError, "1 to 7 dimensions, not 0"),
        (np.zeros((1,) * 8), ValueError, "1 to 7 dimensions, not 8"),
    ],
)
def test_what_is_no_image_is_refused_before_anything_is_loaded(data, error, message):
    source = Source(data)
    with pytest.raises(error, match=message):
        as_nibabel(source, None)
    assert source.loads == []


def test_codes_units_and_time_step_come_from_the_header_given():
    template = nib.Nifti1Header()
    template.set_data_shape((5, 4, 3, 9))
    template.set_sform(AFFINE, "mni")
    template.set_zooms((2, 2, 2.5, 0.72))
    template.set_xyzt_units("mm", "sec")
    template.set_slope_inter(2, 1)
    template["cal_max"] = 7
    header = as_nibabel(Source(run()), template.get_best_affine(), template).header
    assert header.get_sform(coded=True)[1] == 4
    assert header.get_zooms()[3] == np.float32(0.72)
    assert header.get_xyzt_units() == ("mm", "sec")
    assert header["cal_max"] == 0
    assert header.get_data_shape() == (5, 4, 3, 6)


@pytest.mark.parametrize("kind", [nib.MGHImage, nib.Nifti2Image, nib.Spm99AnalyzeImage])
def test_headers_of_other_formats_give_an_image_at_the_same_place(kind):
    other = kind(run("f4"), AFFINE)
    image = as_nibabel(Source(run("f4")), other.affine, other.header)
    assert type(image.header) is nib.Nifti1Header
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.header.get_best_affine(), AFFINE, atol=1e-5)


def test_without_an_affine_it_is_the_identity():
    image = as_nibabel(Source(run()), None)
    assert_array_equal(image.affine, np.eye(4))


@pytest.mark.parametrize("name", ["o.nii", "o.nii.gz", "o.img", "o.mgz"])
def test_nibabel_saves_it(tmp_path, name):
    image = as_nibabel(Source(run()), AFFINE)
    nib.save(image, tmp_path / name)
    if name.endswith(".mgz"):
        return  # nibabel leaves such files open when it reads them
    saved = nib.load(tmp_path / name)
    assert_array_equal(np.asarray(saved.dataobj), run())
    assert_array_equal(saved.affine, AFFINE)


def test_functions_of_nibabel_take_it():
    data = run(shape=(5, 4, 3))
    image = as_nibabel(Source(data), AFFINE)
    assert_array_equal(concat_images([image, image]).get_fdata(), np.stack([data, data], -1))
    assert_array_equal(as_closest_canonical(image).get_fdata(), data[::-1])
    volumes = four_to_three(as_nibabel(Source(run()), AFFINE))
    assert_array_equal(volumes[5].get_fdata(), run()[..., 5])
    assert_array_equal(nib.Nifti1Image.from_bytes(image.to_bytes()).get_fdata(), data)
    assert_array_equal(nib.Nifti1Image.from_image(image).get_fdata(), data)
    double = np.diag([4.0, 4.0, 5.0, 1.0])
    four = as_nibabel(Source(run()), AFFINE)
    resampled = nibabel.processing.resample_from_to(four, ((3, 2, 2, 6), double), order=0)
    wanted = nibabel.processing.resample_from_to(
        nib.Nifti1Image(run(), AFFINE), ((3, 2, 2, 6), double), order=0
    )
    assert_array_equal(resampled.get_fdata(), wanted.get_fdata())


def test_a_copy_shares_the_source_and_a_pickle_carries_it():
    source = Source(run())
    image = as_nibabel(source, AFFINE)
    twin = copy.deepcopy(image)
    assert twin.dataobj is image.dataobj
    twin.header["descrip"] = b"mine"
    assert image.header["descrip"] == b""
    restored = pickle.loads(pickle.dumps(image))
    assert isinstance(restored.dataobj, SourceData)
    assert source.loads == []
    assert_array_equal(restored.get_fdata(), run())


def test_a_header_of_a_result_shares_nothing_with_its_template():
    template = nib.Nifti1Header()
    template.set_data_shape((5, 4, 3))
    template.set_sform(AFFINE, 1)
    before = template.copy()
    header = nifti_header((5, 4, 3), np.dtype("f4"), AFFINE, template)
    header.set_sform(np.eye(4), 2)
    header["pixdim"][1] = 9
    assert template == before
