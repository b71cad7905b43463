"""Random computations, written once and done twice: on arrays by NumPy, and on proxies.

A `Program` is some `Leaf`s and a list of `Step`s, each a piece of Python over the values before it,
so that values are shared and repeated as they are in the code of users. `eagerly` does it on
arrays; the steps that NumPy refuses are set apart. `lazily` does the same code on proxies.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
from hypothesis import strategies as st

import lazycache as lc
from lazycache import DataCache, LazyCacheWarning, LazyReadData, needs, program, spaces

# --- leaves --------------------------------------------------------------------------------------

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
ALL = ["?", "u1", "i2", "u2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
DTYPES = {
    "nii": ["u1", "i2", "u2", "i4", "i8", "f4", "f8", "c8", "c16"],
    "nii.gz": ["u1", "i2", "f4", "f8"],
    "scaled.nii": ["u1", "i2"],
    "scaled.nii.gz": ["i2"],
    "mgz": ["u1", "i2", "i4", "f4"],
}
IMAGES = (*DTYPES, "float32.nii.gz", "uncoded.nii")
ARRAYS = ("C.npy", "F.npy", "called", "memory", "F memory", "raw", "gaps", "turned")
NUMBERS = (True, 2, -3, 0, 0.5, -0.0, float("nan"), 1e300, 1j)


class Leaf(NamedTuple):
    """What a leaf is: where its data are, their dtype and shape, and which values they have.

    ``values``: 0 for small positive numbers, 1 for all that is special too, 2 for many zeros.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    values: int

    @property
    def placed(self) -> bool:
        """Whether the header says where in space it lies."""
        return self.kind in IMAGES and self.kind != "uncoded.nii"


def array_of(leaf: Leaf) -> Any:
    rng = np.random.default_rng([leaf.values, len(leaf.shape), ALL.index(leaf.dtype)])
    dtype, shape = np.dtype(leaf.dtype), leaf.shape
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < (0.5, 0.9, 0.1)[leaf.values])
    special: list[Any]
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = np.asarray(rng.integers(1, 10, shape), dtype)
        special = [limits.min, limits.max, limits.max // 2, 0, 1]
    else:
        array = np.asarray(rng.random(shape) * 9 + 0.5).astype(dtype)
        real = np.finfo(dtype)
        special = [np.nan, np.inf, -np.inf, -0.0, 0.0, real.max, -real.tiny, -1.5]
        if dtype.kind == "c":
            array = (array + 1j * rng.random(shape)).astype(dtype)
            special += [complex(np.nan, 1), complex(0, -np.inf), complex(-0.0, -0.0)]
    if leaf.values == 1:
        chosen = np.asarray(rng.choice(np.array(special, dtype), shape))
        array = np.where(rng.random(shape) < 0.4, chosen, array)
    elif leaf.values == 2:
        array = np.where(rng.random(shape) < 0.7, np.zeros((), dtype), array)
    return np.asarray(array)


def read_anything(path: str) -> Any:
    return np.load(path)


class Library:
    """The files of leaves, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Leaf, tuple[Any, Callable[[DataCache], Any]]] = {}

    def array(self, leaf: Leaf) -> Any:
        return self._look(leaf)[0]

    def proxy(self, leaf: Leaf, cache: DataCache) -> Any:
        """A new proxy of a leaf; the array itself for a raw one."""
        return self._look(leaf)[1](cache)

    def _look(self, leaf: Leaf) -> tuple[Any, Callable[[DataCache], Any]]:
        if leaf not in self._known:
            self._known[leaf] = self._make(leaf)
        return self._known[leaf]

    def _make(self, leaf: Leaf) -> tuple[Any, Callable[[DataCache], Any]]:
        if leaf.kind == "number":
            number = NUMBERS[leaf.values]
            return number, lambda cache: number
        array = array_of(leaf)
        if leaf.kind == "scalar":
            scalar = array[()]
            return scalar, lambda cache: LazyReadData(scalar, cache=cache)
        if leaf.kind in IMAGES:
            path = self._image(leaf, array)
            wanted = "f4" if leaf.kind == "float32.nii.gz" else None
            made = lambda cache: LazyReadData(path, cache=cache, grid="ignore", dtype=wanted)  # noqa: E731
            if wanted is None:
                return np.asarray(nibabel.load(path).dataobj).copy(order="F"), made
            return made(DataCache("1GiB")).data.copy(order="K"), made
        if leaf.kind.startswith("F"):
            array = np.asfortranarray(array)
        if leaf.kind == "gaps":
            array = np.repeat(array, 2, axis=-1)[..., ::2] if array.ndim else array
        elif leaf.kind == "turned":
            array = np.ascontiguousarray(array.T[::-1])[::-1].T if array.ndim else array
        if leaf.kind == "raw":
            return array, lambda cache: array
        if leaf.kind in ("memory", "F memory", "gaps", "turned"):
            return array, lambda cache: LazyReadData(array, cache=cache)
        path = self._path(leaf, leaf.kind if leaf.kind != "called" else "called.npy")
        np.save(path, array)
        reader = read_anything if leaf.kind == "called" else None
        return array, lambda cache: LazyReadData(path, cache=cache, reader=reader)

    def _image(self, leaf: Leaf, array: Any) -> Path:
        path = self._path(leaf, leaf.kind)
        if leaf.kind == "mgz":
            image = nibabel.MGHImage(array, AFFINE)
        else:
            image = nibabel.Nifti1Image(array, AFFINE, dtype=array.dtype)
            if leaf.kind.startswith(("scaled", "float32")):
                image.header.set_slope_inter(0.1, -3)
            if leaf.kind == "uncoded.nii":
                image.set_qform(None)
                image.set_sform(None)
        nibabel.save(image, path)
        return path

    def _path(self, leaf: Leaf, kind: str) -> Path:
        shape = "x".join(map(str, leaf.shape))
        return self.folder / f"{leaf.dtype.replace('?', 'b1')}_{shape}_{leaf.values}.{kind}"


# --- steps ---------------------------------------------------------------------------------------

# Operands are a, b and c; `many` is a list of some; X is an axis.
MAPS = """
a + b; a - b; a * b; a / b; a // b; a % b; a ** b; a & b; a | b; a ^ b; a << b; a >> b; a == b;
a != b; a < b; a <= b; a > b; a >= b; -a; +a; abs(a); ~a; a + a; a * a - a; a + 2; 2 - a; a * 2.5;
1 / a; a / 0; a // 2; a % 3; 5 % a; a ** 2; a ** 0.5; a ** -1.0; 2 ** a; a == 0; a > 1.5;
a + np.float64(2); a * np.int64(3); a + np.float32(0.1); a * 1j; a * True; a & 1; 1 | a; a << 1;
np.int8(100) + a; 300 * a; a - np.uint8(1); np.sqrt(a); np.exp(a); np.log(a); np.sin(a);
np.cos(a); np.tanh(a); np.isnan(a); np.isfinite(a); np.sign(a); np.floor(a); np.ceil(a);
np.rint(a); np.square(a); np.reciprocal(a); np.conjugate(a); np.logical_not(a); np.maximum(a, b);
np.minimum(a, b); np.fmax(a, b); np.fmin(a, b); np.hypot(a, b); np.arctan2(a, b);
np.copysign(a, b); np.logical_and(a, b); np.logical_xor(a, b); np.power(a, b);
np.float_power(a, b); np.add(a, b, dtype="f8"); np.multiply(a, b, dtype="f4");
np.subtract(a, 1, dtype="i4", casting="unsafe"); np.expm1(a); np.log1p(a); np.cbrt(a);
np.signbit(a); np.spacing(a); np.nextafter(a, b); np.gcd(a, b); lc.sqrt(a); lc.maximum(a, b);
lc.abs(a); lc.where(a, b, c); lc.clip(a, -1, 2); lc.round(a); a.astype("?"); a.astype("u1");
a.astype("i2"); a.astype("i8"); a.astype("f2"); a.astype("f4"); a.astype("f8"); a.astype("c8");
a.clip(1, 5); a.clip(None, 2); np.clip(a, b, c); np.clip(a, 0.5, None); a.round();
(a + 0).round(1); np.round(a + 0, -1); np.where(a, b, c); np.where(a > 2, a, 0);
np.where(a, b, 1.5); np.where(a, 1, b); np.where(a == b, a, c); sum(many); sum(many) / 3;
a * b + c; (a + b) * (a - b); (a - b) ** 2; a / (b + 1); abs(a - b) > 1; (a > 1) & (b > 1)
"""
INPLACE = """
inplace("iadd", a, b); inplace("isub", a, b); inplace("imul", a, b); inplace("itruediv", a, b);
inplace("ifloordiv", a, b); inplace("imod", a, b); inplace("ipow", a, b); inplace("iand", a, b);
inplace("ior", a, b); inplace("ixor", a, b); inplace("ilshift", a, b); inplace("irshift", a, b);
inplace("iadd", a, 1); inplace("imul", a, 2.5); inplace("itruediv", a, 2); inplace("ipow", a, 2);
inplace("isub", a, a); inplace("iadd", a * 1, b); inplace("imul", a + b, c);
inplace("iadd", a, 2j)
"""
ASSIGN = """
assign(a, ..., 0); assign(a, ..., b); assign(a, 0, 7); assign(a, slice(1, 3), b);
assign(a, a > 1, 0); assign(a + 1, (..., slice(None, None, 2)), 3);
assign(a, (..., 0), a[..., 1])
"""
# Slices that leave the first three axes where they are, given enough axes.
SLICES = """
a[1:]; a[:2]; a[::2]; a[::-1]; a[..., 1:]; a[..., ::-2]; a[:, 1:3]; a[...]; a[:, ::-1]; a[-3:];
a[2:2]; a[1:2]
"""
TURNS = """
a[0]; a[-1]; a[:, None]; a[..., None]; a[None]; a[:, 1]; a.T; a.transpose(-1, *range(a.ndim - 1));
np.swapaxes(a, 0, -1); np.moveaxis(a, 0, -1); np.squeeze(a); np.flip(a, 0); np.expand_dims(a, 1);
np.transpose(a); a.squeeze()
"""
REDUCTIONS = """
a.mean(X); a.sum(X); a.std(X); a.var(X); a.min(X); a.max(X); a.any(X); a.all(X); a.prod(X);
np.mean(a, X); np.sum(a, axis=X, dtype="f4"); np.std(a, X, ddof=1); np.median(a, X); np.ptp(a, X);
a.argmin(X); a.argmax(axis=X); np.percentile(a, 30, axis=X); np.percentile(a, [25, 75], axis=X);
np.quantile(a, 0.3, axis=X, method="nearest"); np.count_nonzero(a, axis=X); np.nanmean(a, axis=X);
np.nansum(a, axis=X); np.nanstd(a, axis=X); np.nanmin(a, axis=X); np.nanmax(a, axis=X);
np.nanmedian(a, axis=X); np.add.reduce(a, axis=X); np.maximum.reduce(a, axis=X);
np.logical_and.reduce(a, axis=X); np.bitwise_or.reduce(a, axis=X); np.multiply.reduce(a, axis=X);
lc.mean(a, axis=X); lc.median(a, axis=X); lc.count(a, axis=X); lc.percentile(a, 80, axis=X);
a.mean(X, keepdims=True); a.sum(X, keepdims=True); a.std(X, keepdims=True);
a.max(X, keepdims=True); np.any(a, axis=X, keepdims=True); np.median(a, axis=X, keepdims=True);
a - a.mean(X, keepdims=True); a / a.std(X, keepdims=True); a.sum(X, dtype="i8");
a.mean(X, dtype="f8"); a.var(X, ddof=1); np.minimum.reduce(a, axis=X, keepdims=True);
np.average(a, axis=X); np.cumsum(a, axis=X)
"""
JOINS = """
np.stack(many, axis=X); np.concatenate(many, axis=X); np.stack(many, axis=X).mean(X);
np.stack(many, axis=X).max(X); np.concatenate(many, axis=X).sum(X); np.stack(many)
"""
FOLDS = """
lc.mean(many); lc.sum(many); lc.std(many); lc.var(many); lc.min(many); lc.max(many);
lc.median(many); lc.percentile(many, 30); lc.percentile(many, [10, 90]); lc.count(many);
lc.nanmean(many); lc.nansum(many); lc.nanstd(many); lc.nanvar(many); lc.nanmin(many);
lc.nanmax(many); lc.std(many, ddof=1); lc.mean(many) + a; a - lc.mean(many);
(a - lc.mean(many)) / lc.std(many); lc.percentile(many, 0); lc.mean([a * b, b, a])
"""
_WRITTEN = {
    "map": MAPS, "inplace": INPLACE, "assign": ASSIGN, "slice": SLICES, "turn": TURNS,
    "reduce": REDUCTIONS, "join": JOINS, "fold": FOLDS,
}  # fmt: skip


TEXTS = {kind: [text.strip() for text in written.split(";")] for kind, written in _WRITTEN.items()}
AXES = [0, -1, 1, 2, -2, (0, 1), (-2, -1), (0, -1), (0, 1, 2), ()]
_NAMES = re.compile(r"\b[abc]\b")
_compiled: dict[str, Any] = {}


class Step(NamedTuple):
    """``text`` on the values at ``operands``, which are a, b, c and all of them ``many``."""

    kind: str
    text: str
    operands: tuple[int, ...]
    axis: Any = None

    def run(self, names: dict[str, Any], values: Sequence[Any]) -> Any:
        code = _compiled.get(self.text)
        if code is None:
            code = _compiled[self.text] = compile(self.text, self.text, "eval")
        found = dict(zip("abc", values, strict=False))
        return eval(code, {**names, **found, "many": list(values), "X": self.axis})

    def __str__(self) -> str:
        names = [f"v{operand}" for operand in self.operands]
        given = ", ".join(f"{name}={value}" for name, value in zip("abc", names, strict=False))
        return f"{self.text}  # {given}, many=[{', '.join(names)}], X={self.axis}"


@dataclass(frozen=True)
class Program:
    """``steps`` count their operands round the values that are there; so do the ``wanted``."""

    leaves: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    wanted: tuple[int, ...]


# --- done by NumPy -------------------------------------------------------------------------------


class _Eager:
    """What `lazycache` has besides operators, on arrays."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, {"count": "count_nonzero"}.get(name, name))

        def apply(images: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(images, list):
                images, kwargs = np.stack(images), {"axis": 0, **kwargs}
            return function(images, *args, **kwargs)

        return apply


def _own(value: Any) -> Any:
    return value.copy(order="K") if isinstance(value, np.ndarray) else value


def _assign(target: Any, index: Any, value: Any) -> Any:
    target = _own(target)
    target[index] = value
    return target


EAGER = {
    "np": np,
    "lc": _Eager(),
    "inplace": lambda name, left, right: getattr(operator, name)(_own(left), right),
    "assign": _assign,
}


@dataclass
class Done:
    """A program done by NumPy: the ``values`` of leaves and good ``steps``, and which are wanted.

    ``refused`` are steps over those values that raised, with what they raised. ``told`` are the
    warnings of each good step.
    """

    leaves: tuple[Leaf, ...]
    values: list[Any]
    steps: list[Step] = field(default_factory=list)
    told: list[set[str]] = field(default_factory=list)
    refused: list[tuple[Step, Exception]] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def warned(self, wanted: Iterable[int]) -> set[str]:
        """The warnings of the steps that ``wanted`` values need."""
        found: set[str] = set()
        for step in self.needed(wanted):
            found |= self.told[step]
        return found

    def needed(self, wanted: Iterable[int]) -> list[int]:
        count = len(self.leaves)
        needed = set(wanted)
        for number in range(len(self.steps) - 1, -1, -1):
            if number + count in needed:
                needed.update(self.steps[number].operands)
        return [number for number in range(len(self.steps)) if number + count in needed]

    def at_once(self, values: Sequence[Any]) -> bool:
        """Whether some of the lazy ``values`` had to be computed for others to be had."""
        later = values[len(self.leaves) :]
        return any(value is not None and not isinstance(value, LazyReadData) for value in later)

    def __str__(self) -> str:
        lines = [f"v{number} = {leaf}" for number, leaf in enumerate(self.leaves)]
        count = len(self.leaves)
        lines += [f"v{n + count} = {self.steps[n]}" for n in self.needed(self.wanted)]
        return "\n".join([*lines, f"wanted: {self.wanted}"])


def eagerly(program: Program, library: Library, most: int = 20_000) -> Done:
    """The program by NumPy. Results of more than ``most`` elements are left out."""
    done = Done(program.leaves, [library.array(leaf) for leaf in program.leaves])
    placed = [leaf.placed for leaf in program.leaves]
    for loose in program.steps:
        step = loose._replace(operands=tuple(n % len(done.values) for n in loose.operands))
        values = [done.values[n] for n in step.operands]
        where = [placed[n] for n in step.operands]
        if step.kind != "map" and not all(isinstance(v, np.ndarray | np.generic) for v in values):
            continue
        # A step on Python's numbers alone has nothing of NumPy or of a proxy in it.
        if not any(isinstance(v, np.ndarray | np.generic) for v in values):
            continue
        try:
            value, told = observed(step, EAGER, _lined_up(step, values, where))
        except Exception as error:
            done.refused.append((step, error))
            continue
        if np.size(value) > most:
            continue
        done.values.append(value)
        done.steps.append(step)
        done.told.append(told)
        placed.append(_stays(step, values, where))
    done.wanted = [n % len(done.values) for n in program.wanted]
    return done


def _lined_up(step: Step, values: list[Any], placed: list[bool]) -> list[Any]:
    """Images go together at x, y and z, and all else as NumPy has it."""
    if step.kind not in ("map", "inplace"):
        return values
    ndim = max((np.ndim(v) for v, image in zip(values, placed, strict=True) if image), default=0)
    return [
        v[(..., *[None] * (ndim - v.ndim))] if image and v.ndim < ndim else v
        for v, image in zip(values, placed, strict=True)
    ]


def _stays(step: Step, values: list[Any], placed: list[bool]) -> bool:
    """Whether the result still has the axes x, y and z of an image in front."""
    several = "[10, 90]" in step.text or "[25, 75]" in step.text
    if not any(placed) or several or step.kind == "turn" or "cumsum" in step.text:
        return False
    if step.kind not in ("reduce", "join") or step.text.startswith(("a - ", "a / ")):
        return True
    ndim = np.ndim(values[placed.index(True)]) + ("stack" in step.text)
    axis = step.axis if "X" in step.text else 0
    return all(item % ndim >= 3 for item in (axis if isinstance(axis, tuple) else (axis,)))


def observed(step: Step, names: dict[str, Any], values: Sequence[Any]) -> tuple[Any, set[str]]:
    with noted() as told:
        value = step.run(names, values)
    return value, told


class noted:  # noqa: N801 - reads as a statement
    """A context that gives the kinds of the warnings of NumPy in it, complete at its end."""

    def __enter__(self) -> set[str]:
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        self._told: set[str] = set()
        return self._told

    def __exit__(self, *exc: Any) -> None:
        self._catching.__exit__(*exc)
        for warning in self._caught:
            if not issubclass(warning.category, LazyCacheWarning):
                text = str(warning.message)
                self._told.add(text.split(" encountered in ")[0].strip("."))


# --- done lazily ---------------------------------------------------------------------------------


def _inplace(name: str, left: Any, right: Any) -> Any:
    own = LazyReadData(left) if isinstance(left, LazyReadData) else _own(left)
    return getattr(operator, name)(own, right)


def _assign_lazily(target: Any, index: Any, value: Any) -> Any:
    if not isinstance(target, LazyReadData):
        return _assign(target, index, value)
    own = LazyReadData(target)
    own[index] = value
    return own


LAZY = {"np": np, "lc": lc, "inplace": _inplace, "assign": _assign_lazily}


def lazily(done: Done, library: Library, cache: DataCache, wanted: Iterable[int]) -> list[Any]:
    """Proxies of the same values, of which only those that ``wanted`` ones need are there."""
    values: list[Any] = [library.proxy(leaf, cache) for leaf in done.leaves]
    needed = set(done.needed(wanted))
    for number, step in enumerate(done.steps):
        operands = [values[n] for n in step.operands]
        values.append(step.run(LAZY, operands) if number in needed else None)
    return values


# --- ways ----------------------------------------------------------------------------------------

ROOMY = 1 << 30
# Whole arrays, blocks of some tens of elements, of very few, and what is usual.
WAYS = st.sampled_from(["whole", "blocks", "few", "usual"])
THREADS = st.integers(1, 8)


@contextmanager
def running(way: str, threads: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", LazyCacheWarning)
        patch.setenv("LAZYCACHE_THREADS", str(threads))
        if way == "whole":
            patch.setattr(needs, "_WORTH_IT", 1 << 60)
        elif way != "usual":
            patch.setattr(needs, "_WORTH_IT", 0)
            patch.setattr(program, "_SHORTEST", 16 if way == "blocks" else 3)
            patch.setattr(program, "BLOCK", 64 if way == "blocks" else 5)
            patch.setattr(spaces, "FEWEST", 16 if way == "blocks" else 2)
        yield


# --- drawn ---------------------------------------------------------------------------------------

VOLUME, RUN = (5, 6, 7), (5, 6, 7, 4)
SHAPES = {
    "arrays": [VOLUME] * 4 + [(6, 7), (7,), (5, 1, 7), (1, 6, 7), (1,), (), (7, 6, 5)],
    "images": [VOLUME] * 3 + [RUN] * 3 + [(1, 1, 1), (5, 6, 7, 1)],
    "edges": [(), (1,), (2,), (1, 1), (3, 1), (0,), (2, 0), (17,), (2, 3)],
    "large": [(64, 50, 40)] * 3 + [(24, 20, 16, 20)] * 2 + [(24, 20, 16), (50, 40), (20,), (1,)],
}


@st.composite
def leaves(draw: Any, world: str, kinds: Sequence[str], dtypes: Sequence[str]) -> Leaf:
    kind = draw(st.sampled_from(kinds))
    if kind == "number":
        return Leaf(kind, "", (), draw(st.integers(0, len(NUMBERS) - 1)))
    if kind == "scalar":
        return Leaf(kind, draw(st.sampled_from(dtypes)), (), draw(st.integers(0, 2)))
    shape = draw(st.sampled_from(SHAPES[world]))
    if kind == "mgz" and shape[3:] == (1,):  # there is no such file
        shape = shape[:3]
    known = DTYPES.get(kind, ["i2", "u1"] if kind in IMAGES else dtypes)
    known = [dtype for dtype in known if dtype in dtypes] or known
    return Leaf(kind, draw(st.sampled_from(known)), shape, draw(st.integers(0, 2)))


KINDS = {
    "arrays": (*ARRAYS, *ARRAYS, "scalar", "number"),
    "images": (*IMAGES, *IMAGES, "C.npy", "memory", "raw", "scalar", "number"),
    "edges": ("C.npy", "memory", "raw", "scalar", "called", "number"),
    "large": (*(kind for kind in IMAGES if kind != "mgz"), *ARRAYS, "number"),
}
_USUAL = ("map", "map", "map", "map", "inplace", "assign", "slice", "turn", "reduce", "reduce",
          "join", "fold", "fold")  # fmt: skip


@st.composite
def programs(
    draw: Any,
    worlds: Sequence[str] = ("arrays", "images", "edges"),
    kinds: Sequence[str] = _USUAL,
    without: Sequence[str] = (),
) -> Program:
    """``kinds`` are those of steps; ``without`` are kinds of leaves."""
    world = draw(st.sampled_from(worlds))
    found = [kind for kind in KINDS[world] if kind not in without]
    # Few dtypes in one program: not every step of it should be float128 at once.
    dtypes = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=3))
    some = draw(st.lists(leaves(world, found, dtypes), min_size=1, max_size=4))
    steps = draw(st.lists(_steps(kinds), min_size=1, max_size=8))
    wanted = draw(st.lists(st.integers(-4, -1) | st.integers(0, 12), min_size=1, max_size=3))
    return Program(tuple(some), tuple(steps), tuple(wanted))


@st.composite
def _steps(draw: Any, kinds: Sequence[str]) -> Step:
    kind = draw(st.sampled_from(kinds))
    text = draw(st.sampled_from(TEXTS[kind]))
    operand = st.integers(-3, -1) | st.integers(0, 12)
    count = 1 + max(map("abc".find, _NAMES.findall(text)), default=0)
    if "many" in text:
        count = draw(st.integers(count, 6))
    operands = draw(st.lists(operand, min_size=count, max_size=count))
    axis = draw(st.sampled_from(AXES)) if "X" in text else None
    if kind == "join" and isinstance(axis, tuple):
        axis = 0
    return Step(kind, text, tuple(operands), axis)


# --- compared ------------------------------------------------------------------------------------


def facts(value: Any) -> tuple[Any, ...]:
    """All of a value that must be equal: kind, dtype, shape, memory order and bytes.

    Which NaN it is doesn't count, nor whether a slice still has gaps.
    """
    if not isinstance(value, np.ndarray | np.generic):
        return type(value), repr(value)
    array = np.asarray(value)
    dense = array.copy(order="K")
    strides = [s for s, size in zip(dense.strides, array.shape, strict=True) if size > 1]
    strides = strides if array.size else []
    parts = dense.copy(order="C").reshape(-1)
    if array.dtype.kind == "c":
        parts = parts.view(f"f{array.dtype.itemsize // 2}")
    if parts.dtype.kind == "f":
        parts[np.isnan(parts)] = np.nan
    return type(value), array.dtype, array.shape, strides, parts.tobytes()


def difference(found: Any, expected: Any) -> str:
    """What is different, for messages; empty if nothing is."""
    one, two = facts(found), facts(expected)
    if one == two:
        return ""
    if one[:4] != two[:4]:
        return f"{one[:4]} in place of {two[:4]}"
    wrong = np.flatnonzero(
        np.frombuffer(one[4], np.uint8).reshape(np.size(found), -1)
        != np.frombuffer(two[4], np.uint8).reshape(np.size(found), -1)
    )
    places = np.unique(wrong // np.asarray(found).dtype.itemsize)
    some = [(int(p), np.ravel(found)[p], np.ravel(expected)[p]) for p in places[:3]]
    return f"{len(places)} of {np.size(found)} elements ({one[:4]}): at, found, expected {some}"
