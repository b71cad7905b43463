"""Several results computed in one go: what they share is read and computed once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import execute, writing
from .cache import forget_file
from .errors import WriteError
from .expression import files_under
from .proxy import LazyReadData


def compute(*expressions: Any) -> tuple[Any, ...]:
    """The data of each expression; what is no proxy is given back as it is.

    Each proxy keeps its result as if its ``data`` had been asked for. After an error none does.
    """
    proxies = [item for item in expressions if isinstance(item, LazyReadData)]
    if not proxies:
        return expressions
    nodes = [proxy._node for proxy in proxies]
    label = f"computing {len(nodes)} results" if len(nodes) > 1 else ""
    computed = iter(execute.compute(nodes, proxies[0]._use(), label))
    values = []
    for item, node in zip(expressions, _nodes(expressions), strict=True):
        if node is None:
            values.append(item)
            continue
        value, result = next(computed)
        if result is not None and item._node is node:
            item._result = result
        values.append(value)
    return tuple(values)


def save_all(
    results: Mapping[str | os.PathLike[str], Any], *, dtype: DTypeLike | None = None
) -> None:
    """Compute all results in one go and write each to its path, as `LazyReadData.save` does.

    All paths are checked before anything is read: `WriteError` for one that can't be written to,
    is an input of any of the results, or is named twice. If writing one fails, those before it
    stand and that one is left as it was.
    """
    inputs = [node.key.path for node in files_under(n for n in _nodes(results.values()) if n)]
    seen: set[str] = set()
    for path in results:
        writing.check_output(path, inputs)
        place = os.path.realpath(path)
        if place in seen:
            raise WriteError(f"{os.fspath(path)}: two results can't go to one file")
        seen.add(place)
    for (path, item), value in zip(results.items(), compute(*results.values()), strict=True):
        if not isinstance(value, np.ndarray | np.generic):
            raise TypeError(f"{item!r} is no array: only arrays can be saved as an image")
        affine, header = getattr(item, "affine", None), getattr(item, "header", None)
        writing.write_image(path, value, affine=affine, header=header, dtype=dtype, inputs=inputs)
        forget_file(path)


def _nodes(items: Any) -> list[Any]:
    return [item._node if isinstance(item, LazyReadData) else None for item in items]
