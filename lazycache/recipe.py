"""Expressions as flat lists, to be pickled: no recursion, however deep they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .expression import FileNode, Node, OpNode, ValueNode, frozen, walk
from .source import file_key

Recipe = list[tuple[Any, ...]]


def pack(root: Node) -> Recipe:
    """Every node under ``root``, operands first, naming operands by their place in the list.

    A file is its path, reader, options, and the state it had if its header was read; never its
    data. Data in memory travel.
    """
    places: dict[Node, int] = {}
    recipe: Recipe = []
    for node in walk([root]):
        if isinstance(node, FileNode):
            if node.whole is not None and node.whole not in places:
                places[node.whole] = len(recipe)
                recipe.append(_file(node.whole, places))
            recipe.append(_file(node, places))
        elif isinstance(node, ValueNode):
            value = _flat(node.value)
            recipe.append(("value", value, node.name, node.affine, node.header))
        else:
            assert isinstance(node, OpNode)
            operands = tuple(places[operand] for operand in node.operands)
            recipe.append(
                ("op", node.op, operands, node.args, node.kwargs, node.location, node.grid)
            )
        places[node] = len(recipe) - 1
    return recipe


def _file(node: FileNode, places: dict[Node, int]) -> tuple[Any, ...]:
    key = node.key
    whole = None if node.whole is None else places[node.whole]
    known = node.expected if key._known is None else key._known.fingerprint
    options = dict(key.options)
    return ("file", key.path, node.reader, options, key.dtype, node.index, node.handle.nops, whole,
            known)  # fmt: skip


class _Flat(NamedTuple):
    """An array as its bytes: NumPy's own pickles lose the order of bytes, and of most axes."""

    data: NDArray[np.uint8]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _flat(value: Any) -> Any:
    if type(value) is not np.ndarray or value.dtype.hasobject or not value.dtype.itemsize:
        return value
    strides = value.strides
    axes = tuple(sorted(range(value.ndim), key=lambda axis: -abs(strides[axis])))
    ordered = np.ascontiguousarray(value.transpose(axes))
    data = ordered.reshape(-1).view(np.uint8)
    return _Flat(data, value.dtype, value.transpose(axes).shape, axes)


def _unflat(value: Any) -> Any:
    if isinstance(value, _Flat):
        ordered = value.data.view(value.dtype).reshape(value.shape)
        value = ordered.transpose(np.argsort(value.axes))
    return frozen(value) if isinstance(value, np.ndarray) else value


def unpack(recipe: Recipe) -> Node:
    """The node that was packed."""
    nodes: list[Node] = []
    for kind, *fields in recipe:
        if kind == "file":
            path, reader, options, dtype, index, nops, whole, known = fields
            key = file_key(path, reader, options, dtype, index)
            base = None if whole is None else nodes[whole]
            assert base is None or isinstance(base, FileNode)
            nodes.append(FileNode(key, nops, reader, base, index, known))
        elif kind == "value":
            value, *rest = fields
            nodes.append(ValueNode(_unflat(value), *rest))
        else:
            op, operands, args, kwargs, location, grid = fields
            operand_nodes = tuple(nodes[place] for place in operands)
            nodes.append(OpNode(op, operand_nodes, args, kwargs, location, grid))
    return nodes[-1]
