"""Sending many away: evenly, everybody once, and back as evenly."""

import pytest

from tornado_bcast.farewell import Farewell, pace


def told(farewell: Farewell[int], seconds: float, tick: float = 0.02) -> list[tuple[float, int, int]]:
    """When who was told to come back after how many ms."""
    found, now = [], 0.0
    while now < seconds + 2 * tick:
        found += [(now, peer, retry_after) for peer, retry_after in farewell.due(now)]
        now += tick
    return found


def most_in_a_second(times: list[float]) -> int:
    return max(sum(start <= time < start + 1 for time in times) for start in times)


@pytest.mark.parametrize("count", [1, 7, 200, 2000])
@pytest.mark.parametrize("over", [0.0, 20.0])
def test_everybody_is_told_once_within_the_time(count: int, over: float) -> None:
    everybody = told(Farewell(range(count), over, 0.4, 0.0), over)
    assert sorted(peer for _, peer, _ in everybody) == list(range(count))
    assert max(time for time, _, _ in everybody) <= over + 0.02
    assert all(1 <= retry_after <= 400 for _, _, retry_after in everybody)


@pytest.mark.parametrize("count", [200, 2000])
def test_the_return_is_even_over_time(count: int) -> None:
    """Told over 20 s and back soon (a reload), or told at once and back over 20 s (a stop)."""
    for over, back in ((20.0, 0.4), (0.0, 20.0)):
        times = [
            time + retry / 1000 for time, _, retry in told(Farewell(range(count), over, back, 0.0), over)
        ]
        assert most_in_a_second(times) <= 1.2 * count / 20
        assert max(times) <= over + back + 0.05


def test_several_workers_together_are_even_as_well() -> None:
    times = [
        retry / 1000 for _ in range(8) for _, _, retry in told(Farewell(range(100), 0.0, 20.0, 0.0), 0.0)
    ]
    assert most_in_a_second(times) <= 1.5 * 800 / 20
    assert len(set(times)) > 700, "another time for each"


def test_who_comes_and_goes_meanwhile() -> None:
    farewell = Farewell(range(100), 10.0, 0.4, 0.0)
    first = dict(farewell.due(5.0))
    assert len(first) == 50
    stays = next(one for one in range(100) if one not in first)
    farewell.discard(stays)
    farewell.discard(-1)
    farewell.add(100)
    rest = dict(farewell.due(10.0))
    assert set(first) | set(rest) == {*range(101)} - {stays} and 100 in rest
    # After the end: at once.
    farewell.add(101)
    assert [peer for peer, _ in farewell.due(10.1)] == [101]


def test_a_few_are_not_made_to_wait_for_all_of_the_time() -> None:
    assert (pace(0, 20.0), pace(3, 20.0), pace(20_000, 20.0), pace(5, 0.0)) == (0.0, 3.0, 20.0, 0.0)
