"""What is known of an expression before the first voxel is read.

An `Outline` lists the nodes that have to be read and computed, in an order in which operands come
first, with the layout, affine and header of each. Making one reads the headers of all files, in
parallel, and finds what can't go well: all missing files in one error, all operands whose shapes
or grids don't go together in another. Functions over lists are expanded into chains here, and a
part of a file is replaced by a cut from the whole where that needs no reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from . import operations as ops
from ._parts import sliced_affine
from .axes import along_slowest
from .errors import GridMismatchError, ShapeMismatchError
from .expression import (
    ONE,
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
from .headers import file_info
from .layout import Layout, has_gaps, hashable, infer, layout_of, without_gaps
from .source import Key

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
                expands = node.op.family in _EXPANDED or node.op is ops.ROUND
                other = self._expansion(node) if expands else None
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
        if node.op is ops.ROUND:
            return self._rounding(node)
        data = self.info[node.operands[0]].layout
        # Of all of a volume of AIMS it may be a method of its own.
        if data is None or (data.kind and (node.kwargs or {}).get("axis") is None):
            return None
        return along_slowest(node, data)

    def _rounding(self, node: OpNode) -> Node | None:
        """A chain for data that have gaps in NumPy, where that makes another memory order.

        Here they may have none: slices may be copies, and parts of files are read without gaps.
        """
        layout = self._in_numpy(node.operands[0])
        if layout is None or layout.dtype.hasobject or not has_gaps(layout):
            return None
        orders = [
            infer(node.op, node.args, dict(node.kwargs or {}), [one])
            for one in (layout, without_gaps(layout))
        ]
        if orders[0] == orders[1]:
            return None
        sorted_ = {"dtype": layout.dtype, "order": "C"}
        copy = OpNode(ops.COPY, node.operands, ONE, sorted_, node.location, "ignore")
        return OpNode(node.op, (copy,), node.args, node.kwargs, node.location, "ignore")

    def _in_numpy(self, node: Node) -> Layout | None:
        """The layout that NumPy gives the data: that of a view where ours may be a copy."""
        views: list[OpNode] = []
        while isinstance(node, OpNode) and node.op.family == "view" and node not in self.values:
            views.append(node)
            node = node.operands[0]
        info: Info | None = self.info.get(node)
        if isinstance(node, FileNode) and node.whole is not None:
            views.append(OpNode(ops.GETITEM, (node.whole,), (Slot(0), node.index)))
            info = file_info(node.whole.key)
        elif isinstance(node, OpNode) and node in self.values:
            info = node.info
        layout: Layout | None = None if info is None else info.layout
        for view in reversed(views):
            if layout is None:
                return None
            layout = infer(view.op, view.args, dict(view.kwargs or {}), [layout])
        return layout

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
        extended = [info for info, extra in zip(infos, more, strict=True) if extra]
        # Volumes of AIMS have no other axes put behind their own.
        return more if extended and not any(info.layout.kind for info in extended) else ()

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
