"""What computing expressions would do, told from headers alone."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ._buffers import owner_of
from .cache import DataCache
from .execute import Output, outputs_taking, prepare, resident
from .expression import FileNode, Node, OpNode, ValueNode, describe
from .needs import Needs, is_large
from .outline import Outline
from .planning import Planner
from .program import Program
from .proxy import LazyReadData
from .sizes import format_size, nbytes_of, parse_size

# Of what there is more of, the rest is counted.
_TOLD = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What computing some expressions together would do, under the budget of their cache.

    ``reads`` is how often files are read, altogether, and ``bytes_read`` how many bytes of data
    that gives (as they are in memory, not compressed as on disk). ``passes`` is how often the file
    that is read most is read; ``uses`` says how many operations need the data of each file, by its
    path, those that are in memory already included.

    ``peak_bytes`` is the most memory for data in use at once. With room to spare files stay in
    memory, so it may be far above ``min_budget``, the smallest budget that works, with as many
    reads as that takes; from ``single_pass_budget`` on each file is read once. ``fits`` says
    whether ``budget`` is enough beside the ``held`` bytes of it that are in use for something
    else. All sizes are in bytes.

    The rest is in words: ``again``, why files are read more than once; ``whole``, which operations
    and files are in memory as a whole (everything else goes block by block); ``dtypes``, why the
    data of files take a larger type than they have on disk.

    Printed, it says what it found worth knowing of all this::

        files   20 files, 40 reads: 1.3 GiB of data
        again   20 files (s01.nii.gz ...) 2 times each: no room to keep what is used again
        peak    99.3 MiB of memory
        budget  112 MiB: fits, but needs 2 passes; from 430 MiB on each file is read once
        type    float64 for 20 files (s01.nii.gz ...): int16 on disk, scaled by scl_slope 0.5 and
                scl_inter 3; dtype="float32" would halve that
    """

    reads: int
    bytes_read: int
    peak_bytes: int
    min_budget: int
    single_pass_budget: int
    uses: dict[str, int]
    fits: bool
    passes: int
    budget: int
    held: int = 0
    again: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    @property
    def enough(self) -> str:
        """A budget with which it fits, as one writes it: "1.8 MiB"."""
        taken = self.held if self.min_budget <= self.budget else 0
        return _enough(self.min_budget + taken)

    @property
    def verdict(self) -> str:
        """Whether the plan fits, in how many passes, and which budget it needs."""
        once = f"from {_enough(self.single_pass_budget)} on each file is read once"
        more = f"; {once}" if self.single_pass_budget > self.min_budget else ""
        if self.fits and self.passes > 1:
            return f"fits, but needs {self.passes} passes; {once}"
        if self.fits:
            return f"fits; the smallest budget that works is {_enough(self.min_budget)}{more}"
        if self.min_budget <= self.budget:
            return (
                f"does not fit: {_enough(self.min_budget)} are needed, and {format_size(self.held)}"
                " are in use for something else"
            )
        return f"does not fit; the smallest budget that works is {_enough(self.min_budget)}{more}"

    def rows(self) -> list[tuple[str, str]]:
        """What is printed: labels and texts."""
        count = len(self.uses)
        files = _times(count, "file")
        if not self.reads:
            text = "nothing is read" + (f": {files}, in memory already" if count else "")
        elif self.reads == count and self.passes == 1:
            each = "each read once" if count > 1 else "read once"
            text = f"{files}, {each}: {format_size(self.bytes_read)} of data"
        else:
            reads = _times(self.reads, "read")
            text = f"{files}, {reads}: {format_size(self.bytes_read)} of data"
        rows = [("files", text)]
        rows += [("again", text) for text in self.again]
        rows.append(("peak", f"{format_size(self.peak_bytes)} of memory"))
        rows.append(("budget", f"{format_size(self.budget)}: {self.verdict}"))
        rows += [("whole", text) for text in self.whole]
        rows += [("type", text) for text in self.dtypes]
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{label:<7} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        cells = "".join(
            f"<tr><th {left}>{label}</th><td {left}>{html.escape(text)}</td></tr>"
            for label, text in self.rows()
        )
        return f"<table>{cells}</table>"


def explain(*expressions: Any) -> Plan:
    """The `Plan` of computing all ``expressions`` in one go, as `compute` does.

    Only headers are read. Results count as memory, since `compute` keeps them; `save_all` may need
    less, as it writes them while it computes. Raises what headers tell: missing files, shapes and
    grids that don't go together. What is no proxy needs no plan; without any it is a TypeError.
    """
    proxies = [item for item in expressions if isinstance(item, LazyReadData)]
    if not proxies:
        raise TypeError("explain takes proxies and expressions of them; none was given")
    return plan_of([proxy._node for proxy in proxies], proxies[0]._use())


def plan_of(
    roots: Sequence[Node],
    cache: DataCache,
    outputs: Mapping[Node, Sequence[Output]] = MappingProxyType({}),
) -> Plan:
    """The plan of computing ``roots``, those with ``outputs`` only to write them there."""
    outline = prepare(roots, cache)
    roots = [outline.stand_in(root) for root in roots]
    written = {
        root: sum(output.nbytes for output in found)
        for root, found in outputs_taking(outline, outputs).items()
    }
    there, unadopted = _in_memory(outline)
    obtainable = cache.obtainable() - unadopted
    planner = Planner(outline, roots, resident(outline, cache), written)
    fresh = Planner(outline, roots, written=written) if planner.resident else planner
    program = planner.choose(obtainable)
    found = planner.predict(program, obtainable)
    return Plan(
        reads=found.reads.total(),
        bytes_read=found.nbytes,
        peak_bytes=found.peak + there,
        min_budget=fresh.least + there,
        single_pass_budget=fresh.least_to_read_once + there,
        uses=_uses(outline, roots),
        fits=program.need <= obtainable,
        passes=max(found.reads.values(), default=0),
        budget=cache.budget,
        held=max(0, cache.budget - obtainable - there),
        again=_again(program, found.reads),
        whole=_whole(outline, program, planner.needs),
        dtypes=_dtypes(planner.files),
    )


def _in_memory(outline: Outline) -> tuple[int, int]:
    """The bytes of operands that aren't files, and those of them that no cache was charged yet."""
    sizes: dict[int, int] = {}
    fresh: dict[int, int] = {}
    for node in outline.nodes:
        if isinstance(node, ValueNode):
            value = node.value
        elif node in outline.values:
            value = outline.values[node]
        else:
            continue
        nbytes = nbytes_of(value) if hasattr(value, "nbytes") else 0
        (fresh if isinstance(node, ValueNode) and not node.adopted else sizes).setdefault(
            id(owner_of(value)), nbytes
        )
    unadopted = sum(nbytes for owner, nbytes in fresh.items() if owner not in sizes)
    return sum(sizes.values()) + unadopted, unadopted


def _uses(outline: Outline, roots: Sequence[Node]) -> dict[str, int]:
    """How many operations need each file: parts of it, and its data read in other ways, too."""
    uses = Counter({node.key.path: 0 for node in outline.nodes if isinstance(node, FileNode)})
    results = ((root,) for root in roots if isinstance(root, FileNode))
    for files in (*outline.files.values(), *results):
        uses.update({node.key.path for node in files})
    return dict(uses)


def _again(program: Program, reads: Counter[FileNode]) -> tuple[str, ...]:
    """Why files are read more than once."""
    pieces = {
        node: len(stage.pieces)
        for stage in program.stages
        if stage.reopened
        for node in stage.files
    }
    together = max((len(stage.files) for stage in program.stages if stage.reopened), default=0)
    groups: dict[tuple[int, str], list[str]] = {}
    for node, count in reads.items():
        if count > 1:
            why = "to keep what is used again"
            if pieces.get(node, 0) > 1:
                why = f"to read {together} files side by side, so they are read piece by piece"
            groups.setdefault((count, why), []).append(_name(node))
    return tuple(
        f"{_listed(names, 'file')} {count} times{' each' * (len(names) > 1)}: no room {why}"
        for (count, why), names in sorted(groups.items(), key=lambda item: -item[0][0])[:_TOLD]
    )


def _whole(outline: Outline, program: Program, needs: Needs) -> tuple[str, ...]:
    """What is in memory as a whole, where that is large: operands of operations, and files."""
    operations: dict[str, int] = {}
    files: dict[FileNode, None] = {}
    for stage in program.stages:
        files.update(dict.fromkeys(node for node in stage.pinned if _only_whole(outline, node)))
        for step in stage.steps if stage.space is None else ():
            need = needs[outline.cases[step]]
            # Not those that only are so because there is room.
            if need.large and need.way is None and step.op.family != "view":
                layouts = outline.layouts(step)
                size = max((item.nbytes for item in layouts if item is not None), default=0)
                operations[_told(step)] = max(size, operations.get(_told(step), 0))
    texts = [
        f"{name} takes whole operands of {format_size(size)}"
        for name, size in sorted(operations.items(), key=lambda item: -item[1])
    ]
    more = len(texts) - _TOLD
    if more > 0:
        texts[_TOLD:] = [f"so {'does' if more == 1 else 'do'} {_times(more, 'operation')} more"]
    if files:
        size = max(node.key.estimate()[0] for node in files)
        names = list(dict.fromkeys(map(_name, files)))
        verb = "is" if len(names) == 1 else "are"
        texts.append(
            f"{_listed(names, 'file')} {verb} loaded as a whole "
            f"({format_size(size)}{' each at most' * (len(names) > 1)}): the reader gives no blocks"
        )
    return tuple(texts)


def _only_whole(outline: Outline, node: FileNode) -> bool:
    large = is_large((outline.info[node].layout,), None)
    return large and node.key.part is None and not node.key.probe().in_blocks


def _told(step: OpNode) -> str:
    axis = (step.kwargs or {}).get("axis")
    along = "" if axis is None else f" along axis {axis}"
    return f"{describe(step).removeprefix('the result of ')}{along}"


def _dtypes(files: Iterable[FileNode]) -> tuple[str, ...]:
    """Why the data of files aren't in the type that they have on disk, unless it was asked for."""
    groups: dict[str, dict[str, str]] = {}
    for node in files:
        probe = node.key.probe()
        if probe.dtype_reason and node.key.dtype is None:
            groups.setdefault(str(probe.dtype), {})[_name(node)] = probe.dtype_reason
    texts = []
    for dtype, reasons in groups.items():
        reason = next(iter(reasons.values()))
        halved = '; dtype="float32" would halve that' if dtype == "float64" else ""
        texts.append(f"{dtype} for {_listed(list(reasons), 'file')}: {reason}{halved}")
    return tuple(texts)


def _name(node: FileNode) -> str:
    return os.path.basename(node.key.name)


def _listed(names: Sequence[str], word: str) -> str:
    """``names`` by name if they are few, else as many of ``word`` with one of them."""
    if len(names) <= _TOLD:
        return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"{_times(len(names), word)} ({names[0]} ...)"


def _times(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _enough(nbytes: int) -> str:
    """``nbytes`` for people, as a budget that they can write: never less than it."""
    text = format_size(nbytes)
    return text if parse_size(text) >= nbytes else format_size(nbytes + nbytes // 100)
