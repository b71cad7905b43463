"""Random expressions equal eager NumPy to the byte, whatever the blocks, budgets and threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expressions import (
    EAGER,
    LAZY,
    Done,
    Leaf,
    Library,
    Program,
    difference,
    eagerly,
    lazily,
    noted,
    programs,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import together

import lazycache as lc
from lazycache import (
    BudgetExceededError,
    DataCache,
    LazyCacheWarning,
    LazyReadData,
    needs,
    program,
    spaces,
)

# How many examples a second of a storm stands for: about as many as a second has.
EXAMPLES = 25
ROOMY = 1 << 30


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("leaves"))


@pytest.fixture
def storm(request: pytest.FixtureRequest) -> Callable[..., Callable[[Any], None]]:
    """Runs a function on as many examples as --storm-seconds ask for."""
    seconds = request.config.getoption("--storm-seconds")

    def on(*drawn: Any, share: float = 1.0) -> Callable[[Any], None]:
        count = max(5, int(EXAMPLES * share * seconds))
        profile = settings(max_examples=count, suppress_health_check=list(HealthCheck))
        return lambda function: profile(given(*drawn)(function))()

    return on


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


def compute(done: Done, values: Sequence[Any], wanted: Sequence[int]) -> tuple[Any, ...]:
    """Compute the ``wanted`` ones of ``values`` together and compare them with NumPy's."""
    found = lc.compute(*[values[number] for number in wanted])
    for value, number in zip(found, wanted, strict=True):
        wrong = difference(value, done.values[number])
        assert not wrong, f"v{number} differs, {wrong}\n{done}"
    return found


def check_refused(done: Done, library: Library) -> None:
    """What NumPy refuses is refused with an error of the same kind."""
    for step, error in done.refused[:2]:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = lazily(done, library, DataCache(ROOMY), step.operands)
            try:
                found = step.run(LAZY, [values[n] for n in step.operands])
                found = found.data if isinstance(found, LazyReadData) else found
            except kind:
                continue
            except lc.ShapeMismatchError:
                # Shapes are looked at first.
                other = isinstance(error, TypeError | FloatingPointError)
                assert other, f"the shapes are good: {step}\n{done}"
                continue
            except Exception as other:
                if not all(np.size(done.values[n]) for n in step.operands):
                    continue  # that an array is empty is seen after what is wrong with its dtype
                raise AssertionError(f"not {error!r}: {step}\n{done}") from other
        raise AssertionError(f"{error!r} was not raised: {step}\n{done}, got {np.shape(found)}")


def test_an_expression_is_what_numpy_makes_of_it(library: Library, storm: Any) -> None:
    @storm(programs(), WAYS, THREADS)
    def check(drawn: Program, way: str, threads: int) -> None:
        done = eagerly(drawn, library)
        with running(way, threads):
            cache = DataCache(ROOMY)
            with noted() as told:
                values = lazily(done, library, cache, done.wanted)
                compute(done, values, done.wanted)
            assert told == done.warned(done.wanted), f"other warnings: {told}\n{done}"
            check_refused(done, library)
        cache.check()


def test_large_arrays_go_in_blocks_as_they_are(library: Library, storm: Any) -> None:
    @storm(programs(["large"]), THREADS, share=0.1)
    def check(drawn: Program, threads: int) -> None:
        done = eagerly(drawn, library, most=1 << 20)
        with running("usual", threads), noted():
            compute(done, lazily(done, library, DataCache(ROOMY), done.wanted), done.wanted)


def test_what_headers_tell_is_what_comes(library: Library, storm: Any) -> None:
    @storm(programs(without=["called"]), share=0.3)
    def check(drawn: Program) -> None:
        done = eagerly(drawn, library)
        cache = DataCache(ROOMY)
        with running("whole", 1), noted():
            values = lazily(done, library, cache, done.wanted)
            loads = cache.stats().loads
            for number in done.wanted:
                if isinstance(values[number], LazyReadData):
                    assert values[number].shape == np.shape(done.values[number]), str(done)
                    assert values[number].dtype == np.asarray(done.values[number]).dtype, str(done)
            assert cache.stats().loads == loads


def test_results_that_are_held_stay_as_they_are(library: Library, storm: Any) -> None:
    @storm(programs(), WAYS, share=0.5)
    def check(drawn: Program, way: str) -> None:
        done = eagerly(drawn, library)
        with running(way, 2), noted():
            cache = DataCache(ROOMY)
            values = lazily(done, library, cache, done.wanted)
            first = compute(done, values, done.wanted[-1:])
            leaves = range(len(done.leaves))
            found = compute(done, values, [*done.wanted, *leaves])
            again = [value for value in values if isinstance(value, LazyReadData)]
            lc.compute(*again)
            for value, number in zip(first + found, done.wanted[-1:] + done.wanted, strict=False):
                assert not difference(value, done.values[number]), f"v{number} changed\n{done}"


def test_what_numpy_raises_at_warnings_is_raised(library: Library, storm: Any) -> None:
    @storm(programs(), WAYS, share=0.3)
    def check(drawn: Program, way: str) -> None:
        with np.errstate(all="raise"), running(way, 2):
            done = eagerly(drawn, library)
            cache = DataCache(ROOMY)
            with noted():
                values = lazily(done, library, cache, done.wanted)
                compute(done, values, done.wanted)
            check_refused(done, library)


def attempt(done: Done, library: Library, budget: int) -> None:
    """Compute the program within ``budget``, and not a byte more."""
    with DataCache(budget, strict=True) as cache:
        values = lazily(done, library, cache, done.wanted)
        compute(done, values, done.wanted)
        assert cache.stats().overcommits == 0, str(done)
        assert cache.stats().peak_bytes <= budget, str(done)
        cache.check()


def test_the_smallest_budget_is_enough_and_one_byte_less_is_not(
    library: Library, storm: Any
) -> None:
    @storm(programs(without=["called", "scalar"]), WAYS, THREADS, st.integers(1, 4), share=0.3)
    def check(drawn: Program, way: str, threads: int, times: int) -> None:
        done = eagerly(drawn, library)
        with running(way, threads), noted():
            with DataCache(ROOMY) as cache:
                values = lazily(done, library, cache, done.wanted)
            lazy = [isinstance(values[number], LazyReadData) for number in done.wanted]
            # What was computed at once, an element say, has no plan.
            assume(all(lazy) and not done.at_once(values))
            least = lc.explain(*[values[number] for number in done.wanted]).min_budget
            # A number, as an object of Python, takes more than its bytes.
            assume(least >= 1000 and all(np.ndim(done.values[n]) for n in done.wanted))
            attempt(done, library, least)
            attempt(done, library, least * times)
            if min(done.wanted) < len(done.leaves):
                return  # what reading takes besides is that of any of several files
            # Arrays of users count, and can't be refused; that is counted too.
            with pytest.raises((BudgetExceededError, AssertionError)):
                attempt(done, library, least - 1)


def test_threads_compute_what_they_share(library: Library, storm: Any) -> None:
    @storm(programs(), WAYS, THREADS, st.sampled_from([1 << 12, 1 << 16, ROOMY]), share=0.2)
    def check(drawn: Program, way: str, threads: int, budget: int) -> None:
        done = eagerly(drawn, library)
        with running(way, threads), noted():
            cache = DataCache(budget)
            values = lazily(done, library, cache, done.wanted)

            def work(number: int) -> None:
                turn = number % len(done.wanted)
                compute(done, values, done.wanted[turn:] + done.wanted[:turn])

            together(4, work)
        cache.check()


# What such programs have found before, small enough to be read.


@pytest.mark.parametrize("shape", [(4, 5, 6), (70, 80, 90)])
def test_a_view_that_is_the_very_array_is_not_written_over(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).random(shape)
    image = LazyReadData(array, cache=DataCache(ROOMY))
    mean = image.mean(1)
    found, clipped = lc.compute(mean, np.squeeze(mean).clip(0.5, 5))
    assert not difference(found, array.mean(1))
    assert not difference(clipped, array.mean(1).clip(0.5, 5))


def test_numbers_in_proxies_are_numbers_in_operators_of_any_kind() -> None:
    number = np.int64(6)
    array = np.arange(1, 9, dtype="u1")
    with DataCache(ROOMY):
        other = LazyReadData(array)
        for name in ("iand", "ipow", "itruediv", "isub"):
            for right, lazy in ((array, other), (number, LazyReadData(number)), (2, 2)):
                left = LazyReadData(number)
                found = LAZY["inplace"](name, left, lazy)
                assert not difference(found.data, EAGER["inplace"](name, number, right))
        left = LazyReadData(number)
        assert not difference(left.T.data, number)
        assert not difference(np.expand_dims(left, 0).data, np.expand_dims(number, 0))
        assert not difference(left.sum(axis=0).data, number.sum(axis=0))
        stacked = np.stack([left, left + 1, LazyReadData(1)])
        assert stacked.shape == (3,)
        assert not difference(stacked.data, np.stack([number, number + 1, 1]))


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_integers_are_rounded_to_tens(size: int) -> None:
    array = (np.arange(size) % 1000).astype("u2")
    image = LazyReadData(array, cache=DataCache(ROOMY))
    assert not difference(np.round(image, -1).data, np.round(array, -1))


def test_types_are_found_without_warnings_of_their_own() -> None:
    array = np.array([1 + 2j, 0, 3j])
    with DataCache(ROOMY), warnings.catch_warnings():
        warnings.simplefilter("error")
        images = [LazyReadData(array), LazyReadData(array)]
        assert not difference(lc.std(images).data, np.std([array, array], axis=0))
        assert not difference(lc.count(images).data, np.count_nonzero([array, array], axis=0))


def test_arrays_in_memory_leave_less_for_the_plan() -> None:
    array = np.arange(210, dtype="u1")
    with running("blocks", 1), DataCache(420, strict=True):
        image = LazyReadData(array)
        assert not difference((image + image).data, array + array)


def test_files_that_results_are_views_of_are_counted(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((5, 60, 70))
    np.save(tmp_path / "a.npy", array)

    def images() -> list[LazyReadData]:
        image = LazyReadData(tmp_path / "a.npy")
        return [image, image[::2][::2]]

    with DataCache(ROOMY):
        least = lc.explain(*images()).min_budget
    with DataCache(least, strict=True) as cache:
        whole, part = lc.compute(*images())
        assert not difference(whole, array)
        assert not difference(part, array[::4])
        assert cache.stats().peak_bytes <= least


def test_memory_counts_until_the_last_view_of_it_is_gone() -> None:
    array = np.arange(210.0)

    def results() -> list[LazyReadData]:
        image = LazyReadData(array)
        root = np.sqrt(image)
        changed = LazyReadData(root)
        changed[3] = 0
        return [root[None], changed, image.astype("f4")]

    with DataCache(ROOMY):
        least = lc.explain(*results()).min_budget
    with DataCache(least, strict=True) as cache:
        found = lc.compute(*results())
        assert not difference(found[0], np.sqrt(array)[None])
        assert cache.stats().peak_bytes <= least


def test_several_percentiles_are_foretold_and_lie_in_no_space(library: Library) -> None:
    with DataCache(ROOMY) as cache:
        run = library.proxy(Leaf("nii", "f4", (5, 6, 7, 4), 0), cache)
        for image in (lc.percentile([run, run], [10, 90]), np.percentile(run, [10, 90], axis=-1)):
            assert image.shape[0] == 2
            assert image.affine is None
        assert cache.stats().loads == 0
