"""What can be said against a formula before any image is looked at."""

from __future__ import annotations

from collections.abc import Set
from typing import NoReturn

import numpy as np

from . import vocabulary as words
from .tree import (
    Attribute,
    Call,
    Chain,
    Choice,
    Comprehension,
    Constant,
    Name,
    Node,
    Sequence,
    Slice,
    Subscript,
    Unary,
    complain,
)


def is_numpy(node: Node, local: Set[str] = frozenset()) -> bool:
    """Whether ``node`` is the ``np`` of ``np.sqrt``."""
    return isinstance(node, Name) and node.name in ("np", "numpy") and node.name not in local


class Checker:
    """Raises FormulaError at the first name, argument or text that a formula may not use.

    ``count`` images are numbered from ``first``; ``names`` are the named inputs.
    """

    def __init__(self, text: str, count: int, first: int, names: Set[str]) -> None:
        self.text = text
        self.count = count
        self.first = first
        self.names = names

    def fail(self, node: Node, message: str) -> NoReturn:
        raise complain(self.text, node.start, node.end, message)

    def fail_name(self, node: Attribute, message: str) -> NoReturn:
        raise complain(self.text, node.end - len(node.name), node.end, message)

    def check(self, node: Node | None, local: Set[str] = frozenset()) -> None:
        """Check ``node`` and all below it; ``local`` are the variables of the loops around it."""
        match node:
            case Constant(value=str()):
                self.fail(node, "a text can only be a dtype or an option: I1.astype('float32')")
            case Name():
                self.check_name(node, local)
            case Unary():
                self.check(node.operand, local)
            case Chain():
                self.check(node.first, local)
                for _, operand in node.rest:
                    self.check(operand, local)
            case Choice():
                for inner in (node.condition, node.yes, node.no):
                    self.check(inner, local)
            case Attribute():
                self.check_attribute(node, local)
            case Slice():
                for part in (node.lower, node.upper, node.step):
                    self.check(part, local)
            case Subscript():
                if not (isinstance(node.value, Name) and node.value.name == "image"):
                    self.check(node.value, local)
                self.check(node.index, local)
            case Sequence():
                for item in node.items:
                    self.check(item, local)
            case Comprehension():
                self.check_loops(node, local)
            case Call():
                self.check_call(node, local)

    def check_name(self, node: Name, local: Set[str]) -> None:
        name = node.name
        if name in local or name in self.names or name in words.TYPES or name == "images":
            return
        number = words.image_number(name)
        if number is not None:
            self.check_number(node, number)
        elif name == "image":
            self.fail(node, f"write image[{self.first}] for the first image, images for the list")
        elif name in ("np", "numpy"):
            self.fail(node, f"write the function after it: {name}.sqrt(I{self.first})")
        elif name in words.FUNCTIONS | words.BUILTINS:
            self.fail(node, f"{name} is a function: write {name}(...)")
        elif name.startswith("_"):
            self.fail(node, f"names that begin with an underscore are not for formulas: {name}")
        else:
            variables = local | self.names
            known = {"image", "images", "np"} | words.FUNCTIONS | words.BUILTINS | variables
            if words.image_number(name.upper()) is not None:
                known |= {name.upper()}
            hint = f": write np.{name}" if name in words.numpy_names() else ""
            hint = hint or words.close(name, known) or self.inputs(variables)
            self.fail(node, f"{name!r} is not known{hint}")

    def check_number(self, node: Node, number: int) -> None:
        if not self.first <= number < self.first + self.count:
            if number == 0:
                self.fail(node, "I0: images are numbered from 1, unless zero (--zero) is asked for")
            have = {0: "there are no images", 1: "there is only one image"}
            only = have.get(self.count, f"there are only {self.count} images")
            last = self.first + self.count - 1
            span = f", I{self.first} to I{last}" if self.count > 1 else ""
            self.fail(node, f"I{number}: {only}{span}")

    def inputs(self, variables: Set[str]) -> str:
        last = self.first + self.count - 1
        numbered = [f"I{self.first}"] if self.count else []
        numbered += [f"... I{last}"] if self.count > 1 else []
        known = " ".join([*numbered, "images", *sorted(variables)])
        return f"; there are {known}, np.<function> and {' '.join(sorted(words.FUNCTIONS))}"

    def check_attribute(self, node: Attribute, local: Set[str]) -> None:
        name = node.name
        if is_numpy(node.value, local):
            self.check_numpy_name(node)
            if words.is_numpy_function(name):
                self.fail(node, f"np.{name} is a function: write np.{name}(...)")
            return
        self.check(node.value, local)
        if name in words.METHODS:
            self.fail_name(node, f"{name} is a method: write .{name}(...)")
        if name not in words.ATTRIBUTES:
            self.refuse_attribute(node)

    def check_numpy_name(self, node: Attribute) -> None:
        known = words.numpy_names()
        if node.name not in known:
            rest = "only element-wise functions, reductions, dtypes and constants are"
            hint = words.close(node.name, known) or f"; {rest}"
            self.fail(node, f"np.{node.name} is not for formulas{hint}")

    def refuse_attribute(self, node: Attribute) -> NoReturn:
        if node.name.startswith("_"):
            self.fail_name(node, "names that begin with an underscore are not for formulas")
        known = words.METHODS | words.ATTRIBUTES
        hint = words.close(node.name, known) or f"; there are {' '.join(sorted(known))}"
        self.fail_name(node, f".{node.name} is not for formulas{hint}")

    def check_loops(self, node: Comprehension, local: Set[str]) -> None:
        inner = set(local)
        for loop in node.loops:
            self.check(loop.iterable, inner)
            self.add_targets(loop.target, inner)
            for condition in loop.conditions:
                self.check(condition, inner)
        self.check(node.element, inner)

    def add_targets(self, target: Node, inner: set[str]) -> None:
        if isinstance(target, Sequence):
            for item in target.items:
                self.add_targets(item, inner)
        elif isinstance(target, Name):
            fault = words.naming_fault(target.name)
            if fault:
                self.fail(target, fault)
            inner.add(target.name)

    def check_call(self, node: Call, local: Set[str]) -> None:
        takes_dtype = self.check_function(node, local)
        for argument in node.arguments:
            if takes_dtype and isinstance(argument, Constant) and isinstance(argument.value, str):
                self.check_dtype(argument)
            else:
                self.check(argument, local)
        for name, argument in node.keywords:
            if name not in words.KEYWORDS:
                hint = words.close(name, words.KEYWORDS)
                hint = hint or f"; there are {' '.join(sorted(words.KEYWORDS))}"
                self.fail(argument, f"the argument {name}= is not for formulas{hint}")
            if not (isinstance(argument, Constant) and isinstance(argument.value, str)):
                self.check(argument, local)
            elif name == "dtype":
                self.check_dtype(argument)
            elif name not in words.TEXT_KEYWORDS:
                self.fail(argument, f"{name}= takes no text")

    def check_function(self, node: Call, local: Set[str]) -> bool:
        """Check what is called; whether its positional arguments may be a dtype's name."""
        function = node.function
        if isinstance(function, Name):
            known = words.FUNCTIONS | words.BUILTINS
            variables = local | self.names
            if function.name in variables or words.image_number(function.name) is not None:
                self.fail(function, f"{function.name} is an image, it can't be called")
            if function.name in words.TYPES:
                advice = f"write .astype({function.name})"
                self.fail(function, f"{function.name} is a dtype here: {advice}")
            if function.name not in known:
                hint = words.close(function.name, known)
                if not hint and function.name in words.numpy_names():
                    hint = f": write np.{function.name}(...)"
                hint = hint or f"; there are {' '.join(sorted(known))} and np.<function>"
                self.fail(function, f"there is no function {function.name!r}{hint}")
            return False
        if not isinstance(function, Attribute):
            self.fail(function, "only functions can be called: mean(...), np.sqrt(...), I1.mean()")
        if is_numpy(function.value, local):
            self.check_numpy_name(function)
            if not (words.is_numpy_function(function.name) or words.is_numpy_type(function.name)):
                self.fail(function, f"np.{function.name} is a constant, it can't be called")
            return function.name == "dtype"
        self.check(function.value, local)
        if function.name in words.ATTRIBUTES:
            self.fail_name(function, f".{function.name} is not a method: leave out the ( )")
        if function.name not in words.METHODS:
            self.refuse_attribute(function)
        return function.name == "astype"

    def check_dtype(self, node: Constant) -> None:
        try:
            numbers = np.dtype(str(node.value)).kind in "biufc"
        except TypeError:
            numbers = False
        if not numbers:
            self.fail(node, f"{node.value!r} is no dtype of numbers: write for example 'float32'")
