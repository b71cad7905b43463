"""The mean and the standard deviation of 40 real-size brains in the memory of three.

Makes a folder of 40 volumes from the MNI152 template, computes with lazycache under a budget and
with NumPy on a list of loaded arrays, compares the results to the byte, and leaves the maps and a
picture in ``demo-output/``. ``python -m benchmarks.demo --keep`` keeps the volumes as well.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .measure import Measured, report, run

OUTPUT = Path("demo-output")
COUNT = 40
BUDGET = "112MiB"  # three volumes of 33 MiB as float32, and what decoding takes beside them
PATTERN = str(OUTPUT / "subjects" / "sub-*_T1w.nii.gz")


def with_lazycache() -> Any:
    from tqdm import tqdm

    import lazycache as lc

    lc.set_budget(BUDGET)
    images = lc.glob(PATTERN, dtype="float32")
    with tqdm(total=3 * COUNT, desc="lazycache", unit="file", file=sys.stderr) as bar:
        unsubscribe = lc.get_cache().subscribe(
            lambda event: bar.update() and None if event.kind == "load" else None
        )
        lc.mean(images).save(OUTPUT / "mean.nii.gz")
        lc.std(images, ddof=1).save(OUTPUT / "sd.nii.gz")  # a pass for the mean and one more
        unsubscribe()
    stats = lc.get_cache().stats()
    return {"loads": stats.loads, "peak": stats.peak_bytes, "overcommits": stats.overcommits}


def with_numpy() -> Any:
    import glob

    import nibabel

    loaded = [nibabel.load(path) for path in sorted(glob.glob(PATTERN))]
    arrays = [np.asarray(image.dataobj).astype(np.float32) for image in loaded]
    for name, data in (
        ("mean", np.mean(arrays, axis=0)),
        ("sd", np.std(arrays, axis=0, ddof=1)),
    ):
        nibabel.save(nibabel.Nifti1Image(data, loaded[0].affine), OUTPUT / f"numpy-{name}.nii.gz")
    return {}


def compare() -> bool:
    """Whether both ways gave the same voxels."""
    import nibabel

    return all(
        np.array_equal(
            np.asarray(nibabel.load(OUTPUT / f"{name}.nii.gz").dataobj),
            np.asarray(nibabel.load(OUTPUT / f"numpy-{name}.nii.gz").dataobj),
        )
        for name in ("mean", "sd")
    )


def draw() -> Path:
    """The middle slices of the mean and of the standard deviation, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    import lazycache as lc

    figure, rows = plt.subplots(2, 3, figsize=(9, 6.4), facecolor="black", layout="constrained")
    for row, name, title in zip(rows, ("mean", "sd"), ("mean", "standard deviation"), strict=True):
        data = lc.load(OUTPUT / f"{name}.nii.gz").data
        middle = [size // 2 for size in data.shape]
        top = np.percentile(data[data > 0], 99.5)
        for axis, panel in enumerate(row):
            panel.imshow(np.take(data, middle[axis], axis).T, origin="lower", cmap="gray", vmax=top)
            panel.axis("off")
        row[0].set_title(f"{title} of {COUNT} volumes", color="white", loc="left")
    path = OUTPUT / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def table(ours: Measured, theirs: Measured) -> str:
    lines = [
        f"{'':34}{'peak memory':>14}{'time':>10}",
        f"{'lazycache, budget ' + BUDGET:34}{ours.peak / 2**20:>10.0f} MiB{ours.seconds:>8.1f} s",
        f"{'np.mean, np.std of loaded arrays':34}{theirs.peak / 2**20:>10.0f} MiB"
        f"{theirs.seconds:>8.1f} s",
        f"{'ratio':34}{theirs.peak / ours.peak:>13.1f}x{theirs.seconds / ours.seconds:>9.1f}x",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the 40 volumes")
    parser.add_argument("--only", choices=["lazycache", "numpy"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        report(with_lazycache if arguments.only == "lazycache" else with_numpy)
        return 0

    from .volumes import make_subjects

    print(f"making {COUNT} volumes of 17 MB in {OUTPUT / 'subjects'} ...", flush=True)
    make_subjects(OUTPUT / "subjects", COUNT)
    try:
        ours = run("benchmarks.demo", "--only", "lazycache")
        print("the same with NumPy, all in memory ...", flush=True)
        theirs = run("benchmarks.demo", "--only", "numpy")
        same = compare()
        picture = draw()
    finally:
        for name in ("mean", "sd"):
            (OUTPUT / f"numpy-{name}.nii.gz").unlink(missing_ok=True)
        if not arguments.keep:
            shutil.rmtree(OUTPUT / "subjects", ignore_errors=True)
    print()
    print(table(ours, theirs))
    print(
        f"\n{COUNT} files, {ours.told['loads']} loads, accounted peak "
        f"{ours.told['peak'] / 2**20:.0f} MiB, {ours.told['overcommits']} overcommits; "
        f"the maps are {'equal to the byte' if same else 'DIFFERENT'}."
    )
    print(f"Maps in {OUTPUT}/mean.nii.gz and {OUTPUT}/sd.nii.gz, picture in {picture}.")
    return 0 if same and not ours.told["overcommits"] else 1


if __name__ == "__main__":
    sys.exit(main())
