"""What is done to compute an outline, in which order, and the memory that it takes.

A `Program` is a list of stages. A *whole* stage does its steps one after the other, over whole
arrays. The steps of a *block* stage go together from one block of their `Space` to the next, so
that what is between them never exists as a whole, and files that have no other use are read block
by block and never are in memory either. Values that a later stage needs, and results, are whole
arrays.

How many files a block stage may have open decides how often each is read and how much memory that
takes. See ``choosing`` for how a program is chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .expression import FileNode, Node, OpNode
from .layout import Layout
from .memory import usable_cpus
from .needs import Need, Needs
from .outline import Outline
from .source import Key
from .spaces import Space, Way, boundaries, takes_memory
from .voxelwise import Voxelwise

# Elements of a block, at most: what a step works on stays in the processor's cache.
BLOCK = 1 << 17
# All blocks of files that are read ahead, together, in bytes; and where there is much memory.
READ_AHEAD = 8 << 20
READ_FAR_AHEAD = 32 << 20
# Elements of a block, at least: each has its price in Python.
_SHORTEST = 1 << 13
Pieces = tuple[tuple[tuple[int, int], ...], ...]


class Manner(NamedTuple):
    """What a program may do, for `build`.

    ``width`` is how many files a block stage has open at once; 0 makes all stages whole. A step
    that needs more than that reads each of its files in ``passes`` pieces, opening it anew for
    each. ``kept`` files are read as a whole and stay in memory while there is room, ``resident``
    ones are there already. Results that are ``written`` go to disk while they are computed, which
    takes the bytes given for each; unless ``keep`` is true they exist nowhere else. The blocks of
    files that are read ahead may take ``ahead`` bytes together, where that is more than usual.
    """

    width: int
    passes: int = 1
    kept: frozenset[FileNode] = frozenset()
    resident: frozenset[FileNode] = frozenset()
    written: Mapping[Node, int] = MappingProxyType({})
    keep: bool = True
    ahead: int = 0


@dataclass(eq=False, slots=True)
class Array:
    """Where values of a block stage are: a whole array, or a buffer of one block."""

    dtype: np.dtype[Any]
    node: Node | None = None  # the node that the whole array belongs to when the stage begins
    result: OpNode | None = None  # the node whose whole array it is when the stage ends


@dataclass(eq=False, slots=True)
class Stage:
    """Steps that run together; over whole arrays where ``space`` is None.

    ``files`` are read block by block; ``pinned`` are in memory as long as the stage runs. Files
    are read in ``pieces`` of one block or several; ``reopened`` ones are opened for each piece.
    ``outputs`` are the steps whose values are needed after it, ``written`` those that go to disk.
    """

    steps: list[OpNode]
    space: Space | None = None
    files: list[FileNode] = field(default_factory=list)
    pinned: list[FileNode] = field(default_factory=list)
    ways: dict[OpNode, Way] = field(default_factory=dict)
    periods: dict[tuple[Node, Node], int] = field(default_factory=dict)
    arrays: dict[Node, Array] = field(default_factory=dict)
    pieces: Pieces = ()
    longest: int = 0  # the elements of the longest block
    reopened: bool = False
    outputs: list[OpNode] = field(default_factory=list)
    written: list[OpNode] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Program:
    """``workspace`` is the most bytes of temporaries and results at once, ``room`` of pinned files.

    ``streamed`` counts how often each file is read in blocks. Results that are ``unkept`` are
    never in memory as a whole.
    """

    manner: Manner
    stages: list[Stage]
    workspace: int
    room: int
    streamed: Counter[FileNode]
    unkept: frozenset[Node]

    @property
    def need(self) -> int:
        return self.workspace + self.room

    @property
    def by_blocks(self) -> bool:
        return any(stage.space is not None for stage in self.stages)


def build(
    outline: Outline,
    roots: Sequence[Node],
    manner: Manner,
    order: Sequence[OpNode] | None = None,
    needs: Needs | None = None,
) -> Program:
    """The program of ``outline`` for ``roots``, with its steps in ``order`` or as they come.

    ``needs`` are those of the outline, for other programs of it too.
    """
    needs = Needs(outline) if needs is None else needs
    stages = _Partition(outline, manner, needs).run(outline.steps if order is None else order)
    unkept = frozenset(step for stage in stages for step in stage.written if not manner.keep)
    left = outline.uses.copy()
    left.update(root for root in roots if root not in unkept)
    simulation = _Simulation(outline, needs, left, manner)
    for stage in stages:
        simulation.stage(stage)
    simulation.files_for_themselves(roots)
    return Program(
        manner,
        stages,
        simulation.most,
        simulation.room,
        simulation.streamed,
        unkept,
    )


class _Partition:
    """Splits steps into stages."""

    def __init__(self, outline: Outline, manner: Manner, needs: Needs) -> None:
        self.outline = outline
        self.manner = manner
        self.needs = needs
        self.stages: list[Stage] = []
        self.current: Stage | None = None
        self.files: set[FileNode] = set()  # of the current stage
        self.there = manner.resident

    def run(self, steps: Iterable[OpNode]) -> list[Stage]:
        width, files = self.manner.width, self.outline.files
        needs, cases = self.needs, self.outline.cases
        for step in steps:
            need = needs[cases[step]]
            if width and need.way is not None:
                self._blocks(step, need.way, need)
            else:
                self._whole(step, files.get(step, ()))
        return self.stages

    def _whole(self, step: OpNode, files: Sequence[FileNode]) -> None:
        current = self.current
        if current is None or current.space is not None or files or current.pinned:
            self.current = Stage([step], pinned=list(files))
            self.stages.append(self.current)
        else:
            current.steps.append(step)

    def _blocks(self, step: OpNode, way: Way, need: Need) -> None:
        streamed: list[FileNode] = []
        pinned: list[FileNode] = []
        operands = self.outline.operands(step)
        periods = dict(zip(operands, need.periods, strict=True))
        for node in self.outline.files.get(step, ()):
            by_blocks = periods[node] == way.space.size and self._in_blocks(node)
            (streamed if by_blocks else pinned).append(node)
        if not self._fits(way, operands, streamed, pinned):
            self.files = set()
            self.current = Stage([], way.space)
            self.stages.append(self.current)
        stage = self.current
        assert stage is not None
        stage.files += [node for node in streamed if node not in self.files]
        self.files.update(streamed)
        stage.steps.append(step)
        stage.ways[step] = way
        if step in self.manner.written and way.kind == "each":
            stage.written.append(step)
        stage.reopened = len(stage.files) > self.manner.width
        stage.pinned += [node for node in pinned if node not in stage.pinned]
        stage.periods.update(((step, node), again) for node, again in periods.items())

    def _in_blocks(self, node: FileNode) -> bool:
        if node in self.manner.kept or node in self.there:
            return False
        return node.key.probe().in_blocks

    def _fits(
        self,
        found: Way,
        operands: Sequence[Node],
        streamed: list[FileNode],
        pinned: list[FileNode],
    ) -> bool:
        """Whether a step can go with the current stage."""
        stage = self.current
        if stage is None or stage.space != found.space:
            return False
        # What is folded, or reduced in slabs, is complete at the end of the stage only.
        if any(stage.ways[node].kind != "each" for node in operands if node in stage.ways):
            return False
        more = sum(node not in self.files for node in streamed)
        if more and len(self.files) + more > self.manner.width:
            return False
        # Files that are to be loaded come one after the other, the next while this one is used.
        fresh = [n for n in pinned if n not in self.there and n not in stage.pinned]
        return not fresh or all(node in self.there for node in stage.pinned)


@dataclass(eq=False, slots=True)
class _Memory:
    """Memory of temporaries: of one, and of those that are views of it."""

    nbytes: int
    users: int = 1


class _Simulation:
    """Runs over the stages once, without data, for the memory that they take."""

    def __init__(self, outline: Outline, needs: Needs, left: Counter[Node], manner: Manner) -> None:
        self.outline = outline
        self.needs = needs
        self.cases = outline.cases
        self.left = left  # the uses of each node that are still to come
        self.manner = manner
        self.memory: dict[Node, _Memory] = {}  # of each living temporary
        self.pinned: dict[Node, set[Key]] = {}  # by what is a view of a file
        self.own: set[Node] = set()  # temporaries that share their memory with nothing else
        self.current = self.most = self.room = 0
        self.streamed: Counter[FileNode] = Counter()

    def stage(self, stage: Stage) -> None:
        keys: set[Key] = {node.key for node in stage.pinned}
        if stage.space is None:
            for step in stage.steps:
                self._whole(step, keys)
        else:
            self._blocks(stage)
        # What this stage pins, with what reading takes besides, and what stays pinned.
        if keys or self.pinned:
            peak = sum(key.estimate()[1] for key in keys)
            lent = set[Key]().union(*self.pinned.values()) - keys if self.pinned else ()
            self.room = max(self.room, peak + sum(key.estimate()[0] for key in lent))
            for node in [node for node in self.pinned if not self.left[node]]:
                del self.pinned[node]

    def files_for_themselves(self, roots: Sequence[Node]) -> None:
        """Files that are results are read one after the other, and stay pinned.

        So do those that other results are views of.
        """
        keys = dict.fromkeys(root.key for root in roots if isinstance(root, FileNode))
        if not keys:
            return
        lent = set[Key]().union(*self.pinned.values()) - keys.keys()
        held = sum(key.estimate()[0] for key in lent)
        for key in keys:
            nbytes, peak = key.estimate()
            self.room = max(self.room, held + peak)
            held += nbytes

    def _whole(self, step: OpNode, keys: set[Key]) -> None:
        operands = self.outline.operands(step)
        need = self.needs[self.cases[step]]
        heir = self._heir(step, need, operands)
        if heir is not None and step.op.family == "view":
            self.pinned[step] = keys.union(*(self.pinned.get(o, ()) for o in operands))
            self.own.discard(heir)
        else:
            self.own.add(step)
        new = need.nbytes if heir is None else 0
        self.most = max(self.most, self.current + new + need.besides)
        self._hold(step, new, heir)
        for operand in operands:
            self.left[operand] -= 1
            if not self.left[operand]:
                self._let_go(operand)

    def _heir(self, step: OpNode, need: Need, operands: Sequence[Node]) -> Node | None:
        """The operand whose memory the result of a step will take over or be a view of."""
        for place in need.heirs:
            node = operands[place]
            if step.op.family == "view" or (
                node in self.own and self.left[node] == 1 and operands.count(node) == 1
            ):
                return node
        return None

    def _hold(self, step: OpNode, nbytes: int, heir: Node | None) -> None:
        """``step`` has ``nbytes`` of its own, or the memory that its ``heir`` has."""
        if heir is None:
            self.memory[step] = _Memory(nbytes)
            self.current += nbytes
        elif heir in self.memory:
            self.memory[step] = self.memory[heir]
            self.memory[heir].users += 1

    def _let_go(self, node: Node) -> None:
        memory = self.memory.pop(node, None)
        if memory is not None:
            memory.users -= 1
            if not memory.users:
                self.current -= memory.nbytes

    def _blocks(self, stage: Stage) -> None:
        temporary = self._place(stage)
        new = sum(
            self.outline.info[step].layout.nbytes
            for step in stage.outputs
            if stage.arrays[step].node is None
        )
        self._cut(stage)
        extra = self._reading(stage) + stage.longest * temporary
        extra += sum(self.manner.written[step] for step in stage.written)
        short = {again for again in stage.periods.values() if 1 < again < stage.longest}
        extra += len(short) * stage.longest * 8
        self.most = max(self.most, self.current + new + extra)
        for step in stage.outputs:
            self._hold(step, self.outline.info[step].layout.nbytes, stage.arrays[step].node)
        # What was there before and isn't needed any more goes with the stage.
        inside = set(stage.steps)
        for node in {o for step in stage.steps for o in self.outline.operands(step)} - inside:
            if not self.left[node]:
                self._let_go(node)

    def _place(self, stage: Stage) -> int:
        """Decide where each step of a block stage puts its values.

        Returns the bytes that the temporaries of each element take.
        """
        assert stage.space is not None
        inside = set(stage.steps)
        alive: dict[Array, int] = {}  # bytes an element of each buffer that is in use
        temporary = most = calls = 0
        for step in stage.steps:
            operands = self.outline.operands(step)
            result = self.outline.info[step].layout
            heir = None
            if stage.ways[step].kind == "each":
                heir = self._heir(step, self.needs[self.cases[step]], operands)
            self.own.add(step)
            if heir is None or stage.periods[step, heir] != stage.space.size:
                array = Array(result.dtype)
                if stage.ways[step].kind == "each":
                    alive[array] = result.dtype.itemsize
                    temporary += result.dtype.itemsize
                    most = max(most, temporary)
            else:
                array = stage.arrays.get(heir) or Array(result.dtype, node=heir)
            stage.arrays[step] = array
            if takes_memory(step.op):
                calls = max(calls, self._call_nbytes(step))
            for operand in operands:
                self.left[operand] -= 1
                if operand in inside and not self.left[operand]:
                    gone = stage.arrays[operand]
                    if gone is not array:
                        temporary -= alive.pop(gone, 0)
        for step in stage.steps:
            if self.left[step]:
                stage.arrays[step].result = step
                stage.outputs.append(step)
        return most + calls

    def _cut(self, stage: Stage) -> None:
        """Cut the space of a stage into blocks."""
        space = stage.space
        assert space is not None
        nbytes = sum(self._itemsize(node) for node in stage.files)
        ahead = max(READ_AHEAD, self.manner.ahead)
        count = min(BLOCK, ahead // max(1, 2 * nbytes), space.size // 16)
        count = min(space.size, max(_SHORTEST, count))
        units = dict.fromkeys(("slab", "fold"), 1)
        units.update((found.kind, found.unit) for found in stage.ways.values())
        periods = frozenset([*stage.periods.values(), units["fold"]])
        passes = self.manner.passes if stage.reopened else 0
        stage.pieces, stage.longest = _pieces(space, count, periods, units["slab"], passes)
        for node in stage.files:
            self.streamed[node] += len(stage.pieces) if stage.reopened else 1

    def _reading(self, stage: Stage) -> int:
        """The bytes of the buffers that files are read into, and of what reads them."""
        nbytes = sum(self._itemsize(node) for node in stage.files)
        probes = [node.key.probe() for node in stage.files]
        decoders = sorted((probe.peak_nbytes - probe.nbytes for probe in probes), reverse=True)
        if stage.reopened:
            longest = max(piece[-1][1] - piece[0][0] for piece in stage.pieces)
            return longest * nbytes + sum(decoders[: usable_cpus()])
        return 2 * stage.longest * nbytes + sum(decoders)

    def _call_nbytes(self, step: OpNode) -> int:
        """The bytes that a step takes for each element besides operands and result."""
        if isinstance(step.op.call, Voxelwise):
            found = [layout for layout in self.outline.layouts(step) if layout is not None]
            return step.op.call.voxel_nbytes([layout.dtype for layout in found])
        return 3 * sum(self._itemsize(node) for node in (*self.outline.operands(step), step))

    def _itemsize(self, node: Node) -> int:
        layout: Layout | None = self.outline.info[node].layout
        return 0 if layout is None or layout.scalar else layout.dtype.itemsize


@lru_cache(maxsize=256)
def _pieces(
    space: Space, count: int, periods: frozenset[int], unit: int, passes: int
) -> tuple[Pieces, int]:
    """The blocks of a stage in as many pieces as ``passes`` (0: each on its own); the longest."""
    blocks = boundaries(space, count, periods, unit)
    each = -(-len(blocks) // passes) if passes else 1
    pieces = tuple(tuple(blocks[at : at + each]) for at in range(0, len(blocks), each))
    return pieces, max(stop - start for start, stop in blocks)
