"""What the steps of an outline need, whatever the program: for all steps of a case at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .expression import OpNode
from .layout import Layout, transient
from .outline import Case, Outline
from .spaces import Way, period, way

# Smaller operands are done at once: going by blocks has its price too. In bytes.
_WORTH_IT = 1 << 18


class Need(NamedTuple):
    """What all steps of a case need.

    Whether they are ``large``; if so their ``way`` by blocks, and the period of each operand in it.
    The bytes of the result, and those that a step over whole arrays takes ``besides``. ``heirs``
    are the places of the operands whose memory the result may take over, or be a view of.
    """

    large: bool
    way: Way | None
    periods: tuple[int, ...]
    nbytes: int
    besides: int
    heirs: tuple[int, ...]


class Needs(dict[Case, Need]):
    """The `Need` of each case of an outline, found out when it is asked for."""

    def __init__(self, outline: Outline) -> None:
        super().__init__()
        self._outline = outline

    def __missing__(self, case: Case) -> Need:
        info, operands = self._outline.info, self._outline.operands(case.step)
        need = self[case] = _need_of(case, [info[node].layout for node in operands])
        return need


def _need_of(case: Case, own: Sequence[Layout | None]) -> Need:
    """``own`` are the layouts of the operands as they are in memory."""
    step, layouts, result = case.step, case.layouts, case.result
    large = is_large(layouts, result)
    found = way(step, layouts, result) if large else None
    periods = []
    if found is not None:
        ndim = max(len(layout.shape) for layout in layouts if layout is not None)
        for layout in layouts:
            again = None if layout is None else period(layout, found.space, ndim)
            assert again is not None
            periods.append(again)
    nbytes = 0 if result is None else result.nbytes
    besides = transient(step, layouts, result)
    return Need(large, found, tuple(periods), nbytes, besides, _heirs(step, own, result))


def _heirs(step: OpNode, own: Sequence[Layout | None], result: Layout | None) -> tuple[int, ...]:
    family = step.op.family
    if result is None or not own:
        return ()
    if family == "view":
        return (0,) if own[0] is not None and 2 * result.nbytes >= own[0].nbytes else ()
    if family in ("inplace", "assign"):
        return (0,)
    return tuple(
        place for place, layout in enumerate(own) if step.op.elementwise and layout == result
    )


def is_large(layouts: Sequence[Layout | None], result: Layout | None) -> bool:
    if result is not None and result.nbytes >= _WORTH_IT:
        return True
    return any(layout is not None and layout.nbytes >= _WORTH_IT for layout in layouts)
