"""What all tests share: pytest-tornado's loop, a real Redis, and that nothing is logged by surprise."""

import asyncio
import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings
from redis_server import RedisServer, binaries
from tornado.ioloop import IOLoop

from tornado_bcast.eventloop import WorkerLoop

# Whose warnings and errors fail a test that did not announce them.
_LOGGERS = ("tornado_bcast", "tornado", "asyncio")


# How long an example takes says more about what else the machine does.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "logs(event, ...): warnings and errors of these events belong to the test ('' is any)",
    )


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in whose process something was logged at WARNING or above, unless it is marked `logs`.

    A test that takes `caplog` looks at the log itself, and test_logs.py is about nothing else.
    """
    if "caplog" in request.fixturenames or request.path.name == "test_logs.py":
        yield
        return
    recorder = _Recorder()
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(recorder)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(recorder)
    marker = request.node.get_closest_marker("logs")
    expected = marker.args if marker else ()
    surprises = [
        f"{record.name} {record.levelname}: {record.getMessage()}"
        for record in recorder.records
        if "" not in expected and getattr(record, "event", None) not in expected
    ]
    assert not surprises, surprises


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """pytest-tornado's own calls what Tornado has deprecated."""
    turning = WorkerLoop()
    loop = IOLoop(make_current=False, asyncio_loop=turning)
    asyncio.set_event_loop(turning)
    yield loop
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real server that nobody stops; each daemon takes a prefix of its own."""
    with RedisServer(next(iter(binaries().values()))) as server:
        yield server
