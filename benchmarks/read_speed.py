"""How much faster is a real-size volume read than by nibabel?

Writes an int16 T1-like volume of 17 MB (the MNI152 1 mm template with noise, else a smooth blob)
and its scaled twin as ``.nii.gz``, and times ``np.asarray(nibabel.load(f).dataobj)`` against our
reader in pairs, each pair back to back so that both meet the same machine. Prints the medians and
the ratio with its quartiles.

    python benchmarks/read_speed.py [--pairs 15] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from lazycache.readers import reader_for

READS_A_THREAD = 2


def anatomy() -> np.ndarray:
    """A head of 208 x 240 x 180 voxels, its intensities up to about 1000, air exactly 0."""
    shape = (208, 240, 180)
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError:
        axes = [np.linspace(-1.2, 1.2, size) for size in shape]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        head = np.clip(1 - x**2 - y**2 - z**2, 0, None)
    else:
        template = np.asarray(load_mni152_template(resolution=1).dataobj)
        head = np.zeros(shape)
        part = template[: shape[0], : shape[1], : shape[2]]
        head[tuple(slice(size) for size in part.shape)] = part
    noise = np.random.default_rng(0).normal(0, 12, shape)
    return np.where(head > 0, head / head.max() * 1000 + noise, 0).clip(0)


def write_volumes(folder: Path) -> dict[str, Path]:
    head = anatomy()
    affine = np.diag([1.0, 1, 1, 1])
    volumes = {"int16": folder / "int16.nii.gz", "int16 scaled": folder / "scaled.nii.gz"}
    nib.save(nib.Nifti1Image(head.astype(np.int16), affine), volumes["int16"])
    # Real values written as int16: nibabel picks a slope and an intercept.
    nib.save(nib.Nifti1Image(head / 1000 - 0.5, affine, dtype=np.int16), volumes["int16 scaled"])
    return volumes


def by_nibabel(path: str) -> Any:
    return np.asarray(nib.load(path).dataobj)


def by_us(path: str) -> Any:
    return reader_for(path).read(path)


def timed(read: Callable[[str], Any], path: str, threads: int) -> float:
    """Seconds a read, as `threads` threads read at once."""
    start = time.perf_counter()
    if threads == 1:
        for _ in range(READS_A_THREAD):
            read(path)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, [path] * (threads * READS_A_THREAD)))
    return (time.perf_counter() - start) / (threads * READS_A_THREAD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind, file in write_volumes(Path(folder)).items():
            path = str(file)
            expected, got = by_nibabel(path), by_us(path)
            assert got.dtype == expected.dtype
            assert got.tobytes("F") == expected.tobytes("F")
            megabytes = (file.stat().st_size / 1e6, got.nbytes / 1e6)
            print("{}: {:.1f} MB on disk, {:.1f} MB in memory".format(kind, *megabytes))
            for threads in arguments.threads:
                pairs = np.array(
                    [
                        (timed(by_nibabel, path, threads), timed(by_us, path, threads))
                        for _ in range(arguments.pairs)
                    ]
                )
                theirs, ours = np.median(pairs, axis=0) * 1000
                low, middle, high = np.percentile(pairs[:, 0] / pairs[:, 1], [25, 50, 75])
                print(
                    f"  {threads} thread(s): nibabel {theirs:.1f} ms, ours {ours:.1f} ms a volume;"
                    f" {middle:.2f} times faster (quartiles {low:.2f}-{high:.2f})"
                )


if __name__ == "__main__":
    main()
