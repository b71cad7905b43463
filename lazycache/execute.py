"""Expressions computed under a cache: one step after the other, in the order of an `Outline`.

Each step pins the files that it reads, for as long as it runs (or as long as its result is a view
of one); a temporary goes as soon as the last step that uses it is over, and is written over by
that step where the value is exactly the same. So ``sum(volumes)`` takes two volumes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._buffers import LARGE, let_go, owner_of
from .cache import DataCache
from .expression import (
    FileNode,
    Node,
    OpNode,
    ValueNode,
    copy_of,
    describe,
    fill,
    walk,
)
from .layout import Layout, infer, layout_of, transient
from .outline import Outline, check_same, check_unchanged, explain, fingerprints, probe_all
from .source import Key, Result
from .wrapping import Bounds

if TYPE_CHECKING:
    from ._operation import Operation


class Computed(NamedTuple):
    """A value, and the `Result` that keeps it for whoever holds that (None for plain data)."""

    value: Any
    result: Result | None


def compute(roots: Sequence[Node], cache: DataCache, label: str = "") -> list[Computed]:
    """The values of ``roots``, computed together: what they share is computed once.

    Before the first voxel is read the headers of all files are; errors found there are raised
    with nothing read. An error of a later step says the operation, its operands and the line
    where it was written. After an error nothing is kept, and the expression can be computed again.
    """
    outline = prepare(roots, cache)
    # Before anything is read: a change that somebody notices meanwhile is one of other content.
    seen = {root: fingerprints(root) for root in roots if isinstance(root, OpNode)}
    run = _Run(outline, roots, cache)
    computed = run.execute(label or f"computing {describe(roots[0])}")
    for root, (_, result) in zip(roots, computed, strict=True):
        if result is not None and isinstance(root, OpNode) and root not in outline.values:
            root.remember(result, outline.info[root], seen[root])
    run.bounds.warn()
    return computed


def prepare(roots: Sequence[Node], cache: DataCache) -> Outline:
    """The outline of ``roots``, from headers that are looked at again; what changed is noticed."""
    nodes = list(walk(roots, stop=available))
    files = [node for node in nodes if isinstance(node, FileNode)]
    wholes = [node.whole for node in files if node.whole is not None]
    cache.verify(dict.fromkeys(node.key for node in [*files, *wholes]))
    for node in files:
        node.looked = True
    probe_all(files)
    check_unchanged(node for node in nodes if not available(node))
    return Outline(roots, cache.holds)


def available(node: Node) -> bool:
    """Whether the value of an operation was computed before and is still there."""
    result = node.result if isinstance(node, OpNode) else None
    return result is not None and result.value is not None


def adopt(node: ValueNode, cache: DataCache) -> None:
    """Charge data in memory to ``cache``, unless a cache was charged before."""
    if not node.adopted:
        node.value = cache.adopt(node.value, node.name)
        node.adopted = True


class _Run:
    """One execution of an outline."""

    def __init__(self, outline: Outline, roots: Sequence[Node], cache: DataCache) -> None:
        self.outline = outline
        self.asked = roots
        self.roots = [outline.stand_in(root) for root in roots]
        self.cache = cache
        self.values: dict[Node, Any] = dict(outline.values)
        self.steps = [
            node
            for node in outline.nodes
            if isinstance(node, OpNode) and node not in outline.values
        ]
        # How many uses of each node are still to come; a root is used by whoever asked for it.
        self.left: Counter[Node] = Counter(self.roots)
        for step in self.steps:
            self.left.update(outline.operands(step))
        self.executed: Counter[FileNode] = Counter()
        # Files whose memory a temporary is a view of, pinned as long as any such temporary lives.
        self.borrowed: dict[Node, list[_Loan]] = {}
        # Temporaries that share their memory with nothing else.
        self.own: set[Node] = set()
        self.bounds = Bounds(outline)
        files = [node for node in outline.nodes if isinstance(node, FileNode)]
        self.fingerprints = {node.key: node.key.fingerprint for node in files}

    def execute(self, label: str) -> list[Computed]:
        self._adopt_constants()
        workspace, room = self._simulate()
        order = [key for step in self.steps for key in self._files(step)]
        # Not the files that are asked for themselves: whoever has their data may come again.
        started = time.perf_counter()
        try:
            with self.cache.operation(
                label, workspace=workspace, room=room, order=order
            ) as operation:
                try:
                    for step in self.steps:
                        self._step(step, operation)
                    cost = time.perf_counter() - started
                    computed = {
                        root: self._hand_out(root, node, operation, cost)
                        for root, node in dict(zip(self.asked, self.roots, strict=True)).items()
                    }
                    return [computed[root] for root in self.asked]
                except BaseException as error:
                    # Before the operation gives back the bytes.
                    self.values.clear()
                    self.outline.values.clear()
                    let_go(error)
                    raise
        finally:
            self.values.clear()
            for node, uses in self.executed.items():
                if node.handle.nops:
                    self.cache.used_up(node.handle, uses)

    def _adopt_constants(self) -> None:
        for node in self.outline.nodes:
            if isinstance(node, ValueNode):
                adopt(node, self.cache)
                self.values[node] = node.value

    def _files(self, step: OpNode) -> list[Key]:
        operands = dict.fromkeys(self.outline.operands(step))
        return list(dict.fromkeys(node.key for node in operands if isinstance(node, FileNode)))

    # Foretelling

    def _simulate(self) -> tuple[int, int]:
        """The most bytes of temporaries and results at once, and of files pinned at once."""
        left = Counter(self.left)
        sizes: dict[Node, int] = {}  # of the memory that each living temporary answers for
        pinned: dict[Node, set[Key]] = {}
        own: set[Node] = set()  # what `self.own` will be
        current = most = room = 0
        for step in self.steps:
            operands = self.outline.operands(step)
            layouts = [self.outline.info[operand].layout for operand in operands]
            result = self.outline.info[step].layout
            keys = set(self._files(step))
            size = 0 if result is None else result.nbytes
            heir = self._heir(step, operands, layouts, result, left, own)
            if step.op.family == "view" and heir is not None:
                pinned[step] = keys.union(*(pinned.get(operand, ()) for operand in operands))
                own.discard(heir)
            else:
                own.add(step)
            new = size if heir is None else 0
            extra = 0 if None in layouts else transient(step, layouts, result)
            # What this step reads, with what reading takes besides, and what stays pinned.
            lent = set[Key]().union(*pinned.values()) - keys
            peak = sum(key.estimate()[1] for key in keys)
            room = max(room, peak + sum(key.estimate()[0] for key in lent))
            most = max(most, current + new + extra)
            sizes[step] = new if heir is None else sizes.get(heir, 0)
            current += new
            for operand in operands:
                left[operand] -= 1
                if not left[operand]:
                    pinned.pop(operand, None)
                    freed = sizes.pop(operand, 0)
                    if operand is not heir:
                        current -= freed
            if heir is not None and left[heir]:
                sizes[step] = 0
        # Files that are asked for themselves are read one after the other, and stay pinned.
        roots = {root.key for root in self.roots if isinstance(root, FileNode)}
        estimates = [key.estimate() for key in roots]
        besides = max((peak - nbytes for nbytes, peak in estimates), default=0)
        return most, max(room, sum(nbytes for nbytes, _ in estimates) + besides)

    def _heir(
        self,
        step: OpNode,
        operands: Sequence[Node],
        layouts: Sequence[Layout | None],
        result: Layout | None,
        left: Counter[Node],
        own: set[Node],
    ) -> Node | None:
        """The operand whose memory the result of a step will take over or be a view of."""
        family = step.op.family
        if result is None:
            return None
        if family == "view":
            base = layouts[0]
            return operands[0] if base is not None and 2 * result.nbytes >= base.nbytes else None
        for operand, layout in zip(operands, layouts, strict=True):
            mine = operand in own
            last = left[operand] == 1 and operands.count(operand) == 1
            if family in ("inplace", "assign"):
                return operand if mine and last else None
            if mine and last and layout == result and step.op.elementwise:
                return operand
        return None

    # Doing

    def _step(self, step: OpNode, operation: Operation) -> None:
        # The frame that held the operands is gone before they are unpinned: whoever evicts one
        # then frees its memory, and finds it held by nobody.
        free = self._compute(step, operation)
        if free:
            operation.unpin(free)

    def _compute(self, step: OpNode, operation: Operation) -> list[Key]:
        """Run one step; the files that no later step needs pinned."""
        operands = self.outline.operands(step)
        files = [node for node in dict.fromkeys(operands) if isinstance(node, FileNode)]
        keys: list[Key] = list(dict.fromkeys(node.key for node in files))
        try:
            loaded = dict(zip(keys, operation.pin(keys), strict=True)) if keys else {}
            check_same(self.fingerprints, files)
            inputs = [
                loaded[node.key] if isinstance(node, FileNode) else self.values[node]
                for node in operands
            ]
            self.bounds.before(step, operands, inputs)
            value = self._apply(step, operands, inputs)
        except Exception as error:
            explain(error, step)
            raise
        if step.op.family != "view":
            self.executed.update(files)
        return self._settle(step, operands, inputs, value, keys)

    def _apply(self, step: OpNode, operands: Sequence[Node], inputs: list[Any]) -> Any:
        op, kwargs = step.op, dict(step.kwargs or {})
        values = inputs
        if step in self.outline.aligned:
            values = [
                value[(..., *[None] * more)] if more else value
                for value, more in zip(inputs, self.outline.aligned[step], strict=True)
            ]
        if op.family in ("inplace", "assign"):
            if type(values[0]) is np.ndarray and not self._last_of_its_own(operands[0], operands):
                values = [copy_of(values[0]), *values[1:]]
            return op.call(*fill(step.args, values), **kwargs)
        arguments = fill(step.args, values)
        out = self._out(step, operands, values) if op.into is not None else None
        if out is not None:
            assert op.into is not None
            op.into(out, *arguments, **kwargs)
            return out
        value = op.call(*arguments, **kwargs)
        if op.family == "view" and type(value) is np.ndarray:
            # Otherwise a small slice would keep all of what it was cut from.
            return copy_of(value) if 2 * value.nbytes < values[0].nbytes else value
        return value

    def _out(
        self, step: OpNode, operands: Sequence[Node], values: list[Any]
    ) -> NDArray[Any] | None:
        """Where to write the result: over a temporary, into memory of our own, or None."""
        spare = [
            value
            for node, value in zip(operands, values, strict=True)
            if step.op.elementwise and self._last_of_its_own(node, operands)
        ]
        if not spare and sum(getattr(value, "nbytes", LARGE) for value in values) * 8 < LARGE:
            return None
        layouts = [layout_of(value) for value in values]
        known = [layout for layout in layouts if layout is not None]
        if len(known) < len(layouts):
            return None
        info = self.outline.info
        if known == [info[operand].layout for operand in operands]:
            result = info[step].layout
        else:
            result = infer(step.op, step.args, dict(step.kwargs or {}), known)
        if result is None or result.scalar or not result.shape:
            return None
        for value in spare:
            if Layout(value.shape, value.strides, value.dtype) == result:
                return value  # type: ignore[no-any-return]
        return result.empty() if result.nbytes >= LARGE else None

    def _last_of_its_own(self, node: Node, operands: Sequence[Node]) -> bool:
        """Whether this step, in which it is used once, is the last to see a temporary."""
        return node in self.own and self.left[node] == 1 and operands.count(node) == 1

    def _settle(
        self,
        step: OpNode,
        operands: Sequence[Node],
        inputs: list[Any],
        value: Any,
        keys: list[Key],
    ) -> list[Key]:
        """Keep the value of a step and let go of temporaries; the files that may go as well."""
        owner = owner_of(value)
        lenders = [
            node for node, data in zip(operands, inputs, strict=True) if owner_of(data) is owner
        ]
        reused = any(value is self.values.get(node) and node in self.own for node in lenders)
        if type(value) is np.ndarray and (reused or not lenders):
            self.own.add(step)
        loans: list[_Loan] = []
        for node in [] if reused else lenders:
            self.own.discard(node)
            loans += self.borrowed.get(node, [])
            if isinstance(node, FileNode) and node.key in keys:
                keys.remove(node.key)
                loans.append(_Loan(node.key))
        if loans:
            self.borrowed[step] = loans
            for loan in loans:
                loan.holders += 1
        self.values[step] = value
        for node in operands:
            self.left[node] -= 1
            if not self.left[node]:
                self._drop(node, keys)
        return keys

    def _drop(self, node: Node, keys: list[Key]) -> None:
        """Let go of a temporary; the files that are free now go to ``keys``."""
        self.values.pop(node, None)
        self.own.discard(node)
        self.bounds.forget(node)
        for loan in self.borrowed.pop(node, []):
            loan.holders -= 1
            if not loan.holders:
                keys.append(loan.key)

    def _hand_out(self, root: Node, node: Node, operation: Operation, cost: float) -> Computed:
        if isinstance(node, FileNode):
            [value] = operation.pin([node.key])
            return Computed(value, None)
        value = self.values[node]
        if not isinstance(node, OpNode):
            return Computed(value, None)
        result = root.result if isinstance(root, OpNode) else None
        if node in self.outline.values:
            return Computed(value, result)
        if result is None:
            result = Result(describe(root))
        # Another thread may have computed it meanwhile.
        kept = result.value
        if kept is None:
            kept = operation.keep(result, value, cost)
        return Computed(kept, result)


class _Loan:
    """A file that is pinned for the sake of temporaries that are views of it."""

    __slots__ = ("holders", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.holders = 0
