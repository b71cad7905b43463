"""A proxy among NumPy's functions: the values, types and memory order of eager NumPy."""

from __future__ import annotations

import functools
import operator
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycache import _buffers, execute, expression
from lazycache.cache import DataCache
from lazycache.errors import IntegerWrapWarning, StackingWarning
from lazycache.proxy import LazyReadData

DTYPES = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "F"]
BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.pow, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
    np.add, np.multiply, np.maximum, np.arctan2, np.power, np.hypot, np.copysign,
]  # fmt: skip
UNARY = [
    operator.neg, operator.pos, operator.abs, operator.invert, np.sqrt, np.exp, np.square,
    np.isnan, np.sign, lambda a: a[1:], lambda a: a[..., ::-1], lambda a: a[0], lambda a: a.T,
    lambda a: a[..., None], lambda a: a.astype("f4"), lambda a: np.clip(a, 1, 3),
    lambda a: np.where(a, a, 2), lambda a: np.round(a, 1), lambda a: a.mean(axis=-1),
    lambda a: a.sum(axis=0), lambda a: a.max(axis=0), lambda a: a.std(axis=-1),
    lambda a: np.median(a, axis=0), lambda a: np.stack([a, a]), lambda a: a.swapaxes(0, -1),
    lambda a: np.concatenate([a, a], axis=-1), lambda a: a.any(axis=0), lambda a: np.cumsum(a),
    lambda a: np.add.reduce(a, axis=-1), lambda a: np.maximum.reduce(a), lambda a: a.clip(0, 5),
    lambda a: np.squeeze(a), lambda a: np.moveaxis(a, 0, -1), lambda a: a.prod(axis=0),
]  # fmt: skip
INPLACE = [
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior,
]  # fmt: skip
CONSTANTS = [0, 1, 2, 3, -1, 2.5, 0.5, True, np.float32(1.5), np.float64(2), np.int16(3), 1j,
             np.array(2), np.array([1.0, 2.0]), 300, np.uint8(200), [1, 2]]  # fmt: skip


def leaf(rng, dtype, shape, order):
    values = rng.integers(0, 2 if dtype == "?" else 100, size=shape)
    if np.dtype(dtype).kind in "fc":
        values = np.where(rng.random(shape) < 0.2, rng.choice([np.nan, -0.0, np.inf], shape),
                          values / 7)  # fmt: skip
    with np.errstate(all="ignore"):
        return np.asarray(np.asarray(values).astype(dtype), order=order)


@st.composite
def programs(draw):
    """Leaves, and steps that each take a function and the places of its arguments."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = draw(st.sampled_from([(2, 3, 2), (4, 2), (2, 2, 2), (1, 2), (3,), (5, 1, 2), ()]))
    leaves = [
        leaf(rng, draw(st.sampled_from(DTYPES)), shape, draw(st.sampled_from("CF")))
        for _ in range(draw(st.integers(1, 3)))
    ]
    steps = []
    for place in range(len(leaves), len(leaves) + draw(st.integers(1, 7))):
        kinds = ["binary", "binary", "constant", "reflected", "unary", "place"]
        kind = draw(st.sampled_from(kinds))
        at = draw(st.integers(0, place - 1))
        other = draw(st.integers(0, place - 1))
        constant = draw(st.sampled_from(CONSTANTS))
        function = draw(st.sampled_from({"unary": UNARY, "place": INPLACE}.get(kind, BINARY)))
        steps.append((kind, function, at, other, constant))
    return leaves, steps


def run(leaves, steps, copy):
    """The last value, from the steps that it needs."""
    values = list(leaves)
    needed = {len(leaves) + len(steps) - 1}
    for place in range(len(leaves) + len(steps) - 1, len(leaves) - 1, -1):
        kind, _, at, other, _ = steps[place - len(leaves)]
        if place in needed:
            needed |= {at, other} if kind in ("binary", "place") else {at}
    for place, (kind, function, at, other, constant) in enumerate(steps, len(leaves)):
        if place not in needed:
            value = None
        elif constant == [1, 2] and isinstance(values[at], np.generic) and function is operator.mul:
            # A list times a NumPy scalar is Python's repetition; to a proxy a list is an array.
            value = function(values[at], np.array(constant))
        elif kind == "binary":
            value = function(values[at], values[other])
        elif kind == "constant":
            value = function(values[at], constant)
        elif kind == "reflected":
            value = function(constant, values[at])
        elif kind == "unary":
            value = function(values[at])
        else:
            value = function(copy(values[at]), values[other])
        values.append(value)
    return values[-1]


def told(value):
    array = np.asarray(value)
    wide = [abs(step) for step, size in zip(array.strides, array.shape, strict=True) if size > 1]
    order = sorted(range(len(wide)), key=lambda axis: -wide[axis]) if array.size else []
    return type(value), array.dtype, array.shape, order, array.tobytes()


def quiet(make):
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            value = make()
            return told(value.data if isinstance(value, LazyReadData) else value)
        except Exception as error:
            return error


def copied(value):
    return value.copy(order="K") if isinstance(value, np.ndarray) else value


def agree(program):
    leaves, steps = program
    cache = DataCache("1GiB")
    proxies = [LazyReadData(array, cache=cache) for array in leaves]
    eager = quiet(lambda: run(leaves, steps, copied))
    lazy = quiet(lambda: run(proxies, steps, LazyReadData))
    if isinstance(eager, Exception) or isinstance(lazy, Exception):
        assert isinstance(eager, Exception), f"NumPy gives {eager[:3]}, we raise {lazy!r}"
        assert isinstance(lazy, Exception), f"NumPy raises {eager!r}, we give {lazy[:3]}"
    else:
        assert lazy == eager


@settings(max_examples=600, deadline=None)
@given(program=programs())
def test_random_expressions_equal_eager_numpy_in_bytes_dtype_type_and_order(program):
    agree(program)


@settings(max_examples=200, deadline=None)
@given(program=programs())
def test_they_do_in_memory_of_our_own_too(program):
    with pytest.MonkeyPatch.context() as patch:
        for module in (_buffers, execute):
            patch.setattr(module, "LARGE", 1)
        patch.setattr(expression._buffers, "LARGE", 1)
        agree(program)


@pytest.fixture
def cache():
    return DataCache("1GiB")


@pytest.fixture
def array():
    return np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))


@pytest.fixture
def proxy(array, cache):
    return LazyReadData(array, cache=cache)


@pytest.fixture
def file(tmp_path, array):
    np.save(tmp_path / "image.npy", array)
    return tmp_path / "image.npy"


@pytest.mark.parametrize(
    "expression",
    [
        lambda p: np.sqrt(p), lambda p: np.ones((2, 3, 4)) * p, lambda p: np.float64(2) * p,
        lambda p: np.mean(p, axis=0), lambda p: np.mean(p, 0), lambda p: np.nanmean(p, axis=1),
        lambda p: np.stack([p, p]), lambda p: np.concatenate([p, p], 1),
        lambda p: np.where(p, 1, p),
        lambda p: np.clip(p, 1, 2), lambda p: np.transpose(p), lambda p: p[0], lambda p: p[..., 1:],
        lambda p: np.percentile(p, [5, 50], axis=-1), lambda p: np.add.reduce(p),
        lambda p: p @ p[0].T,
        lambda p: p.mean(axis=(0, 1)), lambda p: np.amax(p, axis=0), lambda p: -p, lambda p: p == 3,
    ],
)  # fmt: skip
def test_what_can_be_foretold_is_an_expression_that_reads_nothing(expression, file, cache, array):
    found = expression(LazyReadData(file, cache=cache))
    assert isinstance(found, LazyReadData)
    expected = expression(array)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert cache.stats().loads == 0
    assert told(found.data) == told(expected)


@pytest.mark.parametrize(
    "expression",
    [
        lambda p: p.mean(), lambda p: np.mean(p), lambda p: p[1, 2, 3], lambda p: p[p > 5],
        lambda p: p[[0, 1]], lambda p: p[np.array([0])], lambda p: np.linalg.norm(p),
        lambda p: np.unique(p), lambda p: np.modf(p)[1], lambda p: p.tolist(), lambda p: p.ravel(),
        lambda p: np.array_equal(p, p), lambda p: np.add.outer(p, [1, 2]), lambda p: p.copy(),
        lambda p: np.maximum.accumulate(p, axis=1), lambda p: float(p[0, 0, 1]), lambda p: 5.0 in p,
        lambda p: np.histogram(p)[0], lambda p: np.pad(p, 1), lambda p: np.dot(p, np.ones(4)),
        lambda p: [len(p), *np.shape(p), np.ndim(p), np.size(p)], lambda p: [x.sum() for x in p],
        lambda p: p.reshape(4, 6), lambda p: np.einsum("ijk->k", p), lambda p: np.copy(p),
    ],
)  # fmt: skip
def test_everything_else_is_computed(expression, proxy, array):
    found = expression(proxy)
    assert not isinstance(found, LazyReadData)
    assert told(found) == told(expression(array))


def test_a_copy_of_the_data_can_be_written_to_and_the_data_cannot(proxy):
    assert not proxy.data.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        proxy.data.flags.writeable = True
    assert proxy.copy().flags.writeable
    assert np.array(proxy).flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(proxy)[0] = 1


def test_array_takes_dtype_and_copy(proxy, array):
    assert np.asarray(proxy, dtype="f4").dtype == "f4"
    assert np.array(proxy, dtype="i2", copy=True).tobytes() == array.astype("i2").tobytes()
    assert np.shares_memory(np.asarray(proxy), proxy.data)
    assert not np.shares_memory(np.array(proxy, copy=True), proxy.data)
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(proxy, dtype="f4", copy=False)


def test_a_ufunc_writes_into_an_array_given_as_out(proxy, array):
    out = np.zeros_like(array)
    assert np.add(proxy, 1, out=out) is out
    assert np.array_equal(out, array + 1)
    out += proxy
    assert np.array_equal(out, 2 * array + 1)


def test_a_ufunc_with_a_proxy_as_out_changes_that_proxy_alone(proxy, array, cache):
    other = LazyReadData(proxy)
    before = proxy * 1
    assert np.add(proxy, 1, out=proxy) is proxy
    assert np.array_equal(proxy.data, array + 1)
    assert np.array_equal(other.data, array)
    assert np.array_equal(before.data, array)


def test_an_operand_that_is_none_of_numbers_is_a_typeerror_at_once(proxy):
    for bad in ("text", None, {}, b"x"):
        with pytest.raises(TypeError):
            proxy + bad
        with pytest.raises(TypeError):
            bad - proxy
    assert not (proxy == "text").data.any()


def test_other_types_that_refuse_ufuncs_get_their_turn(proxy):
    class Other:
        __array_ufunc__ = None

        def __radd__(self, left):
            return "mine"

    assert proxy + Other() == "mine"


def test_an_array_operand_may_be_changed_after_the_operator(proxy, array):
    mine = np.ones(4)
    found = proxy + mine
    mine[:] = 100
    assert np.array_equal(found.data, array + 1)


def test_a_read_only_array_is_not_copied(cache):
    array = np.frombuffer(bytes(80))
    assert np.shares_memory(LazyReadData(array, cache=cache).data, array)


def test_functools_reduce_and_stack_mean_give_numpys_values(cache):
    arrays = [np.full((2, 3), i, "f4") for i in range(4)]
    proxies = [LazyReadData(a, cache=cache) for a in arrays]
    found = functools.reduce(np.maximum, proxies)
    assert isinstance(found, LazyReadData)
    assert np.array_equal(found.data, arrays[3])
    assert told(np.stack(proxies).mean(0).data) == told(np.stack(arrays).mean(0))


def test_a_list_stacked_by_numpy_is_correct_and_warned_of_once(cache):
    proxies = [LazyReadData(np.full(3, float(i)), cache=cache) for i in range(3)]
    with pytest.warns(StackingWarning, match=r"lc\.mean") as caught:
        found = [np.mean(proxies, axis=0) for _ in range(3)]
    assert np.array_equal(found[2], [1, 1, 1])
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_converting_proxies_one_by_one_is_no_stacking(cache):
    proxies = [LazyReadData(np.ones(3), cache=cache) for _ in range(3)]
    for proxy in proxies:
        np.asarray(proxy)
    kept = None
    for proxy in proxies:
        kept = np.asarray(proxy)
    assert kept is not None
    assert len([np.asarray(proxy) for proxy in proxies]) == 3
    assert len(list(map(np.asarray, proxies))) == 3


def test_integers_that_wrap_keep_numpys_value_and_are_warned_of_once(cache):
    arrays = [np.full((3, 3), 300 * i, "i2") for i in range(40)]
    proxies = [LazyReadData(a, cache=cache) for a in arrays]
    with pytest.warns(IntegerWrapWarning, match=r"lc\.mean") as caught:
        found = (sum(proxies) / 40).data
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert found.tobytes() == (sum(arrays) / 40).tobytes()


@pytest.mark.parametrize(
    "expression",
    [
        lambda a, b: a + 1, lambda a, b: a + b, lambda a, b: a.astype("i8") * b * b,
        lambda a, b: a * 1.0 * b * b, lambda a, b: (a > 3) + (b > 3), lambda a, b: a - b,
        lambda a, b: sum([a // 4] * 4),
    ],
)  # fmt: skip
def test_integers_that_stay_in_their_type_are_not_warned_of(expression, cache):
    a = LazyReadData(np.array([16000, -16000, 7], "i2"), cache=cache)
    b = LazyReadData(np.array([16000, -16000, 9], "i2"), cache=cache)
    expression(a, b).data


@pytest.mark.parametrize(
    "expression",
    [
        lambda a, b: a - b, lambda a, b: a * b, lambda a, b: np.add(a, b) + b,
        lambda a, b: operator.iadd(LazyReadData(a), b) + b,
    ],
)  # fmt: skip
def test_each_way_to_wrap_is_warned_of(expression, cache):
    a = LazyReadData(np.array([100, 200], "u1"), cache=cache)
    b = LazyReadData(np.array([20, 201], "u1"), cache=cache)
    with pytest.warns(IntegerWrapWarning, match="uint8"):
        expression(a, b).data


def test_divmod_gives_two_expressions(proxy, array):
    for found, expected in zip(divmod(proxy, 3), divmod(array, 3), strict=True):
        assert told(found.data) == told(expected)
    for found, expected in zip(divmod(3, proxy + 1), divmod(3, array + 1), strict=True):
        assert told(found.data) == told(expected)
