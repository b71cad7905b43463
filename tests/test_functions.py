"""Functions over lists: the bytes of NumPy's function of the stack, without the stack."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycache import functions as lc
from lazycache.cache import DataCache
from lazycache.errors import GridMismatchError, GridMismatchWarning, ShapeMismatchError
from lazycache.proxy import LazyReadData

OVER_LISTS = {
    "mean": lc.mean, "sum": lc.sum, "min": lc.min, "max": lc.max, "count_nonzero": lc.count,
    "nanmean": lc.nanmean, "nansum": lc.nansum, "nanmin": lc.nanmin, "nanmax": lc.nanmax,
    "median": lc.median, "var": lc.var, "std": lc.std, "nanvar": lc.nanvar, "nanstd": lc.nanstd,
}  # fmt: skip

DTYPES = ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "F", "D"]
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf]


def volume(rng, shape, dtype, order, special):
    if np.dtype(dtype).kind in "fc":
        values = rng.normal(size=shape) * 100
        if np.dtype(dtype).kind == "c":
            values = values + 1j * rng.normal(size=shape)
        chosen = rng.random(shape) < special
        values = np.where(chosen, rng.choice(SPECIAL, size=shape), values)
    else:
        values = rng.integers(0, 2 if dtype == "?" else 127, size=shape)
    array = np.asarray(values).astype(dtype)
    if order == "P":
        return np.moveaxis(array, 0, -1).copy() if array.ndim else array
    return np.asarray(array, order=order)


@st.composite
def volumes(draw, dtypes=DTYPES):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=4)))
    kinds = draw(st.lists(st.sampled_from(dtypes), min_size=1, max_size=2))
    orders = draw(st.sampled_from([["C"], ["F"], ["P"], ["C", "F"], ["F", "C"]]))
    if "P" in orders and len(set(shape)) > 1:
        orders = ["F"]
    count = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    special = draw(st.sampled_from([0, 0, 0.5]))
    return [
        volume(rng, shape, kinds[i % len(kinds)], orders[i % len(orders)], special)
        for i in range(count)
    ]


def outcome(make, any_nan=False):
    """What a computation gives: its value with all that must be equal, and its warnings.

    With ``any_nan`` the sign of a NaN doesn't count.
    """
    with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        try:
            value = make()
        except Exception as error:
            return type(error)
    told = sorted({str(w.message) for w in caught if w.category is RuntimeWarning})
    array = np.asarray(value)
    if any_nan:
        array = np.where(np.isnan(array), np.nan, array)
    wide = [step for step, size in zip(array.strides, array.shape, strict=True) if size > 1]
    return type(value), array.dtype, array.shape, wide, array.tobytes(), told


@pytest.mark.parametrize("name", OVER_LISTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_function_over_a_list_equals_numpy_of_the_stack_to_the_byte(name, data):
    arrays = data.draw(volumes())
    kwargs = {}
    if name.endswith(("var", "std")):
        kwargs["ddof"] = data.draw(st.integers(0, 2))
    if name == "median" and arrays[0].dtype.kind == "c":
        return
    cache = DataCache("1GiB")
    proxies = [LazyReadData(array, cache=cache) for array in arrays]
    # Which of two NaN an addition gives is up to the loop, and that of the real parts of complex
    # numbers is another one where they lie in one block.
    loose = any(array.dtype.kind == "c" for array in arrays)
    expected = outcome(lambda: getattr(np, name)(np.stack(arrays), axis=0, **kwargs), loose)
    assert outcome(lambda: OVER_LISTS[name](proxies, **kwargs).data, loose) == expected


@pytest.mark.parametrize("dtype", ["h", "e", "f"])
@pytest.mark.parametrize("name", ["mean", "sum", "std"])
def test_many_operands_of_few_voxels_are_added_in_operand_order(name, dtype):
    rng = np.random.default_rng(3)
    cache = DataCache("1GiB")
    for shape in [(2,), (3, 1), (1, 5), (9,), (1,)]:
        arrays = [(rng.normal(size=shape) * 90).astype(dtype) for _ in range(400)]
        proxies = [LazyReadData(array, cache=cache) for array in arrays]
        expected = outcome(lambda a=arrays: getattr(np, name)(np.stack(a), axis=0))
        assert outcome(lambda p=proxies: OVER_LISTS[name](p).data) == expected


def test_large_volumes_equal_numpy_too():
    rng = np.random.default_rng(5)
    arrays = [np.asfortranarray((rng.random((70, 80, 90)) * 900).astype("i2")) for _ in range(4)]
    cache = DataCache("1GiB")
    proxies = [LazyReadData(array, cache=cache) for array in arrays]
    for name in ("mean", "std", "max", "nanmean"):
        expected = outcome(lambda n=name: getattr(np, n)(np.stack(arrays), axis=0))
        assert outcome(lambda n=name: OVER_LISTS[n](proxies).data) == expected


def test_percentiles_over_a_list_and_over_an_axis():
    rng = np.random.default_rng(1)
    arrays = [rng.random((3, 4)) for _ in range(5)]
    cache = DataCache("1GiB")
    proxies = [LazyReadData(array, cache=cache) for array in arrays]
    for q in (25, [10, 90]):
        expected = np.percentile(np.stack(arrays), q, axis=0)
        assert lc.percentile(proxies, q).data.tobytes() == expected.tobytes()
        one = lc.percentile(proxies[0], q, axis=1)
        assert one.shape == np.percentile(arrays[0], q, axis=1).shape
        assert one.data.tobytes() == np.percentile(arrays[0], q, axis=1).tobytes()


@pytest.mark.parametrize("name", OVER_LISTS)
def test_over_one_proxy_a_function_works_along_axis(name):
    array = np.asfortranarray(np.random.default_rng(2).random((3, 4, 5)))
    proxy = LazyReadData(array, cache=DataCache("1GiB"))
    for axis in (None, 0, -1, (0, 2)):
        found = OVER_LISTS[name](proxy, axis=axis)
        expected = getattr(np, name)(array, axis=axis)
        assert found.shape == expected.shape
        assert outcome(lambda f=found: f.data) == outcome(lambda e=expected: e)


def test_generators_scalars_and_plain_arrays_are_accepted():
    cache = DataCache("1GiB")
    arrays = [np.full((2, 2), float(i)) for i in range(3)]
    assert np.array_equal(lc.mean(LazyReadData(a, cache=cache) for a in arrays).data, arrays[1])
    mixed = lc.sum([LazyReadData(arrays[2], cache=cache), arrays[1]])
    assert np.array_equal(mixed.data, arrays[2] + 1)
    scalars = lc.mean([LazyReadData(2.0, cache=cache), 4.0]).data
    assert scalars == 3.0
    assert isinstance(scalars, np.float64)


def test_an_empty_list_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="mean of an empty list"):
        lc.mean([])


def test_an_axis_of_a_list_is_an_error_that_says_what_to_write():
    with pytest.raises(ValueError, match="give one proxy"):
        lc.mean([LazyReadData(np.ones(3))], axis=1)


def test_other_shapes_are_one_error_that_names_the_files(tmp_path):
    files = []
    for i, shape in enumerate([(3, 4), (3, 4), (2, 2), (3, 4), (5,)]):
        np.save(tmp_path / f"{i}.npy", np.ones(shape))
        files.append(tmp_path / f"{i}.npy")
    cache = DataCache("1GiB")
    with pytest.raises(ShapeMismatchError) as caught:
        lc.mean([LazyReadData(f, cache=cache) for f in files]).data
    text = str(caught.value)
    assert "2.npy has (2, 2)" in text
    assert "4.npy has (5,)" in text
    assert "1.npy" not in text
    assert cache.stats().loads == 0


def nifti(path, shift=0.0):
    nibabel = pytest.importorskip("nibabel")
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), "f4"), affine), path)
    return path


def test_images_on_different_grids_are_an_error_unless_asked_otherwise(tmp_path):
    files = [nifti(tmp_path / f"{i}.nii", shift=i // 2) for i in range(3)]
    cache = DataCache("1GiB")
    proxies = [LazyReadData(f, cache=cache) for f in files]
    with pytest.raises(GridMismatchError, match=r"2\.nii.*1 mm"):
        lc.mean(proxies).data
    with pytest.warns(GridMismatchWarning, match=r"2\.nii"):
        lc.mean(proxies, grid="warn").data
    assert lc.mean(proxies, grid="ignore").data.shape == (3, 4, 5)
    assert lc.mean(LazyReadData(f, cache=cache, grid="ignore") for f in files).data.max() == 1


def test_the_affine_of_a_mean_is_that_of_its_images(tmp_path):
    files = [nifti(tmp_path / f"{i}.nii", shift=7) for i in range(2)]
    mean = lc.mean(LazyReadData(f, cache=DataCache("1GiB")) for f in files)
    assert mean.affine[0, 3] == 7
    assert mean.header["pixdim"][1] == 2


@pytest.mark.parametrize("name", ["abs", "sqrt", "exp", "log", "log10", "isnan", "sign", "floor"])
def test_elementwise_functions_are_expressions(name):
    array = np.array([0.5, 2.0, 3.0])
    found = getattr(lc, name)(LazyReadData(array, cache=DataCache("1GiB")))
    assert isinstance(found, LazyReadData)
    assert found.data.tobytes() == getattr(np, name)(array).tobytes()


def test_where_and_clip_are_expressions():
    array = np.arange(6.0).reshape(2, 3)
    proxy = LazyReadData(array, cache=DataCache("1GiB"))
    chosen = lc.where(proxy > 2, proxy, 0)
    assert isinstance(chosen, LazyReadData)
    assert np.array_equal(chosen.data, np.where(array > 2, array, 0))
    assert np.array_equal(lc.clip(proxy, 1, 4).data, array.clip(1, 4))
    assert np.array_equal(lc.round(proxy / 3, 1).data, (array / 3).round(1))


def test_paths_are_taken_for_proxies(tmp_path):
    for value in (1, 3):
        np.save(tmp_path / f"{value}.npy", np.full(4, value))
    assert lc.mean(sorted(tmp_path.glob("*.npy"))).data.tolist() == [2.0] * 4
