"""Work under way for one owner: held while it runs, its failure told, ended with its owner."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """The tasks of one owner. `quiet` are failures that need not be told, for they are part of the work."""

    __slots__ = ("_logger", "_quiet", "_running")

    def __init__(self, logger: logging.Logger, *, quiet: tuple[type[Exception], ...] = ()) -> None:
        self._logger = logger
        self._quiet = quiet
        self._running: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, self._quiet):
            name = getattr(task.get_coro(), "__qualname__", "a task")
            self._logger.error("%s failed", name, exc_info=error, extra={"event": "internal_error"})

    async def close(self) -> None:
        """Cancel what still runs, and wait for its end."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
