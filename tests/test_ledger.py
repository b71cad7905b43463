from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazycache._ledger import IDLE, TIERS, Ledger, Schedule, Tier

KEYS = st.integers(0, 11)
TIER_SETS = st.sets(st.sampled_from(TIERS), min_size=1).map(
    lambda chosen: tuple(tier for tier in TIERS if tier in chosen)
)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a plain model: a dict of what is filed, searched whole for the victim."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: Ledger[int] = Ledger()
        # key → (tier, bytes, next use, when it was last put or touched)
        self.filed: dict[int, tuple[Tier, int, int | None, int]] = {}
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def minimal(self, tiers: tuple[Tier, ...]) -> int | None:
        def order(key: int) -> tuple[int, int, int]:
            tier, _, next_use, used = self.filed[key]
            return TIERS.index(tier), 0 if next_use is None else -next_use, used

        inside = [key for key in self.filed if self.filed[key][0] in tiers]
        return min(inside, key=order, default=None)

    @rule(key=KEYS, nbytes=st.integers(0, 100), tier=st.sampled_from(TIERS), use=st.integers(0, 5))
    def put(self, key: int, nbytes: int, tier: Tier, use: int) -> None:
        next_use = use if tier == "planned" else None
        self.ledger.put(key, nbytes, tier, next_use)
        self.filed[key] = (tier, nbytes, next_use, self.tick())

    @rule(key=KEYS)
    def touch(self, key: int) -> None:
        self.ledger.touch(key)
        if key in self.filed and self.filed[key][0] != "planned":
            self.filed[key] = (*self.filed[key][:3], self.tick())

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        assert self.ledger.remove(key) == (key in self.filed)
        self.filed.pop(key, None)

    @rule(tiers=TIER_SETS)
    def the_victim_is_minimal(self, tiers: tuple[Tier, ...]) -> None:
        found = self.ledger.peek(tiers)
        wanted = self.minimal(tiers)
        assert (None if found is None else found[1]) == wanted
        if found is not None:
            assert TIERS[found[0]] == self.ledger.tier(found[1])

    @rule(tiers=TIER_SETS)
    def pop(self, tiers: tuple[Tier, ...]) -> None:
        wanted = self.minimal(tiers)
        assert self.ledger.pop(tiers) == wanted
        self.filed.pop(wanted, None)

    @precondition(lambda self: any(filed[0] == "planned" for filed in self.filed.values()))
    @rule()
    def farthest(self) -> None:
        next_use, key = self.ledger.farthest() or (0, -1)
        planned = [filed[2] for filed in self.filed.values() if filed[0] == "planned"]
        assert next_use == max(planned)
        assert self.filed[key][2] == next_use

    @invariant()
    def same_story(self) -> None:
        self.ledger.check()
        assert len(self.ledger) == len(self.filed)
        assert all(key in self.ledger for key in self.filed)
        assert self.ledger.nbytes == sum(filed[1] for filed in self.filed.values())


TestLedgerAgainstAModel = LedgerMachine.TestCase


@given(st.lists(KEYS, max_size=30), st.integers(0, 100))
def test_a_schedule_gives_each_next_use_until_the_last_is_over(keys: list[int], start: int) -> None:
    schedule = Schedule(start, keys)
    for position, key in enumerate(keys):
        for other in set(keys):
            later = [start + 1 + at for at in range(position, len(keys)) if keys[at] == other]
            assert schedule.next_use(other) == (later[0] if later else None)
        assert set(schedule.remaining()) == set(keys[position:])
        assert schedule.advance(key) == (key not in keys[position + 1 :])
    assert not schedule.remaining()


def test_a_use_that_was_not_expected_changes_no_schedule() -> None:
    schedule = Schedule(0, "ab")
    assert not schedule.advance("z")
    assert schedule.next_use("z") is None
    assert schedule.remaining() == ["a", "b"]


def test_an_idle_entry_is_spent_or_unreferenced() -> None:
    ledger: Ledger[str] = Ledger()
    ledger.put("wanted", 1, "recent")
    ledger.put("planned", 1, "planned", 3)
    assert ledger.pop(IDLE) is None
    ledger.put("forgotten", 1, "unreferenced")
    ledger.put("spent", 1, "spent")
    assert [ledger.pop(IDLE), ledger.pop(IDLE)] == ["spent", "forgotten"]


@pytest.mark.parametrize("tier", TIERS)
def test_stale_places_of_an_entry_that_is_filed_again_and_again_are_let_go(tier: Tier) -> None:
    ledger: Ledger[int] = Ledger()
    for use in range(5000):
        ledger.put(use % 3, 1, tier, use)
    assert ledger.nbytes == 3
    assert len(ledger._next_use._heap) < 200


def test_of_a_round_what_was_passed_last_goes_first_and_the_quietest_round_before_the_others() -> (
    None
):
    ledger: Ledger[str] = Ledger()
    for key in ("a1", "b1", "b2", "a2"):
        ledger.put(key, 1, "spent", of=key[0])
    assert [ledger.pop() for _ in range(2)] == ["b2", "b1"]
    ledger.put("c1", 1, "spent", of="c")
    ledger.touch("a1")
    assert [ledger.pop() for _ in range(3)] == ["c1", "a1", "a2"]
    assert ledger.pop() is None
    ledger.check()


@given(st.lists(KEYS, max_size=30), st.integers(0, 40))
def test_the_use_after_a_position_is_the_first_one_behind_it(
    keys: list[int], position: int
) -> None:
    schedule = Schedule(0, keys)
    for key in set(keys):
        behind = [1 + at for at, other in enumerate(keys) if other == key and 1 + at > position]
        assert schedule.use_after(key, position) == (behind[0] if behind else None)
    assert schedule.use_after(99, position) is None
