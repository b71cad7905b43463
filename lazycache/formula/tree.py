"""The nodes of a formula's tree, and errors that point at the place of one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import EllipsisType

from lazycache.errors import FormulaError

_EXCERPT = 72  # characters of the formula that a message shows


@dataclass(slots=True)
class Node:
    """``text[start:end]`` is what a message about this node points at."""

    start: int
    end: int


@dataclass(slots=True)
class Constant(Node):
    value: bool | int | float | str | EllipsisType | None


@dataclass(slots=True)
class Name(Node):
    name: str


@dataclass(slots=True)
class Unary(Node):
    operator: str
    operand: Node


@dataclass(slots=True)
class Chain(Node):
    """``first op operand op operand ...``, left to right, operators of one precedence."""

    first: Node
    rest: list[tuple[str, Node]]


@dataclass(slots=True)
class Choice(Node):
    """``yes if condition else no``."""

    condition: Node
    yes: Node
    no: Node


@dataclass(slots=True)
class Attribute(Node):
    value: Node
    name: str


@dataclass(slots=True)
class Slice(Node):
    lower: Node | None
    upper: Node | None
    step: Node | None


@dataclass(slots=True)
class Subscript(Node):
    value: Node
    index: Node


@dataclass(slots=True)
class Call(Node):
    function: Node
    arguments: list[Node]
    keywords: list[tuple[str, Node]]


@dataclass(slots=True)
class Sequence(Node):
    items: list[Node]
    is_list: bool


@dataclass(slots=True)
class Loop:
    """``for target in iterable if condition ...``: target is a Name or a Sequence of targets."""

    target: Node
    iterable: Node
    conditions: list[Node]


@dataclass(slots=True)
class Comprehension(Node):
    element: Node
    loops: list[Loop]


def complain(text: str, start: int, end: int, message: str) -> FormulaError:
    """The error for ``text[start:end]``: the message, the text around it and a caret line."""
    flat = re.sub(r"\s", " ", text)
    left = max(0, min(start - _EXCERPT // 2, len(flat) - _EXCERPT))
    right = min(len(flat), left + _EXCERPT)
    before = "..." if left else ""
    after = "..." if right < len(flat) else ""
    carets = "^" * max(1, min(end, right) - start)
    pointer = " " * (len(before) + start - left) + carets
    return FormulaError(f"{message}\n  {before}{flat[left:right]}{after}\n  {pointer}")
