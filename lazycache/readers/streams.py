"""Reading a file forwards, compressed or not, straight into memory that the caller owns.

A stream has a position in the *decompressed* content. It goes forwards only; a plain file skips
for nothing, a compressed one decompresses and drops. Gzip goes through isal, which is two to three
times faster than zlib and lets go of the interpreter lock.

`decoders` keeps a few half-read compressed streams, so that the successive time points of a run
cost one pass over its file and not one pass each.
"""

from __future__ import annotations

import bz2
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lazycache.errors import TruncatedFileError, UnknownFormatError

from .base import checkpoint
from .files import damaged, truncated

STEP = 256 << 10
"""Bytes between two checkpoints: about half a millisecond of decompression, and fits in L2."""

_HEAD_CHUNK = 16 << 10

_State = tuple[int, int, int, int]


class Stream:
    """Content read forwards. Subclasses give `read`, and `close` what they opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.position = 0

    def read(self, most: int) -> bytes:
        """The next bytes, at most ``most``; none at the end of the content."""
        raise io.UnsupportedOperation("read")

    def close(self) -> None:
        """Let go of the file."""

    def finish(self) -> None:
        """Check what can be checked once the last byte of interest was read."""

    def readinto(self, view: memoryview) -> None:
        """Fill ``view`` from the position on; `TruncatedFileError` if the content ends first."""
        done = 0
        while done < len(view):
            piece = self._must_read(min(STEP, len(view) - done))
            view[done : done + len(piece)] = piece
            done += len(piece)

    def skip_to(self, position: int) -> None:
        """Go forwards to ``position``."""
        while self.position < position:
            self._must_read(min(STEP, position - self.position))

    def _must_read(self, most: int) -> bytes:
        piece = self.read(most)
        if not piece:
            raise truncated(self.path, "the data that its header announces")
        return piece


class PlainStream(Stream):
    """An uncompressed file."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    def read(self, most: int) -> bytes:
        piece = self._file.read(most) or b""
        self.position += len(piece)
        return piece

    def readinto(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            checkpoint()
            count = self._file.readinto(view[done : done + STEP])
            if not count:
                raise truncated(self.path, "the data that its header announces")
            done += count
            self.position += count

    def skip_to(self, position: int) -> None:
        self._file.seek(position)
        self.position = position

    def close(self) -> None:
        self._file.close()


class CompressedStream(Stream):
    """A gzip or bzip2 file: one member after the other, whatever follows the last one ignored."""

    def __init__(
        self, path: str, magic: bytes, decoder: Callable[[], Any], chunk: int = 64 << 10
    ) -> None:
        super().__init__(path)
        self._magic = magic
        self._chunk = chunk
        self._new_decoder = decoder
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.state = _state(os.fstat(self._file.fileno()))
            self._pending = self._file.read(chunk)
            if not self._pending.startswith(magic):
                raise UnknownFormatError(
                    f"{path}: its name says that it is compressed, its content is not; rename it"
                    " without the last extension, or compress it"
                )
        except BaseException:
            self._file.close()
            raise
        self._decoder = decoder()

    def read(self, most: int) -> bytes:
        while True:
            if self._decoder.eof and not self._next_member():
                return b""
            piece = self._step(most)
            if piece:
                return piece

    def finish(self) -> None:
        """Go on to the checksum at the end of the member, if it is near, and have it checked."""
        limit = self.position + STEP
        while not self._decoder.eof and self.position < limit:
            self._step(STEP)

    def close(self) -> None:
        self._file.close()

    def _step(self, most: int) -> bytes:
        """At most ``most`` bytes of content, or none where the decoder needs more to go on."""
        checkpoint()
        data = self._pending
        self._pending = b""
        if not data and self._decoder.needs_input:
            data = self._file.read(self._chunk)
            if not data:
                raise truncated(self.path, "the end of its compressed content")
        try:
            piece: bytes = self._decoder.decompress(data, most)
        except Exception as error:  # each library has its own class, and none says which file
            raise damaged(self.path, error) from error
        self.position += len(piece)
        return piece

    def _next_member(self) -> bool:
        rest = self._decoder.unused_data
        while len(rest) < len(self._magic) and (more := self._file.read(self._chunk)):
            rest += more
        if not rest.startswith(self._magic):
            return False
        self._decoder = self._new_decoder()
        self._pending = rest
        return True


def _gzip_decoder() -> Any:
    from isal import igzip_lib

    return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)


def is_compressed(path: str) -> bool:
    """Whether `open_stream` decompresses this file."""
    return path.lower().endswith((".gz", ".mgz", ".bz2"))


def open_stream(path: str, chunk: int = 64 << 10) -> Stream:
    """The content of a file, decompressed as its name says, ``chunk`` bytes of it at a time."""
    lower = path.lower()
    if lower.endswith((".gz", ".mgz")):
        return CompressedStream(path, b"\x1f\x8b", _gzip_decoder, chunk)
    if lower.endswith(".bz2"):
        return CompressedStream(path, b"BZh", bz2.BZ2Decompressor, chunk)
    return PlainStream(path)


def head_of(path: str, most: int) -> bytes:
    """The first bytes of the content, fewer than ``most`` if it ends before."""
    stream = open_stream(path, _HEAD_CHUNK)
    head = b""
    try:
        while len(head) < most and (piece := stream.read(most - len(head))):
            head += piece
    except TruncatedFileError:
        pass
    finally:
        stream.close()
    return head


def content_of(path: str) -> bytes:
    """All the content of a small file."""
    stream = open_stream(path)
    try:
        return b"".join(iter(lambda: stream.read(STEP), b""))
    finally:
        stream.close()


class Decoders:
    """Half-read compressed streams, waiting for somebody who wants what comes next.

    Whoever uses a stream has it alone: it is taken out, and put back afterwards. At most ``most``
    wait; the one that waited longest is closed.
    """

    def __init__(self, most: int = 4, opener: Callable[[str], Stream] = open_stream) -> None:
        self.most = most
        self._open = opener
        self._lock = threading.Lock()
        self._waiting: list[CompressedStream] = []

    @contextmanager
    def stream(self, path: str, start: int, end: int) -> Iterator[Stream]:
        """A stream of ``path`` that is not past ``start``; kept if it has not come to ``end``."""
        stream: Stream = self._take(path, start) or self._open(path)
        keep = False
        try:
            yield stream
            if stream.position >= end:
                stream.finish()
            else:
                keep = isinstance(stream, CompressedStream)
        finally:
            if keep and isinstance(stream, CompressedStream):
                self._put(stream)
            else:
                stream.close()

    def __len__(self) -> int:
        return len(self._waiting)

    def clear(self) -> None:
        """Close all that wait."""
        with self._lock:
            closing, self._waiting = self._waiting, []
        for stream in closing:
            stream.close()

    def forked(self) -> None:
        """In a child: a position in an open file is shared with the parent, so none is kept."""
        self._lock = threading.Lock()
        self.clear()

    def _take(self, path: str, start: int) -> CompressedStream | None:
        if not is_compressed(path):
            return None
        state = _state(os.stat(path))
        with self._lock:
            usable = [
                stream
                for stream in self._waiting
                if stream.path == path and stream.state == state and stream.position <= start
            ]
            if not usable:
                return None
            nearest = max(usable, key=lambda stream: stream.position)
            self._waiting.remove(nearest)
            return nearest

    def _put(self, stream: CompressedStream) -> None:
        with self._lock:
            self._waiting.append(stream)
            excess = self._waiting[: -self.most]
            del self._waiting[: -self.most]
        for old in excess:
            old.close()


def _state(state: os.stat_result) -> _State:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


decoders = Decoders()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=decoders.forked)
