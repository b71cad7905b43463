"""Running a block stage: from one block to the next, while threads read the files ahead.

Each file is read by one thread at a time, one piece ahead of the steps.
The steps of a block run in the calling thread, in their order, so that every element sees the same
operations in the same order as with whole arrays. While it has to wait for a file it reads others.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._cycles import served
from ._flight import name_file
from ._tasks import Task, Threads, end_all
from ._volumes import array_of
from .cache import DataCache
from .expression import FileNode, Node, OpNode, fill
from .outline import Outline, annotate
from .program import Array, Stage
from .readers.base import cancellable
from .source import FileBlocks
from .spaces import Way, place_of, row, slab
from .totals import Total
from .wrapping import Bounds

Row = NDArray[Any]


class Sink(Protocol):
    """Where the values of a step go, block by block; it takes ``nbytes`` of memory at most."""

    nbytes: int

    def write(self, flat: Row) -> None: ...


class Feed:
    """One file, read a piece ahead of the steps into two buffers in turn; or opened anew for each
    piece, with one buffer."""

    def __init__(self, node: FileNode, longest: int, reopened: bool, threads: Threads) -> None:
        dtype = node.key.probe().dtype
        self.node = node
        self.seconds = 0.0
        self._buffers = [np.empty(longest, dtype) for _ in range(1 if reopened else 2)]
        self._reopened = reopened
        self._threads = threads
        self._context = contextvars.copy_context()
        self._context.run(served.set, threading.get_ident())
        self._source: FileBlocks | None = None
        self._target = self._buffers[0]
        self._task: Task | None = None
        self._closed = False

    def ask(self, start: int, stop: int) -> None:
        """Have the elements from ``start`` to ``stop`` read: those after what was read before."""
        self._buffers.reverse()
        self._target = self._buffers[0][: stop - start]
        self._task = Task(partial(self._context.run, self._read, self._target, start))
        self._threads.ask(self._task)

    def _read(self, target: Row, start: int) -> None:
        started = time.monotonic()
        try:
            with cancellable(lambda: self._closed or self._threads.in_vain):
                if self._source is None:
                    self._source = self.node.key.open_blocks()
                    if start:
                        self._source.skip(start)
                self._source.into(target)
                if self._reopened:
                    self.finish()
                    self._close_source()
        except Exception as error:
            name_file(error, self.node.key)
            raise
        finally:
            if self._closed:
                self._close_source()
        self.seconds += time.monotonic() - started

    def take(self) -> Row:
        """What was asked for; raises what reading it raised."""
        assert self._task is not None
        self._threads.wait(self._task)
        self._task = None
        return self._target

    def finish(self) -> None:
        """See that the file is still the one that it was at the beginning."""
        if self._source is not None:
            self._source.finish()

    def close(self) -> None:
        """Wait for the thread that reads, if any, and let go of the file.

        It stops soon, and lets go itself if an interrupt ends the wait.
        """
        self._closed = True
        if self._task is not None:
            self._task.end()
            self._task = None
        self._close_source()

    def __del__(self) -> None:
        with suppress(Exception):
            self._close_source()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None


class BlockRun:
    """One run over the blocks of a stage.

    ``values`` has the data of all operands that are there before; those in ``own`` may be written
    over where the stage says so. ``sinks`` are given the values of the steps that go to disk.
    """

    def __init__(
        self,
        stage: Stage,
        outline: Outline,
        values: dict[Node, Any],
        own: set[Node],
        bounds: Bounds,
        sinks: Mapping[Node, Sequence[Sink]],
        threads: Threads,
        cache: DataCache,
    ) -> None:
        assert stage.space is not None
        self.stage = stage
        self.outline = outline
        self.bounds = bounds
        self.sinks = {step: sinks[step] for step in stage.written}
        self.cache = cache
        self.longest = stage.longest
        self.size = stage.space.size
        self.spans = [(piece[0][0], piece[-1][1]) for piece in stage.pieces]
        longest = max(stop - start for start, stop in self.spans)
        self.feeds = {node: Feed(node, longest, stage.reopened, threads) for node in stage.files}
        self.arrays: dict[Array, NDArray[Any]] = {}
        self.rows: dict[Any, Row] = {}  # of whole arrays: operands, and what results are put into
        self.buffers: dict[Array, Row] = {}
        self.totals: dict[OpNode, Total] = {}
        for step in stage.steps:
            array = stage.arrays[step]
            if array in self.arrays or array in self.buffers:
                continue
            if array.node in own:
                self.arrays[array] = values[array.node]
            elif array.result is not None or stage.ways[step].kind != "each":
                self.arrays[array] = outline.info[step].layout.empty()
            else:
                self.buffers[array] = np.empty(0, array.dtype)
        self.rows.update((array, row(whole)) for array, whole in self.arrays.items())
        inside = set(stage.steps)
        for (_, node), period in stage.periods.items():
            if node not in inside and node not in self.feeds and (node, period) not in self.rows:
                self.rows[node, period] = self._operand(values[node], period)

    def _operand(self, value: Any, period: int) -> Any:
        value = array_of(value)
        if not isinstance(value, np.ndarray):
            return value
        whole = row(value)
        return np.tile(whole, self.longest // period) if 1 < period < self.longest else whole

    def run(self) -> dict[Node, NDArray[Any]]:
        """The outputs of the stage. Raises what reading, computing and writing raise."""
        try:
            if not self.stage.reopened:
                self._ask(self.spans[0])
            following = [*self.spans[1:], None]
            for piece, span, after in zip(self.stage.pieces, self.spans, following, strict=True):
                if self.stage.reopened:
                    self._ask(span)
                    after = None
                read: dict[Node, Row] = {}
                for start, stop in piece:
                    self.bounds.known.clear()
                    self._block(start, stop, span[0], read, after)
                if self.stage.reopened:
                    self._count_loads()
            if not self.stage.reopened:
                self._count_loads()
        finally:
            end_all(feed.close for feed in self.feeds.values())
        found = {step: self.arrays[self.stage.arrays[step]] for step in self.stage.outputs}
        scalars = {step for step in found if self.outline.info[step].layout.scalar}
        return {step: array[()] if step in scalars else array for step, array in found.items()}

    def _ask(self, span: tuple[int, int]) -> None:
        for feed in self.feeds.values():
            feed.ask(*span)

    def _count_loads(self) -> None:
        for node, feed in self.feeds.items():
            self._checked(feed, feed.finish)
            self.cache.count_load(node.key, node.key.probe().nbytes, feed.seconds)
            feed.seconds = 0.0

    def _block(
        self,
        start: int,
        stop: int,
        base: int,
        read: dict[Node, Row],
        after: tuple[int, int] | None,
    ) -> None:
        """Do all steps for one block of the piece that begins at ``base``.

        What is taken of the files goes to ``read``, and what comes ``after`` is asked for then.
        """
        values: dict[Node, Any] = {}
        for step in self.stage.steps:
            operands = self.outline.operands(step)
            try:
                for node in operands:
                    if node in self.feeds and node not in values:
                        if node not in read:
                            read[node] = self._take(self.feeds[node], after)
                        values[node] = read[node][start - base : stop - base]
                inputs = [
                    values[node] if node in values else self._cut(step, node, start, stop)
                    for node in operands
                ]
                self.bounds.before(step, operands, inputs)
                values[step] = self._apply(step, inputs, start, stop)
            except Exception as error:
                annotate(error, step)
                raise
            for sink in self.sinks.get(step, ()):
                sink.write(values[step])

    def _take(self, feed: Feed, after: tuple[int, int] | None) -> Row:
        found: Row = self._checked(feed, feed.take)
        if after is not None:
            feed.ask(*after)
        return found

    def _checked(self, feed: Feed, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception:
            self.cache.count_failure(feed.node.key)
            raise

    def _cut(self, step: OpNode, node: Node, start: int, stop: int) -> Any:
        period = self.stage.periods[step, node]
        whole = self.rows[node, period]
        if not isinstance(whole, np.ndarray) or period == 1:
            return whole
        if period < self.longest:
            return whole[: stop - start]
        return whole[start % period : start % period + stop - start]

    def _apply(self, step: OpNode, inputs: list[Any], start: int, stop: int) -> Any:
        match self.stage.ways[step]:
            case Way(kind="each"):
                return self._each(step, inputs, start, stop)
            case Way(kind="fold", unit=unit):
                return self._fold(step, inputs, start, stop, unit)
            case Way(kind="total"):
                return self._total(step, inputs, stop)
            case Way(kind="slab", unit=unit):
                return self._slab(step, inputs, start // unit, stop // unit)
            case Way(kind="rows", unit=unit):
                whole = self.rows[self.stage.arrays[step]].reshape(-1, unit)
                assert step.op.into is not None
                return step.op.into(whole[:, start:stop].T, *fill(step.args, inputs))

    def _each(self, step: OpNode, inputs: list[Any], start: int, stop: int) -> Row:
        op, kwargs = step.op, dict(step.kwargs or {})
        target = self._target(self.stage.arrays[step], start, stop)
        if op.family == "inplace":
            if not np.may_share_memory(target, inputs[0]):
                np.copyto(target, inputs[0])
            op.call(*fill(step.args, [target, *inputs[1:]]), **kwargs)
            return target
        arguments = fill(step.args, inputs)
        if op.into is not None:
            op.into(target, *arguments, **kwargs)
        else:
            np.copyto(target, op.call(*arguments, **kwargs))
        return target

    def _fold(self, step: OpNode, inputs: list[Any], start: int, stop: int, unit: int) -> None:
        whole = self.rows[self.stage.arrays[step]]
        at = start
        while at < stop:
            count = min(stop - at, unit - at % unit)
            terms = [
                value[at - start : at - start + count] if np.ndim(value) else value
                for value in inputs
            ]
            folding: Any = step.op.call
            folding.fold(whole[at % unit : at % unit + count], at < unit, *terms)
            at += count

    def _total(self, step: OpNode, inputs: list[Any], stop: int) -> None:
        """Take a block, the last of which completes the result."""
        whole = self.arrays[self.stage.arrays[step]]
        fold: Any = step.op.call
        terms = fold.terms(*inputs)
        size = self.size
        if step not in self.totals:
            self.totals[step] = fold.total(size, terms.dtype, whole.dtype)
        self.totals[step].take(terms)
        if stop == size:
            whole[...] = self.totals.pop(step).value

    def _slab(self, step: OpNode, inputs: list[Any], start: int, stop: int) -> None:
        assert self.stage.space is not None
        [layout] = self.outline.layouts(step)
        assert layout is not None
        axis = self.stage.space.axes[-1][0]
        kwargs = dict(step.kwargs or {})
        value = step.op.call(
            *fill(step.args, [slab(inputs[0], layout, axis, stop - start)]), **kwargs
        )
        whole = self.arrays[self.stage.arrays[step]]
        place = place_of(axis, layout, whole.ndim, kwargs)
        np.copyto(whole[(slice(None),) * place + (slice(start, stop),)], value)

    def _target(self, array: Array, start: int, stop: int) -> Row:
        if array in self.arrays:
            return self.rows[array][start:stop]
        buffer = self.buffers[array]
        if not buffer.size:
            buffer = self.buffers[array] = np.empty(self.longest, array.dtype)
        return buffer[: stop - start]
