"""Expressions: immutable nodes, built by operators and computed later.

A `FileNode` stands for the data of a file, a `ValueNode` for data in memory, an `OpNode` for an
operation on other nodes. Making a node never touches the disk. Nodes are shared freely: between
proxies, between expressions, between threads. Nothing here recurses over an expression, because a
left-deep chain may have 100,000 operands.

The arguments of an operation are kept as a template: `Slot` *i* stands for the value of operand
*i*; everything else (Python and NumPy scalars, an axis, an index) is there as it is. A Python
scalar so stays one, with the dtype rules of a Python scalar.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _buffers
from ._frames import Location
from .source import FileKey, Handle, Result

Affine = NDArray[np.float64]
GridMode = Literal["error", "warn", "ignore"]

# How the shape of a result follows from those of the operands:
#   map      broadcast together (or that of the only operand)
#   reduce   that of the first operand less the axes of ``axis``, ``keepdims`` observed
#   view     whatever the call gives on an array of the same shape and strides
#   join     np.stack and np.concatenate
#   matmul   as `numpy.matmul`
#   inplace  that of the first operand, whose dtype and memory order are kept as well
#   assign   the same, for values put at an index of the first operand
#   fold     an operation over a list, expanded into simpler ones once the headers are known
Family = Literal["map", "reduce", "view", "join", "matmul", "inplace", "assign", "fold"]


@dataclass(frozen=True, slots=True)
class Op:
    """What an `OpNode` does.

    ``call(*args, **kwargs)`` gives the result; for ``inplace`` and ``assign`` its first argument is
    an array that it may, and does, write into. For a ``fold`` it is given the node and what is
    known of each operand, and gives the node that does the work. ``into(out, *args, **kwargs)``
    is the same computation into a given array of the layout of the result, or None where NumPy
    offers no such thing.
    A ``call`` that knows more tells it: ``call.layout(layouts)`` of the result, the bytes of its
    temporaries, ``call.transient``, and ``call.place``, (affine, header, name) of the result.
    ``elementwise`` says that ``into`` may write over an operand of the result's layout.
    ``wraps`` marks the operators ``+ - *``, which are watched for integers that wrap around.
    """

    name: str
    call: Callable[..., Any]
    family: Family = "map"
    into: Callable[..., Any] | None = None
    elementwise: bool = False
    wraps: bool = False


class Slot(NamedTuple):
    """The place of an operand among the arguments of an operation."""

    position: int


@cache
def slots(count: int) -> tuple[Slot, ...]:
    """The places of all of ``count`` operands: the same tuple each time."""
    return tuple(map(Slot, range(count)))


ONE = slots(1)
TWO = slots(2)


class Info(NamedTuple):
    """What is known of a node's data before, or without, computing it.

    ``layout`` is None for data that is no array, or whose layout can't be foretold. ``affine`` and
    ``header`` come from the first operand that has them; ``name`` is the file that the affine is
    from.
    """

    layout: Any
    affine: Affine | None = None
    header: Any = None
    name: str = ""


class Node:
    """One value of an expression. Equal only to itself."""

    __slots__ = ("__weakref__",)

    operands: tuple[Node, ...] = ()


class FileNode(Node):
    """The data of a file, or of a part of one.

    As long as it lives the cache knows that somebody may want the data again, for ``nops``
    operations (0: without end). ``reader`` is the one that was asked for, or None. A part knows
    its ``whole`` and the ``index`` of the part, so that it can be cut from data that are in memory
    already. ``expected`` is the fingerprint that the files had where this node was pickled.
    """

    __slots__ = ("_claim", "expected", "handle", "index", "key", "looked", "reader", "whole")

    def __init__(
        self,
        key: FileKey,
        nops: int = 0,
        reader: Any = None,
        whole: FileNode | None = None,
        index: tuple[Any, ...] | None = None,
        expected: Any = None,
    ) -> None:
        self.key = key
        self.handle = Handle(key, nops)
        self.reader = reader
        self.whole = whole
        self.index = index
        self.expected = expected
        # Whether the files were looked at since: what is cached may be older than this node.
        self.looked = False
        self._claim: weakref.ref[Claim] | None = None

    def claim(self) -> Claim:
        """What a proxy holds as long as its user may ask for these data again."""
        claim = None if self._claim is None else self._claim()
        if claim is None:
            claim = Claim()
            self._claim = weakref.ref(claim)
        return claim

    @property
    def wanted(self) -> bool:
        """Whether any proxy stands for these data; else nothing but expressions do."""
        return self._claim is not None and self._claim() is not None


class Claim:
    """See `FileNode.claim` and `OpNode.claim`."""

    __slots__ = ("__weakref__", "on")

    def __init__(self, on: tuple[Result | Claim, ...] = ()) -> None:
        self.on = on


class ValueNode(Node):
    """Data in memory: a read-only array, or any object.

    ``adopted`` becomes True when a cache has charged its bytes.
    """

    __slots__ = ("adopted", "affine", "header", "name", "value")

    def __init__(
        self, value: Any, name: str = "", affine: Affine | None = None, header: Any = None
    ) -> None:
        self.value = value
        self.name = name or f"<{type(value).__name__} in memory>"
        self.affine = affine
        self.header = header
        self.adopted = False


class OpNode(Node):
    """An operation on the values of other nodes.

    ``location`` is the file and line where the user wrote it; ``grid`` says what to do about
    operands on different grids. `remember` is told when it was computed.
    """

    __slots__ = ("_claim", "_result", "args", "grid", "info", "kwargs", "location", "op",
                 "operands", "seen")  # fmt: skip

    def __init__(
        self,
        op: Op,
        operands: tuple[Node, ...],
        args: tuple[Any, ...] = TWO,
        kwargs: Mapping[str, Any] | None = None,
        location: Location | None = None,
        grid: GridMode = "error",
    ) -> None:
        self.op = op
        self.operands = operands
        self.args = args
        self.kwargs = kwargs
        self.location = location
        self.grid: GridMode = grid
        self.info: Info | None = None
        # The fingerprints of the files that it was computed from, by key: it is never computed
        # again from other content.
        self.seen: dict[FileKey, Any] | None = None
        self._result: weakref.ref[Result] | None = None
        self._claim: weakref.ref[Claim] | None = None

    def claim(self) -> Claim | None:
        """What a proxy holds until this is computed: what its operands' computed values live on.

        So that a value which goes on growing, as in ``total = total + volume; total.data``, is
        computed from the one before, though nobody else refers to that any more.
        """
        if self.result is not None:
            return None
        claim = None if self._claim is None else self._claim()
        if claim is None:
            parts = [
                part
                for operand in dict.fromkeys(self.operands)
                if isinstance(operand, OpNode) and (part := operand._claimed()) is not None
            ]
            if len(parts) == 1 and isinstance(parts[0], Claim):
                claim = parts[0]
            elif parts:
                claim = Claim(tuple(parts))
            self._claim = None if claim is None else weakref.ref(claim)
        return claim

    def _claimed(self) -> Result | Claim | None:
        result = self.result
        return result if result is not None or self._claim is None else self._claim()

    def remember(self, result: Result, info: Info, seen: dict[FileKey, Any]) -> None:
        """It was computed; whoever holds ``result`` has the value."""
        self.info = info
        self.seen = seen
        self._result = weakref.ref(result)

    @property
    def result(self) -> Result | None:
        """The computed value, where its maker is alive; its ``value`` may have been evicted."""
        return None if self._result is None else self._result()

    def where(self) -> str:
        """The line where the user wrote it, for messages."""
        return "" if self.location is None else f'"{self.location[0]}", line {self.location[1]}'


def fill(template: Any, values: list[Any]) -> Any:
    """The template with each `Slot` replaced by its value."""
    if template is TWO:
        return values[0], values[1]
    if type(template) is Slot:
        return values[template.position]
    if type(template) is tuple:
        return tuple([fill(item, values) for item in template])
    if type(template) is list:
        return [fill(item, values) for item in template]
    if type(template) is dict:
        return {name: fill(item, values) for name, item in template.items()}
    return template


def walk(
    roots: Iterable[Node], stop: Callable[[Node], bool] = lambda node: False
) -> Iterator[Node]:
    """Every node under ``roots`` once, operands first and from left to right.

    The operands of a node that ``stop`` is true of are left out.
    """
    entered: set[Node] = set()
    # A node whose operands come before it is there again, under None.
    stack: list[Node | None] = [*reversed([*roots])]
    while stack:
        node = stack.pop()
        if node is None:
            node = stack.pop()
            assert node is not None
            yield node
        elif node not in entered:
            entered.add(node)
            if stop(node) or not node.operands:
                yield node
            else:
                stack += (node, None, *node.operands[::-1])


def files_under(roots: Iterable[Node]) -> list[FileNode]:
    """The file nodes under ``roots``, in the order of their first use."""
    return [node for node in walk(roots) if isinstance(node, FileNode)]


def frozen(value: Any) -> Any:
    """``value`` as an expression may keep it: nobody can change an array of it any more.

    Arrays are copied unless they and all that they are views of are read-only. Lists and tuples
    of numbers become arrays. Other objects are kept as they are.
    """
    if isinstance(value, list | tuple):
        array = np.array(value)
        return value if array.dtype.hasobject else _buffers.readonly(array)
    if type(value) is np.ndarray or isinstance(value, np.memmap):
        if type(value) is np.ndarray and _unchangeable(value):
            return value
        return _buffers.readonly(copy_of(np.asarray(value)))
    return value


def _unchangeable(array: NDArray[Any]) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable or isinstance(base, np.memmap):
            return False
        base = base.base
    return base is None or isinstance(base, bytes) or getattr(base, "readonly", False)


def copy_of(array: NDArray[Any]) -> NDArray[Any]:
    """A writeable copy, in the same memory order, in memory that goes back to the system."""
    if array.nbytes < _buffers.LARGE:
        return array.copy(order="K")
    out = empty_in_order(array.shape, array.dtype, array.strides)
    np.copyto(out, array)
    return out


def empty_in_order(
    shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]
) -> NDArray[Any]:
    """An uninitialised dense array whose axes lie in memory in the order of ``strides``."""
    axes = sorted(range(len(shape)), key=lambda axis: -abs(strides[axis]))
    dense = _buffers.empty(tuple(shape[axis] for axis in axes), dtype)
    return dense.transpose(np.argsort(axes)) if shape else dense


def describe(node: Node) -> str:
    """What a node is, in a few words, for messages."""
    if isinstance(node, FileNode):
        return node.key.name
    if isinstance(node, ValueNode):
        return node.name
    assert isinstance(node, OpNode)
    first = next((n for n in _leftmost(node) if isinstance(n, FileNode)), None)
    of = "" if first is None else f" of {os.path.basename(first.key.path)} ..."
    return f"the result of {node.op.name}{of}"


def _leftmost(node: Node) -> Iterator[Node]:
    while True:
        yield node
        if not node.operands:
            return
        node = node.operands[0]
