"""What planning costs: sums of very many small arrays and files.

Seconds of building the expression, of reading the headers of its files, of planning it once they
are known and of executing it, and how that compares with plain NumPy, which does the same with a
loop. Planning takes at most 10 microseconds a node where no files are looked at again. All are
seconds of the processor, so that others who use the machine don't count.

    python -m benchmarks.planning [--terms 100000] [--files 2000]
"""

from __future__ import annotations

import argparse
import functools
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lazycache as lc

LIMIT = 10.0
ROUNDS = 5
SIDE = 8


class Times(NamedTuple):
    build: float
    headers: float
    plan: float
    compute: float  # planning and executing
    numpy: float


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    value = work()
    return time.process_time() - began, value


def measure(proxies: Callable[[], list[Any]], plain: Callable[[], Any]) -> Times:
    """One round, with proxies of its own; the results have to be the same."""
    with lc.DataCache("1GiB"):
        operands = proxies()
        build, expression = timed(lambda: functools.reduce(operator.add, operands))
        headers, _ = timed(lambda: [operand.shape for operand in operands])
        plan, _ = timed(lambda: lc.explain(expression))
        compute, value = timed(lambda: expression.data)
    numpy, expected = timed(plain)
    if value.tobytes() != expected.tobytes():
        raise SystemExit("the result is not NumPy's")
    return Times(build, headers, plan, compute, numpy)


def line(name: str, nodes: int, rounds: list[Times]) -> float:
    """Print the medians; microseconds of planning a node."""
    build, headers, plan, compute, numpy = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    each = plan / nodes * 1e6
    print(
        f"{name:32}{build:>9.2f} s{headers:>9.2f} s{plan:>9.2f} s{each:>9.1f} µs"
        f"{compute - plan:>9.2f} s"
        f"{numpy:>9.2f} s{compute / numpy:>8.1f}x"
    )
    return each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--terms", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=2000)
    arguments = parser.parse_args()
    arrays = [np.full((SIDE,) * 3, float(number % 7)) for number in range(100)]
    terms = [arrays[number % 100] for number in range(arguments.terms)]
    columns = (("build", 11), ("headers", 11), ("plan", 11), ("a node", 12), ("execute", 11))
    columns += (("NumPy", 11), ("ratio", 9))
    print(" " * 32 + "".join(f"{column:>{width}}" for column, width in columns))

    def in_memory() -> list[Any]:
        held = [lc.load(array) for array in arrays]
        return [held[number % 100] for number in range(arguments.terms)]

    def by_numpy() -> Any:
        return functools.reduce(operator.add, terms)

    found = [measure(in_memory, by_numpy) for _ in range(ROUNDS)]
    each = line(f"{arguments.terms} terms in memory", arguments.terms + 99, found)

    with tempfile.TemporaryDirectory(prefix="lazycache-planning-") as folder:
        paths = [Path(folder) / f"{number:05}.npy" for number in range(arguments.files)]
        for number, path in enumerate(paths):
            np.save(path, arrays[number % 100])

        def on_disk() -> list[Any]:
            return [lc.load(path) for path in paths]

        def read_by_numpy() -> Any:
            return functools.reduce(operator.add, (np.load(path) for path in paths))

        found = [measure(on_disk, read_by_numpy) for _ in range(ROUNDS)]
        line(f"{arguments.files} files", 2 * arguments.files - 1, found)
    print(f"planning takes {each:.1f} µs a node in memory (limit: {LIMIT:.0f})")
    return int(each > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
