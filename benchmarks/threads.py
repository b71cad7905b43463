"""How does preloading scale with threads?

The time of a loop that reads every volume, and of a mean, with 1, 2, 4 ... threads, as ratios to
one thread in the same run. ``LAZYCACHE_THREADS`` bounds the threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

SHAPE = (197, 233, 189)


def make(folder: Path, count: int) -> None:
    """Smooth int16 volumes with noise, which compress about as anatomy does."""
    from lazycache.writing import write_image

    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in SHAPE), indexing="ij", sparse=True)
    inside = sum(axis**2 for axis in axes) < 0.7
    smooth = 500 + 300 * np.cos(9 * axes[0]) * np.cos(7 * axes[1]) * np.cos(5 * axes[2])
    for number in range(count):
        rng = np.random.default_rng(number)
        data = smooth + 12 * rng.standard_normal(SHAPE, dtype=np.float32)
        volume = np.asfortranarray(np.where(inside, data, 0).astype(np.int16))
        write_image(folder / f"{number:03}.nii.gz", volume, affine=np.eye(4))


def loop(folder: Path, threads: int) -> float:
    """Seconds to read all volumes in a loop that keeps none."""
    import lazycache as lc

    with lc.DataCache("4GiB"):
        images = lc.glob(folder / "*.nii.gz", npreload=2 * threads)
        began = time.perf_counter()
        for image in images:
            assert image.data.shape == SHAPE
            image.release()
        return time.perf_counter() - began


def mean(folder: Path, threads: int) -> float:
    """Seconds for the mean of all volumes."""
    import lazycache as lc

    with lc.DataCache("1GiB"):
        began = time.perf_counter()
        lc.mean(lc.glob(folder / "*.nii.gz")).data  # noqa: B018 - computed for its time
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--most", type=int, default=os.cpu_count() or 1, help="the most threads")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lazycache-threads-"))
    try:
        make(folder, arguments.count)
        counts = [2**power for power in range(12) if 2**power <= arguments.most]
        print(f"{'threads':>8}{'loop':>10}{'':>8}{'mean':>10}")
        first: list[float] = []
        for threads in counts:
            os.environ["LAZYCACHE_THREADS"] = str(threads)
            taken = [sorted(work(folder, threads) for _ in range(3))[1] for work in (loop, mean)]
            first = first or taken
            print(
                f"{threads:>8}{taken[0]:>8.2f} s{first[0] / taken[0]:>7.2f}x"
                f"{taken[1]:>8.2f} s{first[1] / taken[1]:>7.2f}x",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
