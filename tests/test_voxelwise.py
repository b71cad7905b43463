"""Functions of voxels see (n, voxels) blocks: the values are those of all voxels at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expressions import ROOMY, THREADS, WAYS, Leaf, Library, difference, running
from hypothesis import strategies as st
from numpy.typing import NDArray

import lazycache as lc
from lazycache import DataCache, LazyReadData, needs, program

Array = NDArray[Any]


# Each gives (voxels,) or (k, voxels) for (n, voxels), from the values of each voxel alone.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sum": (lambda x: x.sum(0), ()),
    "mean": (lambda x: x.mean(0), ()),
    "deviation": (lambda x: x.std(0), ()),
    "median": (lambda x: np.median(x, 0), ()),
    "first": (lambda x: x[0], ()),
    "many": (lambda x: x.max(0) > 5, ()),
    "count": (lambda x, least: (x > least).sum(0, dtype="u1"), (3,)),
    "float32": (lambda x, y, z: (x.astype("f4") * y + z).max(0), (2, np.float32(0.5))),
    "in place": (lambda x: np.multiply(x, 2, out=x).min(0), ()),
    "number of values": (lambda x: np.argmax(x, 0), ()),
    "two": (lambda x: np.stack([x.min(0), x.max(0)]), ()),
    "sorted": (lambda x: np.sort(x, 0), ()),
    "one of one": (lambda x: x.sum(0, keepdims=True), ()),
    "percentiles": (lambda x, q: np.percentile(x, q, axis=0), ([25, 50, 90],)),
    "weights": (lambda x, w: (w[:, :, None] * x).sum(1), (np.arange(1, 13)[None],)),
}
ORDERS = [None, None, (1, 0, 2), (2, 1, 0), (0, 2, 1)]
IMAGES = ["nii", "nii.gz", "scaled.nii", "C.npy", "F.npy", "memory", "mgz"]


@st.composite
def drawn(draw: Any) -> Any:
    """Images of one shape and order, mostly; what is done to them first; and a mask."""
    shape = draw(st.sampled_from([(5, 6, 7), (5, 6, 7, 4), (1, 6, 7), (3, 1, 1), (1, 1, 1)]))
    kinds = draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=2))
    dtypes = draw(st.lists(st.sampled_from(["u1", "i2", "f4", "f8", "i4"]), min_size=1, max_size=3))
    count = draw(st.integers(1, 12))
    leaves = []
    for _ in range(count):
        kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
        if kind in ("mgz", "nii.gz", "scaled.nii"):
            dtype = {"f8": "f4", "i4": "i2", "f4": "f4"}.get(dtype, dtype)
        if kind == "scaled.nii":
            dtype = dtype if dtype in ("u1", "i2") else "i2"
        if kind == "nii.gz" and dtype == "i4":
            dtype = "i2"
        leaves.append(Leaf(kind, dtype, shape, draw(st.integers(0, 1))))
    mask = draw(
        st.none()
        | st.builds(
            Leaf,
            st.sampled_from(["C.npy", "F.npy", "memory", "F memory", "gaps", "nii", "raw"]),
            st.sampled_from(["u1", "f4"]),
            st.just(shape),
            st.integers(0, 2),
        )
    )
    order = draw(st.sampled_from(ORDERS))
    step = draw(st.sampled_from(["none", "plus", "some"]))
    return leaves, mask, order, step, draw(st.sampled_from(sorted(FUNCTIONS)))


def changed(images: list[Any], order: Any, step: str) -> list[Any]:
    if order is not None:
        images = [np.transpose(v, (*order, *range(3, v.ndim))) for v in images]
    if step == "plus":
        images = [v + 1 for v in images]
    elif step == "some":
        images = [v * 2 if at % 2 else v for at, v in enumerate(images)]
    return images


def expected(images: list[Array], mask: Any, name: str) -> Array:
    """What the function gives for all voxels at once."""
    function, args = FUNCTIONS[name]
    voxels = np.stack([image.ravel() for image in images])
    values = np.asarray(function(np.concatenate([voxels, voxels[:, -1:]], 1), *args))[..., :-1]
    if mask is not None:
        values = np.where(mask.ravel() != 0, values, np.zeros((), values.dtype))
    shape = images[0].shape
    if values.ndim > 1:
        return np.ascontiguousarray(np.moveaxis(values.reshape(-1, *shape), 0, -1))
    return values.reshape(shape)


def test_a_function_of_voxels_gives_what_it_gives_for_all_at_once(
    library: Library, storm: Any
) -> None:
    @storm(drawn(), WAYS, THREADS, st.integers(1, 4), share=0.5)
    def check(case: Any, way: str, threads: int, times: int) -> None:
        leaves, mask, order, step, name = case
        if name == "weights" and len(leaves) != 12:
            name = "two"
        function, args = FUNCTIONS[name]

        def result(cache: DataCache) -> LazyReadData:
            images = changed([library.proxy(leaf, cache) for leaf in leaves], order, step)
            given = None
            if mask is not None:
                given = changed([library.proxy(mask, cache)], order, "none")[0]
            return lc.map_voxels(function, images, mask=given, args=args, grid="ignore")

        with running(way, threads), np.errstate(all="ignore"):
            arrays = changed([library.array(leaf) for leaf in leaves], order, step)
            inside = None
            if mask is not None:
                inside = changed([library.array(mask)], order, "none")[0]
            true = expected(arrays, inside, name)
            cache = DataCache(ROOMY)
            lazy = result(cache)
            assert (lazy.shape, lazy.dtype) == (true.shape, true.dtype)
            assert cache.stats().loads == 0
            found = lazy.data
            told = f"{name} of {leaves}, {mask}, {order}, {step}"
            wrong = difference(np.ascontiguousarray(found), true)
            assert not wrong, f"{wrong}\n{told}"
            least = lc.explain(result(DataCache(ROOMY))).min_budget
            for budget in {least, least * times}:
                with DataCache(budget, strict=True) as small:
                    again = result(small)
                    plan = lc.explain(again)
                    assert not difference(again.data, found), f"in {budget}: {told}"
                    stats = small.stats()
                    assert stats.peak_bytes <= budget, told
                    assert (stats.loads, stats.overcommits) == (plan.reads, 0), told


# Found before


def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "_WORTH_IT", 0)
    monkeypatch.setattr(program, "_SHORTEST", 16)
    monkeypatch.setattr(program, "BLOCK", 64)


@pytest.mark.parametrize("axes", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_several_values_lie_where_their_voxels_do_in_any_memory_order(
    axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks(monkeypatch)
    array = np.random.default_rng(0).random((5, 6, 7)).transpose(axes)
    with DataCache(ROOMY):
        images = [LazyReadData(array) + 0, LazyReadData(array * 2)]
        found = lc.map_voxels(lambda x: np.stack([x.min(0), x.max(0)]), images).data
    assert np.array_equal(found, np.stack([array, array * 2], -1))


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_mask_of_any_memory_order_leaves_the_images_in_blocks(order: Any, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    arrays = [np.asfortranarray(dice.random((64, 64, 20), "f4")) for _ in range(8)]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    mask = np.array(arrays[0] > 0.5, order=order)
    np.save(tmp_path / "mask.npy", mask)
    for one in (mask, tmp_path / "mask.npy"):
        with DataCache(2 << 20, strict=True) as cache:
            images = [LazyReadData(tmp_path / f"{number}.npy") for number in range(8)]
            mean = lc.map_voxels(lambda x: x.mean(0), images, mask=LazyReadData(one))
            assert lc.explain(mean).whole == ()
            assert np.array_equal(mean.data, np.where(mask, np.mean(arrays, axis=0), 0))
            assert cache.stats().peak_bytes < sum(array.nbytes for array in arrays)


def test_the_sum_over_one_voxel_is_that_which_it_has_among_others() -> None:
    """NumPy adds up the rows of one column in another order than those of two."""
    arrays = [np.random.default_rng(number).random((3, 4, 5)) for number in range(40)]
    mask = np.zeros((3, 4, 5))
    mask[1, 2, 3] = 1
    with DataCache(ROOMY):
        images = [LazyReadData(array) for array in arrays]
        everywhere = lc.map_voxels(lambda x: x.sum(0), images).data
        alone = lc.map_voxels(lambda x: x.sum(0), images, mask=mask).data
    assert alone[1, 2, 3] == everywhere[1, 2, 3]
    assert np.count_nonzero(alone) == 1


@pytest.mark.parametrize("way", ["blocks", "whole"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_block_takes_is_accounted_for_mixed_types_and_many_values(
    way: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "whole":
        monkeypatch.setattr(needs, "_WORTH_IT", 1 << 40)
    shape = (64, 64, 40)
    arrays = [np.ones(shape, "u1", "F") for _ in range(15)] + [np.ones(shape, "f8", "F")]
    weights = np.arange(40.0).reshape(40, 1)
    with DataCache(ROOMY) as cache:
        images = [LazyReadData(array) for array in arrays]
        mask = LazyReadData(np.ones(shape, "?", "F")) if masked else None
        wide = lc.map_voxels(lambda x, w: x[0] * w, images, mask=mask, args=[weights])
        before = cache.used
        tracemalloc.start()
        try:
            wide.data
            # What is large is mapped, and not seen here.
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak + wide.nbytes <= cache.stats().peak_bytes - before + (1 << 20)


def test_a_function_that_gives_other_shapes_is_an_error_that_says_which() -> None:
    images = [LazyReadData(np.ones((4, 5)), cache=DataCache(ROOMY)) for _ in range(3)]
    for function in (lambda x: x.sum(), lambda x: x[None], lambda x: x[:, 1:], lambda x: "text"):
        with pytest.raises(ValueError, match=r"\(3, 4\) \(images, voxels\)"):
            lc.map_voxels(function, images).data
    with pytest.raises(ValueError, match=r"for \(3, 20\) .* where \(20,\) was expected"):
        lc.map_voxels(lambda x: x[0, :4], images).data
    with pytest.raises(lc.ShapeMismatchError, match=r"\(5, 4\)"):
        lc.map_voxels(lambda x: x[0], images, mask=np.ones((5, 4))).data
    with pytest.raises(ValueError, match="no image"):
        lc.map_voxels(lambda x: x[0], [])
