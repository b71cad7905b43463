"""Running a checked tree on operands; nothing here knows what the operands are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from lazycache import functions
from lazycache.errors import LazyCacheError
from lazycache.proxy import LazyReadData

from . import vocabulary as words
from .checking import is_numpy
from .tree import (
    Attribute,
    Call,
    Chain,
    Choice,
    Comprehension,
    Constant,
    Loop,
    Name,
    Node,
    Sequence,
    Slice,
    Subscript,
    Unary,
    complain,
)

MAX_PASSES = 1_000_000
"""How often the loops of one formula may go round, all together."""

MAX_BITS = 1024
"""How large a whole number may become: nobody's voxels need more, and 9**9**9 would never end."""

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "@": operator.matmul,
    "**": operator.pow,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMPARISONS = frozenset(("<", "<=", ">", ">=", "==", "!=", "in", "not in"))
# What to write for words that decide about one number, where voxels are meant.
_VOXELWISE = {
    "and": "'and' is not elementwise: write (a) & (b)",
    "or": "'or' is not elementwise: write (a) | (b)",
    "not": "'not' is not elementwise: write ~(a)",
    "if": "'if ... else' can't choose voxel by voxel: write where(condition, a, b)",
    "in": "'in' looks for a number in a list of numbers; of images write (a == 1) | (a == 2)",
    "<": "comparisons can't be chained voxel by voxel: write (a < b) & (b < c)",
}
_UNARY: dict[str, Callable[[Any], Any]] = {
    "+": operator.pos,
    "-": operator.neg,
    "~": operator.invert,
}
_PLAIN = (bool, int, float, complex, np.generic, type(None), str, type, np.dtype)
_MISTAKES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
_FOLDS = words.FUNCTIONS - words.ELEMENTWISE


def _is_plain(value: object) -> bool:
    """Whether ``value`` is a number, an option, or a list of nothing else: no image in it."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (*_PLAIN, range, slice))


class Evaluation:
    """One run of one formula, on images numbered from ``first`` and named inputs."""

    def __init__(
        self,
        text: str,
        images: list[Any],
        first: int,
        names: Mapping[str, Any],
    ) -> None:
        self.text = text
        self.images = images
        self.first = first
        self.names = names
        self.passes = 0

    def fail(self, node: Node, message: str) -> NoReturn:
        raise complain(self.text, node.start, node.end, message)

    def attempt(self, node: Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(...)``, its mistakes made errors that point at ``node``."""
        try:
            return function(*args, **kwargs)
        except (LazyCacheError, OSError):
            raise
        except _MISTAKES as error:
            raise complain(self.text, node.start, node.end, str(error)) from error

    def result(self, tree: Node) -> Any:
        """The value of the whole formula: an image or a number."""
        value = self.value(tree, dict(self.names))
        if isinstance(value, (list, tuple, range)):
            self.fail(tree, "this is a list, not an image: write for example mean(...) of it")
        if isinstance(value, (str, type, np.dtype, type(None), type(...))):
            self.fail(tree, "this is neither an image nor a number")
        return value

    def value(self, node: Node, scope: dict[str, Any]) -> Any:
        match node:
            case Constant():
                return node.value
            case Name():
                return self.name(node.name, scope)
            case Unary(operator="not"):
                return not self.truth("not", node.start, self.value(node.operand, scope))
            case Choice():
                condition = self.value(node.condition, scope)
                chosen = self.truth("if", self.after(node.yes, "if"), condition)
                return self.value(node.yes if chosen else node.no, scope)
            case Unary():
                operand = self.value(node.operand, scope)
                self.refuse_list(node.operand, operand)
                return self.attempt(node, _UNARY[node.operator], operand)
            case Chain():
                return self.chain(node, scope)
            case Attribute():
                if is_numpy(node.value, scope.keys()):
                    return getattr(np, node.name)
                return self.attribute(node, self.value(node.value, scope))
            case Slice():
                parts = (node.lower, node.upper, node.step)
                return slice(*(None if part is None else self.value(part, scope) for part in parts))
            case Subscript():
                return self.subscript(node, scope)
            case Sequence():
                items = [self.value(item, scope) for item in node.items]
                return items if node.is_list else tuple(items)
            case Comprehension():
                found: list[Any] = []
                self.loop(node.loops, node.element, dict(scope), found)
                return found
            case Call():
                return self.call(node, scope)
        raise TypeError(f"not a node of a formula: {node!r}")

    def name(self, name: str, scope: dict[str, Any]) -> Any:
        if name in scope:
            return scope[name]
        if name == "images":
            return self.images
        number = words.image_number(name)
        if number is not None:
            return self.images[number - self.first]
        return words.TYPES[name]

    def after(self, node: Node, word: str) -> int:
        """The place of an operator, of whose left side ``node`` is the end."""
        return self.text.index(word.split()[0], node.end)

    def truth(self, word: str, place: int, value: Any) -> bool:
        """Whether a number is true; what is no number is refused at ``place``."""
        if not isinstance(value, (bool, int, float, np.bool, np.number)):
            end = place + len(word)
            raise complain(self.text, place, end, _VOXELWISE[word])
        return bool(value)

    def junction(self, node: Chain, scope: dict[str, Any]) -> Any:
        """``a and b ...``, ``a or b ...``, of numbers."""
        value, left = self.value(node.first, scope), node.first
        for word, right in node.rest:
            place = self.after(left, word)
            if self.truth(word, place, value) == (word == "or"):
                return value
            value, left = self.value(right, scope), right
            self.truth(word, place, value)
        return value

    def comparison(self, node: Chain, scope: dict[str, Any]) -> Any:
        """``a < b``, ``a in b``; with more of them, of numbers, ``a < b < c``."""
        left_node, left = node.first, self.value(node.first, scope)
        several = len(node.rest) > 1
        value: Any = True
        for sign, right_node in node.rest:
            place = self.after(left_node, sign)
            right = self.value(right_node, scope)
            if sign in ("in", "not in"):
                plain = isinstance(right, (list, tuple, range)) and _is_plain([left, right])
                if not plain or isinstance(left, (list, tuple, range)):
                    raise complain(self.text, place, place + len(sign), _VOXELWISE["in"])
                value = (left in right) == (sign == "in")
            else:
                self.refuse_list(left_node, left)
                self.refuse_list(right_node, right)
                if several and not _is_plain([left, right]):
                    place = self.after(node.rest[0][1], node.rest[1][0])
                    end = place + len(node.rest[1][0])
                    raise complain(self.text, place, end, _VOXELWISE["<"])
                value = self.attempt(right_node, self.binary, right_node, sign, left, right)
            if several and not value:
                return value
            left_node, left = right_node, right
        return value

    def chain(self, node: Chain, scope: dict[str, Any]) -> Any:
        sign = node.rest[0][0]
        if sign in ("and", "or"):
            return self.junction(node, scope)
        if sign in _COMPARISONS:
            return self.comparison(node, scope)
        value = self.value(node.first, scope)
        operand_node = node.first
        for sign, right_node in node.rest:
            right = self.value(right_node, scope)
            if not (sign == "+" and isinstance(value, list) and isinstance(right, list)):
                self.refuse_list(operand_node, value)
                self.refuse_list(right_node, right)
            value = self.attempt(right_node, self.binary, right_node, sign, value, right)
            operand_node = right_node
        return value

    def binary(self, node: Node, sign: str, left: Any, right: Any) -> Any:
        whole = isinstance(left, int) and isinstance(right, int)
        # Before it is computed: it is the computing that would never end.
        if whole and (
            (sign == "**" and left.bit_length() * right > MAX_BITS)
            or (sign == "<<" and left.bit_length() + right > MAX_BITS)
        ):
            self.fail(node, f"this makes a whole number of more than {MAX_BITS} bits")
        value = _BINARY[sign](left, right)
        if whole and isinstance(value, int) and value.bit_length() > MAX_BITS:
            self.fail(node, f"this makes a whole number of more than {MAX_BITS} bits")
        return value

    def refuse_list(self, node: Node, value: Any) -> None:
        if isinstance(value, (list, tuple, range)):
            self.fail(
                node,
                "this is a list, not an image: write sum(...) of it, or [2 * i for i in images]",
            )

    def attribute(self, node: Attribute, value: Any) -> Any:
        if isinstance(value, (list, tuple, range)):
            written = self.text[node.value.start : node.value.end]
            advice = f": write {node.name}({written})" if node.name in words.FUNCTIONS else ""
            self.fail(node, f".{node.name} is of an image, and this is a list{advice}")
        return self.attempt(node, getattr, value, node.name)

    def subscript(self, node: Subscript, scope: dict[str, Any]) -> Any:
        numbered = (
            isinstance(node.value, Name) and node.value.name == "image" and "image" not in scope
        )
        index = self.value(node.index, scope)
        if numbered:
            value: Any = [None] * self.first + self.images
        else:
            value = self.value(node.value, scope)
        if not isinstance(value, (list, tuple, range)):
            return self.attempt(node, operator.getitem, value, index)
        parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
        if not all(isinstance(part, int) or (part is None and len(parts) == 3) for part in parts):
            self.fail(node.index, "a list takes a whole number or a slice of them as its index")
        try:
            found = value[index]
        except IndexError:
            last = len(value) - 1
            first = self.first if numbered else 0
            span = f"from {first} to {last}" if last >= first else "no place: the list is empty"
            self.fail(node, f"there is nothing at {index}; the index goes {span}")
        if numbered and (
            found is None or (isinstance(found, list) and None in map(_nothing, found))
        ):
            self.fail(node, "image[0] is nothing: image counts from 1 (images counts from 0)")
        return found

    def loop(
        self, loops: list[Loop], element: Node, scope: dict[str, Any], found: list[Any]
    ) -> None:
        if not loops:
            found.append(self.value(element, scope))
            return
        here, *inner = loops
        items = self.value(here.iterable, scope)
        self.need_list(here.iterable, items)
        for item in items:
            self.passes += 1
            if self.passes > MAX_PASSES:
                self.fail(here.iterable, f"the loops go round more than {MAX_PASSES} times")
            self.bind(here.target, item, scope)
            if all(self.condition(condition, scope) for condition in here.conditions):
                self.loop(inner, element, scope, found)

    def need_list(self, node: Node, value: Any) -> None:
        if not isinstance(value, (list, tuple, range)):
            self.fail(
                node,
                "this is no list: a loop runs over images, range(...), zip(...) or enumerate(...)",
            )

    def bind(self, target: Node, item: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, Name):
            scope[target.name] = item
        elif isinstance(target, Sequence):
            if not isinstance(item, (list, tuple)) or len(item) != len(target.items):
                self.fail(target, f"each item of this loop doesn't have {len(target.items)} parts")
            for inner, part in zip(target.items, item, strict=True):
                self.bind(inner, part, scope)

    def condition(self, node: Node, scope: dict[str, Any]) -> bool:
        value = self.value(node, scope)
        if not isinstance(value, (bool, int, np.bool)):
            self.fail(node, "a loop's 'if' takes numbers, not images nor what is computed of them")
        return bool(value)

    def call(self, node: Call, scope: dict[str, Any]) -> Any:
        arguments = [self.value(argument, scope) for argument in node.arguments]
        keywords = {name: self.value(argument, scope) for name, argument in node.keywords}
        function = node.function
        if isinstance(function, Name):
            if function.name in words.BUILTINS:
                return self.builtin(node, function.name, arguments, keywords)
            return self.function(node, function.name, arguments, keywords)
        assert isinstance(function, Attribute)
        if is_numpy(function.value, scope.keys()):
            return self.numpy(node, function.name, arguments, keywords)
        value = self.value(function.value, scope)
        reduction = self.reduction(function.name, value, arguments, keywords)
        if reduction is not None:
            return self.attempt(node, reduction, value, **keywords)
        method = self.attribute(function, value)
        return self.attempt(node, method, *arguments, **keywords)

    def builtin(self, node: Call, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if name == "len":
            return self.attempt(node, len, *arguments, **keywords)
        if name == "range":
            if not all(isinstance(argument, int) for argument in arguments):
                self.fail(node, "range takes whole numbers")
            values: range = self.attempt(node, range, *arguments, **keywords)
            if values[MAX_PASSES:]:
                self.fail(node, f"this range has more than {MAX_PASSES} numbers")
            return values
        for argument_node, argument in zip(node.arguments, arguments, strict=True):
            self.need_list(argument_node, argument)
        function: Any = zip if name == "zip" else enumerate
        return self.attempt(node, lambda: list(function(*arguments, **keywords)))

    def function(
        self, node: Call, name: str, arguments: list[Any], keywords: dict[str, Any]
    ) -> Any:
        if arguments and isinstance(arguments[0], (list, tuple, range)) and not len(arguments[0]):
            self.fail(node.arguments[0], "this list is empty")
        if name in _FOLDS and len(arguments) > 1:
            number = isinstance(arguments[0], (int, float, np.number)) and name != "percentile"
            if number or not _is_plain(arguments[1]):
                self.fail(node, f"{name} takes the images as a list: write {name}([a, b])")
        if all(_is_plain(argument) for argument in arguments) and hasattr(np, name):
            # A NumPy scalar would decide the dtype of what it is combined with; a number doesn't.
            return self.attempt(node, lambda: getattr(np, name)(*arguments, **keywords).item())
        return self.attempt(node, getattr(functions, name), *arguments, **keywords)

    def numpy(self, node: Call, name: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if words.is_numpy_type(name):
            if not all(_is_plain(argument) for argument in arguments):
                self.fail(node, f"write .astype(np.{name}) to convert an image")
        elif name not in ("stack", "concatenate", "select"):
            # NumPy would load every image of a plain list to make one array of it.
            arguments = [
                self.attempt(node, np.stack, argument)
                if isinstance(argument, (list, tuple)) and not _is_plain(argument)
                else argument
                for argument in arguments
            ]
        if name in ("array", "asarray") and arguments and not _is_plain(arguments[0]):
            return self.as_image(node, *arguments, **keywords)
        function = getattr(np, name)
        if arguments:
            function = self.reduction(name, arguments[0], arguments[1:], keywords) or function
        return self.attempt(node, function, *arguments, **keywords)

    def reduction(
        self, name: str, image: Any, arguments: list[Any], keywords: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """What reduces a whole image to one number without computing it now, where there is such.

        A proxy's method, and NumPy's function, compute that number at once: several results, and
        what is wrong with them, would no longer be one plan.
        """
        whole = isinstance(image, LazyReadData) and not arguments and keywords.keys() <= {"ddof"}
        return getattr(functions, name) if whole and name in _FOLDS else None

    def as_image(self, node: Call, image: Any, dtype: Any = None) -> Any:
        """``np.asarray(image)``, which leaves an image unread."""
        return image if dtype is None else self.attempt(node, image.astype, dtype)


def _nothing(item: object) -> object:
    # `in` asks with ==, which images answer with an image.
    return None if item is None else True
