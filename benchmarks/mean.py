"""How fast, and in how much memory, is the mean of 60 real-size volumes?

Against the loop that people write by hand with nibabel, whole process against whole process, at
budgets from the smallest that works to everything in memory. ``python -m benchmarks.mean --count
20`` measures on fewer files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .measure import report, run


def ours(folder: Path, budget: str, out: Path) -> Any:
    import lazycache as lc

    lc.set_budget(int(budget))
    lc.mean(lc.glob(folder / "*.nii.gz")).save(out)
    stats = lc.get_cache().stats()
    return {"loads": stats.loads, "peak": stats.peak_bytes, "overcommits": stats.overcommits}


def by_hand(folder: Path, out: Path) -> Any:
    import nibabel

    total, count, affine = None, 0, None
    for path in sorted(folder.glob("*.nii.gz")):
        image = nibabel.load(path)
        data = np.asarray(image.dataobj)
        if total is None:
            total, affine = data.astype(np.float64), image.affine
        else:
            total += data
        count += 1
    nibabel.save(nibabel.Nifti1Image(total / count, affine), out)
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        way, folder, budget, out = arguments.only
        if way == "ours":
            report(lambda: ours(Path(folder), budget, Path(out)))
        else:
            report(lambda: by_hand(Path(folder), Path(out)))
        return 0

    from .volumes import make_subjects

    folder = Path(tempfile.mkdtemp(prefix="lazycache-mean-"))
    try:
        make_subjects(folder, arguments.count)
        volume = 197 * 233 * 189 * 2
        result = 4 * volume
        out = str(folder / "mean.nii")
        loop = run("benchmarks.mean", "--only", "by-hand", str(folder), "0", out)
        print(f"{'budget':>12}{'peak':>12}{'over start':>12}{'time':>9}{'against the loop':>18}")
        print(
            f"{'nibabel loop':>12}{_mib(loop.peak)}{_mib(loop.peak - loop.start)}"
            f"{loop.seconds:>7.1f} s"
        )
        budgets = [
            result + 2 * volume,
            result + 4 * volume,
            result + 16 * volume,
            result + (arguments.count + 4) * volume,
        ]
        for budget in budgets:
            found = run("benchmarks.mean", "--only", "ours", str(folder), str(budget), out)
            again = run("benchmarks.mean", "--only", "by-hand", str(folder), "0", out)
            print(
                f"{_mib(budget)}{_mib(found.peak)}{_mib(found.peak - found.start)}"
                f"{found.seconds:>7.1f} s{again.seconds / found.seconds:>16.2f}x"
                f"   {found.told['loads']} loads, {found.told['overcommits']} overcommits"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:>8.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
