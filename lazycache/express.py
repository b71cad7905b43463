"""Making proxies of expressions from proxies, and calling functions on their data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from ._frames import location
from .expression import GridMode, Node, Op, OpNode, Slot, ValueNode, frozen, slots
from .layout import Layout


class Expressible:
    """What a proxy has to say for expressions to be made of it."""

    __slots__ = ()

    _node: Node
    _grid: GridMode

    @property
    @abstractmethod
    def data(self) -> Any: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def ndim(self) -> int: ...

    @abstractmethod
    def _derive(self, node: Node) -> Self:
        """A proxy of an expression that this one is an operand of."""

    @abstractmethod
    def _become(self, node: Node) -> None:
        """From now on, stand for ``node``."""

    @abstractmethod
    def _part(self, index: tuple[Any, ...]) -> Node | None:
        """The node of a part of a file, where that is what the proxy stands for."""

    @abstractmethod
    def _has_room(self) -> bool:
        """Whether it stands for an expression whose value has room in memory, and isn't there."""

    @abstractmethod
    def _is_array(self) -> bool:
        """Whether the data are an array, or a volume that holds one; loaded if need be to tell."""

    @abstractmethod
    def _layout(self) -> Layout | None:
        """The layout that headers say the data will have; None where they don't."""


def express(op: Op, operands: Sequence[Any], constants: tuple[Any, ...] = (), **kwargs: Any) -> Any:
    """A proxy of ``op`` on ``operands``, one of which is a proxy, and ``constants``."""
    first = next(iter(proxies_in(operands)))
    return first._derive(node_of(op, operands, constants, **kwargs))


def node_of(
    op: Op, operands: Sequence[Any], constants: tuple[Any, ...] = (), **kwargs: Any
) -> OpNode:
    nodes: list[Node] = []
    template = tuple(template_of(operand, nodes) for operand in operands)
    args = (*template, *constants)
    if len(args) == len(nodes) and all(type(item) is Slot for item in args):
        args = slots(len(args))
    # What one of them says other than the usual holds for all.
    modes = (proxy._grid for proxy in proxies_in(operands) if proxy._grid != "error")
    grid: GridMode = next(modes, "error")
    return OpNode(op, tuple(nodes), args, kwargs or None, location(), grid)


def template_of(value: Any, nodes: list[Node]) -> Any:
    """What stands for ``value`` in the arguments of a node; its nodes are added to ``nodes``."""
    if isinstance(value, list | tuple) and any(isinstance(item, Expressible) for item in value):
        return [template_of(item, nodes) for item in value]
    if isinstance(value, Expressible):
        node = value._node
        if isinstance(node, ValueNode) and _is_constant(node.value):
            return node.value
    elif _is_constant(value):
        return value
    else:
        node = ValueNode(frozen(value))
    nodes.append(node)
    return Slot(len(nodes) - 1)


def is_number(proxy: Expressible) -> bool:
    """Whether ``proxy`` stands for a number, which is a constant in expressions."""
    return isinstance(proxy._node, ValueNode) and _is_constant(proxy._node.value)


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, int | float | complex | np.generic)


def proxies_in(value: Any) -> Iterator[Expressible]:
    """The proxies in nested tuples, lists and dicts, from left to right."""
    if isinstance(value, Expressible):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from proxies_in(item)
    elif isinstance(value, dict):
        yield from proxies_in(list(value.values()))


def replaced(value: Any, data: Iterator[Any]) -> Any:
    """``value`` with each proxy, in the order of `proxies_in`, replaced by the next of ``data``."""
    if isinstance(value, Expressible):
        return next(data)
    if isinstance(value, list | tuple):
        items = [replaced(item, data) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {name: replaced(item, data) for name, item in value.items()}
    return value


def computed(found: Iterable[Expressible]) -> list[Any]:
    """The data of several proxies."""
    return [proxy.data for proxy in found]


def called(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``function`` on the data of the proxies among its arguments."""
    data = iter(computed(proxies_in([args, kwargs])))
    return function(*replaced(args, data), **replaced(kwargs, data))
