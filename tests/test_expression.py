"""Nodes, and what is foretold of their values."""

from __future__ import annotations

import copy
import gc
import math
import operator
import pickle
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazycache import _buffers
from lazycache import operations as ops
from lazycache._frames import location, user_frame
from lazycache.cache import DataCache
from lazycache.errors import ShapeMismatchError
from lazycache.expression import (
    FileNode,
    OpNode,
    Slot,
    ValueNode,
    copy_of,
    describe,
    empty_in_order,
    files_under,
    fill,
    frozen,
    walk,
)
from lazycache.layout import dense, infer, layout_of, transient
from lazycache.proxy import LazyReadData
from lazycache.recipe import pack, unpack
from lazycache.source import file_key


def add(*operands):
    return OpNode(ops.BINARY["add"], operands)


def chain(length):
    node = ValueNode(np.zeros(2))
    for _ in range(length):
        node = OpNode(ops.BINARY["add"], (node,), (Slot(0), 1))
    return node


def test_walk_gives_each_node_once_operands_first_from_left_to_right():
    a, b = ValueNode(1), ValueNode(2)
    ab = add(a, b)
    top = add(ab, add(b, ab))
    found = list(walk([top, a]))
    assert found[:3] == [a, b, ab]
    assert found[-1] is top
    assert len(found) == len(set(found)) == 5


def test_walk_leaves_out_what_is_below_a_stop():
    a, b = ValueNode(1), ValueNode(2)
    inner = add(a, b)
    top = add(inner, b)
    assert list(walk([top], stop=lambda node: node is inner)) == [inner, b, top]


def test_files_are_told_in_the_order_of_their_use():
    a, b = FileNode(file_key("a.npy")), FileNode(file_key("b.npy"))
    assert files_under([add(add(b, a), b)]) == [b, a]


def test_making_a_node_never_touches_the_disk(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("the disk was touched")

    cache = DataCache("1MiB")
    with monkeypatch.context() as patch:
        for name in ("os.stat", "os.lstat", "os.open", "os.scandir", "builtins.open"):
            patch.setattr(name, touched)
        proxy = LazyReadData("nowhere/at all.nii.gz", cache=cache)
        expression = (proxy * 2 + LazyReadData("else.nii")[..., 3]) / proxy.mean(axis=0)
        assert "at all.nii.gz" in repr(expression)
        assert "at all.nii.gz" in proxy._repr_html_()
        expression += 1
        expression[0] = 3
        pickle.dumps(expression)


def test_a_million_nodes_die_without_recursion():
    node = chain(300_000)
    gc.collect()
    del node
    gc.collect()


def test_deep_expressions_are_copied_pickled_and_shown_without_recursion():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        proxy = LazyReadData(np.zeros(2), cache=DataCache("1MiB"))
        for _ in range(5_000):
            proxy = 1 + proxy
        assert copy.copy(proxy)._node is proxy._node
        assert copy.deepcopy(proxy)._node is proxy._node
        assert "not computed" in repr(proxy)
        again = pickle.loads(pickle.dumps(proxy))
        assert np.array_equal(again.data, [5_000, 5_000])
        assert proxy.shape == (2,)
    finally:
        sys.setrecursionlimit(limit)


def test_a_recipe_keeps_shared_nodes_shared():
    a = ValueNode(np.ones(3))
    both = add(a, a)
    again = unpack(pickle.loads(pickle.dumps(pack(add(both, both)))))
    assert again.operands[0] is again.operands[1]
    assert again.operands[0].operands[0] is again.operands[0].operands[1]


def test_every_operation_survives_a_pickle():
    found = [*ops.BINARY.values(), *ops.COMPARISONS.values(), *ops.UNARY.values()]
    found += [*ops.INPLACE.values(), ops.ufunc(np.sqrt), ops.reduction("mean"), ops.view("flip")]
    found += [ops.ufunc_reduce(np.add)]
    found += [value for value in vars(ops).values() if isinstance(value, ops.Op)]
    for op in found:
        assert pickle.loads(pickle.dumps(op)) == op


def test_location_is_the_line_of_the_users_code():
    proxy = LazyReadData("a.npy")
    for make in (lambda: proxy + 1, lambda: np.sqrt(proxy), lambda: np.mean(proxy, axis=0)):
        found = make()._node.location
        assert found == (__file__, make.__code__.co_firstlineno)
    frame, level = user_frame()
    assert frame.f_code.co_filename == __file__
    assert level == 1
    assert location()[0] == __file__


def test_fill_puts_values_in_the_place_of_slots():
    template = ([Slot(1), Slot(0)], 3, (Slot(0), None))
    assert fill(template, ["a", "b"]) == (["b", "a"], 3, ("a", None))


def test_describe_names_the_first_file():
    node = add(FileNode(file_key("/x/a.npy")), ValueNode(1))
    assert describe(node) == "the result of + of a.npy ..."
    assert describe(node.operands[0]) == "/x/a.npy"
    assert describe(ValueNode(3)) == "<int in memory>"


class TestFrozen:
    def test_an_array_that_can_be_written_to_is_copied(self):
        array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
        found = frozen(array)
        assert not np.shares_memory(found, array)
        assert found.strides == array.strides
        assert not found.flags.writeable

    def test_so_is_a_read_only_view_of_one(self):
        array = np.arange(6.0)
        view = array[1:]
        view.flags.writeable = False
        found = frozen(view)
        array[:] = 0
        assert np.array_equal(found, np.arange(1, 6.0))

    def test_a_memory_map_is_copied(self, tmp_path):
        np.save(tmp_path / "a.npy", np.arange(5))
        mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
        found = frozen(mapped)
        assert type(found) is np.ndarray
        assert not np.shares_memory(found, mapped)

    def test_what_nobody_can_write_to_is_not_copied(self):
        array = np.frombuffer(bytes(16))
        assert frozen(array) is array
        assert frozen(array[1:]).base is not None
        ours = _buffers.readonly(_buffers.empty((1 << 20,), "f4"))
        assert np.shares_memory(frozen(ours), ours)

    def test_lists_of_numbers_become_arrays_and_others_stay(self):
        assert np.array_equal(frozen([1, 2.5]), [1, 2.5])
        thing = object()
        assert frozen(thing) is thing


def test_a_copy_of_a_large_array_is_in_memory_that_goes_back_to_the_system():
    array = np.moveaxis(np.zeros((200, 100, 30)), 0, 1)
    found = copy_of(array)
    assert found.strides == array.copy(order="K").strides
    assert not isinstance(_buffers.owner_of(found), np.ndarray)


@given(order=st.permutations(range(3)))
def test_an_empty_array_has_its_axes_in_the_order_asked_for(order):
    array = np.zeros((2, 3, 4)).transpose(order)
    found = empty_in_order(array.shape, array.dtype, array.strides)
    assert (found.shape, found.strides) == (array.shape, array.strides)


# What is foretold

OPS = [
    (ops.BINARY["add"], 2, (), {}), (ops.BINARY["truediv"], 2, (), {}),
    (ops.BINARY["pow"], 1, (2,), {}), (ops.BINARY["mul"], 1, (2.5,), {}),
    (ops.BINARY["mul"], 1, (np.float64(2),), {}), (ops.COMPARISONS["lt"], 2, (), {}),
    (ops.UNARY["abs"], 1, (), {}), (ops.WHERE, 3, (), {}), (ops.CLIP, 1, (1, 3), {}),
    (ops.ASTYPE, 1, (np.dtype("f4"),), {}), (ops.ufunc(np.sqrt), 1, (), {}),
    (ops.reduction("mean"), 1, (), {"axis": 0}),
    (ops.reduction("std"), 1, (), {"axis": -1, "ddof": 2}),
    (ops.reduction("max"), 1, (), {"axis": (0, 1), "keepdims": True}),
    (ops.reduction("sum"), 1, (), {"axis": None}), (ops.reduction("median"), 1, (), {"axis": 1}),
    (ops.reduction("percentile"), 1, (), {"axis": 0, "q": [5, 10, 90]}),
    (ops.reduction("argmax"), 1, (), {"axis": 1}),
    (ops.GETITEM, 1, ((slice(1, None), Ellipsis, slice(None, None, -1)),), {}),
    (ops.GETITEM, 1, ((0, None, slice(0, 1)),), {}), (ops.view("moveaxis"), 1, (0, -1), {}),
    (ops.STACK, "list", (), {"axis": 0}), (ops.STACK, "list", (), {"axis": -1}),
    (ops.CONCATENATE, "list", (), {"axis": 1}),
]  # fmt: skip


@st.composite
def operands(draw, count):
    full = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    found = []
    for _ in range(count):
        dtype = draw(st.sampled_from(["?", "b", "h", "i", "l", "B", "e", "f", "d", "F"]))
        order = draw(st.permutations(range(len(full))))
        shape = full
        if draw(st.booleans()):
            shape = tuple(1 if draw(st.booleans()) else size for size in full)
        array = np.ones([shape[axis] for axis in order], dtype).transpose(np.argsort(order))
        if draw(st.booleans()):
            array = np.repeat(array, 2, axis=0)[::2]
        found.append(array)
    return found


@settings(max_examples=600, deadline=None)
@given(data=st.data(), case=st.sampled_from(OPS))
def test_the_foretold_layout_is_that_of_the_value(data, case):
    op, count, constants, kwargs = case
    arrays = data.draw(operands(2 if count == "list" else count))
    args = (*(Slot(i) for i in range(len(arrays))), *constants)
    if count == "list":
        arrays = [arrays[0], np.ones(arrays[0].shape, arrays[1].dtype)]
        args = ([Slot(0), Slot(1)],)
    layouts = [layout_of(array) for array in arrays]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = op.call(*fill(args, arrays), **kwargs)
    except Exception as error:
        with pytest.raises((type(error), ShapeMismatchError)):
            infer(op, args, kwargs, layouts)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = infer(op, args, kwargs, layouts)
    assert found is not None
    assert (found.shape, found.dtype, found.scalar) == (
        value.shape, value.dtype, isinstance(value, np.generic)
    )  # fmt: skip
    wide = [axis for axis, size in enumerate(value.shape) if size > 1]
    if op.family != "view":
        assert [found.strides[axis] for axis in wide] == [value.strides[axis] for axis in wide]


def test_nothing_of_the_size_of_the_data_is_made_to_foretell():
    huge = dense((100_000, 100_000, 1000), np.dtype("f4"), "F")
    found = infer(ops.BINARY["truediv"], (Slot(0), Slot(1)), {}, [huge, huge])
    assert found == huge
    part = infer(ops.GETITEM, (Slot(0), (Ellipsis, 5)), {}, [huge])
    assert part.shape == (100_000, 100_000)
    mean = infer(ops.reduction("mean"), (Slot(0),), {"axis": -1}, [huge])
    assert mean.nbytes == math.prod(mean.shape) * 4


def test_numpys_errors_are_foretold():
    flags = dense((3,), np.dtype(bool))
    with pytest.raises(TypeError, match="boolean"):
        infer(ops.UNARY["neg"], (Slot(0),), {}, [flags])
    small = dense((3,), np.dtype("u1"))
    with pytest.raises(OverflowError):
        infer(ops.BINARY["add"], (Slot(0), 300), {}, [small])
    with pytest.raises(TypeError, match="same_kind"):
        infer(ops.INPLACE["add"], (Slot(0), 2.5), {}, [small])
    with pytest.raises(IndexError):
        infer(ops.GETITEM, (Slot(0), (5,)), {}, [small])


def test_shapes_that_do_not_go_together_are_an_error():
    a, b = dense((3, 4), np.dtype("f4")), dense((3, 5), np.dtype("f4"))
    for op in (ops.BINARY["add"], ops.INPLACE["add"], ops.BINARY["matmul"]):
        with pytest.raises(ShapeMismatchError, match=r"\(3, 4\)"):
            infer(op, (Slot(0), Slot(1)), {}, [a, b])
    with pytest.raises(ShapeMismatchError):
        infer(ops.INPLACE["add"], (Slot(0), Slot(1)), {}, [dense((4,), np.dtype("f4")), a])


def test_python_scalars_of_equal_value_and_other_type_are_told_apart():
    layout = dense((3,), np.dtype("i2"))
    found = [infer(ops.BINARY["mul"], (Slot(0), c), {}, [layout]) for c in (1, 1.0, True, 1j, 1)]
    assert [one.dtype for one in found] == ["i2", "f8", "i2", "c16", "i2"]


def test_objects_have_no_layout():
    assert layout_of(object()) is None
    assert layout_of(np.ma.masked_array([1.0])) is None
    objects = np.array([None, 1])
    assert infer(ops.BINARY["add"], (Slot(0), 1), {}, [layout_of(objects)]) is None


def test_what_numpy_takes_meanwhile_is_estimated_from_above():
    import tracemalloc

    array = np.ones((64, 64, 64), "i2")
    for name in ("std", "var", "median", "nanmean", "mean"):
        node = OpNode(ops.reduction(name), (ValueNode(array),), (Slot(0),), {"axis": -1})
        layout = layout_of(array)
        result = infer(node.op, node.args, node.kwargs, [layout])
        tracemalloc.start()
        value = node.op.call(array, axis=-1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= transient(node, [layout], result) + 3 * value.nbytes + 200_000, name


def test_the_buffer_in_which_the_mean_of_float16_is_added_up_is_in_the_estimate():
    import tracemalloc

    array = np.ones((100, 100, 100, 2), "f2")
    node = OpNode(ops.reduction("mean"), (ValueNode(array),), (Slot(0),), {"axis": -1})
    layout = layout_of(array)
    result = infer(node.op, node.args, node.kwargs, [layout])
    tracemalloc.start()
    node.op.call(array, axis=-1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak == pytest.approx(transient(node, [layout], result) + result.nbytes, rel=0.02)


@pytest.mark.parametrize("operation", [operator.add, operator.mul])
def test_nodes_compare_and_hash_by_identity(operation):
    a, b = LazyReadData("a.npy"), LazyReadData("a.npy")
    assert a._node != b._node
    assert a._node.key is b._node.key
    assert len({operation(a, b)._node, operation(a, b)._node}) == 2
