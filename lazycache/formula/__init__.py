"""Formulas as text: ``evaluate("(I1 * 2 + I2 * I3) / 1.2", files)``.

A formula is parsed and held against a list of what is allowed; nothing of it is ever run by
Python's own evaluation. It may use

``I1``, ``I2`` ..., ``image[1]``
    the images, counted from 1 (from 0 with ``zero``).
``images``
    the list of them, counted from 0; ``images[1:3]`` is a list too.
names
    the named inputs.
operators
    ``+ - * / // % ** @``, ``& | ^ ~ << >>``, ``== != < <= > >=``, indices, slices.
numbers alone
    ``and or not``, ``a if condition else b``, ``in``, ``not in``, ``0 < k < 5``: they decide about
    one number, not about voxels. For these there are ``& | ~`` and ``where(condition, a, b)``.
loops
    ``sum(2 * i for i in images)``, ``[a - b for a, b in zip(images[::2], images[1::2])]``; over
    lists, `range`, `zip`, `enumerate`; with ``if`` on numbers:
    ``mean(i for k, i in enumerate(images) if k not in (3, 8))``.
functions
    those of `lazycache.functions` by their names (``mean(images)``, ``where(a > 0, a, 0)``),
    NumPy's as ``np.sqrt(I1)``, methods of images (``I1.mean(axis=-1)``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Set
from typing import Any

import numpy as np

from lazycache.cache import DataCache
from lazycache.errors import FormulaError
from lazycache.expression import GridMode
from lazycache.proxy import LazyReadData

from . import syntax, vocabulary
from .checking import Checker
from .evaluation import Evaluation

__all__ = ["Formula", "evaluate"]


class Formula:
    """A formula that was parsed and checked for ``count`` images and inputs called ``names``.

    Raises FormulaError, pointing at the place: for what is no formula, what it may not use, an
    unknown name, an image number that there is none for.
    """

    def __init__(
        self, text: str, count: int, names: Set[str] = frozenset(), *, zero: bool = False
    ) -> None:
        for name in sorted(names):
            fault = vocabulary.naming_fault(name)
            if fault:
                raise FormulaError(f"an input can't be called so: {fault}")
        self.text = text
        self.first = 0 if zero else 1
        self._tree = syntax.parse(text)
        Checker(text, count, self.first, names).check(self._tree)

    def __call__(self, images: Iterable[Any], /, **names: Any) -> Any:
        """The value on ``images``, any objects with operators; `evaluate` hands it proxies.

        A mistake that only the values show (a wrong argument, an index out of range) is a
        FormulaError; errors of lazycache and of reading come through as they are.
        """
        return Evaluation(self.text, list(images), self.first, names).result(self._tree)


def evaluate(
    formula: str,
    images: Iterable[Any] = (),
    *,
    zero: bool = False,
    grid: GridMode = "error",
    cache: DataCache | None = None,
    **names: Any,
) -> Any:
    """The value of a formula: a proxy, or a plain number where no image decides it.

    ``images`` and the named inputs are paths, proxies, arrays, images of nibabel or numbers.
    ``zero`` counts images from 0. ``grid`` and ``cache`` are those of `LazyReadData`.

    No voxel is read but by what NumPy computes at once (``np.mean(I1)`` over all voxels). Raises
    FormulaError, which points at the place.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    # A list is not asked for its iterator: that of a PreloadList would begin to load.
    given = list.copy(images) if isinstance(images, list) else list(images)
    compiled = Formula(formula, len(given), names.keys(), zero=zero)
    return compiled(
        [_operand(image, grid, cache) for image in given],
        **{name: _operand(value, grid, cache) for name, value in names.items()},
    )


def _operand(value: Any, grid: GridMode, cache: DataCache | None) -> Any:
    if isinstance(value, int | float | complex | np.generic):
        return value
    return LazyReadData(value, cache=cache, grid=grid)
