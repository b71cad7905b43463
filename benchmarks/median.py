"""The median of 40 real-size volumes: lazycache against `numpy.median` of their stack.

Each runs in a process of its own, in turn. lazycache runs at the smallest budget that works, at the
smallest with which each file is read once, and with room for all.

    python -m benchmarks.median [--count 40] [--rounds 3] [--folder made-volumes]
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .measure import Measured, interleaved, mib, ratio, report, run
from .volumes import subjects

ONCE, LEAST, ALL = "lazycache, one pass", "lazycache, least", "lazycache, room for all"
NUMPY = "np.median(np.stack(...))"


def ours(name: str, paths: list[str]) -> Any:
    import lazycache as lc

    median = lc.median([lc.load(path) for path in paths])
    plan = lc.explain(median)
    room = {ONCE: plan.single_pass_budget, LEAST: plan.min_budget}
    lc.set_budget(room.get(name, plan.single_pass_budget + plan.bytes_read))
    data = median.data
    stats = lc.get_cache().stats()
    return {
        "budget": lc.get_cache().budget,
        "accounted": stats.peak_bytes,
        "loads": stats.loads,
        "overcommits": stats.overcommits,
        "digest": _digest(data),
    }


def theirs(paths: list[str]) -> Any:
    import nibabel
    import numpy as np

    stack = np.stack([np.asarray(nibabel.load(path).dataobj) for path in paths])
    return {"digest": _digest(np.median(stack, axis=0))}


def _digest(data: Any) -> str:
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the volumes here, for the next time")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        import nibabel  # noqa: F401 - imported before anything is measured

        import lazycache  # noqa: F401

        name, *paths = arguments.only
        report(lambda: theirs(paths) if name == NUMPY else ours(name, paths))
        return 0

    with subjects(arguments.folder, arguments.count) as made:
        paths = [str(path) for path in made]
        runs: dict[str, Callable[[], Measured]] = {
            name: partial(run, "benchmarks.median", "--only", name, *paths)
            for name in (ONCE, LEAST, ALL, NUMPY)
        }
        found = interleaved(runs, arguments.rounds)
    first = [one.seconds for one in found[ONCE]]
    print(f"the median of {len(paths)} volumes, {arguments.rounds} rounds")
    print(
        f"{'':26}{'time':>9}{'ratio':>8}{'resident':>10}{'accounted':>11}{'budget':>10}{'reads':>7}"
    )
    held = True
    for name, measured in found.items():
        seconds = [one.seconds for one in measured]
        resident = max(one.peak - one.start for one in measured)
        text = (
            f"{name:26}{statistics.median(seconds):>7.2f} s{ratio(first, seconds):>7.2f}x"
            f"{mib(resident):>10}"
        )
        told = measured[0].told
        if name != NUMPY:
            reads = told["loads"] / len(paths)
            text += f"{mib(told['accounted']):>11}{mib(told['budget']):>10}{reads:>7.2f}"
            held &= told["accounted"] <= told["budget"] and not told["overcommits"]
        print(text)
    same = len({one.told["digest"] for measured in found.values() for one in measured}) == 1
    print(
        f"{'all budgets held' if held else 'A BUDGET DID NOT HOLD'}; "
        f"the results are {'equal to the byte' if same else 'DIFFERENT'}"
    )
    return 0 if held and same else 1


if __name__ == "__main__":
    sys.exit(main())
