"""What the arguments of the command mean: images, lists of images, named inputs, outputs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lazycache.formula.vocabulary import naming_fault
from lazycache.writing import EXTENSIONS

from .terminal import UsageError


@dataclass(slots=True)
class Inputs:
    """The numbered images, in order, and the named ones."""

    images: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def paths(self) -> list[str]:
        return [*self.images, *self.names.values()]


@dataclass(slots=True)
class Output:
    """A formula and the file for its result; without a file the result is a number to print."""

    formula: str
    path: str | None


_NAMED = re.compile(r"([^\W\d]\w*)=(.*)", re.DOTALL)
_ENDS_AS_IMAGE = re.compile(
    rf".*?[^/](?:{'|'.join(map(re.escape, EXTENSIONS))})(?==|\Z)", re.DOTALL | re.IGNORECASE
)


def expand_lists(given: Iterable[str]) -> list[str]:
    """``given`` with the content of each ``@list`` in its place.

    A list has one path a line, relative to the folder of the list, so that a list means the same
    files wherever it is used from. Raises OSError for a list that can't be read.
    """
    paths: list[str] = []
    for one in given:
        if not one.startswith("@"):
            paths.append(one)
            continue
        folder = os.path.dirname(one[1:])
        try:
            with open(one[1:], encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except UnicodeDecodeError:
            raise UsageError(f"{one[1:]}: no list of files: write one path a line") from None
        found = [os.path.join(folder, line) for line in lines if line and line[0] != "#"]
        if not found:
            raise UsageError(f"{one[1:]}: this list names no files")
        paths.extend(found)
    return paths


def read_inputs(given: Iterable[str]) -> Inputs:
    """Tell the named inputs (``a=file``) from images; what exists by the whole name is an image."""
    inputs = Inputs()
    for one in given:
        named = None if os.path.lexists(one) else _NAMED.fullmatch(one)
        if named is None:
            inputs.images.extend(expand_lists([one]))
            continue
        name, path = named.groups()
        fault = naming_fault(name)
        if fault:
            raise UsageError(f"{one}: {fault} (or write ./{one} for a file of this name)")
        if name in inputs.names:
            raise UsageError(f"{one}: {name} is already {inputs.names[name]}")
        if not path:
            raise UsageError(f"{one}: no file is given for {name}")
        inputs.names[name] = path
    return inputs


def split_output(text: str) -> tuple[str, str | None]:
    """``OUT=FORMULA`` as its two parts; ``OUT`` alone with None.

    OUT ends at the first ``=`` that follows an extension which can be written (so it may itself
    hold a ``=``), or else at the first ``=``. OUT is ``-`` or nothing for a number to print.
    """
    image = _ENDS_AS_IMAGE.match(text)
    if image is not None:
        path, rest = text[: image.end()], text[image.end() :]
    else:
        path, equals, formula = text.partition("=")
        rest = equals + formula
    return path, rest[1:] if rest else None


def read_eval(
    given: list[str],
    outputs: list[str],
    formula: str | None = None,
    images: Iterable[str] = (),
) -> tuple[Inputs, list[Output]]:
    """The inputs and outputs of ``lazycache eval``, in any of its forms.

    ``formula`` and ``images`` are what was given as such, by ``-f`` and ``-i``; these images come
    before those among ``given``.
    """
    split = [split_output(text) for text in outputs]
    with_formula = [formula is not None for _, formula in split]
    if any(with_formula) and formula is not None:
        raise UsageError(f"a formula is given with -f, and another one with -o: {formula}")
    if split and all(with_formula):
        found = [Output(formula or "", _file(path)) for path, formula in split]
        return read_inputs([*images, *given]), found
    if any(with_formula):
        lone = outputs[with_formula.index(False)]
        raise UsageError(f"-o {lone}: write its formula too: -o {lone}=FORMULA")
    if len(split) > 1:
        raise UsageError("with several -o each needs its formula: -o OUT=FORMULA")
    if formula is None:
        if not given:
            raise UsageError("write a formula and its images (see lazycache eval --help)")
        formula, *given = given
        if os.path.exists(formula) or formula.startswith("@"):
            raise UsageError(f"{formula} is a file: write the formula before the images")
    path = _file(split[0][0]) if split else None
    return read_inputs([*images, *given]), [Output(formula, path)]


def _file(path: str) -> str | None:
    return None if path in ("", "-") else path
