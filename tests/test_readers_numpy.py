"""``.npy`` and ``.npz``."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lazycache.errors import ReadError, TruncatedFileError
from lazycache.readers import reader_for, slabs, streams
from lazycache.testing import check_reader

READER = reader_for("a.npy")
DTYPES = ["?", "i1", "u1", "<i2", ">i2", "u8", "f2", "<f4", ">f8", "c8", "g", "U3", "S5", "M8[s]"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_read_as_numpy_reads_it(tmp_path: Path, dtype: str, order: str) -> None:
    path = tmp_path / "a.npy"
    array = np.arange(60).reshape(3, 4, 5).astype(dtype, order=order)
    np.save(path, array)
    expected = np.load(path)
    check_reader(READER, path, expected=expected)
    assert READER.read(str(path)).strides == expected.strides


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (2, 1, 1, 3, 1)])
def test_npy_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    np.save(path, array)
    check_reader(READER, path, expected=array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_member_stored_and_deflated(tmp_path: Path, save: object) -> None:
    path = tmp_path / "a.npz"
    one, two = np.arange(10.0).reshape(2, 5), np.arange(12, dtype=">i2").reshape(3, 4).T
    save(path, one=one, two=two)  # type: ignore[operator]
    check_reader(READER, path, expected=one, member="one")
    check_reader(READER, path, expected=two, member="two")
    assert READER.probe(str(path), member="two").affine is None


def test_the_only_member_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.arange(5))
    check_reader(READER, path, expected=np.arange(5))


def test_several_members_are_listed(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, left=1, right=2)
    with pytest.raises(ReadError, match=r"say which.*left, right"):
        READER.probe(path)
    with pytest.raises(ReadError, match=r"no array 'up'.*left, right"):
        READER.read(path, member="up")


def test_npy_has_no_members(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ReadError, match="no members: leave member='x' out"):
        READER.read(str(tmp_path / "a.npy"), member="x")


def test_a_zip_of_something_else_is_said_to_hold_no_array(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "?")
    with pytest.raises(ReadError, match="holds no array"):
        READER.probe(str(path))


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", objects=np.array([{}], dtype=object))
    for name in ("a.npy", "a.npz"):
        for method in (READER.probe, READER.read):
            with pytest.raises(ReadError, match=f"{name} holds pickled Python objects"):
                method(str(tmp_path / name))


def test_structured_and_unicode_field_names(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    array = np.zeros(4, [("размер", "f4"), ("x", ">i2", (2,))])
    array["размер"] = range(4)
    with pytest.warns(UserWarning, match="format 3.0"):
        np.save(path, array)
    check_reader(READER, path, expected=array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(tmp_path: Path, version: tuple[int, int]) -> None:
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array(file, np.arange(7), version)
    check_reader(READER, path, expected=np.arange(7))


def test_a_header_that_python_2_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype="<i8").reshape(2, 3))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(2, 3), }", b"(2L, 3L)}"))
    assert READER.read(str(path)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("header", [b"{", b"[1]", b"{'shape': (2,)}", b"{'shape': 3"])
def test_a_damaged_header_is_an_error_with_the_name(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ReadError, match=r"a\.npy: its NumPy header can't be understood"):
        READER.probe(str(path))


def test_a_truncated_array_is_seen_by_probe(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100))
    content = path.read_bytes()
    for kept in (3, 8, 9, 60, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(TruncatedFileError, match=r"a\.npy is truncated"):
            READER.probe(str(path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_member_with_a_wrong_checksum_is_damaged(tmp_path: Path, save: object, size: int) -> None:
    path = tmp_path / "a.npz"
    save(path, a=np.random.default_rng(0).integers(0, 99, size))  # type: ignore[operator]
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 16] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match=r"a\.npz is damaged .*CRC"):
        READER.read(str(path))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_part_of_any_array_is_that_of_the_whole(
    data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slab = data.draw(st.sampled_from([1, 16, 64, 1 << 18]))
    monkeypatch.setattr(slabs, "STEP", slab)
    monkeypatch.setattr(streams, "STEP", slab)
    shape = data.draw(hnp.array_shapes(max_dims=4, max_side=6))
    array = np.arange(np.prod(shape), dtype=data.draw(st.sampled_from(["u1", ">i2", "f8"])))
    array = np.asarray(array.reshape(shape), order=data.draw(st.sampled_from("CF")))
    index = []
    for size in shape:
        start, stop = (data.draw(st.integers(-size, size)) for _ in range(2))
        step = data.draw(st.integers(1, 3))
        item = data.draw(st.sampled_from([slice(None), slice(start, stop, step), 0, size - 1, -1]))
        index.append(item)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    wanted = array[(*index, ...)]
    for name in ("a.npy", "a.npz"):
        for dtype in (None, np.dtype("f4")):
            part = READER.read_part(str(tmp_path / name), tuple(index), dtype=dtype)
            expected = wanted if dtype is None else wanted.astype(dtype)
            assert (part.shape, part.dtype) == (expected.shape, expected.dtype)
            assert part.tobytes() == expected.tobytes()


def test_an_index_outside_is_an_index_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(IndexError):
        READER.read_part(str(tmp_path / "a.npy"), (2, slice(None)))
