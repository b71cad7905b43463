"""From the text of a formula to a tree of nodes; knows no name and computes nothing.

The grammar is that of Python's expressions, without what a formula has no use for (`lambda`,
``:=``, f-strings, dictionaries ...). It is parsed here because Python's own parser
recurses over ``I1 + I2 + ...`` and refuses some thousands of images: operators of one precedence
make one flat `Chain`, however many they are. What does nest (brackets, powers, signs) may nest
`MAX_DEPTH` deep, so that no walk over the tree can overflow the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from lazycache.errors import FormulaError

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

MAX_DEPTH = 40
MAX_LENGTH = 2_000_000
_MAX_DIGITS = 100


_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[^\W\d]\w*)
      | (?P<string>'[^'\\]*'|"[^"\\]*")
      | (?P<op>\.\.\.|\*\*|//|<<|>>|<=|>=|==|!=|<>|:=|&&|\|\||[-+*/%@&|^~<>()\[\]{},:.=!])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


_LEVELS = {
    **dict.fromkeys(("<", "<=", ">", ">=", "==", "!=", "in", "not"), 1),
    "|": 2,
    "^": 3,
    "&": 4,
    **dict.fromkeys(("<<", ">>"), 5),
    **dict.fromkeys(("+", "-"), 6),
    **dict.fromkeys(("*", "/", "//", "%", "@"), 7),
}

_CONSTANTS = {"True": True, "False": False, "None": None}

_REFUSED = {
    "and": "a value is missing before 'and'",
    "or": "a value is missing before 'or'",
    "not": "put this 'not' into brackets",
    "if": "a value is missing before 'if ... else'; voxel by voxel write where(condition, a, b)",
    "else": "there is no 'if' that this belongs to: write a if condition else b",
    "in": "a value is missing before 'in'",
    "is": "'is' has no place in a formula: write == to compare",
    "for": "a loop must stand in brackets: sum(... for x in images) or [... for x in images]",
    ":=": "a formula gives no names to values: write the expression out",
    "=": "a formula has no assignments: write == to compare",
    "&&": "'&&' is no operator here: write (a) & (b)",
    "||": "'||' is no operator here: write (a) | (b)",
    "!": "'!' is no operator here: write ~(a)",
    "<>": "'<>' is no operator here: write a != b",
    "{": "there are no dictionaries or sets in a formula: use [...] for a list",
    "}": "there is no '{' that this closes",
}
_WORDS = """
    and or not if else in is for lambda await async yield import def class return del global
    nonlocal while with try except finally raise assert from as pass
"""
_KEYWORDS = frozenset(_WORDS.split())


def is_keyword(name: str) -> bool:
    """Whether ``name`` is a word of the grammar, and so can't name an image."""
    return name in _KEYWORDS or name in _CONSTANTS


def parse(text: str) -> Node:
    """The tree of ``text``; FormulaError, pointing at the place, if it isn't a formula."""
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"the formula is longer than {MAX_LENGTH} characters")
    if not text.strip():
        raise FormulaError("the formula is empty: write for example mean(images)")
    return _Parser(text).formula()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.depth = 0
        self.tokens = self.tokenize()
        self.token = next(self.tokens)
        self.last_end = 0

    def fail(self, message: str, start: int | None = None, end: int | None = None) -> NoReturn:
        start = self.token.start if start is None else start
        raise complain(self.text, start, self.token.end if end is None else end, message)

    def tokenize(self) -> Iterator[_Token]:
        position = 0
        while True:
            match = _TOKEN.match(self.text, position)
            if match is None:
                start = re.compile(r"\s*").match(self.text, position).end()  # type: ignore[union-attr]  # \s* matches everywhere
                character = self.text[start]
                if character in "'\"":
                    self.fail("this text has no closing quote, or holds a backslash", start, start)
                self.fail(f"{character!r} has no meaning in a formula", start, start + 1)
            kind = match.lastgroup or ""
            start, end = match.span(kind)
            yield _Token(kind, match[kind], start, end)
            position = end

    def advance(self) -> _Token:
        token = self.token
        self.last_end = token.end
        self.token = next(self.tokens) if token.kind != "end" else token
        return token

    def at(self, *texts: str) -> bool:
        return self.token.kind in ("op", "name") and self.token.text in texts

    def expect(self, text: str, opened: _Token | None = None) -> _Token:
        if self.at(text):
            return self.advance()
        if self.token.kind == "end" and opened is not None:
            self.fail(f"this {opened.text!r} is never closed", opened.start, opened.end)
        raise self.misplaced()

    def misplaced(self) -> FormulaError:
        """Why the token at hand can't stand where it does."""
        token = self.token
        if token.kind == "end":
            message = "the formula ends too early"
        elif token.text in _REFUSED and token.kind != "string":
            message = _REFUSED[token.text]
        elif token.text in (")", "]"):
            message = f"there is no {'(' if token.text == ')' else '['!r} that this closes"
        elif token.kind == "op":
            message = f"{token.text!r} can't stand here"
        elif token.text in _KEYWORDS:
            message = f"{token.text!r} has no place in a formula"
        else:
            message = f"an operator is missing before {token.text}: write for example a * b"
        return complain(self.text, token.start, token.end, message)

    def nested(self, parse: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"the formula is nested more than {MAX_DEPTH} deep: split it up")
        node = parse()
        self.depth -= 1
        return node

    def formula(self) -> Node:
        node = self.expression()
        if self.at(","):
            self.fail("a formula gives one result: write one formula for each output")
        if self.token.kind != "end":
            raise self.misplaced()
        return node

    def expression(self) -> Node:
        return self.nested(self.choice)

    def choice(self) -> Node:
        yes = self.disjunction()
        if not self.at("if"):
            return yes
        opened = self.advance()
        condition = self.disjunction()
        if not self.at("else"):
            self.fail(
                "this 'if' has no 'else': write a if condition else b; voxel by voxel "
                "where(condition, a, b)",
                opened.start,
                opened.end,
            )
        self.advance()
        no = self.nested(self.choice)
        return Choice(yes.start, no.end, condition, yes, no)

    def disjunction(self) -> Node:
        return self.junction("or", lambda: self.junction("and", self.negation))

    def junction(self, word: str, operand: Callable[[], Node]) -> Node:
        first = operand()
        if not self.at(word):
            return first
        chain = Chain(first.start, first.end, first, [])
        while self.at(word):
            self.advance()
            chain.rest.append((word, operand()))
        chain.end = self.last_end
        return chain

    def negation(self) -> Node:
        if not self.at("not"):
            return self.binary()
        word = self.advance()
        operand = self.nested(self.negation)
        return Unary(word.start, operand.end, "not", operand)

    def binary(self, lowest: int = 1) -> Node:
        left = self.unary()
        chain: Chain | None = None
        chain_level = 0
        while self.token.kind in ("op", "name"):
            level = _LEVELS.get(self.token.text, 0)
            if level < lowest:
                break
            operator = self.advance().text
            if operator == "not":
                self.expect("in")
                operator = "not in"
            right = self.binary(level + 1)
            if chain is None or level != chain_level:
                left = chain = Chain(left.start, right.end, left, [])
                chain_level = level
            chain.rest.append((operator, right))
            chain.end = right.end
        return left

    def unary(self) -> Node:
        if not self.at("+", "-", "~"):
            return self.power()
        sign = self.advance()
        operand = self.nested(self.unary)
        return Unary(sign.start, operand.end, sign.text, operand)

    def power(self) -> Node:
        base = self.postfix()
        if not self.at("**"):
            return base
        operator = self.advance().text
        exponent = self.nested(self.unary)
        return Chain(base.start, exponent.end, base, [(operator, exponent)])

    def postfix(self) -> Node:
        node = self.atom()
        depth = self.depth
        while self.at("(", "[", "."):
            # Postfixes nest to the left without recursion here, but not so for those who walk
            # the tree.
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.fail(f"the formula is nested more than {MAX_DEPTH} deep: split it up")
            opened = self.advance()
            if opened.text == ".":
                if self.token.kind != "name":
                    self.fail("a name must follow the '.'")
                node = Attribute(node.start, self.token.end, node, self.advance().text)
            elif opened.text == "[":
                index = self.index(opened)
                node = Subscript(node.start, self.expect("]", opened).end, node, index)
            else:
                node = self.call(node, opened)
        self.depth = depth
        return node

    def call(self, function: Node, opened: _Token) -> Call:
        arguments: list[Node] = []
        keywords: list[tuple[str, Node]] = []
        while not self.at(")"):
            if self.at("*", "**"):
                self.fail("arguments can't be unpacked in a formula")
            node = self.expression()
            if self.at("="):
                if not isinstance(node, Name):
                    raise self.misplaced()
                if node.name in dict(keywords):
                    self.fail(f"{node.name}= is given twice", node.start, node.end)
                self.advance()
                keywords.append((node.name, self.expression()))
            elif keywords:
                self.fail("this argument must stand before the named ones", node.start, node.end)
            elif self.at("for"):
                arguments.append(self.loops(node))
                if self.at(","):
                    node = arguments[-1]
                    self.fail("put [ ] round this loop", node.start, node.end)
                break
            else:
                arguments.append(node)
            if not self.at(")"):
                self.separator(opened)
        return Call(function.start, self.expect(")", opened).end, function, arguments, keywords)

    def separator(self, opened: _Token) -> None:
        self.expect(",", opened)

    def index(self, opened: _Token) -> Node:
        start = self.token.start
        items: list[Node] = []
        is_tuple = False
        while not self.at("]"):
            items.append(self.slice())
            if self.at("]"):
                break
            self.separator(opened)
            is_tuple = True
        if not items:
            self.fail("an index is missing between [ and ]")
        return Sequence(start, items[-1].end, items, False) if is_tuple else items[0]

    def slice(self) -> Node:
        start = self.token.start
        parts: list[Node | None] = [None]
        while not self.at("]", ","):
            if self.at(":"):
                if len(parts) == 3:
                    self.fail("a slice has at most two ':'")
                self.advance()
                parts.append(None)
            elif parts[-1] is None:
                parts[-1] = self.expression()
            else:
                break
        if len(parts) == 1:
            return parts[0] or self.expression()
        parts.append(None)
        return Slice(start, self.last_end, parts[0], parts[1], parts[2])

    def loops(self, element: Node) -> Comprehension:
        loops: list[Loop] = []
        while self.at("for"):
            self.advance()
            target = self.target()
            if not self.at("in"):
                self.fail("a loop is written: for x in images")
            self.advance()
            iterable = self.nested(self.disjunction)
            conditions: list[Node] = []
            while self.at("if"):
                self.advance()
                conditions.append(self.nested(self.disjunction))
            loops.append(Loop(target, iterable, conditions))
        return Comprehension(element.start, self.last_end, element, loops)

    def target(self) -> Node:
        start = self.token.start
        items = [self.target_item()]
        is_tuple = False
        while self.at(","):
            self.advance()
            is_tuple = True
            if not self.at("in", ")"):
                items.append(self.target_item())
        return Sequence(start, items[-1].end, items, False) if is_tuple else items[0]

    def target_item(self) -> Node:
        if self.at("("):
            opened = self.advance()
            node = self.nested(self.target)
            self.expect(")", opened)
            return node
        if self.token.kind != "name" or is_keyword(self.token.text):
            self.fail("a loop needs a name here: for x in images")
        token = self.advance()
        return Name(token.start, token.end, token.text)

    def atom(self) -> Node:
        token = self.token
        if token.kind == "number":
            return self.number()
        if token.kind == "string":
            self.advance()
            return Constant(token.start, token.end, token.text[1:-1])
        if token.kind == "name" and token.text == "lambda":
            self.fail("a formula defines no functions: write the expression out")
        if token.kind == "name" and token.text not in _KEYWORDS:
            self.advance()
            if self.token.kind == "string":
                self.fail("texts have no prefix in a formula", token.start)
            if token.text in _CONSTANTS:
                return Constant(token.start, token.end, _CONSTANTS[token.text])
            return Name(token.start, token.end, token.text)
        if self.at("..."):
            self.advance()
            return Constant(token.start, token.end, ...)
        if self.at("(", "["):
            return self.bracket()
        raise self.misplaced()

    def number(self) -> Node:
        token = self.advance()
        if self.token.kind in ("name", "number") and self.token.start == token.end:
            if self.token.text in ("j", "J"):
                self.fail("there are no imaginary numbers in a formula", token.start)
            self.fail(f"write {token.text} * {self.token.text} to multiply", token.start)
        whole = not set(token.text) - set("0123456789_")
        if len(token.text) > _MAX_DIGITS:
            self.fail("this number has too many digits", token.start, token.start + 1)
        try:
            value = int(token.text) if whole else float(token.text)
        except ValueError:
            self.fail("this is no number", token.start, token.end)
        return Constant(token.start, token.end, value)

    def bracket(self) -> Node:
        """``(a)``, ``(a, b)``, ``[a, b]``, ``(a for ...)``, ``[a for ...]``."""
        opened = self.advance()
        close = ")" if opened.text == "(" else "]"
        items: list[Node] = []
        is_tuple = False
        while not self.at(close):
            items.append(self.expression())
            if self.at("for") and len(items) == 1:
                comprehension = self.loops(items[0])
                self.expect(close, opened)
                return comprehension
            if not self.at(close):
                self.separator(opened)
                is_tuple = True
        end = self.expect(close, opened).end
        if close == ")" and len(items) == 1 and not is_tuple:
            return items[0]
        return Sequence(opened.start, end, items, close == "]")
