"""What plans take: predicted and accounted peaks, resident memory, and reads of each file.

Each plan runs in a process of its own, at the smallest budget that `lazycache.explain` names, at
the smallest with which each file is read once, and at a roomy one. ``resident`` is the most memory
of the process over what it had after its imports; ``reads`` are those of each file.

    python -m benchmarks.plans [--count 100] [--folder made-volumes] [--plan mean ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .measure import Measured, mib, report, run
from .volumes import subjects

Plan = Callable[[Sequence[Any]], list[Any]]


def _formula(text: str) -> Plan:
    def plan(images: Sequence[Any]) -> list[Any]:
        import lazycache as lc

        return [lc.evaluate(text, images)]

    return plan


def _functions(*names: str) -> Plan:
    def plan(images: Sequence[Any]) -> list[Any]:
        import lazycache as lc

        return [getattr(lc, name)(images) for name in names]

    return plan


def _repeated(operands: int, files: int) -> str:
    """Products of two operands, added up and divided; each file comes several times."""
    numbers = [1 + (7 * place) % files for place in range(operands)]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return "(" + " + ".join(f"I{a} * I{b} / 1000" for a, b in pairs) + ") / I1"


# Of each plan: how many files (of a hundred; more are the same ones under other names), and how
# many of them the roomy budget has room for.
PLANS: dict[str, tuple[Plan, int, float]] = {
    "sum": (_functions("sum"), 100, 1),
    "mean": (_functions("mean"), 100, 1),
    "(I1 * 2 + I2 * I3) / 1.2 + I1": (_formula("(I1 * 2 + I2 * I3) / 1.2 + I1"), 3, 1),
    "20 operands, 8 files": (_formula(_repeated(20, 8)), 8, 1),
    "mean, std, median": (_functions("mean", "std", "median"), 40, 1),
    "var, room for half": (_functions("var"), 200, 0.5),
}


def work(name: str, budget: str, folder: Path) -> Any:
    import lazycache as lc

    plan, files, room = PLANS[name]
    images = lc.glob(folder / "*.nii.gz", dtype="float32" if files < 40 else None)
    expressions = plan(images)
    told = lc.explain(*expressions)
    roomy = told.single_pass_budget + int(room * told.bytes_read)
    budgets = {"least": told.min_budget, "one pass": told.single_pass_budget, "roomy": roomy}
    lc.set_budget(budgets[budget])
    del images  # only the expressions may keep files in memory
    told = lc.explain(*expressions)
    values = lc.compute(*expressions)
    stats = lc.get_cache().stats()
    return {
        "budget": lc.get_cache().budget,
        "predicted": told.peak_bytes,
        "accounted": stats.peak_bytes,
        "reads": told.reads,
        "loads": stats.loads,
        "overcommits": stats.overcommits,
        "results": sum(value.nbytes for value in values),
    }


def line(name: str, count: int, found: Measured) -> str:
    told = found.told
    return (
        f"{name:32}{mib(told['budget']):>10}{mib(told['predicted']):>11}"
        f"{mib(told['accounted']):>11}{mib(found.peak - found.start):>10}"
        f"{mib(told['results']):>10}{told['reads'] / count:>10.2f}{told['loads'] / count:>7.2f}"
        f"{found.seconds:>8.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="files that a hundred stand for")
    parser.add_argument("--folder", type=Path, help="keep the volumes here, for the next time")
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS), metavar="PLAN")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        import nibabel  # noqa: F401 - imported before anything is measured

        import lazycache  # noqa: F401

        name, budget, links = arguments.only
        report(lambda: work(name, budget, Path(links)))
        return 0

    print(
        f"{'':32}{'budget':>10}{'predicted':>11}{'accounted':>11}{'resident':>10}{'results':>10}"
        f"{'predicted':>10}{'reads':>7}{'time':>10}"
    )
    held = True
    with subjects(arguments.folder, arguments.count) as made:
        for name in arguments.plan:
            _, hundredths, _ = PLANS[name]
            count = hundredths if hundredths < 40 else hundredths * arguments.count // 100
            with tempfile.TemporaryDirectory(prefix="lazycache-plans-") as links:
                for number in range(count):
                    link = Path(links) / f"{number:03}.nii.gz"
                    link.symlink_to(made[number % len(made)].resolve())
                for budget in ("least", "one pass", "roomy"):
                    found = run("benchmarks.plans", "--only", name, budget, links)
                    print(line(name if budget == "least" else "", count, found), flush=True)
                    told = found.told
                    held &= told["accounted"] <= told["budget"] and not told["overcommits"]
    print("all budgets held" if held else "A BUDGET DID NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
