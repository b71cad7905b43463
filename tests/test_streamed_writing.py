"""Images written while their voxels are computed: the file of `write_image`, or nothing."""

from __future__ import annotations

import _thread
import errno
import gc
import io
import itertools
import os
import queue
import random
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from isal import igzip
from support import SOON, Gate, Running

from lazycache import _conversion, _sinks, _tasks, nibabel_image, writing
from lazycache.errors import WriteError
from lazycache.writing import ImageStream, can_stream, stream_image, write_image

AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
EXTENSIONS = (".nii", ".nii.gz", ".img", ".hdr", ".mgh", ".mgz", ".npy")
CHUNK = 4096


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images have many chunks, blocks and pieces."""
    monkeypatch.setattr(writing, "CHUNK_NBYTES", CHUNK)
    monkeypatch.setattr(writing, "BLOCK_NBYTES", 1000)
    monkeypatch.setattr(_conversion, "PIECE", 300)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    """The threads that compressed. All have ended when the test has."""
    started: list[threading.Thread] = []

    def start(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        started.append(thread)
        thread.start()

    monkeypatch.setattr(_thread, "start_new_thread", start)
    yield started
    ended(started)


def ended(started: list[threading.Thread]) -> None:
    for thread in started:
        thread.join(SOON)
        assert not thread.is_alive()


def values(
    dtype: Any = "f4", shape: tuple[int, ...] = (23, 17, 11), order: Any = "F"
) -> np.ndarray[Any, Any]:
    numbers = np.random.default_rng(0).integers(0, 100, np.prod(shape)).reshape(shape)
    return numbers.astype(dtype, order=order)


def blocks(data: Any, order: Any = "F", *lengths: int) -> Iterator[Any]:
    """The elements of ``data`` in ``order``, in blocks of these lengths in turn."""
    flat = data.reshape(-1, order=order).copy()
    start = 0
    for length in itertools.cycle(lengths or (700,)):
        if start >= flat.size:
            return
        yield flat[start : start + length]
        start += length


def stream(path: Path, data: Any, order: Any = "F", *lengths: int, **options: Any) -> None:
    with stream_image(path, data.shape, data.dtype, order, **options) as opened:
        for block in blocks(data, order, *lengths):
            opened.write(block)
            block[...] = np.zeros((), block.dtype)  # it is the caller's again
        opened.finish()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


# -- the file -----------------------------------------------------------------------------------

KINDS: dict[Any, list[Any]] = {
    "?": [None, "?", "u1", "f4"],
    "u1": [None, "f8"],
    "i1": [None],
    "i2": [None, "i4", "f4"],
    "u2": [None],
    "i4": [None, "i2"],
    "u4": [None, "i4"],
    "i8": [None, "i8", "i4", "f4"],
    "u8": [None, "u8", "u1"],
    "f2": [None, "f4", "i2"],
    "f4": [None, "i2", "u1", "f8"],
    "f8": [None, "f4", "i2", ">i2"],
    "c8": [None, "c16"],
    "c16": [None, "c8"],
    ">i2": [None],
    ">f8": [None, "f4"],
    np.longdouble: [None, "f4"],
}


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_file_is_to_the_byte_the_one_of_the_whole_array(
    tmp_path, extension, order, kind
):
    folders = tmp_path / "whole", tmp_path / "streamed"
    for folder in folders:
        folder.mkdir()
    template = nib.Nifti1Header()
    template.set_data_shape((23, 17, 11))
    template.set_zooms((2, 2, 2.5))
    whole, streamed = (folder / f"o{extension}" for folder in folders)
    options = {"affine": AFFINE, "header": template}
    data = values(kind, order=order)
    for dtype in KINDS[kind]:
        try:
            possible = can_stream(streamed, data.shape, data.dtype, order, dtype)
        except WriteError as error:
            message = re.escape(str(error).partition(": ")[2])
            with pytest.raises(WriteError, match=message):
                write_image(whole, data, dtype=dtype)
            with pytest.raises(WriteError, match=message):
                stream_image(streamed, data.shape, data.dtype, order, dtype=dtype)
            continue
        if not possible:
            assert extension != ".npy"
            with pytest.raises(ValueError, match="block by block"):
                stream_image(streamed, data.shape, data.dtype, order, dtype=dtype)
            continue
        write_image(whole, data, dtype=dtype, **options)
        for lengths in ((700,), (1,) * 40 + (3001,), (data.size,)):
            stream(streamed, data, order, *lengths, dtype=dtype, **options)
            assert contents(folders[0]) == contents(folders[1])


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_array_of_any_memory_order_gives_one_file(tmp_path, extension):
    data = values("f4", (13, 12, 11))
    files = []
    for whole in (data, np.ascontiguousarray(data), data[::-1].copy()[::-1], data.T.copy().T):
        write_image(tmp_path / f"o{extension}", whole)
        files.append(contents(tmp_path))
    assert extension == ".npy" or files == files[:1] * 4


@pytest.mark.parametrize("shape", [(5,), (1, 1, 7), (5, 1), (1,), (3, 4), (2, 3, 4, 5)])
def test_npy_files_are_those_of_numpy_in_either_order(tmp_path, shape):
    for order in "CF":
        data = values("f8", shape, order)
        np.save(tmp_path / "numpy.npy", data)
        stream(tmp_path / "ours.npy", data, order, 7)
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


@pytest.mark.parametrize("kind", ["f4", "i2", "u1"])
def test_what_is_compressed_comes_in_chunks_of_one_size_after_the_header(tmp_path, kind):
    """So that equal results are equal files, however they were computed."""
    data = values(kind, (40, 30, 11))
    stream(tmp_path / "o.nii", data)
    stream(tmp_path / "o.nii.gz", data, "F", 999)
    plain = (tmp_path / "o.nii").read_bytes()
    file = io.BytesIO()
    with igzip.IGzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as compressor:
        compressor.write(plain[:348])
        compressor.write(plain[348:352])
        for start in range(352, len(plain), CHUNK):
            compressor.write(plain[start : start + CHUNK])
    assert (tmp_path / "o.nii.gz").read_bytes() == file.getvalue()


def test_values_on_disk_are_rounded_and_those_that_do_not_fit_counted_at_the_end(tmp_path):
    for extension in (".nii", ".nii.gz", ".mgz", ".npy"):
        path = tmp_path / f"o{extension}"
        path.write_bytes(b"keep")
        data = np.linspace(-3, 3, 2000).astype("f4").reshape(20, 100, order="F")
        stream(path, data, dtype="i2")
        written = contents(tmp_path)
        data[::10] = np.nan
        data[3, 5] = 40000
        wrong = stream_image(path, data.shape, data.dtype, "F", dtype="i2")
        with wrong:
            for block in blocks(data):
                wrong.write(block)
            with pytest.raises(WriteError, match="201 of 2000 values are NaN or out of the range"):
                wrong.finish()
            with pytest.raises(ValueError, match="not all"):
                wrong.finish()
        assert contents(tmp_path) == written
        path.unlink()


# -- what can be streamed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "source", "order", "dtype", "expected"),
    [
        ("o.nii", (3, 4), "f4", "F", None, True),
        ("o.nii", (3, 4), "f4", "C", None, False),
        ("o.nii", (3, 1), "f4", "C", None, True),
        ("o.npy", (3, 4), "f4", "C", None, True),
        ("o.npy", (3, 4), "i8", "F", None, True),
        ("o.nii", (3, 4), "i8", "F", None, False),
        ("o.nii", (3, 4), "u8", "F", None, False),
        ("o.nii", (3, 4), "i8", "F", "i4", True),
        ("o.mgz", (3, 4), "u4", "F", None, False),
        ("o.nii", (3, 4), "u4", "F", None, True),
        ("o.npy", (), "f4", "C", None, False),
        ("o.nii", (), "f4", "C", None, False),
        ("o.npy", (3, 0), "f4", "C", None, False),
        ("o.ima", (3, 4), "f4", "F", None, False),
    ],
)
def test_it_is_known_beforehand_what_can_be_streamed(
    tmp_path, name, shape, source, order, dtype, expected
):
    assert can_stream(tmp_path / name, shape, np.dtype(source), order, dtype) is expected


@pytest.mark.parametrize(
    ("name", "shape", "source", "dtype", "message"),
    [
        ("o.nii", (3, 0), "f4", None, "is empty"),
        ("o.nii", (1,) * 8, "f4", None, "8 dimensions"),
        ("o.mgz", (1,) * 5, "f4", None, "5 dimensions"),
        ("o.npy", (3,), "O", None, "Python objects"),
        ("o.mgz", (3, 4), "f4", "f8", "no float64"),
        ("o.mgz", (3, 4), "c8", None, "can't hold complex64"),
        ("o.nii", (3, 4), "c8", "f4", "imaginary part"),
        ("o.npy", (3, 4), "f4", "?", "say which values are True"),
    ],
)
def test_what_no_file_can_hold_is_refused_beforehand_as_with_a_whole_array(
    tmp_path, name, shape, source, dtype, message
):
    data = np.zeros(shape, source)
    for attempt in (
        lambda: can_stream(tmp_path / name, shape, np.dtype(source), "F", dtype),
        lambda: stream_image(tmp_path / name, shape, np.dtype(source), "F", dtype=dtype),
        lambda: write_image(tmp_path / name, data, dtype=dtype),
    ):
        with pytest.raises(WriteError, match=message):
            attempt()
    assert names(tmp_path) == []


def test_a_path_that_cannot_be_written_to_is_refused_before_anything_is_touched(tmp_path):
    (tmp_path / "in.nii").write_bytes(b"keep")
    for path, message in [("in.nii", "is an input"), ("missing/o.nii", "make it first")]:
        with pytest.raises(WriteError, match=message):
            stream_image(tmp_path / path, (3,), np.dtype("f4"), "F", inputs=[tmp_path / "in.nii"])
    stream_image(tmp_path / "o.nii", (3,), np.dtype("f4"), "F")
    assert names(tmp_path) == ["in.nii"]


@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".npy"])
def test_a_file_is_not_finished_with_fewer_or_other_voxels_than_announced(tmp_path, extension):
    path = tmp_path / f"o{extension}"

    def opened() -> ImageStream:
        return stream_image(path, (30,), np.dtype("f4"), "F")

    with opened() as one:
        one.write(np.zeros(29, "f4"))
        with pytest.raises(ValueError, match="not all"):
            one.finish()
        with pytest.raises(ValueError, match="more values than announced"):
            one.write(np.zeros(2, "f4"))
        with pytest.raises(ValueError, match="not all"):
            one.finish()
    for wrong in (np.zeros(30, "f8"), np.zeros((15, 2), "f4")):
        with opened() as one, pytest.raises(ValueError, match="of one axis were announced"):
            one.write(wrong)
    assert names(tmp_path) == []


# -- the thread ---------------------------------------------------------------------------------


def test_the_caller_goes_on_while_a_chunk_is_compressed_and_waits_for_room_for_a_third():
    gate, passed = Gate(), []

    def slowly(data: Any) -> None:
        gate()
        passed.append(data.tobytes())

    behind = _sinks.Behind(slowly, 20, 100)
    for number in (1, 2, 3, 4):
        behind.write(np.full(10, number, np.uint8))
    gate.reached()
    assert passed == []  # and both chunks were taken
    waiting = Running(behind.write, np.full(1, 5, np.uint8))
    assert not waiting.done
    gate.open()
    waiting.result()
    behind.finish()
    assert b"".join(passed) == b"".join(bytes([n]) * 10 for n in (1, 2, 3, 4)) + b"\5"


class FullDisk:
    """In place of a compressor: the disk is full from the first chunk of a thread on."""

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __init__(self, file: Any) -> None:
        pass

    def write(self, data: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            raise self.error
        return len(data)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("chunks", [1.5, 2.5])
def test_what_fails_in_the_thread_is_raised_by_a_later_call_and_the_file_is_not_finished(
    tmp_path, monkeypatch, chunks
):
    monkeypatch.setattr(writing, "_gzip", FullDisk)
    path = tmp_path / "o.nii.gz"
    path.write_bytes(b"keep")
    chunk = np.zeros(CHUNK // 4, "f4")
    whole, rest = int(chunks), chunk[: chunk.size // 2]
    size = whole * chunk.size + rest.size
    with stream_image(path, (size,), chunk.dtype, "F") as opened:
        for _ in range(whole):
            opened.write(chunk)
        if whole == 1:
            opened.write(rest)
        with pytest.raises(WriteError, match=r"o\.nii\.gz: can't .*free some space") as caught:
            opened.finish() if whole == 1 else opened.write(rest)  # there is no room for a third
        assert caught.value.__cause__ is FullDisk.error
        with pytest.raises(ValueError, match="after an error"):
            opened.write(chunk)
        with pytest.raises(ValueError, match="not all"):
            opened.finish()
    assert contents(tmp_path) == {"o.nii.gz": b"keep"}


@pytest.mark.parametrize("told", [True, False])
def test_an_error_of_the_thread_is_in_no_cycle_with_the_memory_of_the_chunks(threads, told):
    """Which would stay until a collection."""

    def failing(data: Any) -> None:
        raise OSError("no more")

    def attempt() -> list[weakref.ref[Any]]:
        behind = _sinks.Behind(failing, 10, 100)
        watched = [weakref.ref(one) for one in (behind, *behind._buffers)]
        behind.write(np.zeros(10, np.uint8))
        if told:
            with suppress(OSError):
                behind.finish()
        behind.end()
        return watched

    gc.collect()
    gc.disable()
    try:
        watched = attempt()
        ended(threads)
        assert [one() for one in watched] == [None] * 3
    finally:
        gc.enable()


def test_the_block_is_left_when_its_thread_has_ended_and_then_the_file_is_closed(
    tmp_path, monkeypatch
):
    gate, log, waits = Gate(), [], queue.SimpleQueue()

    class Slow:
        def __init__(self, file: Any) -> None:
            pass

        def write(self, data: Any) -> int:
            if len(data) == CHUNK:
                gate()
                log.append("compressed")
            return len(data)

        def close(self) -> None:
            log.append("closed")

    def leave() -> None:
        with stream_image(tmp_path / "o.nii.gz", (CHUNK,), np.dtype("f4"), "F") as opened:
            opened.write(np.zeros(CHUNK // 4, "f4"))
            raise ZeroDivisionError

    def wait(task: Any) -> None:
        waits.put(None)
        until_over(task)

    until_over = _tasks.Task._until_over
    monkeypatch.setattr(_tasks.Task, "_until_over", wait)
    monkeypatch.setattr(writing, "_gzip", Slow)
    leaving = Running(leave)
    gate.reached()
    waits.get(timeout=SOON)
    gate.open()
    assert type(leaving.error()) is ZeroDivisionError
    assert log == ["compressed", "closed"]


def test_what_was_to_be_compressed_and_has_not_begun_never_is(tmp_path, monkeypatch):
    """A thread that comes up only when its caller has gone, after an interrupt, does nothing."""
    late: list[Callable[[], None]] = []
    start = lambda function, arguments: late.append(partial(function, *arguments))  # noqa: E731
    monkeypatch.setattr(_thread, "start_new_thread", start)
    passed: list[Any] = []
    behind = _sinks.Behind(passed.append, 10, 100)
    behind.write(np.zeros(10, np.uint8))
    behind.end()
    behind.end()
    (thread,) = late
    thread()
    assert passed == []


def test_without_a_thread_to_be_had_the_caller_compresses(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    data = values()
    write_image(tmp_path / "a.nii.gz", data)
    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    write_image(tmp_path / "b.nii.gz", data)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_small_and_uncompressed_files_take_no_thread(tmp_path, threads):
    write_image(tmp_path / "a.nii.gz", values("f4", (10, 10)))
    write_image(tmp_path / "b.nii", values())
    assert threads == []
    write_image(tmp_path / "c.nii.gz", values())
    assert 1 <= len(threads) <= values().nbytes // CHUNK


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", EXTENSIONS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError, GeneratorExit])
def test_an_error_of_the_caller_stays_what_it_is_and_leaves_the_old_file(
    tmp_path, extension, error
):
    path = tmp_path / f"o{extension}"
    data = values()
    write_image(path, values("i2"))
    before = contents(tmp_path)

    def attempt() -> None:
        with stream_image(path, data.shape, data.dtype, "F") as opened:
            for block in itertools.islice(blocks(data), 4):
                opened.write(block)
            assert any(name.startswith(".lazycache-") for name in names(tmp_path))
            raise error

    with pytest.raises(error) as caught:
        attempt()
    assert caught.type is error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_gets_its_name_is_whole_and_closed(tmp_path, monkeypatch, extension):
    moved = {}

    def looked_at(source: str, target: str) -> None:
        moved[Path(target).name] = Path(source).read_bytes()
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", looked_at)
    write_image(tmp_path / f"o{extension}", values())
    assert moved == contents(tmp_path)


@pytest.mark.parametrize("at", ["mkdir", "open"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_ends_the_beginning_leaves_nothing_even_while_the_error_is_kept(
    tmp_path, monkeypatch, at, error
):
    def mkdir(path: str, mode: int) -> None:
        make(path, mode)
        raise error

    def refuse(*_: Any) -> None:
        raise error

    make = os.mkdir
    if at == "mkdir":
        monkeypatch.setattr(os, "mkdir", mkdir)
    else:
        monkeypatch.setattr(writing, "open", refuse, raising=False)
    told = WriteError if error is OSError else error
    with pytest.raises(told) as kept:
        write_image(tmp_path / "o.nii.gz", values())
    assert names(tmp_path) == []
    with pytest.raises(told) as kept_too:
        write_image(tmp_path / "o.txt", values(), writer=refuse)
    assert names(tmp_path) == []
    del kept, kept_too


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_stream_that_is_forgotten_leaves_nothing(tmp_path, extension):
    data = values()

    def generator() -> Iterator[None]:
        with stream_image(tmp_path / f"o{extension}", data.shape, data.dtype, "F") as opened:
            for block in blocks(data):
                opened.write(block)
                yield
            opened.finish()

    forgotten = generator()
    for _ in range(4):
        next(forgotten)
    del forgotten
    gc.collect()
    assert names(tmp_path) == []
    finished = generator()
    assert len(list(finished)) == -(-data.size // 700)
    assert f"o{extension}" in names(tmp_path)


FORK = """
import os, sys, threading, warnings
import numpy as np
from lazycache.writing import stream_image, write_image

opened, forked = threading.Event(), threading.Event()
data = np.arange(30000, dtype="f4")

def write():
    with stream_image(sys.argv[1], data.shape, data.dtype, "F") as stream:
        stream.write(data[:100])
        opened.set()
        forked.wait(60)
        stream.write(data[100:])
        stream.finish()

thread = threading.Thread(target=write)
thread.start()
opened.wait(60)
warnings.simplefilter("ignore")  # threads and fork
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
forked.set()
thread.join()
write_image(sys.argv[2], data)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("extension", [".nii", ".nii.gz"])
def test_a_forked_child_that_ends_leaves_what_its_parent_is_writing(tmp_path, extension):
    in_a_process(FORK, tmp_path / f"a{extension}", tmp_path / f"b{extension}")
    assert names(tmp_path) == [f"a{extension}", f"b{extension}"]
    a, b = contents(tmp_path).values()
    assert a == b


FULL = """
import resource, sys
import numpy as np
from lazycache.errors import WriteError
from lazycache.writing import stream_image
block = np.random.default_rng(0).normal(size=1 << 17)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))  # as a quota that is used up
written = 0
with stream_image(sys.argv[1], (200, 1 << 17), block.dtype, "F", dtype="f4") as stream:
    try:
        for _ in range(200):
            stream.write(block)
            written += 1
        stream.finish()
    except WriteError as error:
        print(written, error)
"""


def in_a_process(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(writing.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the size of files are POSIX")
@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".img", ".mgz", ".npy"])
def test_a_full_disk_is_told_soon_and_leaves_the_old_file(tmp_path, extension):
    path = tmp_path / f"o{extension}"
    path.write_bytes(b"keep")
    written, _, message = in_a_process(FULL, path).partition(" ")
    assert message.startswith(f"{path}: can't be written: ")
    assert int(written) < 40  # not after all of the 200 were computed
    assert contents(tmp_path) == {path.name: b"keep"}


# -- interrupts ---------------------------------------------------------------------------------

TRACED = {module.__file__ for module in (_sinks, _tasks, _conversion, writing)}


class Interrupted:
    """Runs a function with a `KeyboardInterrupt` at the lines of these numbers of our code.

    The numbers are counted from the interrupt before. ``count`` is how many lines ran.
    """

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)
        self.count = 0
        self.since = 0
        self.where: list[str] = []
        self.tracing = self._trace

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        if self.where and frame.f_code is _sinks._remove.__code__:
            return None  # by a finalizer, which is the last that there is
        if event == "line":
            self.count += 1
            self.since += 1
            if self.numbers and self.since == self.numbers[0]:
                del self.numbers[0]
                self.since = 0
                self.where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return self.tracing

    def _again(self, *_: object) -> None:
        # Python ends the tracing with what is raised in it.
        if sys.gettrace() is None and self.numbers:
            sys.settrace(self.tracing)

    def run(self, function: Callable[[], None]) -> bool:
        """Whether it came to its end."""
        outer, hook = sys.gettrace(), sys.unraisablehook
        # An interrupt between the beginning of a `with np.errstate` and its block leaves it set.
        errors = np.geterr()
        sys.unraisablehook = lambda told: None  # an interrupt in a finalizer is only told
        gc.disable()  # finalizers of what was before would be traced
        sys.setprofile(self._again)
        sys.settrace(self.tracing)
        try:
            function()
        except KeyboardInterrupt:
            return False
        finally:
            sys.setprofile(None)
            sys.settrace(outer)
            gc.enable()
            sys.unraisablehook = hook
            np.seterr(**errors)
        return True


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".img", ".mgz"])
def test_an_interrupt_at_any_line_leaves_the_old_file_or_the_new_and_nothing_else(
    tmp_path, threads, extension
):
    path = tmp_path / f"o{extension}"
    data = values("f4", (17, 13, 12))
    write_image(path, data, dtype="i2")
    new = contents(tmp_path)
    write_image(path, values("u1", (5,)))
    old = contents(tmp_path)
    nibabel_image.holds(nib.Nifti1Header, data.dtype)  # what is imported once

    def attempt(*numbers: int) -> Interrupted:
        for name, content in old.items():
            (tmp_path / name).write_bytes(content)
        interrupted = Interrupted(*numbers)
        try:
            interrupted.run(lambda: stream(path, data, dtype="i2"))
            ended(threads)
            threads.clear()
            if len(names(tmp_path)) > len(old):
                gc.collect()  # a stream in a cycle with its own frames
            found = contents(tmp_path)
            if extension == ".img" and len(interrupted.where) and found["o.hdr"] == old["o.hdr"]:
                found["o.img"] = old["o.img"]  # the interrupt may be between the two
            assert found in (old, new)
        except BaseException as error:
            error.add_note(f"after interrupts at {interrupted.where}")
            raise
        return interrupted

    lines = attempt().count
    assert lines > 150
    assert contents(tmp_path) == new
    dice = random.Random(extension)
    for number in dice.sample(range(1, lines + 1), 150):
        attempt(number)
    for _ in range(100):  # an interrupt of what follows an interrupt
        attempt(dice.randint(1, lines), dice.randint(1, 20))


# -- memory -------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
import nibabel, isal.igzip, lazycache.nibabel_image
from lazycache.writing import stream_image, write_image

def kib(field):
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(field)))

path, source, dtype = sys.argv[1:4]
block = np.random.default_rng(0).normal(100, 15, 1 << 17).astype(source)
count = (500 << 20) // (block.size * max(block.itemsize, np.dtype(dtype).itemsize))
write_image(path, block[:100], dtype=dtype)  # what is made once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is the present again
before = kib("VmRSS")
with stream_image(path, (block.size, count), block.dtype, "F", dtype=dtype) as stream:
    for _ in range(count):
        stream.write(block)
    stream.finish()
print(kib("VmHWM") - before, stream.nbytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is Linux's")
@pytest.mark.parametrize(
    ("name", "source", "dtype"),
    [
        ("o.nii.gz", "f4", "f4"),
        ("o.nii.gz", "f8", "i2"),
        ("o.nii.gz", "f4", "f8"),
        ("o.nii", "f4", "f4"),
        ("o.nii", "f8", "f4"),
    ],
)
def test_500_mib_are_written_with_a_few_mib_and_no_more_than_is_said(tmp_path, name, source, dtype):
    grown, said = map(int, in_a_process(PEAK, tmp_path / name, source, dtype).split())
    assert grown < 16 << 10
    assert said <= 10 << 20
    assert grown << 10 <= said + (1 << 20)
    (tmp_path / name).unlink()
