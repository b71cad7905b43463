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
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from . import operations as ops
from ._frames import warn
from ._parts import sliced_affine
from .axes import along_slowest
from .errors import (
    FileChangedError,
    FileChangedWarning,
    GridMismatchError,
    ReadError,
    ShapeMismatchError,
)
from .expression import (
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

# The families of which some operations are expanded into chains.
_EXPANDED = frozenset({"fold", "reduce"})


@dataclass(eq=False, slots=True)
class Case:
    """What is the same for all steps that do the same to operands of the same layouts.

    ``step`` is one of them. ``layouts`` are those of its operands, with the axes that are put
    behind them.
    """

    step: OpNode
    layouts: Sequence[Layout | None]
    result: Layout | None


class _Known(NamedTuple):
    """What was found out of a step from what is known of its operands."""

    info: Info
    case: Case
    aligned: tuple[int, ...]


class Outline:
    """Made of ``nodes``, operands first; see the module.

    ``nodes`` are in the order of execution, and ``steps`` those of them that have to be computed;
    ``values`` holds what was computed before and is still there. ``info`` knows every node, those
    that are only stood in for (``stand_in``) too; ``cases`` and ``files`` every step, and the
    latter the files among its operands, where there are any.
    ``aligned`` says how many axes are put behind each operand of a node to bring its x, y, z below
    those of the others.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        values: dict[Node, Any],
        holds: Holds = lambda key: False,
    ) -> None:
        self.nodes: list[Node] = []
        self.steps: list[OpNode] = []
        self.values = values
        self.info: dict[Node, Info] = {}
        self.cases: dict[Node, Case] = {}
        self.files: dict[Node, tuple[FileNode, ...]] = {}
        self.aligned: dict[Node, tuple[int, ...]] = {}
        self._stand_ins: dict[Node, Node] = {}
        self._operands: dict[Node, tuple[Node, ...]] = {}  # where others stand in for some
        self._twins: dict[Any, OpNode] = {}
        self._first: dict[Key, FileNode] = {}
        self._kinds: dict[Any, int] = {}
        self._same: dict[Any, int] = {}  # kinds by identity, which is faster
        self._known: dict[Any, _Known] = {}  # by the identity of what is known of the operands
        self._cases: dict[Any, Case] = {}
        self._holds = holds
        self._misshapen: list[str] = []
        self._misplaced: dict[str, list[tuple[str, Any, tuple[int, ...]]]] = {}
        self._take(nodes)
        self._report()
        self.uses = Counter(chain.from_iterable(map(self.operands, self.steps)))

    def stand_in(self, node: Node) -> Node:
        """The node that is computed in place of ``node``: itself, or what it was expanded to."""
        other = self._stand_ins.get(node)
        while other is not None:
            node, other = other, self._stand_ins.get(other)
        return node

    def operands(self, node: Node) -> tuple[Node, ...]:
        return self._operands.get(node, node.operands)

    def layouts(self, node: Node) -> Sequence[Layout | None]:
        """The layouts of the operands of a step, with the axes that are put behind them."""
        return self.cases[node].layouts

    def _take(self, nodes: Iterable[Node]) -> None:
        """Take ``nodes``, whose operands come first, and what stands in for them."""
        info, stand_ins = self.info, self._stand_ins
        for node in nodes:
            if node in info:
                continue
            if not isinstance(node, OpNode) or node in self.values:
                other = self._take_source(node)
            else:
                operands = node.operands
                if stand_ins and not stand_ins.keys().isdisjoint(operands):
                    operands = self._operands[node] = tuple(map(self.stand_in, operands))
                other = self._expansion(node) if node.op.family in _EXPANDED else None
                other = other or self._take_step(node, operands)
            if other is not None:
                stand_ins[node] = other
                self._take(walk([other], stop=info.__contains__))
                info[node] = info[other]

    def _kind(self, node: OpNode) -> int | None:
        """A number of the operation and its constants; None where those can't be hashed."""
        same = (id(node.op), id(node.args), id(node.kwargs), node.grid)
        kind = self._same.get(same)
        if kind is None:
            constants = hashable((node.args, node.kwargs or {}, node.grid))
            try:
                kind = self._kinds.setdefault((node.op, constants), len(self._kinds))
            except TypeError:
                return None
            self._same[same] = kind
        return kind

    def _take_source(self, node: Node) -> Node | None:
        """Take a node that nothing has to be computed for; or the one that stands in for it."""
        if isinstance(node, ValueNode):
            self.info[node] = Info(layout_of(node.value), node.affine, node.header, node.name)
        elif isinstance(node, FileNode):
            other = self._replacement(node)
            if other is not None:
                return other
            self.info[node] = file_info(node.key)
        else:
            assert isinstance(node, OpNode)
            assert node.info is not None
            self.info[node] = node.info._replace(layout=layout_of(self.values[node]))
        self.nodes.append(node)
        return None

    def _take_step(self, node: OpNode, operands: tuple[Node, ...]) -> Node | None:
        """Take a node that has to be computed; or the one that does the same already."""
        kind = self._kind(node)
        known = None
        if kind is not None:
            twin = self._twins.setdefault(_same(kind, operands), node)
            if twin is not node:
                return twin
            info = self.info
            same = (kind, *[id(info[operand]) for operand in operands])
            known = self._known.get(same)
        if known is None:
            known = self._infer(node, kind)
            if kind is not None and not self._misshapen:
                self._known[same] = known
        self.info[node], self.cases[node], aligned = known
        if aligned:
            self.aligned[node] = aligned
        self.nodes.append(node)
        self.steps.append(node)
        if self._first:
            files = [one for one in operands if isinstance(one, FileNode)]
            if files:
                self.files[node] = tuple(dict.fromkeys(files))
        return None

    def _replacement(self, node: FileNode) -> Node | None:
        """What is read in place of a file: another proxy's node for the same data, where there is
        one; the cut from the whole, for a part that no reader reads or that is there already."""
        first = self._first.setdefault(node.key, node)
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
        if not node.operands:
            return None
        data = self.info[node.operands[0]].layout
        return None if data is None else along_slowest(node, data)

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

    def _infer(self, node: OpNode, kind: int | None) -> _Known:
        infos = [self.info[operand] for operand in node.operands]
        layouts = [info.layout for info in infos]
        aligned: tuple[int, ...] = ()
        if None in layouts:
            case = Case(node, layouts, None)
        else:
            if node.op.family in ("map", "inplace") and len(layouts) > 1:
                aligned = self._align(infos)
                self._compare_grids(node, infos)
            try:
                case = self._case(node, kind, layouts, aligned)
            except ShapeMismatchError as error:
                self._misshapen.append(_misfit(node, infos, error))
                case = Case(node, layouts, layouts[0])
            except Exception as error:
                annotate(error, node)
                raise
        info = Info(case.result, *_space(node, infos))
        # One for all of a chain: there may be very many.
        if infos and _same_info(info, infos[0]):
            info = infos[0]
        return _Known(info, case, aligned)

    def _case(
        self, node: OpNode, kind: int | None, layouts: list[Layout], aligned: tuple[int, ...]
    ) -> Case:
        key = (kind, aligned, *layouts)
        found = self._cases.get(key)
        if found is None:
            longer = _longer(layouts, aligned) if aligned else layouts
            result = infer(node.op, node.args, dict(node.kwargs or {}), longer)
            found = Case(node, longer, result)
            if kind is not None:
                self._cases[key] = found
        return found

    def _align(self, infos: list[Info]) -> tuple[int, ...]:
        """How many axes are put behind each operand; empty where none are."""
        ndims = [len(info.layout.shape) for info in infos]
        if min(ndims) == max(ndims):
            return ()
        placed = [(info.layout.shape, says_place(info.affine)) for info in infos]
        more = tuple(
            len(shape) - ndim for shape, ndim in zip(aligned_shapes(placed), ndims, strict=True)
        )
        return more if any(more) else ()

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


def _same(kind: int, operands: tuple[Node, ...]) -> Any:
    """What is equal for nodes of one kind and the same operands, as long as those live."""
    if len(operands) != 2:
        return (kind, *operands)
    # There may be very many: numbers, unlike tuples, are nothing to the garbage collector.
    left, right = operands
    return (kind << 64 | id(left)) << 64 | id(right)


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
    if probe.shape is not None and probe.dtype is not None and not probe.kind:
        layout = dense(probe.shape, probe.dtype, probe.order)
    # Of an object the header is what its own method gives.
    return Info(layout, probe.affine, None if probe.kind else probe.header, key.title)


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
    place = getattr(node.op.call, "place", None)
    if place is not None:  # it was brought elsewhere
        return place  # type: ignore[no-any-return]
    family = node.op.family
    if node.kwargs and np.ndim(node.kwargs.get("q", 0)):  # several percentiles, each an image
        return nothing
    first = next((info for info in infos if info.affine is not None), None)
    if family in ("map", "inplace", "assign"):
        if first is None:
            first = next((info for info in infos if info.header is not None), None)
        return nothing if first is None else (first.affine, first.header, first.name)
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
