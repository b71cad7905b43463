"""Arithmetic on volumes of AIMS: plain AIMS' values, planned and accounted as that of arrays."""

from __future__ import annotations

import ast
import copy
import gc
import operator
import pickle
import re
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Running
from test_aims_fake import DTYPES, SECTIONS, agree, told

import lazycache as lc
from lazycache import (
    BudgetExceededError,
    DataCache,
    IntegerWrapWarning,
    LazyReadData,
    ReadError,
    ShapeMismatchError,
    planning,
)

SHAPE = (3, 2, 2, 1)
MIB = 1 << 20


class Folder:
    """Volumes in files, and proxies of them."""

    def __init__(self, aims: Any, path: Path) -> None:
        self.aims = aims
        self.path = path
        self.count = 0

    def volume(self, values: Any, subject: str = "") -> Any:
        values = np.asfortranarray(values)
        volume = self.aims.Volume(self.aims.Volume(values))
        if subject:
            volume.header()["subject"] = subject
        return volume

    def write(self, values: Any, subject: str = "") -> str:
        self.count += 1
        path = str(self.path / f"v{self.count:02}.ima")
        self.aims.write(self.volume(values, subject), path)
        return path

    def proxy(self, values: Any, subject: str = "", **kwargs: Any) -> LazyReadData:
        return LazyReadData(self.write(values, subject), **kwargs)

    def plain(self, proxy: LazyReadData) -> Any:
        """The volume that AIMS reads."""
        return self.aims.read(proxy.filename)


def counting(dtype: Any, shape: tuple[int, ...] = SHAPE, start: int = 1) -> Any:
    return np.arange(start, start + np.prod(shape)).reshape(shape).astype(dtype)


@pytest.fixture
def folder(aims: Any, tmp_path: Path) -> Folder:
    return Folder(aims, tmp_path)


@pytest.fixture(autouse=True)
def cache() -> Iterator[DataCache]:
    with DataCache("256MiB", strict=True) as cache:
        yield cache


def same(found: Any, expected: Any) -> None:
    assert type(found).__name__ == type(expected).__name__
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes("F") == expected.tobytes("F")


def data_of(value: Any) -> Any:
    return value.data if isinstance(value, LazyReadData) else value


# What plain AIMS gives

# What a proxy has of its own: it can be hashed, and its elements are proxies.
OF_PROXIES = {"hash", "iter"}
UNARY = {
    "neg": operator.neg,
    "abs": abs,
    "pos": operator.pos,
    "invert": operator.invert,
    "bool": bool,
    "len": len,
    "float": float,
    "round": round,
    "np.sqrt": np.sqrt,
    "np.exp": np.exp,
    "np.sum": np.sum,
    "np.mean": np.mean,
    "np.asarray": np.asarray,
    "v==v is": lambda vol: vol == vol,
}


def outcome(files: list[str], what: str, dtype: str) -> str:
    """What a recorded line gives with a proxy of a file in the place of each volume."""
    # What the records call so was a number of the volume's own dtype.
    what = what.replace("np.int16(2)", f"np.{dtype}(2)")
    vol, another = map(LazyReadData, files)
    names = {"np": np, "vol": vol, "v": vol, "same": another, "ndarray": counting(dtype)}
    if what in UNARY:
        return told(lambda: data_of(UNARY[what](vol)))
    in_place = re.fullmatch(r"vol (\S+=) (\S+)", what)
    if in_place and in_place[1] not in ("==", "!=", "<=", ">="):

        def change() -> Any:
            exec(what.replace("= vol", "= same"), names)
            return names["vol"].data

        found = told(change)
        same(np.asarray(LazyReadData(files[0])), counting(dtype))
        return found
    what = what.replace("vol(same type)", "same")
    return told(lambda: data_of(eval(what, names)))


@pytest.mark.filterwarnings("ignore::lazycache.IntegerWrapWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_recorded_operator_gives_the_same_through_proxies(folder: Folder, dtype: str) -> None:
    [lines] = [lines for title, lines in SECTIONS.items() if title.startswith(f"dtype {dtype} ")]
    assert len(lines) > 200
    files = [folder.write(counting(dtype)) for _ in range(2)]
    wrong = []
    for what, expected in lines:
        if what in OF_PROXIES:
            continue
        out = outcome(files, what, dtype)
        # Of a comparison Python asks the right operand first; of None it asks nobody but the proxy.
        turned = expected.startswith("!! TypeError") and re.fullmatch(
            r"!! TypeError: .*'(Volume_\w+|LazyReadData)'.*", out
        )
        if not agree(out, expected) and not (turned and re.search(r"[<>]|None", what)):
            wrong.append(f"{what}: {out}, recorded {expected}")
    assert not wrong, "\n".join(wrong)


def test_volumes_of_two_types_give_what_was_recorded(folder: Folder) -> None:
    proxies = {
        dtype: folder.proxy(counting(dtype))
        for dtype in ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
    }
    pairs = [(what, out) for what, out in SECTIONS["mixed"] if re.fullmatch(r"\w+ . \w+", what)]
    assert len(pairs) == 28
    for what, expected in pairs:
        left, sign, right = what.split()
        names = {"a": proxies[left], "b": proxies[right]}
        out = told(lambda sign=sign, names=names: eval(f"a {sign} b", names).data)
        assert agree(out, expected), f"{what}: {out}, recorded {expected}"


def test_the_type_and_the_bytes_of_results_are_known_from_headers(
    folder: Folder, cache: DataCache
) -> None:
    a, b = folder.proxy(counting("int16")), folder.proxy(counting("float32"))
    expressions = {
        "int16": [a + a, a * 2.5, -a, 2 - a, a // 2, a[0], a.astype("int16")],
        "float32": [a + b, np.sqrt(a), a + np.float32(1), b // 2.5],
        "float64": [a // 2.5, a.mean(axis=0), lc.mean([a, a]), lc.sum([a, a])],
        "bool": [a == a, a != a, a < np.float32(2)],
    }
    foretold = [(e, e.dtype, e.shape, e.nbytes) for each in expressions.values() for e in each]
    assert [str(dtype) for _, dtype, _, _ in foretold] == [
        dtype for dtype, each in expressions.items() for _ in each
    ]
    assert cache.stats().loads == 0
    for expression, *known in foretold:
        array = np.asarray(expression)
        assert known == [array.dtype, array.shape, array.nbytes]


def test_the_header_of_a_result_is_a_copy_of_that_of_the_left_volume(folder: Folder) -> None:
    a = folder.proxy(counting("int16"), "left")
    b = folder.proxy(counting("int16"), "right")
    total = (a + b + b).data
    assert total.header()["subject"] == "left"
    total.header()["subject"] = "changed"
    assert a.data.header()["subject"] == "left"
    assert (2 * b - a).data.header()["subject"] == "right"
    assert (-b // 2).data.header()["subject"] == "right"


# Errors in the place of wrong values


class Foreign:
    """Has no operators."""


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "//", "%", "**", "&", "|", "^", "<", "@"])
def test_not_implemented_is_never_data(folder: Folder, sign: str) -> None:
    lazy = folder.proxy(counting("int16"))
    for other in (Foreign(), LazyReadData(Foreign()), "text", None):
        for left, right in ((lazy, other), (other, lazy)):
            if isinstance(left, str) and sign == "%":
                continue  # which formats
            with pytest.raises(TypeError) as raised:
                _ = eval(f"left {sign} right", {"left": left, "right": right}).data
            kinds = (type(data_of(other)).__name__, "LazyReadData", "Volume_S16")
            assert any(kind in str(raised.value) for kind in kinds)


def test_a_volume_and_a_proxy_give_what_two_volumes_give(folder: Folder) -> None:
    lazy = folder.proxy(counting("int16", start=2))
    volume = folder.volume(counting("int16"))
    for sign in ("+", "-", "*", "/", "%", "&", "|", "==", "!="):
        for left, right in ((volume, lazy), (lazy, volume)):
            found = eval(f"a {sign} b", {"a": left, "b": right})
            assert isinstance(found, LazyReadData)
            same(found.data, eval(f"a {sign} b", {"a": data_of(left), "b": data_of(right)}))
    mesh = folder.aims.AimsTimeSurface_3_VOID()
    for left, right in ((mesh, lazy), (lazy, mesh)):
        with pytest.raises(TypeError, match="'AimsTimeSurface_3_VOID'"):
            _ = (left + right).data


@pytest.mark.parametrize("sign", ["/", "%"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "int32"])
def test_a_division_of_integers_by_zero_is_an_error_and_not_the_end(
    folder: Folder, cache: DataCache, sign: str, dtype: str
) -> None:
    a, holes = folder.proxy(counting(dtype)), folder.proxy(counting(dtype) % 3)
    operators = {"a": a, "holes": holes}
    for number in ("0", "np.int16(0)"):
        with pytest.raises(ZeroDivisionError, match="AIMS would end the process"):
            _ = eval(f"a {sign} {number}", {**operators, "np": np}).data
    assert cache.stats().loads == 0
    with pytest.raises(ZeroDivisionError, match="by 0") as raised:
        _ = eval(f"a {sign} holes", operators).data
    assert str(holes.filename) in "".join(raised.value.__notes__)
    changed = LazyReadData(a)
    exec(f"changed {sign}= holes", {"changed": changed, "holes": holes})
    with pytest.raises(ZeroDivisionError):
        _ = changed.data
    # NumPy's operators don't end the process.
    with np.errstate(all="ignore"):
        assert type((a // holes).data) is type(a.data)
        assert np.isinf(np.asarray(a.astype("float32") / holes).max())


def test_the_quotient_that_no_integer_holds_is_an_error_and_not_the_end(folder: Folder) -> None:
    lowest = counting("int32")
    lowest[0] = np.iinfo("int32").min
    a = folder.proxy(lowest)
    for other in (-1, folder.proxy(-counting("int32") // 12)):
        with pytest.raises(OverflowError, match="AIMS would end the process"):
            _ = (a / other).data
        # Of the volume that has the -1 elsewhere there is a quotient.
    same((a / 2).data, folder.plain(a) / 2)


def test_floats_are_divided_by_zero(folder: Folder) -> None:
    a, zero = folder.proxy(counting("float32")), folder.proxy(counting("float32") * 0)
    with np.errstate(all="ignore"):
        assert np.isinf(np.asarray(a / zero)).all()
        assert np.isinf(np.asarray(a / 0)).all()


def test_volumes_of_two_sizes_are_refused_before_anything_is_read(
    folder: Folder, cache: DataCache
) -> None:
    a = folder.proxy(counting("float32"))
    for shape in ((4, 2, 2, 1), (1, 2, 2, 1), (3, 2, 2, 2), (3, 2, 2, 1, 2)):
        b = folder.proxy(counting("float32", shape)) if len(shape) == 4 else None
        other = b if b is not None else folder.volume(counting("float32", shape))
        for left, right in ((a, other), (other, a)):
            with pytest.raises(ShapeMismatchError, match=r"\(3, 2, 2, 1\)"):
                _ = (left + right).data
        if b is not None:
            with pytest.raises(ShapeMismatchError) as raised:
                lc.explain(a * 2 + b)
            assert str(b.filename) in str(raised.value)
            changed = LazyReadData(a)
            changed += b
            with pytest.raises(ShapeMismatchError):
                _ = changed.data
    assert cache.stats().loads == 0


def test_what_aims_refuses_is_refused_before_anything_is_read(
    folder: Folder, cache: DataCache
) -> None:
    a, b = folder.proxy(counting("int16")), folder.proxy(counting("float32"))
    for expression in (a / b, a + 2.5, b % 2, abs(a), a ^ a, 2 / a):
        with pytest.raises(TypeError, match="Volume_") as raised:
            _ = expression.data
        assert any("test_aims_arithmetic.py" in note for note in raised.value.__notes__)
    assert cache.stats().loads == 0


# Plans


@pytest.fixture
def twenty(folder: Folder) -> tuple[list[str], list[Any]]:
    """Twenty volumes of 8 MB, and their values."""
    values = [np.full((128, 128, 128, 1), number, np.float32) for number in range(20)]
    return [folder.write(value, str(n)) for n, value in enumerate(values)], values


EIGHT = 4 * 128**3
# Reading takes a little more than the volume.
READING = EIGHT // 20


def test_the_sum_of_twenty_volumes_takes_two(twenty: tuple[list[str], list[Any]]) -> None:
    files, values = twenty
    with DataCache("1GiB") as wide:
        plan = lc.explain(sum(map(LazyReadData, files)))
        assert wide.stats().loads == 0
    assert (plan.reads, plan.passes) == (20, 1)
    assert 2 * EIGHT <= plan.min_budget == plan.single_pass_budget <= 2 * EIGHT + READING
    with DataCache(plan.min_budget, strict=True) as cache:
        total = sum(LazyReadData(file) for file in files)
        found = total.data
        stats = cache.stats()
        assert (stats.loads, stats.overcommits) == (20, 0)
        assert stats.peak_bytes == plan.min_budget
        assert type(found).__name__ == "Volume_FLOAT"
        assert found.header()["subject"] == "0"
        np.testing.assert_array_equal(np.asarray(found), sum(values))
        del found, total
    with DataCache(plan.min_budget - 1, strict=True) as cache:
        with pytest.raises(BudgetExceededError):
            _ = sum(map(LazyReadData, files)).data
        assert cache.stats().loads == 0


def test_the_formula_of_the_original_reads_each_file_once(
    folder: Folder,
    twenty: tuple[list[str], list[Any]],
) -> None:
    files, _ = twenty

    def formula(i1: Any, i2: Any, i3: Any) -> Any:
        return (i1 * 2 + i2 * i3) / 1.2 + i1

    with DataCache("1GiB"):
        plan = lc.explain(formula(*map(LazyReadData, files[:3])))
    assert (plan.reads, plan.passes) == (3, 1)
    assert plan.single_pass_budget == plan.min_budget <= 4 * EIGHT + 2 * READING
    with DataCache(plan.min_budget, strict=True) as cache:
        found = formula(*map(LazyReadData, files[:3])).data
        stats = cache.stats()
        assert (stats.loads, stats.overcommits) == (3, 0)
        assert stats.peak_bytes <= plan.min_budget
    same(found, formula(*map(folder.aims.read, files[:3])))


def test_what_is_foretold_of_plans_is_what_they_do(folder: Folder) -> None:
    shape = (24, 20, 16, 1)
    files = [folder.write(counting("int16", shape) % 7 + n) for n in range(6)]
    floats = folder.write(counting("float32", shape))

    def expressions() -> list[Any]:
        a, b, c, d, e, f = map(LazyReadData, files)
        x = LazyReadData(floats)
        return [
            ((a + b) * (c + d) - x) * 2.5 + a,
            (a * x + b * x) / (x + 1),
            (a // 2 + b**2) % 5,
            np.sqrt(a + b) * x,
            lc.mean([a, b, c, d, e, f]) - x,
            lc.std([a, b, c, d, e, f]),
            lc.median([a, b, c]),
            lc.sum([a, b]) + a,
            (a + b)[..., 0] + 1,
            lc.where(a > np.int16(3), x, 0),
        ]

    for number in range(len(expressions())):
        with DataCache("64MiB"):
            wide = lc.explain(expressions()[number])
            expected = expressions()[number].data
        for budget in {wide.min_budget, wide.single_pass_budget}:
            with DataCache(budget, strict=True) as cache:
                expression = expressions()[number]
                plan = lc.explain(expression)
                found = expression.data
                stats = cache.stats()
                same(found, expected)
                assert plan.fits, number
                assert stats.loads == plan.reads, number
                assert stats.peak_bytes <= budget, number
                assert stats.peak_bytes >= plan.peak_bytes * 0.98, number
                assert stats.overcommits == 0
                del found, expression
        with DataCache(wide.min_budget - 1, strict=True) as cache:
            with pytest.raises(BudgetExceededError):
                _ = expressions()[number].data
            assert cache.stats().loads == 0, number


def test_a_temporary_is_written_over_only_where_that_is_the_same(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (32, 32, 32, 1)
    files = [folder.write(counting("float32", shape) + n) for n in range(2)]

    def expression() -> Any:
        a, b = map(LazyReadData, files)
        return (a + b) * 1.5

    nbytes = 4 * 32**3
    workspace = lc.explain(expression()).min_budget - 2 * nbytes
    expected = expression().data
    kind = type(expected)
    plain = kind.__imul__

    def rounded(self: Any, other: Any) -> Any:
        return plain(self, float(np.float16(other)) + 2**-20)

    monkeypatch.setattr(kind, "__imul__", rounded)
    # The same operator of another number hasn't been tried before.
    a, b = map(LazyReadData, files)
    other = (a + b) * 1.25
    assert lc.explain(other).min_budget - 2 * nbytes >= workspace + nbytes
    with DataCache(lc.explain(other).min_budget, strict=True):
        a, b = map(LazyReadData, files)
        same(((a + b) * 1.25).data, (folder.plain(a) + folder.plain(b)) * 1.25)


def test_temporaries_are_written_over(
    folder: Folder, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the stand-in: the methods of the real types can't be replaced.
    kind = stand_in.Volume_FLOAT
    calls: list[str] = []

    def counted(name: str) -> Any:
        plain = getattr(kind, name)

        def method(self: Any, *other: Any) -> Any:
            if self.shape == (8, 8, 8, 1):
                calls.append(name)
            return plain(self, *other)

        return method

    for name in ("__add__", "__radd__", "__iadd__", "__imul__", "__mul__", "__neg__"):
        monkeypatch.setattr(kind, name, counted(name))
    files = [folder.write(counting("float32", (8, 8, 8, 1))) for _ in range(4)]
    _ = sum(map(LazyReadData, files)).data
    assert calls == ["__radd__", "__iadd__", "__iadd__", "__iadd__"]
    calls.clear()
    a, b, c, d = map(LazyReadData, files)
    product = a + b
    _ = ((product + c) * (product + d) * 2.5).data
    assert calls == ["__add__", "__add__", "__iadd__", "__imul__", "__imul__"]
    calls.clear()
    lazy = LazyReadData(a)
    lazy += b
    lazy *= c
    _ = (-(lazy + d)).data
    assert calls == ["__iadd__", "__imul__", "__iadd__", "__neg__"]


def test_what_can_not_be_written_over_is_reserved(folder: Folder) -> None:
    shape = (32, 32, 32, 1)
    nbytes = 4 * 32**3
    a, b, c = (folder.proxy(counting("float32", shape)) for _ in range(3))

    def volumes(expression: Any) -> int:
        return round(lc.explain(expression).min_budget / nbytes)

    # The operands of the product, itself, and the difference in its place if it is on the left.
    assert volumes((b * c) - a) == 3
    assert volumes(a - (b * c)) == 4
    assert volumes(-(b * c)) == 4
    assert volumes(a * 2) == 2
    # These are copied: what AIMS gives lies in the memory of an array.
    assert volumes(a // 2) == volumes(a**2) == 3
    changed = LazyReadData(a)
    changed += b
    assert volumes(changed) == 3


def test_a_sum_of_integers_that_wraps_is_told(folder: Folder) -> None:
    volumes = [folder.proxy(np.full(SHAPE, 20000, "int16")) for _ in range(2)]
    with pytest.warns(IntegerWrapWarning, match="int16"):
        total = sum(volumes).data
    same(total, folder.plain(volumes[0]) + folder.plain(volumes[1]))


# What others see


def test_in_place_operators_change_this_proxy_and_nothing_else(folder: Folder) -> None:
    mine = folder.volume(counting("float32"))
    for lazy in (folder.proxy(counting("float32")), LazyReadData(mine)):
        other, before = LazyReadData(lazy), lazy + 1
        held = other.data
        lazy += 2
        lazy *= other
        lazy /= 2.5
        lazy[0, 0, 0, 0] = -1
        expected = (folder.volume(counting("float32")) + 2) * folder.volume(counting("float32"))
        expected /= 2.5
        expected[0, 0, 0, 0] = -1
        same(lazy.data, expected)
        same(held, folder.volume(counting("float32")))
        same(other.data, folder.volume(counting("float32")))
        same(before.data, folder.volume(counting("float32") + 1))
        same(mine, folder.volume(counting("float32")))


def test_data_that_are_changed_in_place_are_one_proxys_from_then_on(
    folder: Folder, cache: DataCache
) -> None:
    a = folder.proxy(counting("int16"))
    for lazy in (LazyReadData(a), a + 0):
        other, twice = LazyReadData(lazy), lazy * 2
        _ = lazy.data
        lazy.data += 5
        same(lazy.data, folder.volume(counting("int16") + 5))
        same(other.data, folder.volume(counting("int16")))
        same(twice.data, folder.volume(counting("int16") * 2))
        cache.clear()
        same(lazy.data, folder.volume(counting("int16") + 5))


def test_results_that_somebody_holds_are_never_written_over(folder: Folder) -> None:
    a, b = folder.proxy(counting("float32")), folder.proxy(counting("float32"))
    total = a + b
    held = total.data
    twice = total + a
    total2 = total * 2
    for expression in (twice, total2, total + total, (total + 1) + total):
        _ = expression.data
    same(held, folder.volume(counting("float32") * 2))
    first, second = lc.compute(a + b, (a + b) * 2)
    same(first, held)
    same(second, folder.volume(counting("float32") * 4))


def test_results_that_aims_makes_in_the_memory_of_an_array_have_their_own(folder: Folder) -> None:
    a = folder.proxy(counting("int16"))
    for halved in (a // 1, a**1):
        volume = halved.data
        _ = volume + 2  # overwrites the array that AIMS' own volume // 1 lies in
        _ = (halved + 3).data
        same(volume, folder.volume(counting("int16")))


def test_a_volume_in_an_expression_is_copied_in(folder: Folder, cache: DataCache) -> None:
    mine = folder.volume(counting("int16", (16, 16, 16, 1)), "mine")
    used = cache.used
    total = folder.proxy(counting("int16", (16, 16, 16, 1))) + mine
    assert cache.used - used == 2 * 16**3
    lazy = LazyReadData(mine)
    mine += 5
    same(total.data, folder.volume(2 * counting("int16", (16, 16, 16, 1))))
    same(lazy.data, folder.volume(counting("int16", (16, 16, 16, 1))))
    assert lazy.data.header()["subject"] == "mine"
    assert "Volume_S16" in repr(lazy)


def test_arrays_of_volumes_are_read_only_and_keep_them(folder: Folder, cache: DataCache) -> None:
    shape = (32, 32, 32, 1)
    a = folder.proxy(counting("float32", shape))
    total = a + a
    for array in (np.asarray(a), a[0].data, a[:, 1:].data, np.asarray(total), total[0:20].data):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    large = a[:, 1:].data
    owner = weakref.ref(a.data)
    del array
    a.release()
    total.release()
    del total
    gc.collect()
    assert owner() is not None
    assert cache.used >= 4 * 32**3
    np.testing.assert_array_equal(large, counting("float32", shape)[:, 1:])
    del large
    gc.collect()
    assert owner() is None
    assert cache.used < 4 * 32**3


def test_a_small_part_is_a_copy_and_keeps_no_volume(folder: Folder, cache: DataCache) -> None:
    a = folder.proxy(counting("float32", (32, 32, 32, 1)))
    part = (a + 1)[0].data
    a.release()
    gc.collect()
    assert part.nbytes <= cache.used < 2 * part.nbytes


# Functions over lists


@pytest.mark.parametrize("name", ["mean", "std", "var", "sum", "min", "max", "median", "nanmean"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_functions_over_lists_give_a_volume_with_the_header_of_the_first(
    folder: Folder, name: str, dtype: str
) -> None:
    shape = (9, 8, 7, 1)
    values = [np.asfortranarray(counting(dtype, shape) % (5 + n)) for n in range(4)]
    proxies = [folder.proxy(value, f"s{n}") for n, value in enumerate(values)]
    found = getattr(lc, name)(proxies).data
    expected = getattr(np, name)(np.stack(values), axis=0)
    if expected.dtype == np.int64:
        expected = expected.astype(np.float64)
    same(found, folder.volume(expected))
    assert found.header()["subject"] == "s0"
    assert list(found.header()["volume_dimension"]) == list(shape)
    # A volume in an expression with others: their difference is one as well.
    assert type((found - proxies[1]).data).__name__.startswith("Volume_")


def test_several_percentiles_and_reductions_along_an_axis_are_arrays(folder: Folder) -> None:
    values = [counting("int16", (9, 8, 7, 2)) % (5 + n) for n in range(3)]
    proxies = [folder.proxy(value) for value in values]
    both = lc.percentile(proxies, [25, 75]).data
    np.testing.assert_array_equal(both, np.percentile(np.stack(values), [25, 75], axis=0))
    for name in ("mean", "std", "max", "sum", "argmax"):
        found = getattr(proxies[0], name)(axis=-1).data
        np.testing.assert_array_equal(found, getattr(np, name)(values[0], axis=-1))
    assert type(lc.max(proxies[0]).data) is int
    assert lc.std(proxies[0]).data == values[0].std()


@pytest.mark.parametrize("few", [0, 4096])
def test_a_mean_reads_each_file_once_in_three_volumes(
    folder: Folder, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_FEW", few)  # of more steps no other order is tried
    shape = (64, 64, 32, 1)
    nbytes = 4 * 64 * 64 * 32
    files = [folder.write(np.full(shape, n, np.float32)) for n in range(12)]
    with DataCache("64MiB"):
        plan = lc.explain(lc.mean(files))
    assert (plan.reads, plan.passes) == (12, 1)
    assert plan.min_budget <= 3 * nbytes + nbytes // 10
    with DataCache(plan.min_budget, strict=True) as cache:
        mean = lc.mean(files).data
        assert cache.stats().loads == 12
        assert np.all(np.asarray(mean) == 5.5)
        del mean


def test_a_function_of_voxels_gives_a_volume(folder: Folder) -> None:
    proxies = [folder.proxy(counting("float32") * n, f"s{n}") for n in (1, 2, 4)]
    spread = lc.map_voxels(lambda block: np.ptp(block, axis=0), proxies).data
    same(spread, folder.volume(counting("float32") * 3))
    assert spread.header()["subject"] == "s1"


# The life of results


def test_results_that_were_dropped_are_computed_again(folder: Folder) -> None:
    shape = (32, 32, 32, 1)
    files = [folder.write(counting("float32", shape) * n, f"s{n}") for n in range(6)]
    with DataCache(5 * 4 * 32**3, strict=True) as cache:
        sums = [LazyReadData(a) + LazyReadData(b) for a, b in pairwise(files)]
        for _ in range(3):
            for n, total in enumerate(sums):
                same(total.data, folder.volume(counting("float32", shape) * (2 * n + 1)))
                assert total.data.header()["subject"] == f"s{n}"
        assert cache.stats().overcommits == 0
        total = sums[0]
        total.release()
        same(total.data, folder.volume(counting("float32", shape)))


def test_expressions_pickle_as_their_recipe(folder: Folder) -> None:
    a = folder.proxy(counting("float32"))
    b = folder.proxy(counting("float32", start=3))
    mine = folder.volume(counting("float32"), "mine")
    expression = (mine - a * 2 + b) / 3
    changed = LazyReadData(a)
    changed += 5
    expected = expression.data, changed.data
    packed = pickle.dumps((expression, changed))
    assert len(packed) < 4096
    for again, value in zip(pickle.loads(packed), expected, strict=True):
        same(again.data, value)
    assert pickle.loads(packed)[0].data.header()["subject"] == "mine"


# What the original got wrong


def test_all_divisions_work(folder: Folder) -> None:
    a, b = folder.proxy(counting("int16")), folder.proxy(counting("int16") * 2)
    x, y = folder.plain(a), folder.plain(b)
    for found, expected in [(b / a, y / x), (b // a, y // x), (b % a, y % x), (b / 2, y / 2)]:
        same(found.data, expected)


def test_the_absolute_value_is_that_of_the_array(folder: Folder) -> None:
    a = folder.proxy(-counting("int16"))
    for found in (np.abs(a), lc.abs(a)):
        np.testing.assert_array_equal(found.data, counting("int16"))
    # AIMS has none, and says so.
    with pytest.raises(TypeError, match="abs"):
        _ = abs(a).data


def test_every_operation_counts(folder: Folder, cache: DataCache) -> None:
    for operation in (
        operator.neg,
        lambda v: v + 1,
        lambda v: v == v,
        np.sqrt,
        lambda v: lc.mean([v, v]),
        lambda v: operator.iadd(v, 1),
    ):
        lazy = folder.proxy(counting("int16"), nops=1)
        source = LazyReadData(lazy)
        _ = operation(lazy).data
        assert not source.loaded(), operation


def test_after_a_release_there_are_as_many_operations_again(
    folder: Folder, cache: DataCache
) -> None:
    lazy = folder.proxy(counting("int16"), nops=2)
    for round_ in range(3):
        _ = (lazy + 1).data
        assert lazy.loaded()
        _ = (lazy + 2).data
        assert not lazy.loaded()
        assert cache.stats().loads == round_ + 1


def test_what_was_changed_in_place_survives_a_release(folder: Folder, cache: DataCache) -> None:
    for start in (folder.proxy(counting("int16"), nops=1), folder.proxy(counting("int16")) + 0):
        z = start
        z += 10
        same(z.data, folder.volume(counting("int16") + 10))
        z.release()
        cache.clear()
        same(z.data, folder.volume(counting("int16") + 10))
        z += 1
        same((z * 2).data, folder.volume((counting("int16") + 11) * 2))


def test_a_result_that_was_released_is_itself_and_not_its_operand(folder: Folder) -> None:
    a = folder.proxy(counting("int16"), nops=1)
    result = a + 1
    for _ in range(3):
        same(result.data, folder.volume(counting("int16") + 1))
        result.release()
        gc.collect()


def test_a_volume_in_memory_stays_whatever_its_nops(folder: Folder, cache: DataCache) -> None:
    lazy = LazyReadData(folder.volume(counting("int16")), nops=1)
    for _ in range(3):
        same((lazy + 1).data, folder.volume(counting("int16") + 1))
        cache.clear()
    same(lazy.data, folder.volume(counting("int16")))


def test_proxies_of_volumes_can_be_copied(folder: Folder) -> None:
    a = folder.proxy(counting("int16"))
    for lazy in (a, a + 1, LazyReadData(folder.volume(counting("int16")))):
        expected = folder.volume(np.asarray(lazy).copy())
        for other in (copy.copy(lazy), copy.deepcopy(lazy)):
            other += 1
            same(other.data, expected + 1)
            same(lazy.data, expected)


def test_after_a_failed_read_the_next_fails_as_well(folder: Folder) -> None:
    path = Path(folder.write(counting("int16")))
    path.write_bytes(path.read_bytes()[:-4])
    lazy = LazyReadData(path)
    for _ in range(3):
        with pytest.raises(ReadError, match=re.escape(str(path))):
            _ = (lazy + 1).data


def test_threads_with_one_operation_each_all_get_the_data(folder: Folder) -> None:
    proxies = [folder.proxy(counting("int16", (8, 8, 8, 1)), nops=1) for _ in range(3)]
    expected = np.asarray(folder.plain(proxies[0]) * 3)

    def work() -> int:
        for _ in range(25):
            found = sum(proxies).data
            assert np.array_equal(np.asarray(found), expected)
        return 1

    threads = [Running(work) for _ in range(4)]
    assert [thread.result() for thread in threads] == [1] * 4


def test_promoted_types_are_those_that_were_recorded(folder: Folder) -> None:
    text = "\n".join(" ".join(line) for line in SECTIONS["mixed"])
    assert "float32" in text
    table = (Path(__file__).parent / "data" / "pyaims" / "operators.txt").read_text()
    for left, row in re.findall(r"^(\w+) (\{'\+'.*\})$", table, re.MULTILINE):
        for right, code in ast.literal_eval(row)["+"].items():
            total = folder.proxy(counting(left)) + folder.proxy(counting(right))
            assert str(total.dtype) == str(np.asarray(total).dtype)
            assert type(total.data).__name__ == f"Volume_{code}"
