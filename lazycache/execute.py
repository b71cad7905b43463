"""Expressions computed under a cache: one stage after the other, as a `Program` says.

A step over whole arrays pins the files that it reads, for as long as it runs (or as long as its
result is a view of one); a temporary goes as soon as the last step that uses it is over, and is
written over by that step where the value is exactly the same. So ``sum(volumes)`` takes two
volumes, and where it goes by blocks one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ._buffers import LARGE, let_go, owner_of
from ._tasks import Threads, end_all
from .cache import DataCache
from .expression import (
    FileNode,
    Info,
    Node,
    OpNode,
    ValueNode,
    copy_of,
    describe,
    fill,
    walk,
)
from .layout import infer, layout_of, lies
from .memory import usable_cpus
from .outline import Outline, annotate, check_same, check_unchanged, fingerprints, probe_all
from .planning import Planner
from .program import Stage
from .source import Key, Result
from .streaming import BlockRun, Sink
from .wrapping import Bounds

if TYPE_CHECKING:
    from ._operation import Operation


class Computed(NamedTuple):
    """A value, and the `Result` that keeps it for whoever holds that (None for plain data).

    Where it was only written to its output as it was computed, there is no value.
    """

    value: Any
    result: Result | None


class Output(Sink, Protocol):
    """A file that takes the values of a root in blocks, if it ``takes`` what the headers tell.

    It is entered when the first block comes, and `finish` called after the last one; without that,
    leaving it undoes everything.
    """

    def takes(self, info: Info) -> bool: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...

    def finish(self) -> None: ...


def compute(
    roots: Sequence[Node],
    cache: DataCache,
    label: str = "",
    outputs: Mapping[Node, Sequence[Output]] = MappingProxyType({}),
) -> list[Computed]:
    """The values of ``roots``, computed together: what they share is computed once.

    Where they can, roots go to their ``outputs`` while they are computed.

    Before the first voxel is read the headers of all files are; errors found there are raised
    with nothing read. An error of a later step says the operation, its operands and the line
    where it was written. After an error nothing is kept, and the expression can be computed again.
    """
    outline = prepare(roots, cache)
    taking = outputs_taking(outline, outputs)
    # Before anything is read: a change that somebody notices meanwhile is one of other content.
    seen = {root: fingerprints(root) for root in roots if isinstance(root, OpNode)}
    run = _Run(outline, roots, cache, taking)
    computed = run.execute(label or f"computing {describe(roots[0])}")
    for root, (_, result) in zip(roots, computed, strict=True):
        if result is not None and isinstance(root, OpNode) and root not in outline.values:
            root.remember(result, outline.info[root], seen[root])
    run.bounds.warn()
    return computed


def outputs_taking(
    outline: Outline, outputs: Mapping[Node, Sequence[Output]]
) -> dict[Node, list[Output]]:
    """The outputs that take the values of a node in blocks, by the node that is computed."""
    taking: dict[Node, list[Output]] = {}
    for root, given in outputs.items():
        found = [output for output in given if output.takes(outline.info[root])]
        if found:
            taking.setdefault(outline.stand_in(root), []).extend(found)
    return taking


def prepare(roots: Sequence[Node], cache: DataCache) -> Outline:
    """The outline of ``roots``, from headers that are looked at again; what changed is noticed."""
    values: dict[Node, Any] = {}

    def there(node: Node) -> bool:
        value = _computed(node)
        if value is None:
            return False
        values[node] = value
        return True

    nodes = list(walk(roots, stop=there))
    files = [node for node in nodes if isinstance(node, FileNode)]
    wholes = [node.whole for node in files if node.whole is not None]
    cache.verify(dict.fromkeys(node.key for node in [*files, *wholes]))
    for node in files:
        node.looked = True
    probe_all(files)
    check_unchanged(node for node in nodes if node not in values)
    return Outline(nodes, values, cache.holds)


def available(node: Node) -> bool:
    """Whether the value of an operation was computed before and is still there."""
    return _computed(node) is not None


def _computed(node: Node) -> Any:
    result = node.result if isinstance(node, OpNode) else None
    return None if result is None else result.value


def adopt(node: ValueNode, cache: DataCache) -> None:
    """Charge data in memory to ``cache``, unless a cache was charged before."""
    if not node.adopted:
        node.value = cache.adopt(node.value, node.name)
        node.adopted = True


def resident(outline: Outline, cache: DataCache) -> list[FileNode]:
    """The files of an outline that are in memory."""
    return [n for n in outline.nodes if isinstance(n, FileNode) and cache.holds(n.key)]


class _Run:
    """One execution of an outline."""

    def __init__(
        self,
        outline: Outline,
        roots: Sequence[Node],
        cache: DataCache,
        outputs: Mapping[Node, Sequence[Output]],
    ) -> None:
        self.outline = outline
        self.outputs = outputs
        self.asked = roots
        self.roots = [outline.stand_in(root) for root in roots]
        self.cache = cache
        self.values: dict[Node, Any] = dict(outline.values)
        self._adopt_constants()  # which leaves less for the program
        written = {root: sum(one.nbytes for one in given) for root, given in outputs.items()}
        planner = Planner(outline, self.roots, resident(outline, cache), written)
        self.program = planner.choose(cache.obtainable())
        # How many uses of each node are still to come; a root is used by whoever asked for it.
        kept = (root for root in self.roots if root not in self.program.unkept)
        self.left = outline.uses.copy()
        self.left.update(kept)
        self.executed: Counter[FileNode] = Counter()
        # Files whose memory a temporary is a view of, pinned as long as any such temporary lives.
        self.borrowed: dict[Node, list[_Loan]] = {}
        # Temporaries that share their memory with nothing else.
        self.own: set[Node] = set()
        self.bounds = Bounds(outline)
        files = [node for node in outline.nodes if isinstance(node, FileNode)]
        self.fingerprints = {node.key: node.key.fingerprint for node in files}

    def execute(self, label: str) -> list[Computed]:
        program = self.program
        order = [node.key for stage in program.stages for node in stage.pinned]
        # Files that are asked for themselves are pinned at the end; and once more, as it were:
        # whoever has their data may come again.
        order += 2 * [node.key for node in dict.fromkeys(self.roots) if isinstance(node, FileNode)]
        started = time.perf_counter()
        threads = Threads(usable_cpus())
        try:
            with self.cache.operation(
                label, workspace=program.workspace, room=program.room, order=order
            ) as operation:
                try:
                    for stage in program.stages:
                        if stage.space is None:
                            for step in stage.steps:
                                self._step(step, operation)
                        else:
                            self._run_blocks(stage, operation, threads)
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

    # Doing

    def _step(self, step: OpNode, operation: Operation) -> None:
        # The frame that held the operands is gone before they are unpinned: whoever evicts one
        # then frees its memory, and finds it held by nobody.
        free = self._compute(step, operation)
        if free:
            operation.unpin(free)

    def _run_blocks(self, stage: Stage, operation: Operation, threads: Threads) -> None:
        sinks: dict[Node, Sequence[Output]] = {node: self.outputs[node] for node in stage.written}
        outputs = [output for found in sinks.values() for output in found]
        try:
            for output in outputs:
                output.__enter__()
            free = self._compute_blocks(stage, operation, sinks, threads)
            if free:
                operation.unpin(free)
            for output in outputs:
                output.finish()
        finally:
            end_all(output.__exit__ for output in outputs)

    def _compute_blocks(
        self,
        stage: Stage,
        operation: Operation,
        sinks: Mapping[Node, Sequence[Output]],
        threads: Threads,
    ) -> list[Key]:
        """Run a block stage; the files that no later stage needs pinned."""
        keys: list[Key] = list(dict.fromkeys(node.key for node in stage.pinned))
        loaded = dict(zip(keys, operation.pin(keys), strict=True)) if keys else {}
        check_same(self.fingerprints, [*stage.pinned, *stage.files])
        values = {**self.values}
        values.update((node, loaded[node.key]) for node in stage.pinned)
        try:
            run = BlockRun(
                stage, self.outline, values, self.own, self.bounds, sinks, threads, self.cache
            )
        except Exception as error:  # no memory for the results
            annotate(error, stage.steps[0])
            raise
        outputs = run.run()
        check_same(self.fingerprints, stage.files)
        self.values.update(outputs)
        self.own.update(outputs)
        for step in stage.steps:
            operands = self.outline.operands(step)
            self._count(step)
            for node in operands:
                self.left[node] -= 1
                if not self.left[node]:
                    self._drop(node, keys)
        return keys

    def _compute(self, step: OpNode, operation: Operation) -> list[Key]:
        """Run one step; the files that no later step needs pinned."""
        operands = self.outline.operands(step)
        files = self.outline.files.get(step, ())
        keys: list[Key] = [node.key for node in files]
        values: Mapping[Node, Any] = self.values
        try:
            if files:
                values = {node: values.get(node) for node in operands}
                values.update(zip(files, operation.pin(keys), strict=True))
                check_same(self.fingerprints, files)
            inputs = [values[node] for node in operands]
            self.bounds.before(step, operands, inputs)
            value = self._apply(step, operands, inputs)
        except Exception as error:
            annotate(error, step)
            raise
        if files and step.op.family != "view":
            self._count(step)
        return self._settle(step, operands, inputs, value, keys)

    def _count(self, step: OpNode) -> None:
        """``step`` has read its files: one operation for each proxy, also of the same file."""
        for node in dict.fromkeys(step.operands):
            if isinstance(node, FileNode) and isinstance(self.outline.stand_in(node), FileNode):
                self.executed[node] += 1

    def _apply(self, step: OpNode, operands: Sequence[Node], inputs: list[Any]) -> Any:
        op, kwargs = step.op, step.kwargs or {}
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
        if op.family == "view" and values and type(value) is np.ndarray:
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
        info = self.outline.info
        if all(map(lies, values, [info[node].layout for node in operands])):
            result = info[step].layout
        else:
            layouts = [layout_of(value) for value in values]
            known = [layout for layout in layouts if layout is not None]
            if len(known) < len(layouts):
                return None
            result = infer(step.op, step.args, dict(step.kwargs or {}), known)
        if result is None or result.scalar or not result.shape:
            return None
        for value in spare:
            if lies(value, result):
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
        same = [n for n, data in zip(operands, inputs, strict=True) if data is value]
        # A view may be the very array that it is of: of no axis too long, say.
        reused = step.op.family != "view" and not self.own.isdisjoint(same)
        if reused and type(value) is np.ndarray:
            self.own.add(step)
        else:
            self._borrow(step, operands, inputs, value, keys)
        self.values[step] = value
        for node in operands:
            self.left[node] -= 1
            if not self.left[node]:
                self._drop(node, keys)
        return keys

    def _borrow(
        self,
        step: OpNode,
        operands: Sequence[Node],
        inputs: list[Any],
        value: Any,
        keys: list[Key],
    ) -> None:
        """Find whose memory the value of a step lies in; files that it is of leave ``keys``."""
        owner = owner_of(value)
        lenders = [
            node for node, data in zip(operands, inputs, strict=True) if owner_of(data) is owner
        ]
        if type(value) is np.ndarray and not lenders:
            self.own.add(step)
        loans: list[_Loan] = []
        for node in lenders:
            self.own.discard(node)
            loans += self.borrowed.get(node, [])
            if isinstance(node, FileNode) and node.key in keys:
                keys.remove(node.key)
                loans.append(_Loan(node.key))
        if loans:
            self.borrowed[step] = loans
            for loan in loans:
                loan.holders += 1

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
        if node in self.program.unkept:
            return Computed(None, None)
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
