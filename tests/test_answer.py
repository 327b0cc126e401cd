"""An answer: given once, told where it is given, awaited by anybody."""

import asyncio
import logging

import pytest
from broker_kit import asynchronous

from tornado_bcast.answer import Answer


def test_who_listens_is_told_at_once() -> None:
    answer: Answer[int] = Answer()
    told: list[int] = []
    answer.add_done_callback(lambda done: told.append(done.result()))
    answer.add_done_callback(lambda done: told.append(10 * done.result()))
    assert not answer.done() and not told
    answer.set_result(7)
    assert told == [7, 70] and answer.done() and answer.exception() is None


def test_who_comes_later_is_told_alone() -> None:
    answer: Answer[int] = Answer()
    told: list[str] = []
    answer.add_done_callback(lambda _: told.append("first"))
    answer.set_result(7)
    answer.add_done_callback(lambda _: told.append("second"))
    assert told == ["first", "second"]


def test_an_error() -> None:
    answer: Answer[int] = Answer()
    answer.set_exception(ValueError("no"))
    assert answer.done() and str(answer.exception()) == "no"
    with pytest.raises(ValueError, match="no"):
        answer.result()


def test_a_listener_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    answer: Answer[int] = Answer()
    told: list[int] = []

    def fail(_: Answer[int]) -> None:
        raise RuntimeError("broken")

    answer.add_done_callback(fail)
    answer.add_done_callback(lambda done: told.append(done.result()))
    with caplog.at_level(logging.ERROR):
        answer.set_result(7)
    assert told == [7] and "broken" in caplog.text
    caplog.clear()


@asynchronous
async def test_awaiting() -> None:
    answer: Answer[int] = Answer()

    async def wait() -> int:
        return await answer

    waiting = [asyncio.ensure_future(wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    answer.set_result(7)
    assert [await task for task in waiting[1:]] == [7, 7] and waiting[0].cancelled()
    assert await answer == 7
    failed: Answer[int] = Answer()
    failed.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        await failed
