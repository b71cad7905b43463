"""Results that go to image files: block by block as they are computed, or at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import execute, writing
from .cache import DataCache, forget_file
from .errors import WriteError
from .execute import Computed
from .expression import Info, Node, files_under
from .layout import Layout


class ImageFile:
    """An image or ``.npy`` file that one result goes to: an `execute.Output`.

    ``dtype`` is the type on disk; without it ``floats`` is that of floating results. ``each`` is
    called with all values, some at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dtype: DTypeLike | None = None,
        *,
        floats: DTypeLike | None = None,
        each: Callable[[NDArray[Any]], None] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.dtype = dtype
        self.floats = floats
        self.nbytes = 0
        self._each = each
        self._info = Info(None)
        self._inputs: list[str] = []
        self._stream: writing.ImageStream | None = None
        self._finished = False

    def check(self, inputs: list[str]) -> None:
        """Raise `WriteError` if nothing can be written there, or it is one of ``inputs``."""
        self._inputs = inputs
        writing.check_output(self.path, inputs)

    def takes(self, info: Info) -> bool:
        self._info = info
        layout, order = info.layout, _order(info.layout)
        if order is None:
            return False
        dtype = self._stored(layout.dtype)
        if not writing.can_stream(self.path, layout.shape, layout.dtype, order, dtype):
            return False
        self._stream = writing.stream_image(
            self.path,
            layout.shape,
            layout.dtype,
            order,
            affine=info.affine,
            header=info.header,
            dtype=dtype,
            inputs=self._inputs,
        )
        self.nbytes = self._stream.nbytes
        return True

    def __enter__(self) -> None:
        assert self._stream is not None
        self._stream.__enter__()

    def __exit__(self, *error: object) -> None:
        assert self._stream is not None
        self._stream.__exit__(*error)

    def write(self, flat: NDArray[Any]) -> None:
        assert self._stream is not None
        if self._each is not None:
            self._each(flat)
        self._stream.write(flat)

    def finish(self) -> None:
        assert self._stream is not None
        self._stream.finish()
        self._done()

    def write_whole(self, value: Any) -> None:
        """Write all of ``value``, unless that was done while it was computed."""
        if self._finished:
            return
        if not isinstance(value, np.ndarray | np.generic):
            raise TypeError(
                f"{self.path}: the result is no array, but a {type(value).__name__}: only arrays "
                "can be written"
            )
        if self._each is not None:
            self._each(np.asarray(value))
        affine, header = self._info.affine, self._info.header
        if self._info.layout is None:
            affine = affine if affine is not None else getattr(value, "affine", None)
            header = header if header is not None else getattr(value, "header", None)
        writing.write_image(
            self.path,
            value,
            affine=affine,
            header=header,
            dtype=self._stored(value.dtype),
            inputs=self._inputs,
        )
        self._done()

    def _stored(self, dtype: np.dtype[Any]) -> Any:
        return self.floats if self.dtype is None and dtype.kind == "f" else self.dtype

    def _done(self) -> None:
        self._finished = True
        forget_file(self.path)


def check_files(files: Iterable[ImageFile], roots: Iterable[Node]) -> None:
    """Raise `WriteError` for a file that can't be written, is an input, or is named twice."""
    inputs = [file for node in files_under(roots) for file in node.key.inputs]
    seen: set[str] = set()
    for file in files:
        file.check(inputs)
        place = os.path.realpath(file.path)
        if place in seen:
            raise WriteError(f"{file.path}: two results can't go to one file")
        seen.add(place)


def save(
    roots: Sequence[Node], files: Sequence[ImageFile | None], cache: DataCache, label: str = ""
) -> list[Computed]:
    """Compute ``roots`` in one plan, and write each to its file, where it has one.

    The files are those that `check_files` was asked about. If writing one fails, those
    that are complete by then stand, and the others are left as they were. What was
    only written has no value afterwards.
    """
    if not roots:
        return []
    outputs: dict[Node, list[ImageFile]] = {}
    for root, file in zip(roots, files, strict=True):
        if file is not None:
            outputs.setdefault(root, []).append(file)
    computed = execute.compute(roots, cache, label, outputs)
    for file, (value, _) in zip(files, computed, strict=True):
        if file is not None:
            file.write_whole(value)
    return computed


def _order(layout: Layout | None) -> Any:
    """The order of the axes of an array without gaps, as it lies in memory; None for others."""
    if layout is None or layout.scalar:
        return None
    lines = [
        (step, size) for step, size in zip(layout.strides, layout.shape, strict=True) if size != 1
    ]
    for order, axes in (("F", lines), ("C", lines[::-1])):
        step = layout.dtype.itemsize
        for stride, size in axes:
            if stride != step:
                break
            step *= size
        else:
            return order
    return None
