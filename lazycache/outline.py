"""What is known of an expression before the first voxel is read.

An `Outline` lists the nodes that have to be read and computed, in an order in which operands come
first, with the layout, affine and header of each. Making one reads the headers of all files, in
parallel, and finds what can't go well: all missing files in one error, all operands whose shapes
or grids don't go together in another. Functions over lists are expanded into chains here, and a
part of a file is replaced by a cut from the whole where that needs no reading.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import queue
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from . import operations as ops
from ._frames import warn
from ._parts import sliced_affine
from ._volumes import is_known
from .axes import along_slowest
from .errors import (
    FileChangedError,
    FileChangedWarning,
    GridMismatchError,
    ReadError,
    ShapeMismatchError,
)
from .expression import (
    ONE,
    TWO,
    FileNode,
    Info,
    Node,
    OpNode,
    Slot,
    ValueNode,
    describe,
    walk,
)
from .grid import aligned_shapes, check_grids, listed, same_grid, says_place
from .layout import Layout, dense, hashable, infer, layout_of
from .source import FileKey, Key

_PROBING_THREADS = 8

Holds = Callable[[Key], bool]


class Outline:
    """See the module.

    ``nodes`` are in the order of execution, and ``steps`` those of them that have to be computed;
    ``values`` holds what was computed before and is still there. ``info`` knows every node, those
    that are only stood in for (``stand_in``) too.
    ``aligned`` says how many axes are put behind each operand of a node to bring its x, y, z below
    those of the others.
    """

    def __init__(self, roots: Sequence[Node], holds: Holds = lambda key: False) -> None:
        self.nodes: list[Node] = []
        self.values: dict[Node, Any] = {}
        self.info: dict[Node, Info] = {}
        self.aligned: dict[Node, tuple[int, ...]] = {}
        self._stand_ins: dict[Node, Node] = {}
        self._operands: dict[Node, tuple[Node, ...]] = {}
        self._layouts: dict[Node, Sequence[Layout | None]] = {}
        self._twins: dict[Any, OpNode] = {}
        self._files: dict[Key, FileNode] = {}
        self._kinds: dict[Any, int] = {}
        self._same: dict[Any, int] = {}  # kinds by identity, which is faster
        self._inferred: dict[Any, Layout | None] = {}
        self._holds = holds
        self._misshapen: list[str] = []
        self._misplaced: dict[str, list[tuple[str, Any, tuple[int, ...]]]] = {}
        self._walk(roots)
        self._report()
        self.steps = [n for n in self.nodes if isinstance(n, OpNode) and n not in self.values]
        self.uses = Counter(chain.from_iterable(map(self.operands, self.steps)))

    def stand_in(self, node: Node) -> Node:
        """The node that is computed in place of ``node``: itself, or what it was expanded to."""
        other = self._stand_ins.get(node)
        while other is not None:
            node, other = other, self._stand_ins.get(other)
        return node

    def operands(self, node: Node) -> tuple[Node, ...]:
        found = self._operands.get(node)
        if found is None:
            found = node.operands
            if not self._stand_ins.keys().isdisjoint(found):
                found = tuple(map(self.stand_in, found))
            self._operands[node] = found
        return found

    def layouts(self, node: Node) -> Sequence[Layout | None]:
        """The layouts of the operands of ``node``, with the axes that are put behind them."""
        found = self._layouts.get(node)
        if found is None:
            found = [self.info[operand].layout for operand in self.operands(node)]
            if node in self.aligned:
                found = _longer(found, self.aligned[node])
            self._layouts[node] = found
        return found

    def _walk(self, roots: Sequence[Node]) -> None:
        info, stand_ins = self.info, self._stand_ins
        entered: set[Node] = set()
        stack = list(roots)[::-1]
        while stack:
            node = stack[-1]
            if node in info:
                stack.pop()
            elif node not in entered:
                entered.add(node)
                other = self._replacement(node)
                if other is not None:
                    stand_ins[node] = other
                    stack.append(other)
                elif not self._known(node):
                    stack.extend([one for one in node.operands[::-1] if one not in info])
            elif node in stand_ins:
                info[node] = info[stand_ins[node]]
            else:
                assert isinstance(node, OpNode)
                other = self._expansion(node)
                if other is not None:
                    stand_ins[node] = other
                    stack.append(other)
                    continue
                kind = self._kind(node)
                # One found before may do the same to the same operands: it is computed for both.
                twin = node
                if kind is not None:
                    twin = self._twins.setdefault((kind, *self.operands(node)), node)
                if twin is node:
                    info[node] = self._infer(node, kind)
                    self.nodes.append(node)
                else:
                    stand_ins[node] = twin
                    info[node] = info[twin]

    def _kind(self, node: OpNode) -> int | None:
        """A number of the operation and its constants; None where those can't be hashed."""
        plain = node.kwargs is None and (node.args is ONE or node.args is TWO)
        same = (id(node.op), id(node.args), node.grid) if plain else None
        kind = self._same.get(same)
        if kind is None:
            constants = hashable((node.args, node.kwargs or {}, node.grid))
            try:
                kind = self._kinds.setdefault((node.op, constants), len(self._kinds))
            except TypeError:
                return None
            if plain:
                self._same[same] = kind
        return kind

    def _known(self, node: Node) -> bool:
        """Take a node that nothing has to be computed for; False if there is one to compute."""
        if isinstance(node, ValueNode):
            self.info[node] = Info(layout_of(node.value), node.affine, node.header, node.name)
        elif isinstance(node, FileNode):
            self.info[node] = file_info(node.key)
        else:
            assert isinstance(node, OpNode)
            result = node.result
            value = None if result is None else result.value
            if value is None:
                return False
            assert node.info is not None
            self.values[node] = value
            self.info[node] = node.info._replace(layout=layout_of(value))
        self.nodes.append(node)
        return True

    def _replacement(self, node: Node) -> Node | None:
        """What is read in place of a file: another proxy's node for the same data, where there is
        one; the cut from the whole, for a part that no reader reads or that is there already."""
        if not isinstance(node, FileNode):
            return None
        first = self._files.setdefault(node.key, node)
        if first is not node:
            return first
        if node.whole is None:
            return None
        if self._holds(node.key):
            return None
        if hasattr(node.key.reader, "read_part") and not self._holds(node.whole.key):
            return None
        return OpNode(ops.GETITEM, (node.whole,), (Slot(0), node.index))

    def _expansion(self, node: OpNode) -> Node | None:
        """The chain that does what ``node`` says, if there is one."""
        if node.op.family == "fold":
            return self._expand(node)
        if node.op.family != "reduce" or not node.operands:
            return None
        data = self.info[node.operands[0]].layout
        # Of all of a volume of AIMS it may be a method of its own.
        if data is None or (data.kind and (node.kwargs or {}).get("axis") is None):
            return None
        return along_slowest(node, data)

    def _expand(self, node: OpNode) -> Node:
        infos = [self.info[operand] for operand in node.operands]
        try:
            other = node.op.call(node, infos)
        except Exception as error:
            annotate(error, node)
            raise
        self._compare_grids(node, infos)
        assert isinstance(other, Node)
        return other

    def _infer(self, node: OpNode, kind: int | None) -> Info:
        infos = [self.info[operand] for operand in node.operands]
        layouts = [info.layout for info in infos]
        layout: Layout | None = None
        if None not in layouts:
            if node.op.family in ("map", "inplace") and len(layouts) > 1:
                layouts = self._align(node, infos, layouts)
                self._compare_grids(node, infos)
            try:
                layout = self._result(node, kind, layouts)
            except ShapeMismatchError as error:
                self._misshapen.append(_misfit(node, infos, error))
                layout = layouts[0]
            except Exception as error:
                annotate(error, node)
                raise
        affine, header, name = _space(node, infos)
        found = Info(layout, affine, header, name)
        # One for all of a chain: there may be very many.
        return infos[0] if infos and _same_info(found, infos[0]) else found

    def _result(self, node: OpNode, kind: int | None, layouts: list[Layout]) -> Layout | None:
        key = (kind, *layouts)
        if key in self._inferred:
            return self._inferred[key]
        found = infer(node.op, node.args, dict(node.kwargs or {}), layouts)
        if kind is not None:
            self._inferred[key] = found
        return found

    def _align(self, node: Node, infos: list[Info], layouts: list[Layout]) -> list[Layout]:
        if len({len(layout.shape) for layout in layouts}) == 1:
            return layouts
        placed = [
            (layout.shape, says_place(info.affine))
            for info, layout in zip(infos, layouts, strict=True)
        ]
        shapes = aligned_shapes(placed)
        more = tuple(
            len(shape) - len(layout.shape) for shape, layout in zip(shapes, layouts, strict=True)
        )
        extended = [layout for layout, extra in zip(layouts, more, strict=True) if extra]
        if not extended or any(layout.kind for layout in extended):
            return layouts
        self.aligned[node] = more
        return _longer(layouts, more)

    def _compare_grids(self, node: OpNode, infos: list[Info]) -> None:
        if node.grid == "ignore":
            return
        items = [
            (info.name, info.affine, info.layout.shape)
            for info in infos
            if info.affine is not None and info.layout is not None
        ]
        for item in items[1:]:
            # Parts of one image may well be shifted against each other: a gradient is made so.
            if item[0] != items[0][0] and not same_grid(item[1], items[0][1], item[2]):
                found = self._misplaced.setdefault(node.grid, [items[0]])
                found.append(item)

    def _report(self) -> None:
        grids: GridMismatchError | None = None
        for mode, items in self._misplaced.items():
            try:
                check_grids(items, mode)  # type: ignore[arg-type]
            except GridMismatchError as error:
                grids = error
        if self._misshapen:
            more = "" if grids is None else f". Besides, {grids}"
            raise ShapeMismatchError(
                f"shapes don't go together: {listed(self._misshapen)}{more}"
            ) from grids
        if grids is not None:
            raise grids


def _longer(layouts: Sequence[Any], more: Sequence[int]) -> list[Any]:
    """The layouts with as many axes of length 1 behind them as ``more`` says."""
    return [
        layout._replace(shape=layout.shape + (1,) * extra, strides=layout.strides + (0,) * extra)
        for layout, extra in zip(layouts, more, strict=True)
    ]


def _same_info(a: Info, b: Info) -> bool:
    return (
        a.layout == b.layout and a.affine is b.affine and a.header is b.header and a.name == b.name
    )


def file_info(key: FileKey) -> Info:
    """What the header of a file tells; raises what probing raises."""
    probe = key.probe()
    layout = None
    known = not probe.kind or is_known(probe.kind)
    if probe.shape is not None and probe.dtype is not None and known:
        layout = dense(probe.shape, probe.dtype, probe.order, probe.kind)
    # Of an object the header is what its own method gives.
    return Info(layout, probe.affine, None if probe.kind else probe.header, key.path)


def probe_all(files: Iterable[FileNode]) -> None:
    """Read the headers of all files, several at a time.

    Raises the error of a single bad file as it is, or one error that lists the first 20. Warns of
    files that changed since their proxy was pickled.
    """
    nodes = list(files)
    keys = list(dict.fromkeys(node.key for node in nodes))
    errors: dict[FileKey, Exception] = {}

    def look(key: FileKey) -> None:
        try:
            key.probe()
        except Exception as error:
            errors[key] = error

    if len(keys) < _PROBING_THREADS:
        for key in keys:
            look(key)
    else:
        _share_out(look, keys)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        found = [errors[key] for key in keys if key in errors]
        kind = ReadError
        if all(isinstance(error, FileNotFoundError) for error in found):
            kind = FileNotFoundError  # type: ignore[assignment]
            lines = [key.path for key in keys if key in errors]
            text = f"{len(found)} of {len(keys)} files don't exist: {listed(lines)}"
        else:
            lines = [str(error) for error in found]
            text = f"{len(found)} of {len(keys)} files can't be read: {listed(lines)}"
        raise kind(text) from found[0]
    for node in nodes:
        expected, node.expected = node.expected, None
        if expected is not None and expected != node.key.fingerprint:
            warn(
                f"{node.key.name} changed since the expression was pickled: the new data are used",
                FileChangedWarning,
            )


def _share_out(look: Callable[[FileKey], None], keys: Iterable[FileKey]) -> None:
    """``look`` at each of ``keys``, in several threads and in this one.

    No executor: its locks are taken by Python code, and an interrupt of that leaves them held, so
    that nobody would ever see its threads end.
    """
    left = deque(keys)
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                look(left.popleft())
        except IndexError:
            pass
        finally:
            ended.put(None)

    try:
        working = 1
        with contextlib.suppress(RuntimeError):  # no more threads: with those that there are
            for _ in range(_PROBING_THREADS - 1):
                _thread.start_new_thread(contextvars.copy_context().run, (work,))
                working += 1
        work()
        for _ in range(working):
            ended.get()
    finally:
        left.clear()


def check_unchanged(nodes: Iterable[Node]) -> None:
    """Raise `FileChangedError` where something that was computed would be so from other content."""
    for node in nodes:
        if not isinstance(node, OpNode) or node.seen is None:
            continue
        for key, fingerprint in node.seen.items():
            if key.fingerprint != fingerprint:
                raise FileChangedError(
                    f"{key.name} changed since {describe(node)} was computed, and its value is no "
                    f"longer in memory: write the expression again to compute it from the new file"
                )


def check_same(seen: Mapping[FileKey, Any], files: Iterable[FileNode]) -> None:
    """Raise `FileChangedError` where a file isn't any more what it was as the plan began.

    What is read tells that itself; but somebody else may have noticed it before, and what is known
    of the file is then of its new content.
    """
    for node in files:
        key = node.key
        try:
            same = key.fingerprint == seen[key]
        except OSError:
            same = False
        if not same:
            raise FileChangedError(
                f"{key.name} changed during the computation: run it again once nobody writes to it"
            )


def fingerprints(root: OpNode) -> dict[FileKey, Any]:
    """The state of each file that the value of ``root`` was computed from."""
    found: dict[FileKey, Any] = {}
    for node in walk([root], stop=lambda node: isinstance(node, OpNode) and node.seen is not None):
        if isinstance(node, FileNode):
            found[node.key] = node.key.fingerprint
        elif isinstance(node, OpNode) and node.seen is not None:
            found.update(node.seen)
    return found


def annotate(error: Exception, node: OpNode) -> None:
    """Note on ``error`` which operation failed, on what, and where it was written."""
    names = list(dict.fromkeys(describe(operand) for operand in node.operands))
    where = f", written at {node.where()}" if node.location else ""
    note = f"in {node.op.name} of {listed(names)}{where}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _misfit(node: OpNode, infos: Sequence[Info], error: Exception) -> str:
    parts = [
        f"{describe(operand)} {info.layout.shape}"
        for operand, info in zip(node.operands, infos, strict=True)
    ]
    where = f" ({node.op.name} at {node.where()})" if node.location else f" ({node.op.name})"
    return " and ".join(parts) + where


def _space(node: OpNode, infos: Sequence[Info]) -> tuple[Any, Any, str]:
    """The affine and header of a result, and the file that they are from."""
    nothing = (None, None, "")
    family = node.op.family
    if np.ndim((node.kwargs or {}).get("q", 0)):  # several percentiles, each an image
        return nothing
    if family in ("map", "inplace", "assign"):
        headed = (info for info in infos if info.affine is not None or info.header is not None)
        first = next(headed, None)
        return nothing if first is None else (first.affine, first.header, first.name)
    first = next((info for info in infos if info.affine is not None), None)
    if first is None or first.layout is None:
        return nothing
    ndim = len(first.layout.shape)
    if family == "view" and node.op is ops.GETITEM:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(item is None for item in index):
            return nothing
        return sliced_affine(first.affine, index, first.layout.shape), first.header, first.name
    if family in ("reduce", "join"):
        axis = (node.kwargs or {}).get("axis", None if family == "reduce" else 0)
        if axis is None or not ndim:
            return nothing
        size = ndim + (node.op is ops.STACK)
        axes = axis if isinstance(axis, tuple) else (axis,)
        if all(int(item) % size >= 3 for item in axes):
            return first.affine, first.header, first.name
    return nothing
