"""What a reader promises, as a test that any reader can be put through.

In the tests of a plug-in::

    from lazycache.testing import check_reader

    def test_reader_keeps_its_promises(tmp_path):
        path = write_a_file(tmp_path)
        check_reader(MyReader(), path, expected=the_array_in_it)
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lazycache import _aims, _buffers
from lazycache.readers import Probe, Reader
from lazycache.readers.base import LoadCancelled, cancellable
from lazycache.sizes import nbytes_of

_TIMEOUT = 60.0
_THREADS = 4
_WORTH_TRACING = 1 << 20


def check_reader(
    reader: Reader,
    path: str | os.PathLike[str],
    *,
    expected: ArrayLike | None = None,
    **options: Any,
) -> None:
    """Hold ``reader`` to the contract of `lazycache.readers.base` on one good file.

    ``expected`` is the array in the file, compared by shape, dtype and bytes. ``options`` are
    passed to each call of the reader. The file is read a few dozen times, and copied, with its
    side files, into a temporary folder to be damaged there: give a small one.

    Raises `AssertionError` saying which promise is broken.
    """
    path = os.path.abspath(os.fspath(path))
    probe = _check_probe(reader, path, options)
    data = reader.read(path, **options)
    assert data is not None, f"read({path}) returned None in place of data"
    if probe.kind:
        _check_object(reader, path, probe, data, options)
    elif probe.shape is not None:
        _check_array(probe, data, expected)
        _check_alone(data, reader.read(path, **options))
        _check_conversion(reader, path, data, options)
        _check_parts(reader, path, data, options)
        _check_blocks(reader, path, probe, data, options)
    _check_threads(reader, path, data, options)
    if probe.nbytes:
        _check_cancelling(reader, path, data, options)
    _check_bad_files(reader, path, probe, data, options)


def _check_probe(reader: Reader, path: str, options: dict[str, Any]) -> Probe:
    assert isinstance(reader.name, str), f"name is {reader.name!r}, not a str"
    assert reader.name, "name is empty"
    assert reader.can_read(path) is True, f"can_read({path}) is not True"
    for other in ("", os.path.dirname(path), path + "-no-such-file", "a\0b"):
        assert reader.can_read(other) in (True, False), f"can_read({other!r}) is no bool"
    probe = reader.probe(path, **options)
    assert probe.format, "probe says no format"
    assert path in probe.files, f"probe.files leaves out {path}"
    assert 0 <= probe.nbytes <= probe.peak_nbytes, "probe's peak_nbytes is below its nbytes"
    assert (probe.shape is None) == (probe.dtype is None), "only one of shape and dtype is known"
    for file in probe.files:
        assert os.path.exists(file), f"probe.files has {file}, which does not exist"
    if probe.nbytes >= _WORTH_TRACING:
        peak = _traced_peak(lambda: reader.probe(path, **options))
        assert peak < probe.nbytes / 2, f"probe reads voxels: it took {peak} bytes of memory"
    return probe


def _traced_peak(function: Callable[[], object]) -> int:
    if tracemalloc.is_tracing():
        return 0
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _check_array(probe: Probe, data: Any, expected: ArrayLike | None) -> None:
    assert isinstance(data, np.ndarray), f"probe tells a shape, but read gave {type(data)}"
    assert data.shape == probe.shape, f"probe says shape {probe.shape}, read gave {data.shape}"
    assert data.dtype == probe.dtype, f"probe says dtype {probe.dtype}, read gave {data.dtype}"
    assert data.nbytes == probe.nbytes, f"probe says {probe.nbytes} bytes, read gave {data.nbytes}"
    if data.flags.c_contiguous != data.flags.f_contiguous:
        order = "C" if data.flags.c_contiguous else "F"
        assert order == probe.order, f"probe says order {probe.order}, read gave {order}"
    if expected is not None:
        _check_same(data, np.asarray(expected), "read", "expected")
    assert not data.flags.writeable, "what read gave is writeable"
    if data.nbytes:
        try:
            data.flags.writeable = True
        except ValueError:
            pass
        else:
            raise AssertionError("what read gave can be made writeable again")


def _check_object(
    reader: Reader, path: str, probe: Probe, data: Any, options: dict[str, Any]
) -> None:
    kind = type(data).__name__
    assert kind == probe.kind, f"probe says {probe.kind}, read gave {kind}"
    assert nbytes_of(data) > 0, "nothing is known of the size of what read gave"
    if probe.shape is None:
        return
    values = np.asarray(data)
    assert values.shape == probe.shape, f"probe says shape {probe.shape}, read gave {values.shape}"
    assert values.dtype == probe.dtype, f"probe says dtype {probe.dtype}, read gave {values.dtype}"
    held = nbytes_of(data)
    assert held == probe.nbytes, f"probe says {probe.nbytes} bytes, read gave {held}"
    again = np.asarray(reader.read(path, **options))
    assert not np.may_share_memory(values, again), "two reads share memory"
    _check_conversion(reader, path, values, options)


def _check_alone(data: NDArray[Any], again: NDArray[Any]) -> None:
    assert not np.may_share_memory(data, again), "two reads share memory"
    base: Any = data
    while base is not None:
        assert not isinstance(base, np.memmap), "what read gave is a map of a file"
        base = getattr(base, "base", None)
    owner = _buffers.owner_of(data)
    held = len(owner) if hasattr(owner, "__len__") and not isinstance(owner, np.ndarray) else 0
    assert held <= 2 * data.nbytes + (4 << 20), "what read gave keeps a larger buffer alive"


def _check_conversion(
    reader: Reader, path: str, data: NDArray[Any], options: dict[str, Any]
) -> None:
    if not getattr(reader, "converts", False) or data.dtype.kind not in "biufc":
        return
    wanted = np.dtype(np.complex64 if data.dtype.kind == "c" else np.float32)
    probe = reader.probe(path, dtype=wanted, **options)
    assert probe.dtype == wanted, f"probe with dtype={wanted} says {probe.dtype}"
    with np.errstate(all="ignore"):
        converted = reader.read(path, dtype=wanted, **options)
        values = data.astype(wanted)
        _check_same(np.asarray(converted), values, f"read with dtype={wanted}", "astype")
    assert nbytes_of(converted) == probe.nbytes, (
        "probe with dtype= says another nbytes than read gave"
    )


def _check_parts(reader: Reader, path: str, data: NDArray[Any], options: dict[str, Any]) -> None:
    read_part = getattr(reader, "read_part", None)
    if read_part is None:
        return
    for index in _indices(data.shape):
        part = read_part(path, index, **options)
        _check_same(part, data[(*index, ...)], f"read_part at {index}", "read()[index]")
        assert not np.may_share_memory(part, data), "a part shares memory with the whole"


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int | slice, ...]]:
    """A spread of full indices: each kind on each axis alone, some together."""
    if 0 in shape:
        return
    everything = (slice(None),) * len(shape)
    yield everything
    for axis, size in enumerate(shape):
        kinds: tuple[int | slice, ...] = (
            0,
            size - 1,
            slice(size // 2, None),
            slice(0, size, 2),
            slice(1, 1),
        )
        for kind in kinds:
            yield (*everything[:axis], kind, *everything[axis + 1 :])
    corner: list[tuple[int | slice, ...]] = [
        (size // 2, slice(size // 3, size, 2)) for size in shape
    ]
    for number, index in enumerate(product(*corner)):
        if number < 8 or number == 2 ** len(shape) - 1:
            yield index


def _check_blocks(
    reader: Any, path: str, probe: Probe, data: NDArray[Any], options: dict[str, Any]
) -> None:
    if not probe.in_blocks:
        return
    flat = data.reshape(-1, order=probe.order)
    cuts = sorted({0, min(1, flat.size), flat.size // 3, flat.size // 2, flat.size})
    for passed in (False, True):
        blocks = reader.open_blocks(path, **options)
        try:
            for number, (start, stop) in enumerate(pairwise(cuts)):
                if passed and number % 2 == 0:
                    blocks.skip(stop - start)
                    continue
                block = np.empty(stop - start, data.dtype)
                blocks.into(block)
                _check_same(block, flat[start:stop], "open_blocks", "read")
        finally:
            blocks.close()


def _check_threads(reader: Reader, path: str, data: Any, options: dict[str, Any]) -> None:
    together = threading.Barrier(_THREADS)

    def read() -> Any:
        together.wait(_TIMEOUT)
        return reader.read(path, **options)

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(read) for _ in range(_THREADS)]
        for future in futures:
            _check_equal(future.result(_TIMEOUT), data, "read by four threads at once", "by one")


def _check_cancelling(reader: Reader, path: str, data: Any, options: dict[str, Any]) -> None:
    count = _Stop(at=None)
    with cancellable(count):
        reader.read(path, **options)
    assert count.asked, "read never calls checkpoint"
    for at in {1, count.asked}:
        before = _open_files()
        try:
            with cancellable(_Stop(at)):
                reader.read(path, **options)
        except LoadCancelled:
            pass
        else:
            raise AssertionError("a cancelled read went on to its end")
        assert _open_files() <= before, "a cancelled read leaves files open"
    again = reader.read(path, **options)
    _check_equal(again, data, "read after a cancelled read", "the first read")


class _Stop:
    """Cancels at the ``at``-th time that it is asked, and counts."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == self.at


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # a system without /proc
        return 0


def _check_bad_files(
    reader: Reader, path: str, probe: Probe, data: Any, options: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copies = [shutil.copy(file, folder) for file in probe.files]
        copy = copies[probe.files.index(path)]
        absent = os.path.join(folder, "absent-" + os.path.basename(path))
        _must_fail(reader, absent, absent, FileNotFoundError, options)
        os.mkdir(absent)
        _must_fail(reader, absent, absent, OSError, options)
        for file in copies:
            size = os.path.getsize(file)
            lengths = {size // 2, min(size, 60), 0}
            if _arrays(data) is not None:  # of text, the last byte may mean nothing
                lengths.add(size - 1)
            for kept in sorted(lengths, reverse=True):
                os.truncate(file, kept)
                _must_fail_or_equal(reader, copy, os.path.splitext(file)[0], data, options)
            shutil.copy(probe.files[copies.index(file)], folder)


def _must_fail(
    reader: Reader, path: str, name: str, kind: type[OSError], options: dict[str, Any]
) -> None:
    for method in (reader.probe, reader.read):
        try:
            method(path, **options)
        except kind as error:
            _check_names(error, name)
        else:
            raise AssertionError(f"{method.__name__}({path}) did not fail")


def _must_fail_or_equal(
    reader: Reader, path: str, name: str, data: Any, options: dict[str, Any]
) -> None:
    """A file that was cut short is an error, unless nothing that matters was in what was cut."""
    before = _open_files()
    try:
        value = reader.read(path, **options)
    except OSError as error:
        _check_names(error, name)
        _forget_frames(error)
    else:
        assert _arrays(data) is not None, f"{path} was read although {name} was cut short"
        _check_equal(value, data, f"read of {path}, cut short", "the whole file")
    assert _open_files() <= before, "a failed read leaves files open"


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error, and of those that led to it, still hold open."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _check_names(error: OSError, name: str) -> None:
    text = f"{error} {error.filename} {' '.join(getattr(error, '__notes__', ()))}"
    assert name in text, f"this error does not name the file {name}: {error!r}"


def _arrays(data: Any) -> list[NDArray[Any]] | None:
    """All that the data hold; None where that isn't known."""
    return [data] if isinstance(data, np.ndarray) else _aims.contents_of(data)


def _check_equal(value: Any, wanted: Any, what: str, than: str) -> None:
    """`_check_same`, of all that the data hold."""
    found, expected = _arrays(value), _arrays(wanted)
    if expected is None:
        return
    assert found is not None, f"{what} gave {type(value)}"
    assert len(found) == len(expected), f"{what}: {len(found)} arrays, {than}: {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        _check_same(one, other, what, than)


def _check_same(value: Any, wanted: NDArray[Any], what: str, than: str) -> None:
    assert isinstance(value, np.ndarray), f"{what} gave {type(value)}, no array"
    assert value.shape == wanted.shape, f"{what}: shape {value.shape}, {than}: {wanted.shape}"
    assert value.dtype == wanted.dtype, f"{what}: dtype {value.dtype}, {than}: {wanted.dtype}"
    if wanted.dtype.char in "gG":  # long doubles have bytes that mean nothing
        same = np.array_equal(value, wanted, equal_nan=True)
    else:
        same = value.tobytes() == wanted.tobytes()
    assert same, f"{what}: other values than {than}"
