"""When a worker counts as overloaded, and what it refuses then."""

import pytest

from tornado_bcast.errors import Refusal
from tornado_bcast.overload import PATIENCE, Overload

TICK = 0.25


def refuses(overload: Overload) -> bool:
    try:
        overload.check()
    except Refusal as refusal:
        assert refusal.code == "unavailable" and refusal.setting is None
        assert refusal.retry_after is not None and 0 < refusal.retry_after < 5000
        return True
    return False


def feed(overload: Overload, lag: float, now: float, seconds: float) -> float:
    """Feed the same lag for a while; the time after it. The state may change with the last one alone."""
    end = now + seconds
    while now + TICK < end:
        now += TICK
        assert not overload.observe(lag, now)
    return now + TICK


def test_a_lag_that_stays_begins_it_and_one_that_stays_low_ends_it() -> None:
    overload = Overload(0.5)
    now = feed(overload, 0.6, 100.0, PATIENCE + TICK)
    assert not overload.active and not refuses(overload)
    assert overload.observe(0.6, now) and overload.active and refuses(overload)
    # Between low and too high nothing changes.
    now = feed(overload, 0.4, now, 60)
    assert overload.active and refuses(overload)
    now = feed(overload, 0.25, now, PATIENCE)
    assert overload.active
    assert overload.observe(0.25, now + TICK) and not overload.active and not refuses(overload)


def test_a_moment_without_lag_begins_the_count_anew() -> None:
    overload = Overload(0.5)
    now = feed(overload, 0.6, 0.0, PATIENCE - TICK)
    assert not overload.observe(0.5, now)
    feed(overload, 0.6, now, PATIENCE)
    assert not overload.active


def test_one_very_late_sample_is_enough() -> None:
    """It has been late for as long as that already."""
    overload = Overload(0.5)
    assert not overload.observe(PATIENCE, 10.0)
    overload = Overload(0.5)
    assert overload.observe(PATIENCE + 0.5, 10.0)


def test_while_the_lag_is_low_messages_are_taken() -> None:
    """So a load that stays too high is carried in turns."""
    overload = Overload(0.5)
    overload.observe(10.0, 10.0)
    for step in range(1, 10):
        assert not overload.observe(0.1 if step % 2 else 0.6, 10.0 + step * TICK)
        assert overload.active and refuses(overload) is (step % 2 == 0)


def test_zero_is_off_also_when_it_comes_by_a_reload() -> None:
    overload = Overload(0)
    assert not overload.observe(60.0, 100.0) and not overload.observe(60.0, 200.0)
    assert not refuses(overload)
    overload.max_lag = 0.5
    assert overload.observe(60.0, 300.0) and refuses(overload)
    overload.max_lag = 0
    assert not refuses(overload)
    assert not overload.observe(60.0, 301.0)
    assert overload.observe(60.0, 301.0 + PATIENCE) and not overload.active


def test_the_wait_is_not_the_same_for_all() -> None:
    overload = Overload(0.5)
    overload.observe(10.0, 10.0)
    waits = set()
    for _ in range(50):
        with pytest.raises(Refusal) as caught:
            overload.check()
        waits.add(caught.value.retry_after)
    assert len(waits) > 10
