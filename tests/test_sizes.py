"""Sizes as text, and the bytes that values keep in memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import tracemalloc
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.gifti import GiftiDataArray, GiftiImage
from numpy.lib.stride_tricks import as_strided

from lazycache import _buffers, sizes
from lazycache.errors import SizeError
from lazycache.sizes import format_size, nbytes_of, parse_size, register_size

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "_sizers", {})


# --- sizes as text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("512 MiB", 512 * MIB),
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("8GIB", 8 << 30),
        ("8gib", 8 << 30),
        ("1.5GiB", 3 << 29),
        ("3kB", 3000),
        ("3KB", 3000),
        ("3KiB", 3072),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 << 40),
        ("17B", 17),
        ("17 B", 17),
        ("1000", 1000),
        ("0", 0),
        (" 4 GiB ", 4 << 30),
        ("0.1MB", 100_000),
        ("0.3B", 0),
        (12, 12),
        (0, 0),
        (np.int64(12), 12),
    ],
)
def test_a_size_is_read_as_written(text: int | str, nbytes: int) -> None:
    size = parse_size(text)
    assert size == nbytes
    assert type(size) is int


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "4G",
        "4k",
        "0.8",
        "0.8x",
        "50%",
        "auto",
        "4 bananas",
        "-1GiB",
        "+1GiB",
        "1e9",
        "1e9B",
        "1_000",
        "1,5GiB",
        ".5GiB",
        "5.GiB",
        "4  GiB",
        "GiB",
        "4 GiB 3",
        "1Gb",
        "1Mib",
        "8b",
        "0x10",
        "nan",
        "inf",
        "٤GiB",
        "9" * 5000,
        "4\0GiB",
        -5,
        0.5,
        4e9,
        float("nan"),
        True,
        False,
        None,
        np.True_,
        b"4GiB",
        [4],
    ],
)
def test_what_could_be_misread_is_refused_with_what_to_write(value: Any) -> None:
    with pytest.raises(SizeError) as refused:
        parse_size(value)
    assert repr(value) in str(refused.value)
    assert "iB" in str(refused.value)


def test_a_bare_letter_is_told_its_two_readings() -> None:
    with pytest.raises(SizeError, match=r'write "4GiB" .* or "4GB"'):
        parse_size("4g")


@given(st.integers(0, 2**62))
def test_an_int_and_its_text_are_the_same_size(nbytes: int) -> None:
    assert parse_size(nbytes) == nbytes
    assert parse_size(f"{nbytes}B") == nbytes
    assert parse_size(str(nbytes)) == nbytes


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_size_error(text: str) -> None:
    try:
        size = parse_size(text)
    except SizeError:
        return
    assert size >= 0


@given(st.integers(0, 2**60))
def test_a_formatted_size_reads_back_within_half_a_percent(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= nbytes * 0.0051 + 1


@given(st.integers(1, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_whole_number_of_units_is_formatted_and_read_back_exactly(n: int, unit: str) -> None:
    assert format_size(parse_size(f"{n}{unit}")) == f"{n} {unit}"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (MIB - 1, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (int(1.04 * (1 << 30)), "1.04 GiB"),
        (100 * MIB, "100 MiB"),
        (5000 << 40, "5000 TiB"),
        (-3 << 29, "-1.5 GiB"),
    ],
)
def test_sizes_are_formatted_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


# --- arrays and other memory ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 4, 5)])
def test_an_array_is_its_data(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.int16)
    assert nbytes_of(array) == array.nbytes


def test_a_view_counts_the_whole_owner_that_it_keeps() -> None:
    volume = np.zeros((10, 10, 10))
    for view in (volume[0], volume.T, volume[::3, ::2], volume[0].view(np.uint8), volume[:0]):
        assert nbytes_of(view) == 8000


def test_several_views_of_an_owner_count_once() -> None:
    volume = np.zeros((100, 100))
    views = (volume[0], volume[1:5], volume, memoryview(volume))
    overhead = sys.getsizeof(views)
    assert nbytes_of(views) == 80_000 + overhead
    assert nbytes_of((*views, np.zeros(3))) == 80_000 + 24 + sys.getsizeof((*views, 0))


def test_a_broadcast_array_counts_what_exists() -> None:
    assert nbytes_of(np.broadcast_to(np.zeros(10), (1000, 10))) == 80
    assert nbytes_of(as_strided(np.zeros(10), (1000, 10), (0, 8))) < 4000


@pytest.mark.parametrize("nbytes", [100, _buffers.LARGE, 3 * MIB + 17])
def test_memory_of_our_own_counts_to_the_byte(nbytes: int) -> None:
    buffer = _buffers.Buffer(nbytes)
    whole = buffer.readonly((nbytes,), np.uint8)
    assert nbytes_of(whole) == nbytes
    assert nbytes_of(whole[3:5]) == nbytes
    assert nbytes_of([whole[:3], whole[3:]]) == nbytes + sys.getsizeof([0, 0])
    assert nbytes_of(_buffers.readonly(np.zeros(nbytes, np.uint8))) == nbytes


def test_what_is_charged_is_the_owner_that_buffers_follow() -> None:
    for array in (np.zeros(10)[2:], _buffers.empty((3 * MIB,), np.uint8)[5:]):
        owner = _buffers.owner_of(array)
        meter = sizes._Meter()
        meter.walk(array)
        assert list(meter._charged) == [id(owner)]


@pytest.mark.parametrize("memory", [bytearray(50), bytes(50), memoryview(bytes(50))])
def test_where_nobody_tells_of_an_owners_death_the_array_over_it_is_followed(memory: Any) -> None:
    array = np.frombuffer(memory, np.uint8)
    views = [array[3:], array.reshape(5, 10).T, _buffers.readonly(array)[1:], array[1:].data]
    assert all(_buffers.owner_of(view) is array for view in views)
    assert nbytes_of(views[0]) == 50
    assert nbytes_of([views[0], array]) == 50 + sys.getsizeof([0, 0])


def test_a_memmap_counts_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "volume.dat"
    path.write_bytes(bytes(5 * MIB))
    mapped = np.memmap(path, np.uint8, "r")
    assert nbytes_of(np.asarray(mapped)[:10]) == 5 * MIB
    assert 0 <= nbytes_of(mapped[:10]) - 5 * MIB < 4096


def test_a_mapping_counts_itself_and_a_small_part_of_it_the_whole() -> None:
    with mmap.mmap(-1, 5 * MIB) as mapping:
        assert nbytes_of(mapping) == 5 * MIB
        array = np.frombuffer(memoryview(mapping)[:4096], np.uint8)
        assert nbytes_of(array) == 5 * MIB
        assert nbytes_of([array, mapping]) == 5 * MIB + sys.getsizeof([0, 0])
        del array
        gc.collect()
    assert nbytes_of(mapping) == 0


def test_bytes_count_themselves_and_arrays_over_them_their_bytes() -> None:
    raw = bytes(1000)
    assert nbytes_of(raw) == sys.getsizeof(raw)
    assert nbytes_of(np.frombuffer(raw, np.uint8)[:3]) == 1000
    assert nbytes_of(memoryview(bytearray(1000))[:3]) == 1000
    both = (raw, np.frombuffer(raw, np.uint8))
    assert nbytes_of(both) == sys.getsizeof(raw) + sys.getsizeof(both)


def test_memory_of_an_extension_counts_the_span_of_the_arrays_over_it() -> None:
    class Foreign:
        """Shows its memory to NumPy, and nowhere else."""

        def __init__(self) -> None:
            address = np.ctypeslib.as_ctypes(_KEPT)
            self.__array_interface__ = {
                "shape": (100_000,),
                "typestr": "|u1",
                "data": (ctypes.addressof(address), False),
                "version": 3,
            }

    foreign = np.asarray(Foreign())
    assert nbytes_of(foreign) == 100_000
    assert nbytes_of(foreign[::-2]) == 100_000
    assert nbytes_of([foreign, foreign[3:]]) == 100_000 + sys.getsizeof([0, 0])


_KEPT = np.zeros(100_000, np.uint8)


def test_a_masked_array_counts_its_data_and_its_mask() -> None:
    masked = np.ma.masked_array(np.zeros(10_000), mask=np.zeros(10_000, bool))
    assert 0 <= nbytes_of(masked) - 90_000 < 1000
    assert 0 <= nbytes_of(np.ma.masked_array(np.zeros(10_000))) - 80_000 < 1000


def test_structured_arrays_count_their_records() -> None:
    records = np.zeros(100, [("a", "i2"), ("b", "f8", (3,))])
    assert nbytes_of(records) == 2600
    assert nbytes_of(records["b"]) == 2600


def test_object_arrays_count_what_they_refer_to() -> None:
    text = "x" * 1000
    each = sys.getsizeof(text)
    array = np.array([text, text, np.zeros(50)], dtype=object)
    assert nbytes_of(array) == 24 + each + 400
    assert nbytes_of(array[:0]) == 24 + each + 400
    records = np.zeros(2, [("a", "f8"), ("b", [("c", "O")])])
    records["b"]["c"][1] = text
    assert nbytes_of(records) == 32 + each + sys.getsizeof(0)


def test_gifti_images_count_all_their_arrays() -> None:
    points, faces = np.zeros((10_000, 3), np.float32), np.zeros((20_000, 3), np.int32)
    surface = GiftiImage(darrays=[GiftiDataArray(points), GiftiDataArray(faces)])
    data = points.nbytes + faces.nbytes
    assert data <= nbytes_of(surface) < data + 20_000


def test_nibabel_images_count_the_copy_that_get_fdata_hides() -> None:
    image = nibabel.Nifti1Image(np.zeros((50, 50, 10), np.int16), np.eye(4))
    before = nbytes_of(image)
    assert 50_000 <= before < 60_000
    image.get_fdata()
    assert nbytes_of(image) == before + 200_000


# --- everything else -----------------------------------------------------------------------------


class Slotted:
    __slots__ = ("__private", "never_set", "public")

    def __init__(self, public: Any, private: Any) -> None:
        self.public, self.__private = public, private


class OneSlot:
    __slots__ = "array"

    def __init__(self, array: Any) -> None:
        self.array = array


class Derived(Slotted):
    """A class with a dictionary over one with slots."""


class Touchy(list[Any]):
    """Whatever runs its code fails."""

    def __iter__(self) -> Any:
        raise AssertionError("iterated")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")

    def __len__(self) -> int:
        raise AssertionError("measured")


def hold(kind: str, array: Any) -> Any:
    containers: dict[str, Any] = {
        "dict": {"array": array},
        "list": [array],
        "tuple": (array,),
        "deque": deque([array]),
        "attribute": SimpleNamespace(array=array),
        "slot": Slotted(array, None),
        "private slot": Slotted(None, array),
        "only slot": OneSlot(array),
        "inherited slot": Derived(array, None),
        "list with code": Touchy([array]),
        "method": OneSlot.__init__.__get__(OneSlot(array)),
        "deep": [{"a": (SimpleNamespace(b=[array]),)}],
    }
    return containers[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "dict",
        "list",
        "tuple",
        "deque",
        "attribute",
        "slot",
        "private slot",
        "only slot",
        "inherited slot",
        "list with code",
        "method",
        "deep",
    ],
)
def test_what_an_object_refers_to_counts(kind: str) -> None:
    empty, full = nbytes_of(hold(kind, None)), nbytes_of(hold(kind, np.zeros(10_000)))
    assert 79_900 < full - empty <= 80_000


def test_sets_count_their_items() -> None:
    items = frozenset(bytes([i]) * 1000 for i in range(10))
    assert nbytes_of(items) == sys.getsizeof(items) + 10 * sys.getsizeof(bytes(1000))
    assert nbytes_of(set(items)) > 10_000


def test_cycles_end_and_shared_objects_count_once() -> None:
    array = np.zeros(1000)
    ring: list[Any] = [array, array]
    ring.append(ring)
    ring.append({"ring": ring, "array": array})
    assert 8000 < nbytes_of(ring) < 9000


def test_a_chain_deeper_than_the_recursion_limit_is_measured() -> None:
    chain: list[Any] = []
    for _ in range(50_000):
        chain = [chain]
    assert nbytes_of(chain) >= 50_000 * sys.getsizeof([0]) * 0.9


def test_classes_modules_and_functions_belong_to_nobody() -> None:
    assert nbytes_of([np, np.ndarray, hold, len, hold.__code__]) <= sys.getsizeof([0] * 5)


def test_an_object_too_large_to_walk_is_guessed_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = [float(i) for i in range(50_000)]
    array = np.array(numbers, dtype=object)
    exact, exact_array = nbytes_of(numbers), nbytes_of(array)
    monkeypatch.setattr(sizes, "_VISITS", 1000)
    assert nbytes_of(numbers) == pytest.approx(exact, rel=0.01)
    assert nbytes_of(array) == pytest.approx(exact_array, rel=0.01)
    # One large array at the beginning says nothing of the numbers after it.
    assert nbytes_of([np.zeros(10**6), numbers]) == pytest.approx(8 * 10**6 + exact, rel=0.01)


def test_measuring_an_array_copies_nothing() -> None:
    volume = np.zeros(10 * MIB, np.uint8)
    holder = {"a": volume[1:], "b": [volume[::2]]}
    tracemalloc.start()
    try:
        nbytes_of(holder)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# --- registered sizes ----------------------------------------------------------------------------


def test_a_registered_size_is_asked_also_inside_containers_and_for_subclasses() -> None:
    register_size(SimpleNamespace, lambda value: value.size)

    class Sub(SimpleNamespace):
        pass

    assert nbytes_of(SimpleNamespace(size=10**9)) == 10**9
    assert nbytes_of([Sub(size=10**9)]) == 10**9 + sys.getsizeof([0])


def test_the_nearest_class_decides_and_the_last_registration() -> None:
    register_size(Slotted, lambda value: 1)
    register_size(Derived, lambda value: 2)
    assert nbytes_of(Derived(0, 0)) == 2
    register_size(Derived, lambda value: 3)
    assert nbytes_of(Derived(0, 0)) == 3
    assert nbytes_of(Slotted(0, 0)) == 1


@pytest.mark.parametrize("answer", [-1, None, 1.5, "4GiB"])
def test_a_registered_function_that_gives_no_size_is_named(answer: Any) -> None:
    register_size(Slotted, lambda value: answer)
    with pytest.raises(SizeError, match="Slotted"):
        nbytes_of(Slotted(0, 0))


def test_only_classes_and_functions_are_registered() -> None:
    with pytest.raises(TypeError, match="class"):
        register_size("Surface", len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="function"):
        register_size(Slotted, 5)  # type: ignore[arg-type]
