"""Several results computed in one go: what they share is read and computed once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import DTypeLike

from . import execute
from .execute import Computed
from .expression import Node
from .proxy import LazyReadData
from .saving import ImageFile, check_files, save


def compute(*expressions: Any) -> tuple[Any, ...]:
    """The data of each expression; what is no proxy is given back as it is.

    Each proxy keeps its result as if its ``data`` had been asked for. After an error none does.
    """
    proxies = [item for item in expressions if isinstance(item, LazyReadData)]
    if not proxies:
        return expressions
    nodes = [proxy._node for proxy in proxies]
    computed = execute.compute(nodes, proxies[0]._use(), _label(nodes))
    _remember(proxies, nodes, computed)
    values = iter(computed)
    return tuple(
        next(values).value if isinstance(item, LazyReadData) else item for item in expressions
    )


def save_all(
    results: Mapping[str | os.PathLike[str], Any], *, dtype: DTypeLike | None = None
) -> None:
    """Compute all results in one go and write each to its path, as `LazyReadData.save` does.

    All paths are checked before anything is read: `WriteError` for one that can't be written to,
    is an input of any of the results, or is named twice. If writing one fails, those
    that are complete by then stand, and the others are left as they were.
    """
    files = [ImageFile(path, dtype) for path in results]
    pairs = list(zip(results.values(), files, strict=True))
    lazy = [(item, file) for item, file in pairs if isinstance(item, LazyReadData)]
    check_files(files, [item._node for item, _ in lazy])
    nodes = [item._node for item, _ in lazy]
    if lazy:
        cache = lazy[0][0]._use()
        computed = save(nodes, [file for _, file in lazy], cache, _label(nodes))
        _remember([item for item, _ in lazy], nodes, computed)
    for item, file in pairs:
        if not isinstance(item, LazyReadData):
            file.write_whole(item)


def _label(nodes: Sequence[Node]) -> str:
    return f"computing {len(nodes)} results" if len(nodes) > 1 else ""


def _remember(
    proxies: Sequence[LazyReadData], nodes: Sequence[Node], computed: Sequence[Computed]
) -> None:
    for proxy, node, (_, result) in zip(proxies, nodes, computed, strict=True):
        proxy._keep(node, result)
