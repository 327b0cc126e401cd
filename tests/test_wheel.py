"""The timer wheel: never early, late by one tick at most, nothing lost."""

from hypothesis import given
from hypothesis import strategies as st

from tornado_bcast.wheel import Wheel


def test_in_the_order_of_their_times() -> None:
    wheel: Wheel[str] = Wheel(1.0)
    for item, due in (("c", 7.5), ("a", 3.2), ("b", 5.0)):
        wheel.add(item, due)
    assert list(wheel.expired(3.0)) == []
    assert list(wheel.expired(4.0)) == ["a"]
    assert list(wheel.expired(100.0)) == ["b", "c"]
    assert list(wheel.expired(101.0)) == []


def test_what_is_taken_out_does_not_come() -> None:
    wheel: Wheel[str] = Wheel(1.0)
    slot = wheel.add("a", 3.0)
    wheel.add("b", 3.0)
    wheel.discard("a", slot)
    wheel.discard("a", slot)
    wheel.discard("nobody", 17)
    assert list(wheel.expired(10.0)) == ["b"]
    wheel.discard("b", slot)


def test_what_is_overdue_comes_at_the_next_turn() -> None:
    wheel: Wheel[str] = Wheel(1.0)
    assert list(wheel.expired(10.0)) == []
    wheel.add("late", 2.0)
    assert list(wheel.expired(10.0)) == []
    assert list(wheel.expired(11.0)) == ["late"]


def test_items_may_be_added_while_it_turns() -> None:
    wheel: Wheel[str] = Wheel(1.0)
    wheel.add("a", 1.0)
    for item in wheel.expired(5.0):
        wheel.add(item, 0.0)
    assert list(wheel.expired(6.0)) == ["a"]


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0.1, 9), min_size=1))
def test_never_early_and_late_by_one_tick(dues: list[float], pauses: list[float]) -> None:
    tick = 0.25
    wheel: Wheel[int] = Wheel(tick)
    for item, due in enumerate(dues):
        wheel.add(item, due)
    now, left = 0.0, dict(enumerate(dues))
    for pause in [*pauses, 200]:
        now += pause
        for item in wheel.expired(now):
            assert left.pop(item) <= now
        assert all(due > now - 2 * tick for due in left.values()), "at the next turn at the latest"
    assert not left
