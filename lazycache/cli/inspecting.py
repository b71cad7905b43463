"""``lazycache info`` and ``lazycache check``: what headers tell, and what would go wrong later."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazycache import config
from lazycache.cache import DataCache
from lazycache.grid import displacement, orientation, same_grid, says_place
from lazycache.readers import Probe
from lazycache.sizes import format_size
from lazycache.source import file_key

from .inputs import expand_lists
from .terminal import complain, describe, plural, progress, tell
from .voxels import count_not_finite


def info(options: argparse.Namespace) -> int:
    status = 0
    found: list[dict[str, Any]] = []
    for path in expand_lists(options.images):
        try:
            probe = file_key(path).probe()
        except Exception as error:
            complain(error)
            status = 1
            continue
        if options.json:
            found.append(_as_json(path, probe))
        else:
            print("\n".join(_as_text(path, probe)))
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    return status


def voxel_sizes(affine: NDArray[Any]) -> list[float]:
    """The lengths of the edges of a voxel, in millimetres."""
    return [float(size) for size in np.sqrt((affine[:3, :3] ** 2).sum(axis=0))]


def _as_json(path: str, probe: Probe) -> dict[str, Any]:
    placed = probe.affine is not None and says_place(probe.affine)
    affine = probe.affine if placed else None
    return {
        "path": path,
        "format": probe.format,
        "shape": None if probe.shape is None else [int(size) for size in probe.shape],
        "dtype": None if probe.dtype is None else str(probe.dtype),
        "kind": probe.kind or None,
        "dtype_reason": probe.dtype_reason or None,
        "nbytes": int(probe.nbytes),
        "peak_nbytes": int(probe.peak_nbytes),
        "voxel_sizes": None if affine is None else voxel_sizes(affine),
        "orientation": None if affine is None else orientation(affine),
        "affine": None if affine is None else affine.tolist(),
        "files": list(probe.files),
    }


def _as_text(path: str, probe: Probe) -> Iterator[str]:
    yield path
    reason = f" ({probe.dtype_reason})" if probe.dtype_reason else ""
    rows = [
        ("format", probe.format),
        ("shape", _shape_text(probe.shape)),
        ("type", f"{probe.kind or probe.dtype or 'no array'}{reason}"),
        ("memory", f"{format_size(probe.nbytes)}, {format_size(probe.peak_nbytes)} while reading"),
    ]
    affine = probe.affine
    if affine is None or not says_place(affine):
        rows.append(("space", "nothing is said"))
    else:
        sizes = " x ".join(f"{size:.5g}" for size in voxel_sizes(affine))
        rows += [("voxel", f"{sizes} mm"), ("axes", orientation(affine))]
        rows += [
            ("" if row else "affine", " ".join(f"{value:10.5g}" for value in values))
            for row, values in enumerate(affine)
        ]
    if len(probe.files) > 1:
        rows.append(("files", ", ".join(os.path.relpath(file) for file in probe.files)))
    for label, text in rows:
        yield f"  {label:8}{text}"


def _shape_text(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "no array"
    return " x ".join(map(str, shape)) or "a number"


# --- check ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Image:
    path: str
    probe: Probe


def check(options: argparse.Namespace) -> int:
    paths = expand_lists(options.images)
    budget = config.budget() if options.budget is None else options.budget
    cache = DataCache(budget, strict=config.strict())
    images: list[_Image] = []
    damaged: list[str] = []
    holes: list[str] = []
    bar = progress(len(paths), shown=not (options.quiet or options.verbose))
    with closing(cache), bar as step:
        cache.subscribe(tell)
        for path in paths:
            try:
                key = file_key(path)
                probe = key.probe()
                found = count_not_finite(cache.load(key))
            except Exception as error:
                damaged.append(_named(path, describe(error)))
            else:
                images.append(_Image(path, probe))
                if found.nans or found.infinite:
                    holes.append(f"{path}: {found}")
                cache.release(key)
            step()
    sections = [
        ("unreadable", damaged),
        ("shapes", _odd_ones(images, lambda image: image.probe.shape, _shape_text)),
        ("types", _odd_ones(images, lambda image: image.probe.dtype, _type_text)),
        ("grids", _odd_grids(images)),
        ("not finite", holes),
    ]
    for title, lines in sections:
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))
    bad = any(lines for _, lines in sections)
    if not bad:
        print(f"{plural(len(paths), 'image')}: no problem found")
    return int(bad)


def _named(path: str, message: str) -> str:
    """``message`` with the name of the file in front, unless it is there already."""
    return message if path in message else f"{path}: {message}"


def _type_text(dtype: np.dtype[Any] | None) -> str:
    return "no array" if dtype is None else str(dtype)


def _odd_ones(
    images: Sequence[_Image],
    feature: Callable[[_Image], Any],
    text: Callable[[Any], str],
) -> list[str]:
    """The groups of images that share a feature, if there is more than one: the largest first,
    without its members, and each other one with all of them."""
    groups: dict[Hashable, list[_Image]] = {}
    for image in images:
        groups.setdefault(feature(image), []).append(image)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    if len(ranked) < 2:
        return []
    lines = [f"{text(ranked[0][0])}: {plural(len(ranked[0][1]), 'image')}"]
    for value, members in ranked[1:]:
        names = ", ".join(image.path for image in members)
        lines.append(f"{text(value)}: {plural(len(members), 'image')}: {names}")
    return lines


def _odd_grids(images: Sequence[_Image]) -> list[str]:
    """As `_odd_ones`, for grids that are the same to within the tolerance of expressions."""
    groups: list[list[_Image]] = []
    for image in images:
        if not says_place(image.probe.affine):
            continue
        for group in groups:
            if same_grid(image.probe.affine, group[0].probe.affine, _extent(image, group[0])):
                group.append(image)
                break
        else:
            groups.append([image])
    groups.sort(key=len, reverse=True)
    if len(groups) < 2:
        return []
    first = groups[0][0]
    assert first.probe.affine is not None
    lines = [
        f"{orientation(first.probe.affine)}, as {first.path}: {plural(len(groups[0]), 'image')}"
    ]
    for group in groups[1:]:
        affine = group[0].probe.affine
        assert affine is not None
        apart = displacement(affine, first.probe.affine, _extent(group[0], first))
        names = ", ".join(image.path for image in group)
        lines.append(
            f"{orientation(affine)}, {apart:.4g} mm away: {plural(len(group), 'image')}: {names}"
        )
    return lines


def _extent(a: _Image, b: _Image) -> tuple[int, ...]:
    """The larger of the two images along each of the three axes of space."""
    sides = [(*(image.probe.shape or ()), 1, 1, 1)[:3] for image in (a, b)]
    return tuple(max(pair) for pair in zip(*sides, strict=True))
