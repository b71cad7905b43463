"""Images over a source in nilearn, as a user passes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pytest

from lazycache.nibabel_image import as_nibabel

mpl.use("Agg")

from nilearn import image as nimage
from nilearn.maskers import NiftiMasker
from nilearn.plotting import plot_anat

AFFINE = np.array([[-8.0, 0, 0, 80], [0, 8, 0, -80], [0, 0, 8, -60], [0, 0, 0, 1]])


class Source:
    """Read-only data that count how often they are loaded; copying them is an error."""

    def __init__(self, data: Any) -> None:
        self._data = data
        data.flags.writeable = False
        self.shape, self.dtype = data.shape, data.dtype
        self.loads = 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self.loads += 1
        return self._data

    def __getitem__(self, index: Any) -> Any:
        self.loads += 1
        return self._data[index]

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the data were copied behind the cache")


def head(dtype: Any = "f4") -> Any:
    """A bright box in noise, a size that a plot can show."""
    data = np.random.default_rng(0).normal(100, 10, size=(20, 22, 18))
    data[5:15, 6:16, 5:13] += 400
    return data.astype(dtype)


def bold() -> Any:
    return np.stack([head() * (1 + 0.01 * t) for t in range(4)], axis=-1)


def lazy(data: Any, affine: Any = AFFINE) -> tuple[Any, Source]:
    source = Source(data)
    return as_nibabel(source, affine), source


def eager(data: Any, affine: Any = AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(data, affine)


OPERATIONS = {
    "mean_img": lambda img: nimage.mean_img([img, img], copy_header=True),
    "smooth_img": lambda img: nimage.smooth_img(img, 10),
    "threshold_img": lambda img: nimage.threshold_img(img, 200, copy_header=True),
    "crop_img": lambda img: nimage.crop_img(img, copy_header=True),
    "math_img": lambda img: nimage.math_img("img * 2", img=img),
    "resample_to_img": lambda img: nimage.resample_to_img(
        img, eager(np.zeros((10, 10, 10), "u1"), np.diag([16.0, 16, 16, 1])), force_resample=True
    ),
}


# nilearn says so of any int16 image, before SciPy interpolates it.
@pytest.mark.filterwarnings("ignore:Casting data from int16 to float32:UserWarning")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", ["f4", "i2", "u1"])
def test_nilearn_gives_what_it_gives_for_a_plain_image(name, dtype):
    image, source = lazy(head(dtype))
    result = OPERATIONS[name](image)
    wanted = OPERATIONS[name](eager(head(dtype)))
    np.testing.assert_array_equal(result.get_fdata(), wanted.get_fdata())
    np.testing.assert_array_equal(result.affine, wanted.affine)
    assert source.loads
    assert not image.in_memory


def test_the_mean_of_a_run_takes_it(tmp_path):
    image, _ = lazy(bold())
    result = nimage.mean_img(image, copy_header=True)
    np.testing.assert_array_equal(
        result.get_fdata(), nimage.mean_img(eager(bold()), copy_header=True).get_fdata()
    )
    result.to_filename(tmp_path / "mean.nii.gz")
    assert nib.load(tmp_path / "mean.nii.gz").shape == (20, 22, 18)


# nilearn says so of any int64 image, as it makes its own copy of a mask.
@pytest.mark.filterwarnings("ignore:Data array used to create a new image contains 64-bit")
@pytest.mark.parametrize("dtype", ["?", "u1", "i8"])
def test_a_lazy_mask_and_a_lazy_run_go_through_a_masker(dtype):
    mask = head() > 300
    image, source = lazy(bold())
    masker = NiftiMasker(mask_img=lazy(mask.astype(dtype))[0], standardize=None)
    series = masker.fit_transform(image)
    np.testing.assert_array_equal(series, bold()[mask].T)
    assert masker.inverse_transform(series).shape == image.shape
    assert source.loads
    assert not image.in_memory


def test_a_masker_that_finds_its_own_mask_takes_it():
    image, _ = lazy(bold())
    plain = NiftiMasker(standardize=None).fit_transform(eager(bold()))
    np.testing.assert_array_equal(NiftiMasker(standardize=None).fit_transform(image), plain)


def test_non_finite_voxels_are_cleaned_in_a_copy():
    data = head()
    data[0, 0, 0] = np.nan
    image, _ = lazy(data)
    assert np.isfinite(nimage.smooth_img(image, 10).get_fdata()).all()
    assert np.isnan(image.get_fdata()[0, 0, 0])


def test_an_anatomy_is_plotted(tmp_path):
    image, source = lazy(head())
    plot_anat(image, output_file=tmp_path / "anat.png", cut_coords=(0, 0, 0))
    assert (tmp_path / "anat.png").read_bytes().startswith(b"\x89PNG")
    assert source.loads
    assert not image.in_memory


def test_nilearn_leaves_the_source_uncopied():
    image, source = lazy(head())
    assert copy.deepcopy(image).dataobj is image.dataobj
    nimage.smooth_img(image, 10)
    assert source.loads == 1


def test_a_result_over_a_lazy_reference_is_a_plain_image(tmp_path: Path):
    image, source = lazy(head("i2"))
    made = nimage.new_img_like(image, head(), copy_header=True)
    assert source.loads == 0
    assert made.in_memory
    np.testing.assert_array_equal(made.get_fdata(), head())
