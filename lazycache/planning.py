"""Choosing the program with the fewest reads that a budget allows, and foretelling what it does.

A program with more files open at once reads files that are used several times less often, and
takes more memory; so does one that keeps some of them. The programs that are looked at differ in
these (`Manner`), and in the order of their steps.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

from .expression import FileNode, Node, OpNode
from .memory import openable_files
from .needs import Needs
from .outline import Outline
from .program import BLOCK, READ_AHEAD, READ_FAR_AHEAD, Manner, Program, build
from .source import Key

# Files that a block stage has open at once where more would save no reads.
FILES = 16
# In how many pieces a file may be read where it has to be opened anew for each.
_PIECES = (2, 4, 8, 16, 32, 64, 128)
_NOTHING: Mapping[Node, int] = MappingProxyType({})
# Larger expressions aren't tried in another order.
_FEW = 4096


# The bytes of the data of each file, and with what reading takes besides.
_Sizes = Mapping[Key, tuple[int, int]]


class Prediction(NamedTuple):
    """``reads`` of each file, ``nbytes`` altogether; ``peak`` is the most bytes in use at once."""

    reads: Counter[FileNode]
    nbytes: int
    peak: int


class Planner:
    """The programs for ``roots``, of which those that are ``written`` need not be kept.

    ``resident`` files are in memory already.
    """

    def __init__(
        self,
        outline: Outline,
        roots: Sequence[Node],
        resident: Iterable[FileNode] = (),
        written: Mapping[Node, int] = _NOTHING,
    ) -> None:
        self.outline = outline
        self.roots = roots
        self.resident = frozenset(resident)
        self.written = written
        self.needs = Needs(outline)
        self._built: dict[Any, Program] = {}
        self._memory: dict[Program, _Memory] = {}
        self._predicted: dict[Program, tuple[int, Prediction]] = {}  # the last of each
        self.files = [node for node in outline.nodes if isinstance(node, FileNode)]
        self._sizes: _Sizes = {node.key: node.key.estimate() for node in self.files}

    def choose(self, obtainable: int) -> Program:
        """The program with the fewest reads among those that need at most ``obtainable`` bytes.

        If there is none, the one that needs the least.
        """
        best: Program | None = None
        least: Program | None = None
        reads = 0
        for program in self._programs():
            if least is None or program.need < least.need:
                least = program
            if program.need > obtainable:
                continue
            keeping = self._keeping(program, obtainable)
            found = self.predict(keeping, obtainable).nbytes
            if best is None or found < reads:
                best, reads = keeping, found
            if reads <= self._fewest:
                break
        assert least is not None
        return least if best is None else self._farther_ahead(best, obtainable)

    @property
    def least(self) -> int:
        """The smallest number of bytes that any program needs."""
        return self._least[0]

    @property
    def least_to_read_once(self) -> int:
        """The smallest number of bytes with which each file is read once."""
        return self._least[1]

    @cached_property
    def _least(self) -> tuple[int, int]:
        """More than a program needs it spends on keeping files that it will use again."""
        files = sum(peak for _, peak in self._sizes.values())
        least = once = -1
        for program in self._programs():
            if least < 0 or program.need < least:
                least = program.need
            most = program.need + files if once < 0 else once - 1
            if most < program.need:
                continue
            if self._once(program, program.need):
                once = program.need
            elif self._once(program, most):
                tried = range(program.need, most + 1)
                once = tried[bisect_left(tried, True, key=partial(self._once, program))]
        return least, once

    def _once(self, program: Program, obtainable: int) -> bool:
        return self.predict(program, obtainable).nbytes <= self._fewest

    @cached_property
    def _fewest(self) -> int:
        """The bytes of the files that have to be read, each once."""
        fresh = [node for node in self.files if node not in self.resident]
        return sum(self._sizes[node.key][0] for node in fresh)

    def predict(self, program: Program, obtainable: int) -> Prediction:
        """What ``program`` will do with ``obtainable`` bytes, if it has them for itself."""
        before = self._predicted.get(program)
        if before is not None and before[0] == obtainable:
            return before[1]
        memory = self._memory.get(program)
        if memory is None:
            needs = [stage.pinned for stage in program.stages if stage.pinned]
            files = [root for root in dict.fromkeys(self.roots) if isinstance(root, FileNode)]
            needs += [files[: count + 1] for count in range(len(files))]  # they stay pinned
            memory = self._memory[program] = _Memory(needs, self._sizes, self.resident)
        reads, peak = memory.run(obtainable - program.workspace)
        reads.update(program.streamed)
        nbytes = sum(self._sizes[node.key][0] * count for node, count in reads.items())
        found = Prediction(reads, nbytes, program.workspace + peak)
        self._predicted[program] = obtainable, found
        return found

    def _programs(self) -> Iterator[Program]:
        """What there is to choose from, the best first where the reads are the same."""
        yield from self._for(self.resident)
        if self.resident:  # those in memory may be in the way
            yield from self._for(frozenset())

    def _for(self, resident: frozenset[FileNode]) -> Iterator[Program]:
        """The programs that leave ``resident`` files in memory."""
        count = len(self.files)
        most = openable_files(count)
        plain = Manner(0, resident=resident, written=self.written)
        reopened = True
        for width in dict.fromkeys([min(FILES, max(1, count)), count, count // 2, 8, 4, 2, 1]):
            if 0 < width <= max(1, min(count, most)):
                by_blocks = reopened = False
                for program in self._each(plain._replace(width=width)):
                    yield program
                    by_blocks |= program.by_blocks
                    reopened |= any(stage.reopened for stage in program.stages)
                if not by_blocks:
                    return
        for passes in _PIECES if reopened else ():
            yield from self._each(plain._replace(width=1, passes=passes))
        yield from self._each(plain)

    def _each(self, manner: Manner) -> Iterator[Program]:
        """In each order; where files are read again, also the program that keeps those."""
        for place in range(len(self._orders)):
            manners = [manner]
            if manner.written:
                # The last has results in memory first and writes them when all is done.
                manners += [manner._replace(keep=False), manner._replace(written=_NOTHING)]
            for one in manners:
                program = self._build(one, place)
                yield program
                again = program.manner._replace(kept=self._read_again(program))
                if again.kept >= program.streamed.keys():
                    again = again._replace(width=1, passes=1)  # it has nothing to be wide for
                if again.kept:
                    yield self._build(again, place)

    def _build(self, manner: Manner, place: int) -> Program:
        recipe = (
            manner.width,
            manner.passes,
            manner.kept,
            manner.keep,
            bool(manner.written),
            bool(manner.resident),
            place,
        )
        program = self._built.get(recipe)
        if program is None:
            order = self._orders[place]
            program = build(self.outline, self.roots, manner, order, self.needs)
            self._built[recipe] = program
        return program

    def _read_again(self, program: Program) -> frozenset[FileNode]:
        """The files that ``program`` reads more than once, at least once in blocks."""
        if not program.streamed:
            return frozenset()
        uses = Counter(program.streamed)
        for stage in program.stages:
            uses.update(node for node in stage.pinned if node in program.streamed)
        uses.update(n for n in self.roots if isinstance(n, FileNode) and n in program.streamed)
        return frozenset(node for node, count in uses.items() if count > 1)

    @cached_property
    def _orders(self) -> list[Sequence[OpNode]]:
        steps = self.outline.steps
        branching = len(steps) <= _FEW and any(
            sum(isinstance(o, OpNode) for o in set(self.outline.operands(step))) > 1
            for step in steps
        )
        if not branching:
            return [steps]
        orders = [_latest_last(self.outline), _lowest_peak_first(self.outline)]
        latest, lowest = (_in_order(order, self.roots) for order in orders)
        return [latest, steps, lowest]

    def _keeping(self, program: Program, obtainable: int) -> Program:
        """``program``, or one that besides keeps files that are wanted, or read again."""
        if not program.streamed:
            return program
        before = self.predict(program, obtainable)
        spare = obtainable - program.need
        kept = set(program.manner.kept)
        for node in sorted(self.files, key=lambda node: -before.reads[node]):
            size = self._sizes[node.key][1]
            useful = before.reads[node] > 1 or node.wanted
            if useful and node in program.streamed and size <= spare:
                kept.add(node)
                spare -= size
        if kept == program.manner.kept:
            return program
        order = [step for stage in program.stages for step in stage.steps]
        manner = program.manner._replace(kept=frozenset(kept))
        keeping = build(self.outline, self.roots, manner, order, self.needs)
        after = self.predict(keeping, obtainable)
        fits = keeping.need <= obtainable and after.peak <= obtainable
        return keeping if fits and after.nbytes <= before.nbytes else program

    def _farther_ahead(self, program: Program, obtainable: int) -> Program:
        """``program``, or with much memory the same with longer blocks of its many files."""
        ahead = min(READ_FAR_AHEAD, obtainable // 16)
        short = any(stage.longest < BLOCK for stage in program.stages if stage.files)
        reopened = any(stage.reopened for stage in program.stages)
        if ahead <= READ_AHEAD or not short or reopened:
            return program
        order = [step for stage in program.stages for step in stage.steps]
        manner = program.manner._replace(ahead=ahead)
        farther = build(self.outline, self.roots, manner, order, self.needs)
        after = self.predict(farther, obtainable)
        same = after.nbytes == self.predict(program, obtainable).nbytes
        return farther if same and max(farther.need, after.peak) <= obtainable else program


class _Memory:
    """The files that a program ``needs`` in memory, those of each place together.

    ``resident`` ones are there before.
    """

    def __init__(
        self, needs: Sequence[Sequence[FileNode]], sizes: _Sizes, resident: Collection[FileNode]
    ) -> None:
        self.sizes = sizes
        self.resident: list[Key] = [node.key for node in resident]
        self.needs: list[dict[Key, FileNode]] = [{n.key: n for n in nodes} for nodes in needs]
        at = self.end = sum(map(len, needs))
        self.following: list[dict[Key, int]] = []  # the next use of each, after each place
        self.first: dict[Key, int] = {}
        for nodes in reversed(needs):
            at -= len(nodes)
            self.following.append({node.key: self.first.get(node.key, self.end) for node in nodes})
            self.first.update((node.key, at + index) for index, node in enumerate(nodes))
        self.following.reverse()

    def run(self, capacity: int) -> tuple[Counter[FileNode], int]:
        """The reads of each, and the most bytes of files, in ``capacity`` bytes of memory.

        Of those not in use, the farthest next use goes first.
        """
        sizes, end = self.sizes, self.end
        reads: Counter[FileNode] = Counter()
        held = {key: sizes[key][0] for key in self.resident}
        used = sum(held.values())
        # Of those with no further use the most recently used goes first, as in the cache.
        recent = itertools.count(0, -1)
        current = dict(self.first)
        farthest = [(-current.get(key, end), next(recent), key) for key in held]
        heapq.heapify(farthest)
        while farthest and used > capacity:  # the rest of the program takes their place
            used -= held.pop(heapq.heappop(farthest)[2])
        most = used
        for wanted, following in zip(self.needs, self.following, strict=True):
            missing = [key for key in wanted if key not in held]
            # Reserved for all before any is read.
            need = sum([sizes[key][1] for key in missing])
            while farthest and need and used + need > capacity:
                after, _, key = heapq.heappop(farthest)
                if key in held and key not in wanted and current.get(key, end) == -after:
                    used -= held.pop(key)
            most = max(most, used + need)
            for key in missing:
                held[key] = sizes[key][0]
                used += held[key]
                reads[wanted[key]] += 1
            for key, after in following.items():
                current[key] = after
                heapq.heappush(farthest, (-after, next(recent), key))
        return reads, most


# The operands of each step that are steps, in the order in which they are done.
_Order = dict[Node, list[Node]]


def _lowest_peak_first(outline: Outline) -> _Order:
    """Of two operands the one with the larger transient is done first.

    That takes the least memory where whole arrays are computed and nothing is shared (R. Sethi and
    J. D. Ullman, The generation of optimal code for arithmetic expressions, J. ACM 17, 1970).
    """
    size: dict[Node, int] = {}
    peak: dict[Node, int] = {}
    order: _Order = {}
    for step in outline.steps:
        layout = outline.info[step].layout
        size[step] = 0 if layout is None else layout.nbytes
        operands = [n for n in dict.fromkeys(outline.operands(step)) if n in size]
        operands.sort(key=lambda node: size[node] - peak[node])
        held = 0
        most = size[step] + _loaded(outline.operands(step))
        for node in operands:
            most = max(most, held + peak[node])
            held += size[node]
        order[step] = operands
        peak[step] = max(most, held + size[step])
    return order


def _loaded(operands: Iterable[Node]) -> int:
    """The bytes of files that have to be in memory as a whole."""
    files = {node.key for node in operands if isinstance(node, FileNode)}
    return sum(key.estimate()[0] for key in files if not key.probe().in_blocks)


def _latest_last(outline: Outline) -> _Order:
    """Of two operands the one that has to wait for more reductions is done first.

    The other, if it goes by blocks, can then go with the step that both are for, and is never in
    memory as a whole.
    """
    depth: dict[Node, int] = {}
    order: _Order = {}
    for step in outline.steps:
        layout = outline.info[step].layout
        operands = [n for n in dict.fromkeys(outline.operands(step)) if n in depth]
        operands.sort(key=lambda node: -depth[node])
        order[step] = operands
        above = [outline.info[node].layout for node in outline.operands(step)]
        size = 0 if layout is None else math.prod(layout.shape)
        reduces = any(one is not None and math.prod(one.shape) > size for one in above)
        depth[step] = max((depth[node] for node in operands), default=0) + reduces
    return order


def _in_order(order: _Order, roots: Sequence[Node]) -> list[OpNode]:
    found: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            found.setdefault(node)
        elif node in order and node not in found:
            stack.append((node, True))
            stack.extend((operand, False) for operand in reversed(order[node]))
    return [node for node in found if isinstance(node, OpNode)]
