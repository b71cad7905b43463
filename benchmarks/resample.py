"""Real-size volumes brought onto an oblique grid: lazycache against `resample_from_to` of nibabel.

A loop over some .nii.gz files, each resampled and looked at. Each contender runs in a process of
its own, in turn: lazycache with loads that run ahead of the loop and without, and nibabel.

    python -m benchmarks.resample [--count 4] [--rounds 3] [--orders 0 1 3] [--folder made-volumes]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .measure import Measured, interleaved, mib, ratio, report, run
from .volumes import subjects

PRELOADED, PLAIN, NIBABEL = "lazycache, PreloadList", "lazycache", "resample_from_to"
SHAPE = (160, 190, 160)
AFFINE = np.array(
    [[1.1, 0.09, 0, -90], [-0.08, 1.1, 0.05, -120], [0, -0.05, 1.1, -70], [0, 0, 0, 1]]
)


def ours(name: str, order: int, paths: list[str]) -> Iterator[Any]:
    import nibabel

    import lazycache as lc

    like = nibabel.Nifti1Image(np.broadcast_to(np.zeros((), "u1"), SHAPE), AFFINE)
    volumes = lc.PreloadList(
        [lc.LazyResampleVolume(path, like=like, resampling_order=order, nops=1) for path in paths],
        npreload=0 if name == PLAIN else None,
    )
    lc.set_budget(4 * volumes[0]._node.key.estimate()[1])
    for volume in volumes:
        yield volume.data


def theirs(order: int, paths: list[str]) -> Iterator[Any]:
    import nibabel
    from nibabel.processing import resample_from_to

    for path in paths:
        yield np.asarray(resample_from_to(nibabel.load(path), (SHAPE, AFFINE), order=order).dataobj)


def work(name: str, order: int, paths: list[str]) -> Any:
    found = theirs(order, paths) if name == NIBABEL else ours(name, order, paths)
    return [round(float(values.mean(dtype="f8")), 6) for values in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--folder", type=Path, help="keep the volumes here, for the next time")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        import nibabel.processing  # noqa: F401 - imported before anything is measured
        import scipy.ndimage  # noqa: F401

        import lazycache  # noqa: F401

        name, order, *paths = arguments.only
        report(lambda: work(name, int(order), paths))
        return 0

    print(f"{arguments.count} volumes onto {SHAPE}, {arguments.rounds} rounds")
    print(f"{'order':>5}  {'':24}{'time':>9}{'ratio':>8}{'resident':>10}")
    same = True
    with subjects(arguments.folder, arguments.count) as made:
        paths = [str(path) for path in made]
        for order in arguments.orders:
            runs: dict[str, Callable[[], Measured]] = {
                name: partial(run, "benchmarks.resample", "--only", name, str(order), *paths)
                for name in (PRELOADED, PLAIN, NIBABEL)
            }
            found = interleaved(runs, arguments.rounds)
            nibabel_took = [one.seconds for one in found[NIBABEL]]
            for name, measured in found.items():
                seconds = [one.seconds for one in measured]
                resident = max(one.peak - one.start for one in measured)
                times = f"{statistics.median(seconds):>7.2f} s{ratio(seconds, nibabel_took):>7.2f}x"
                print(f"{order:>5}  {name:24}{times}{mib(resident):>10}")
            told = [one.told for measured in found.values() for one in measured]
            same &= bool(np.allclose(told, told[0], rtol=1e-4))
    print(f"the means of the results are {'equal' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
