"""The proxy: how it is made, what it tells without loading, and what happens to its data."""

from __future__ import annotations

import copy
import gc
import os
import pathlib
import pickle
import threading
import weakref

import numpy as np
import pytest

from lazycache import _buffers
from lazycache.cache import DataCache, get_cache
from lazycache.errors import FileChangedWarning, UnknownFormatError, WriteError
from lazycache.proxy import LazyReadData

nibabel = pytest.importorskip("nibabel")

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])


@pytest.fixture
def cache():
    cache = DataCache("1GiB")
    yield cache
    cache.check()


@pytest.fixture
def array():
    return np.asfortranarray(np.arange(60.0, dtype="f4").reshape(3, 4, 5))


@pytest.fixture
def file(tmp_path, array):
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), tmp_path / "t1.nii.gz")
    return tmp_path / "t1.nii.gz"


@pytest.fixture
def proxy(file, cache):
    return LazyReadData(file, cache=cache)


class TestMaking:
    def test_nothing_is_read(self, cache, tmp_path):
        LazyReadData(tmp_path / "no such file.nii", cache=cache)
        assert cache.stats().misses == 0

    def test_paths_images_and_proxies_of_a_file_share_one_load(self, file, cache, array):
        sources = [str(file), file, pathlib.Path(file), nibabel.load(file), LazyReadData(file)]
        for source in sources:
            assert np.array_equal(LazyReadData(source, cache=cache).data, array)
        assert cache.stats().loads == 1

    def test_a_path_is_made_absolute_at_once(self, file, cache, monkeypatch, array):
        monkeypatch.chdir(file.parent)
        proxy = LazyReadData(file.name, cache=cache)
        monkeypatch.chdir("/")
        assert proxy.filename == str(file)
        assert np.array_equal(proxy.data, array)

    def test_an_image_whose_data_were_replaced_is_data_in_memory(self, file, cache):
        image = nibabel.load(file)
        other = nibabel.Nifti1Image(np.zeros((2, 2, 2)), image.affine)
        proxy = LazyReadData(other, cache=cache)
        assert proxy.data.shape == (2, 2, 2)
        assert np.array_equal(proxy.affine, AFFINE)

    def test_an_object_keeps_its_filename(self, cache):
        thing = object()
        proxy = LazyReadData(thing, filename="x.thing", cache=cache)
        assert proxy.data is thing
        assert proxy.filename == "x.thing"

    def test_an_array_is_not_seen_to_change(self, cache):
        mine = np.ones(3)
        proxy = LazyReadData(mine, cache=cache)
        mine[:] = 7
        assert np.array_equal(proxy.data, [1, 1, 1])

    def test_dtype_converts_while_loading(self, file, cache, array):
        proxy = LazyReadData(file, cache=cache, dtype="i2")
        assert proxy.dtype == "i2"
        assert proxy.data.tobytes() == array.astype("i2").tobytes()

    def test_options_go_to_the_reader(self, tmp_path, cache):
        seen = []

        def read(path, **options):
            seen.append(options)
            return np.zeros(2)

        (tmp_path / "f.x").write_text("x")
        LazyReadData(tmp_path / "f.x", None, {"frame": 3}, reader=read, cache=cache, border=2).data
        assert seen == [{"frame": 3, "border": 2}]

    def test_a_reader_object_of_the_original_kind_works(self, tmp_path, cache):
        class Reader:
            def read(self, filename, **kwargs):
                return np.full(2, len(kwargs))

        (tmp_path / "f.x").write_text("x")
        proxy = LazyReadData(tmp_path / "f.x", reader=Reader(), cache=cache)
        assert np.array_equal(proxy.get_data(), [0, 0])

    def test_a_wrong_grid_mode_is_an_error_at_once(self):
        with pytest.raises(ValueError, match='"ignore"'):
            LazyReadData("a.nii", grid="no")


class TestTelling:
    def test_headers_tell_shape_dtype_and_space_without_a_load(self, proxy, cache):
        assert (proxy.shape, proxy.dtype, proxy.ndim, proxy.size) == ((3, 4, 5), "f4", 3, 60)
        assert proxy.nbytes == 240
        assert np.array_equal(proxy.affine, AFFINE)
        assert proxy.header.get_zooms() == (2, 3, 4)
        assert len(proxy) == 3
        expression = (proxy + 1.5)[..., 1:]
        assert (expression.shape, expression.dtype) == ((3, 4, 4), "f4")
        assert cache.stats().loads == 0

    def test_repr_never_loads_nor_looks(self, proxy, tmp_path, cache):
        missing = LazyReadData(tmp_path / "missing.nii", cache=cache)
        for shown in (missing, missing + 1, missing[0:2], proxy):
            assert "LazyReadData" in repr(shown)
            assert "LazyReadData" in shown._repr_html_()
            assert str(shown) == repr(shown) == f"{shown}"
        assert "missing.nii" in repr(missing)
        assert "not loaded" in repr(proxy)
        proxy.data
        assert ", loaded" in repr(proxy)
        assert "&lt;" in proxy._repr_html_()

    def test_underscore_names_never_load(self, proxy, cache):
        for name in ("__array_interface__", "_ipython_display_", "__deepcopy_me__", "_x"):
            assert not hasattr(proxy, name)
        assert cache.stats().loads == 0

    def test_other_names_are_those_of_the_data(self, proxy, array):
        assert proxy.strides == array.strides
        assert proxy.flat[7] == array.flat[7]
        with pytest.raises(AttributeError, match="no_such_name"):
            proxy.no_such_name

    def test_loaded_preloading_and_not_started(self, proxy):
        assert (proxy.loaded(), proxy.preloading(), proxy.not_started()) == (False, False, True)
        proxy.data
        assert (proxy.loaded(), proxy.preloading(), proxy.not_started()) == (True, True, False)
        total = proxy + 1
        assert total.not_started()
        total.data
        assert total.loaded()

    def test_preloading_is_true_while_a_load_is_under_way(self, tmp_path, cache):
        reading, go_on = threading.Event(), threading.Event()

        def read(path):
            reading.set()
            assert go_on.wait(10)
            return np.zeros(2)

        (tmp_path / "f.x").write_text("x")
        proxy = LazyReadData(tmp_path / "f.x", reader=read, cache=cache)
        thread = threading.Thread(target=proxy.get_data)
        thread.start()
        assert reading.wait(10)
        assert (proxy.preloading(), proxy.loaded()) == (True, False)
        go_on.set()
        thread.join(10)
        assert proxy.loaded()

    def test_numbers(self, cache):
        three = LazyReadData(np.float32(3), cache=cache)
        assert (int(three), float(three + 0.5), complex(three), round(three)) == (3, 3.5, 3, 3)
        assert bool(three)
        assert f"{three / 2:.2f}" == "1.50"
        assert [0, 1, 2, 3][LazyReadData(np.int16(2), cache=cache)] == 2
        with pytest.raises(ValueError, match="ambiguous"):
            bool(LazyReadData(np.ones(2), cache=cache))

    def test_hash_is_identity_and_equality_elementwise(self, proxy, file, array):
        other = LazyReadData(file)
        assert len({proxy, other, proxy}) == 2
        assert np.array_equal((proxy == other).data, array == array)


class TestData:
    def test_a_failed_read_is_tried_again(self, tmp_path, cache):
        proxy = LazyReadData(tmp_path / "late.npy", cache=cache)
        for _ in range(2):
            with pytest.raises(FileNotFoundError) as caught:
                proxy.data
            assert caught.value.filename == str(tmp_path / "late.npy")
        np.save(tmp_path / "late.npy", np.ones(2))
        assert np.array_equal(proxy.data, [1, 1])

    def test_directories_and_unknown_formats_are_clear_errors(self, tmp_path, cache):
        with pytest.raises(IsADirectoryError):
            LazyReadData(tmp_path, cache=cache).data
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(UnknownFormatError, match=r"notes\.txt"):
            LazyReadData(tmp_path / "notes.txt", cache=cache).data

    def test_data_can_be_set(self, proxy, file, cache, array):
        before = proxy + 0
        proxy.data = np.zeros(2)
        assert np.array_equal(proxy.data, [0, 0])
        assert np.array_equal(before.data, array)
        assert proxy.loaded()

    def test_changed_data_survive_eviction_and_release(self, proxy, cache, array):
        proxy += 10
        assert np.array_equal(proxy.data, array + 10)
        proxy.release()
        cache.clear()
        assert np.array_equal(proxy.data, array + 10)

    @pytest.mark.parametrize(
        "change",
        [
            lambda p: p.__iadd__(1), lambda p: p.__isub__(1), lambda p: p.__imul__(2),
            lambda p: p.__itruediv__(2), lambda p: p.__ifloordiv__(2), lambda p: p.__imod__(2),
            lambda p: p.__ipow__(2), lambda p: p.__setitem__(0, 5),
            lambda p: p.__setitem__((slice(None), 1), [1, 2, 3, 4, 5]),
        ],
    )  # fmt: skip
    def test_a_change_in_place_is_seen_by_nobody_else(self, change, proxy, file, cache, array):
        other, same, built = LazyReadData(file, cache=cache), LazyReadData(proxy), proxy * 2
        mine = array.copy(order="K")
        change(mine)
        change(proxy)
        assert proxy.data.tobytes() == mine.tobytes()
        assert proxy.data.strides == mine.strides
        for unchanged in (other, same):
            assert np.array_equal(unchanged.data, array)
        assert np.array_equal(built.data, array * 2)
        assert np.array_equal(nibabel.load(file).get_fdata(), array)

    def test_an_in_place_operator_keeps_the_object_and_the_dtype(self, cache):
        proxy = same = LazyReadData(np.array([1, 2], "i2"), cache=cache)
        proxy += 1
        proxy *= 2
        assert proxy is same
        assert proxy.data.dtype == "i2"
        proxy += 2.5
        with pytest.raises(TypeError, match="same_kind"):
            proxy.data

    def test_items_are_assigned_by_masks_lists_and_proxies(self, cache, array):
        proxy = LazyReadData(array, cache=cache)
        mine = array.copy(order="K")
        for target in (mine, proxy):
            target[target > 50] = -1
            target[[0, 1], 2] = 7
            target[..., 0] = target[..., 1]
            target += target
        assert proxy.data.tobytes() == mine.tobytes()

    def test_many_assignments_make_one_copy(self, cache):
        proxy = LazyReadData(np.zeros(1000), cache=cache)
        for i in range(1000):
            proxy[i] = i
        assert np.array_equal(proxy.data, np.arange(1000))
        assert cache.stats().peak_bytes <= 3 * 8000

    def test_pinned_keeps_data_in_memory(self, proxy, cache, array):
        with proxy.pinned() as data:
            cache.clear()
            cache.release(proxy._node.key)
            assert proxy.loaded()
            assert np.array_equal(data, array)
        cache.clear()
        del data
        assert not proxy.loaded()

    def test_release_drops_the_data(self, proxy, cache):
        proxy.data
        proxy.release()
        assert not proxy.loaded()
        assert cache.stats().releases == 1

    def test_the_last_reference_frees_the_data_without_collecting(self, file):
        cache = DataCache("1GiB")
        gc.disable()
        try:
            proxy = LazyReadData(file, cache=cache)
            owner = weakref.ref(_buffers.owner_of(proxy.data))
            cache.clear()
            assert owner() is None
            gone = weakref.ref(proxy)
            del proxy
            assert gone() is None
        finally:
            gc.enable()

    def test_proxies_use_the_scope_that_is_open(self, file):
        with DataCache("10MiB") as scope:
            proxy = LazyReadData(file)
            proxy.data
            assert scope.used == proxy.nbytes
            assert (proxy + 1).data.shape == (3, 4, 5)
            assert scope.stats().loads == 1
        assert proxy.data.shape == (3, 4, 5)
        assert get_cache() is not scope


class TestIteration:
    def test_over_the_first_axis(self, proxy, array):
        found = [plane.data for plane in proxy]
        assert len(found) == 3
        assert all(np.array_equal(a, b) for a, b in zip(found, array, strict=True))

    def test_zero_dimensions_have_no_length(self, cache):
        proxy = LazyReadData(np.array(3.0), cache=cache)
        with pytest.raises(TypeError, match="unsized"):
            len(proxy)
        with pytest.raises(TypeError):
            iter(proxy)

    def test_objects_iterate_as_they_do(self, cache):
        assert list(LazyReadData({"a": 1}, cache=cache)) == ["a"]
        assert len(LazyReadData({"a": 1}, cache=cache)) == 1
        assert LazyReadData({"a": 1}, cache=cache)["a"] == 1


class TestCopying:
    def test_a_copy_shares_the_data_and_changes_alone(self, proxy, cache, array):
        other = copy.copy(proxy)
        other += 1
        assert np.array_equal(proxy.data, array)
        assert np.array_equal(other.data, array + 1)
        assert other.filename == proxy.filename

    def test_a_deep_copy_of_an_object_copies_it(self, cache):
        proxy = LazyReadData({"a": [1]}, cache=cache)
        other = copy.deepcopy(proxy)
        other.data["a"].append(2)
        assert proxy.data == {"a": [1]}
        assert copy.deepcopy([proxy, proxy])[0].data == {"a": [1]}

    def test_a_file_pickles_as_its_recipe(self, proxy, array):
        proxy.data
        text = pickle.dumps(proxy)
        assert len(text) < 1000
        assert array.tobytes()[:40] not in text
        again = pickle.loads(text)
        assert again.filename == proxy.filename
        assert np.array_equal(again.data, array)

    def test_an_expression_pickles_with_its_constants(self, proxy, array):
        expression = np.sqrt(proxy[..., 1] * np.arange(4.0)) + proxy.mean(axis=2)
        again = pickle.loads(pickle.dumps(expression))
        assert again.data.tobytes() == expression.data.tobytes()
        assert not again.data.flags.writeable

    def test_a_file_that_changed_since_the_pickle_is_warned_of(self, tmp_path):
        np.save(tmp_path / "a.npy", np.ones(2))
        proxy = LazyReadData(tmp_path / "a.npy")
        proxy.data
        text = pickle.dumps(proxy)
        del proxy
        get_cache().clear()
        np.save(tmp_path / "a.npy", np.zeros(3))
        with pytest.warns(FileChangedWarning, match=r"a\.npy"):
            assert pickle.loads(text).data.shape == (3,)


class Squared(LazyReadData):
    """Overrides how data are loaded, as in the original."""

    loads = 0

    def __init__(self, *args, power=2, **kwargs):
        super().__init__(*args, **kwargs)
        self.power = power

    def load_data(self):
        type(self).loads += 1
        super().load_data()
        self.data = self.data**self.power
        self.note = "loaded"


class TestSpecialising:
    def test_load_data_is_how_the_data_are_loaded(self, file, cache, array):
        Squared.loads = 0
        proxy = Squared(file, cache=cache)
        assert np.array_equal(proxy.data, array**2)
        assert np.array_equal((proxy + 1).data, array**2 + 1)
        assert Squared.loads == 1
        assert cache.stats().loads == 1
        assert proxy.note == "loaded"
        cache.clear()
        assert np.array_equal(proxy.data, array**2)
        assert Squared.loads == 2

    def test_expressions_outlive_the_proxy(self, file, cache, array):
        total = Squared(file, cache=cache, power=3) * 2
        assert np.array_equal(total.data, array**3 * 2)

    def test_load_data_may_return_the_data(self, tmp_path, cache):
        class Made(LazyReadData):
            def load_data(self):
                return np.full(3, 9)

        (tmp_path / "x").write_text("x")
        assert np.array_equal(Made(tmp_path / "x", cache=cache).data, [9, 9, 9])

    def test_lazy_read_may_be_overridden_instead(self, tmp_path, cache):
        class Made(LazyReadData):
            def _lazy_read(self):
                self.data = np.full(3, 8)
                return self.data

        (tmp_path / "x").write_text("x")
        assert np.array_equal(Made(tmp_path / "x", cache=cache).data, [8, 8, 8])

    def test_many_threads_make_one_load(self, file, cache):
        Squared.loads = 0
        proxy = Squared(file, cache=cache)
        threads = [threading.Thread(target=proxy.get_data) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert Squared.loads == 1

    def test_the_proxy_dies_without_collecting(self, file, cache):
        gc.disable()
        try:
            proxy = Squared(file, cache=cache)
            proxy.data
            gone = weakref.ref(proxy)
            node = weakref.ref(proxy._node)
            cache.clear()
            del proxy
            assert gone() is None
            assert node() is None, "the cache's own reader keeps no interest alive"
        finally:
            gc.enable()

    def test_copies_and_pickles_keep_the_class(self, file, cache, array):
        proxy = Squared(file, cache=cache)
        for again in (copy.copy(proxy), copy.deepcopy(proxy), pickle.loads(pickle.dumps(proxy))):
            assert type(again) is Squared
            assert np.array_equal(again.data, array**2)


class TestOut:
    def test_save_keeps_the_orientation(self, proxy, tmp_path, array):
        (proxy * 2).save(tmp_path / "double.nii.gz")
        image = nibabel.load(tmp_path / "double.nii.gz")
        assert np.array_equal(image.affine, AFFINE)
        assert np.array_equal(np.asarray(image.dataobj), array * 2)
        assert image.get_data_dtype() == "f4"
        (proxy / 3).save(tmp_path / "t.npy", dtype="f8")
        assert np.load(tmp_path / "t.npy").dtype == "f8"

    def test_save_refuses_an_input_before_computing(self, proxy, file, cache):
        with pytest.raises(WriteError, match=r"t1\.nii\.gz"):
            (proxy + 1).save(file)
        assert cache.stats().loads == 0

    def test_objects_are_no_images(self, tmp_path, cache):
        with pytest.raises(TypeError, match="only arrays"):
            LazyReadData({}, cache=cache).save(tmp_path / "x.nii")

    def test_to_nibabel_loads_when_asked(self, proxy, cache, array):
        image = (proxy + 1).to_nibabel()
        assert cache.stats().loads == 0
        assert image.shape == (3, 4, 5)
        assert np.array_equal(image.affine, AFFINE)
        assert np.array_equal(image.get_fdata(), array + 1)
        assert np.asarray(image.dataobj).flags.writeable


def test_the_data_of_a_file_that_is_gone_still_serve(proxy, file, array):
    proxy.data
    os.remove(file)
    assert np.array_equal(proxy.data, array)


def test_data_that_are_in_memory_are_had_without_an_operation(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.arange(4))
    with DataCache(1 << 20) as cache:
        proxy = LazyReadData(tmp_path / "a.npy")
        total = proxy + proxy
        assert total.data[3] == 6
        first = proxy.data
        before = cache.stats().hits
        monkeypatch.setattr(DataCache, "operation", None)
        assert proxy.data is first
        assert total.data[3] == 6
        assert cache.stats().hits == before + 1


def test_a_new_proxy_sees_that_its_file_was_written_anew(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(5))
    with DataCache(1 << 20):
        old = LazyReadData(path)
        assert old.data.sum() == 0
        np.save(path, np.ones(6))
        new = LazyReadData(path)
        with pytest.warns(FileChangedWarning, match=r"a\.npy"):
            assert new.shape == (6,)
        assert new.data.sum() == 6
        assert LazyReadData(path).data.sum() == 6


def test_saving_a_plain_file_looks_at_it_again(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(5))
    with DataCache(1 << 20):
        proxy = LazyReadData(path)
        assert proxy.data.sum() == 0
        np.save(path, np.ones(6))
        with pytest.warns(FileChangedWarning):
            proxy.save(tmp_path / "b.npy")
        assert np.load(tmp_path / "b.npy").sum() == 6


def test_what_we_write_ourselves_is_no_surprise(tmp_path):
    out = tmp_path / "out.npy"
    with DataCache(1 << 20):
        for value in range(3):
            np.save(tmp_path / f"{value}.npy", np.full(4, value))
            (LazyReadData(tmp_path / f"{value}.npy") + 0).save(out)
            assert LazyReadData(out).data.sum() == 4 * value


def test_a_header_is_a_copy_that_may_be_changed(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "a.nii"
    image = nibabel.Nifti1Image(np.zeros((2, 3, 4, 5), np.int16), np.eye(4))
    image.header["pixdim"][4] = 1.5
    nibabel.save(image, path)
    LazyReadData(path).header["pixdim"][4] = 99
    assert LazyReadData(path).header["pixdim"][4] == 1.5


def test_none_is_no_data():
    with pytest.raises(TypeError, match="None is no data"):
        LazyReadData(None)


def test_an_attribute_error_of_a_reader_is_not_taken_for_a_missing_attribute(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    reads = []

    def reader(path):
        reads.append(path)
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    proxy = LazyReadData(tmp_path / "a.npy", reader=reader)
    with pytest.raises(RuntimeError, match=r"a\.npy.*has no attribute 'shape'"):
        proxy.data
    assert len(reads) == 1
