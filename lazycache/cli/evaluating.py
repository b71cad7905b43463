"""``lazycache eval``: formulas over images, written as images or printed as numbers."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from lazycache import config, execute
from lazycache.aims_writing import is_for_aims
from lazycache.cache import DataCache
from lazycache.errors import BudgetExceededError, WriteError
from lazycache.expression import Node
from lazycache.formula import Formula
from lazycache.plan import Plan, plan_of
from lazycache.proxy import LazyReadData
from lazycache.readers.aims import reads_alone
from lazycache.saving import ImageFile, check_files, check_path, save
from lazycache.sizes import format_size
from lazycache.stats import Event
from lazycache.writing import files_of

from .inputs import Inputs, Output, read_eval
from .terminal import UsageError, plural, progress, tell
from .textures import EXTENSIONS, is_texture, texture_of, values_of
from .voxels import count_not_finite


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    inputs, outputs = read_eval(options.given, options.output, options.formula, options.input)
    formulas = [
        Formula(output.formula, len(inputs.images), inputs.names.keys(), zero=options.zero)
        for output in outputs
    ]
    dtype = _dtype(options.dtype)
    _check_files(inputs, outputs, dtype)
    budget = config.budget() if options.budget is None else options.budget
    if options.dry_run:
        with closing(DataCache(budget, strict=config.strict())) as cache:
            return _foretell(_Evaluated(inputs, outputs, formulas, cache, options.grid, dtype))
    known = {os.path.abspath(path) for path in inputs.paths()}
    read: set[str] = set()
    bar = progress(len(known), shown=not (options.quiet or options.verbose))
    with closing(DataCache(budget, strict=config.strict())) as cache:
        with bar as step:

            def watch(event: Event) -> None:
                if event.kind == "load":
                    read.add(_path_of(event.name, known))
                    step()

            cache.subscribe(tell)
            cache.subscribe(watch)
            results = _Evaluated(inputs, outputs, formulas, cache, options.grid, dtype)
            nans = results.write()
        if not options.quiet:
            seconds = time.monotonic() - started
            print(_closing_line(read, cache, seconds, nans), file=sys.stderr)
    results.print()
    return 0


def _foretell(results: _Evaluated) -> int:
    """Print what would be done; 1 if the budget is too small for it."""
    plan = results.plan()
    print(plan)
    if plan.fits:
        return 0
    raise BudgetExceededError(
        f"the budget of {format_size(plan.budget)} is too small: set a larger one with --budget, "
        f"{plan.enough} or more"
    )


# --- what is wrong before anything is read -------------------------------------------------------


def _dtype(text: str | None) -> np.dtype[Any] | None:
    if text is None:
        return None
    try:
        dtype = np.dtype(text)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "biufc":
        raise UsageError(f"--dtype {text!r} is no type of numbers: write for example float32")
    return dtype


def _check_files(inputs: Inputs, outputs: Sequence[Output], dtype: np.dtype[Any] | None) -> None:
    seen: set[str] = set()
    for output in outputs:
        if output.path is None:
            continue
        try:
            check_path(output.path, inputs.paths())
        except WriteError as error:
            raise UsageError(str(error)) from None
        if dtype is not None and not is_for_aims(output.path):
            _check_dtype(output.path, dtype)
        places = set(map(os.path.realpath, files_of(output.path)))
        if places & seen:
            raise UsageError(f"{output.path} is the file of two outputs: use another name for one")
        seen |= places


def _check_dtype(path: str, dtype: np.dtype[Any]) -> None:
    """A type that the file can't hold is told now, not when everything has been computed."""
    name = path.lower()
    if name.endswith(".npy") or dtype == np.bool_:
        return
    from nibabel.freesurfer.mghformat import MGHHeader
    from nibabel.nifti1 import Nifti1Header

    from lazycache.nibabel_image import holds

    if not holds(MGHHeader if name.endswith((".mgh", ".mgz")) else Nifti1Header, dtype):
        raise UsageError(f"{path}: this kind of file can't hold {dtype}; use another --dtype")


# --- results -------------------------------------------------------------------------------------


class _Evaluated:
    """The values of the formulas: proxies, of which nothing is computed yet, or numbers.

    Raises what headers tell: missing files, shapes and grids that don't go together; UsageError
    where a number would have to be written, or an image printed.
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: Sequence[Output],
        formulas: Sequence[Formula],
        cache: DataCache,
        grid: Any,
        dtype: np.dtype[Any] | None,
    ) -> None:
        self.outputs = outputs
        self.cache = cache
        self.dtype = dtype
        # AIMS has its own order of axes, so it reads either all images or none.
        alone = any(map(reads_alone, inputs.paths())) or any(
            is_for_aims(output.path) for output in outputs if output.path is not None
        )
        load = partial(LazyReadData, reader="aims" if alone else None, cache=cache, grid=grid)
        proxies = {path: load(path) for path in inputs.paths()}
        textures = [path for path, proxy in proxies.items() if alone and is_texture(proxy)]
        proxies.update((path, values_of(proxies[path])) for path in textures)
        images = [proxies[path] for path in inputs.images]
        named = {name: proxies[path] for name, path in inputs.names.items()}
        self.values = [formula(images, **named) for formula in formulas]
        # The outputs that are textures, made of arrays.
        self.textures = {
            output.path
            for output in outputs
            if textures and output.path is not None and output.path.endswith(EXTENSIONS)
        }
        for number, output in enumerate(outputs):
            if output.path in self.textures:
                self.values[number] = texture_of(self.values[number], output.path, dtype)
        self.lazy = [value for value in self.values if isinstance(value, LazyReadData)]
        outline = execute.prepare([value._node for value in self.lazy], cache)
        for output, value in zip(outputs, self.values, strict=True):
            if isinstance(value, LazyReadData):
                layout = outline.info[value._node].layout
                if layout is not None:
                    _check_shape(output, layout.shape)
            else:
                _check_shape(output, np.shape(value))

    def plan(self) -> Plan:
        """What `write` would do."""
        found: dict[Node, list[ImageFile]] = {}
        for value, file in self._files({}):
            if isinstance(value, LazyReadData) and file is not None:
                found.setdefault(value._node, []).append(file)
        return plan_of([value._node for value in self.lazy], self.cache, found)

    def _files(self, nans: dict[str, int]) -> list[tuple[Any, ImageFile | None]]:
        """Each value with the file for it, all of which can be written."""
        files = [
            _file(output, None if output.path in self.textures else self.dtype, nans)
            for output in self.outputs
        ]
        check_files([file for file in files if file is not None], [v._node for v in self.lazy])
        return list(zip(self.values, files, strict=True))

    def write(self) -> dict[str, int]:
        """Compute everything in one plan and write the images: their numbers of NaN voxels."""
        nans: dict[str, int] = {}
        pairs = self._files(nans)
        wanted = [file for value, file in pairs if isinstance(value, LazyReadData)]
        computed = iter(save([value._node for value in self.lazy], wanted, self.cache))
        for number, (output, (value, file)) in enumerate(zip(self.outputs, pairs, strict=True)):
            if isinstance(value, LazyReadData):
                value = next(computed).value
            elif file is not None:
                file.write_whole(value)
            if output.path is None:
                if not isinstance(value, np.ndarray | np.generic | int | float | complex):
                    raise WriteError(
                        f"stdout: the result of {_short(output.formula)} is no number, but a "
                        f"{type(value).__name__}"
                    )
                _check_shape(output, np.shape(value))
                self.values[number] = value
        return nans

    def print(self) -> None:
        """Print the numbers, one a line, in the order of their outputs."""
        for output, value in zip(self.outputs, self.values, strict=True):
            if output.path is None:
                print(np.asarray(value).item())


def _file(output: Output, dtype: np.dtype[Any] | None, nans: dict[str, int]) -> ImageFile | None:
    """The file of an output, whose NaN voxels are counted in ``nans``."""
    path = output.path
    if path is None:
        return None
    nans[path] = 0

    def count(values: Any) -> None:
        nans[path] += count_not_finite(values).nans

    return ImageFile(path, dtype, floats=np.float32, each=count)


def _check_shape(output: Output, shape: tuple[int, ...]) -> None:
    if output.path is None and shape:
        raise UsageError(
            f"the result of {_short(output.formula)} is an image of shape {shape}, not a number: "
            "say with -o where to write it"
        )
    if output.path is not None and not shape:
        raise UsageError(
            f"{output.path}: the result of {_short(output.formula)} is a number, not an image: "
            "leave out -o to print it"
        )


def _short(formula: str) -> str:
    return formula if len(formula) <= 60 else f"{formula[:57]}..."


def _path_of(name: str, known: set[str]) -> str:
    """The file that a load is named after: a part of one has its index in brackets behind."""
    return name if name in known else name.rpartition("[")[0]


def _closing_line(read: set[str], cache: DataCache, seconds: float, nans: dict[str, int]) -> str:
    stats = cache.stats()
    reads = f"{plural(len(read), 'file')} read"
    if stats.loads != len(read):
        reads = f"{plural(stats.loads, 'read')} of {plural(len(read), 'file')}"
    with_nan = [f"{count} in {path}" for path, count in nans.items() if count]
    return (
        f"lazycache: {reads} ({format_size(stats.loaded_bytes)}), "
        f"peak {format_size(stats.peak_bytes)} of {format_size(cache.budget)}, {seconds:.1f} s, "
        f"NaN voxels: {', '.join(with_nan) or 'none'}"
    )
