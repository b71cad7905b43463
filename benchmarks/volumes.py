"""Real-size volumes to measure on: the MNI152 1 mm template as many noisy subjects."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def template() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The T1 template that nilearn ships, 197 x 233 x 189 voxels of 1 mm, and its affine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
    return np.asarray(image.dataobj, dtype=np.float32), image.affine


def make_subjects(folder: Path, count: int, workers: int = 2) -> list[Path]:
    """``count`` int16 volumes of 17 MB as .nii.gz in ``folder``: anatomy, own contrast, noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sub-{number:02d}_T1w.nii.gz" for number in range(1, count + 1)]
    with ProcessPoolExecutor(workers) as executor:
        list(executor.map(_make, paths, range(count), chunksize=-(-count // workers)))
    return paths


@contextmanager
def subjects(folder: Path | None, count: int) -> Iterator[list[Path]]:
    """``count`` such volumes: those of ``folder``, made there the first time, or of a moment."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="lazycache-volumes-") as made:
            yield make_subjects(Path(made), count)
        return
    there = sorted(folder.glob("sub-*_T1w.nii.gz"))
    yield there[:count] if len(there) >= count else make_subjects(folder, count)


_template: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None


def _make(path: Path, seed: int) -> None:
    from lazycache.writing import write_image

    global _template
    if _template is None:
        _template = template()
    anatomy, affine = _template
    rng = np.random.default_rng(seed)
    data: NDArray[Any] = anatomy * np.float32(800 + 100 * rng.standard_normal())
    data += 12 * rng.standard_normal(anatomy.shape, dtype=np.float32)
    data[anatomy == 0] = 0
    write_image(path, np.asfortranarray(data.astype(np.int16)), affine=affine)
