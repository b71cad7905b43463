"""The whole cache in one thread, beside a plain model of what must be charged and to whom."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import UNIT, Made, table_of

from lazycache._operation import Operation
from lazycache.cache import DataCache
from lazycache.errors import BudgetExceededError, BudgetExceededWarning
from lazycache.source import Handle, Result

SIZES = (1, 1, 2, 2, 3, 5, 1, 4)
KEYS = st.integers(0, len(SIZES) - 1)


class Plan:
    """An operation under way: what it pins, in the order of its uses."""

    def __init__(self, operation: Operation, pinned: bool) -> None:
        self.operation = operation
        self.pinned = pinned
        self.counts: dict[int, int] = {}


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        warnings.simplefilter("ignore", BudgetExceededWarning)
        self.keys = [Made(str(i), size * UNIT, fill=i) for i, size in enumerate(SIZES)]
        self.root = DataCache(6 * UNIT)
        self.table = table_of(self.root)
        self.scopes: list[DataCache] = [self.root]
        self.plans: list[Plan] = []
        self.views: list[tuple[int, Any]] = []
        self.results: list[tuple[Result, int, bool]] = []
        self.constants: list[Any] = []
        self.handles: list[tuple[int, Handle]] = []
        self.loads = 0

    def teardown(self) -> None:
        for plan in self.plans:
            plan.operation.close()
        self.views.clear()
        self.constants.clear()
        self.results.clear()
        self.root.clear()
        assert self.root.used == 0
        self.root.check()

    def any_scope(self, number: int) -> DataCache:
        return self.scopes[number % len(self.scopes)]

    def known(self, index: int) -> bool:
        """Whether the data can be had without a read."""
        held = any(at == index for at, _ in self.views)
        return held or self.keys[index] in self.table.entries

    # Asking

    @rule(index=KEYS, scope=st.integers(0, 9))
    def load(self, index: int, scope: int) -> None:
        known, before = self.known(index), self.keys[index].loads
        value = self.any_scope(scope).load(self.keys[index])
        assert value[0] == index
        assert value.nbytes == SIZES[index] * UNIT
        assert not value.flags.writeable
        assert self.keys[index].loads == before + (not known)

    @rule(index=KEYS, scope=st.integers(0, 9), start=st.integers(0, 99))
    def hold_a_view(self, index: int, scope: int, start: int) -> None:
        self.views.append((index, self.any_scope(scope).load(self.keys[index])[start:]))

    @precondition(lambda self: self.views)
    @rule(number=st.integers(0, 99))
    def drop_a_view(self, number: int) -> None:
        self.views.pop(number % len(self.views))

    @rule(index=KEYS)
    def look(self, index: int) -> None:
        key = self.keys[index]
        assert (self.root.lookup(key) is not None) == (key in self.table.entries)
        assert self.root.holds(key) == self.known(index)

    # Operations

    @rule(
        scope=st.integers(0, 9),
        workspace=st.integers(0, 3),
        room=st.integers(0, 4),
        order=st.lists(KEYS, max_size=2),
    )
    def begin_an_operation(self, scope: int, workspace: int, room: int, order: list[int]) -> None:
        operation = self.any_scope(scope).operation(
            "a plan",
            workspace=workspace * UNIT,
            room=room * UNIT,
            order=[self.keys[index] for index in order],
        )
        operation.__enter__()
        self.plans.append(Plan(operation, pinned=False))

    @rule(scope=st.integers(0, 9), index=KEYS)
    def pin_for_a_user(self, scope: int, index: int) -> None:
        operation = self.any_scope(scope).pinned(self.keys[index])
        operation.__enter__()
        operation.pin([self.keys[index]])
        plan = Plan(operation, pinned=True)
        plan.counts[index] = 1
        self.plans.append(plan)

    @precondition(lambda self: self.plans)
    @rule(number=st.integers(0, 9), indices=st.lists(KEYS, min_size=1, max_size=3))
    def pin(self, number: int, indices: list[int]) -> None:
        plan = self.plans[number % len(self.plans)]
        values = plan.operation.pin([self.keys[index] for index in indices])
        assert [int(value[0]) for value in values] == indices
        for index in set(indices):
            plan.counts[index] = plan.counts.get(index, 0) + 1

    @precondition(lambda self: any(plan.counts for plan in self.plans))
    @rule(number=st.integers(0, 9))
    def unpin(self, number: int) -> None:
        pinning = [plan for plan in self.plans if plan.counts]
        plan = pinning[number % len(pinning)]
        index = min(plan.counts)
        plan.operation.unpin([self.keys[index]])
        plan.counts[index] -= 1
        if not plan.counts[index]:
            del plan.counts[index]

    @precondition(lambda self: self.plans)
    @rule(number=st.integers(0, 9))
    def end_an_operation(self, number: int) -> None:
        self.plans.pop(number % len(self.plans)).operation.close()

    @precondition(lambda self: self.plans)
    @rule(number=st.integers(0, 9))
    def forget_an_operation(self, number: int) -> None:
        self.plans.pop(number % len(self.plans))

    @precondition(lambda self: self.plans)
    @rule(
        number=st.integers(0, 9),
        units=st.integers(1, 2),
        cost=st.sampled_from([1.0, 2.0, math.inf]),
    )
    def keep_a_result(self, number: int, units: int, cost: float) -> None:
        plan = self.plans[number % len(self.plans)]
        result = Result("a result")
        plan.operation.keep(result, np.zeros(units * UNIT, np.uint8), cost)
        self.results.append((result, units, cost == math.inf))

    @precondition(lambda self: self.results)
    @rule(number=st.integers(0, 99))
    def drop_a_result(self, number: int) -> None:
        self.results.pop(number % len(self.results))

    @rule(scope=st.integers(0, 9))
    def adopt(self, scope: int) -> None:
        self.constants.append(self.any_scope(scope).adopt(np.zeros(UNIT, np.uint8), "constant"))

    @precondition(lambda self: self.constants)
    @rule()
    def drop_a_constant(self) -> None:
        self.constants.pop()

    # Proxies

    @rule(index=KEYS, nops=st.integers(0, 2))
    def refer(self, index: int, nops: int) -> None:
        self.handles.append((index, Handle(self.keys[index], nops)))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 99))
    def forget_a_proxy(self, number: int) -> None:
        self.handles.pop(number % len(self.handles))

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 99), uses=st.integers(1, 2))
    def use_up(self, number: int, uses: int) -> None:
        index, handle = self.handles[number % len(self.handles)]
        self.root.used_up(handle, uses)
        if self.keys[index].used_up and not self.in_use(index):
            assert self.root.lookup(self.keys[index]) is None

    def in_use(self, index: int) -> bool:
        planned = any(s.next_use(self.keys[index]) is not None for s in self.table.schedules)
        return planned or any(index in plan.counts for plan in self.plans)

    # Scopes and budgets

    @precondition(lambda self: len(self.scopes) < 5)
    @rule(budget=st.integers(0, 8), outer=st.integers(0, 9))
    def open_a_scope(self, budget: int, outer: int) -> None:
        scope = DataCache(budget * UNIT)
        scope._bind(self.any_scope(outer))
        self.scopes.append(scope)

    @precondition(lambda self: len(self.scopes) > 1)
    @rule(number=st.integers(0, 9))
    def close_a_scope(self, number: int) -> None:
        scope = self.scopes.pop(1 + number % (len(self.scopes) - 1))
        scope.close()
        assert scope.closed
        assert scope.used == 0

    @rule(scope=st.integers(0, 9), budget=st.integers(0, 8))
    def resize(self, scope: int, budget: int) -> None:
        self.any_scope(scope).budget = budget * UNIT

    @rule(scope=st.integers(0, 9))
    def clear(self, scope: int) -> None:
        self.any_scope(scope).clear()

    @rule(index=KEYS)
    def release(self, index: int) -> None:
        self.root.release(self.keys[index])
        pinned = any(index in plan.counts for plan in self.plans)
        assert (self.root.lookup(self.keys[index]) is not None) <= pinned

    @rule(index=KEYS)
    def a_strict_scope_never_exceeds(self, index: int) -> None:
        scope = DataCache(2 * UNIT, strict=True)
        scope._bind(self.root)
        known, before = self.known(index), self.root.stats().overcommits
        try:
            scope.load(self.keys[index])
        except BudgetExceededError:
            assert not known
        assert scope.used <= 2 * UNIT
        assert self.root.stats().overcommits == before
        scope.close()

    # What must hold

    @invariant()
    def everything_is_whole(self) -> None:
        self.root.check()

    @invariant()
    def what_is_used_is_what_can_be_counted(self) -> None:
        resident = {self.keys.index(key) for key in self.table.entries}  # type: ignore[arg-type]
        held = {index for index, _ in self.views}
        pinned = {index for plan in self.plans for index in plan.counts}
        assert pinned <= resident
        used = sum(SIZES[index] * UNIT for index in resident | held)
        used += sum(use.workspace.nbytes for use in self.table.uses if use.workspace)
        used += sum(units * UNIT for result, units, _ in self.results if result.value is not None)
        used += len(self.constants) * UNIT
        assert self.root.used == used

    @invariant()
    def nothing_that_could_go_is_kept_over_a_budget(self) -> None:
        held = {index for index, _ in self.views}
        for scope in self.scopes:
            level = scope._bind()[1]
            if level.used > level.budget:
                idle = [
                    key
                    for inner in level.tree()
                    for index, key in enumerate(self.keys)
                    if key in inner.ledger and index not in held
                ]
                assert not idle, (level.used, level.budget)

    @invariant()
    def what_cannot_be_made_again_is_kept(self) -> None:
        assert all(result.value is not None for result, _, forever in self.results if forever)

    @invariant()
    def scopes_add_up(self) -> None:
        for scope in self.scopes[1:]:
            assert scope.used <= self.root.used


CacheMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestCacheAgainstAModel = CacheMachine.TestCase


def test_a_forgotten_operation_ends_without_the_garbage_collector() -> None:
    cache = DataCache(6 * UNIT)
    gc.disable()
    try:
        operation = cache.operation("a plan", workspace=UNIT, room=0)
        operation.__enter__()
        operation.pin([Made("a")])
        assert cache.used == 2 * UNIT
        del operation
        assert cache.used == UNIT
    finally:
        gc.enable()
