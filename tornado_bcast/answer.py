"""The answer to something that was asked for, before it is there.

Like a future, but who waits for it is called where it is given, not by the loop a turn later: a publish has
one answer, and thousands of them a second need neither a future nor a turn each.
"""

import asyncio
import logging
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Answer(Generic[T]):
    """A result or an error, given once. To be awaited, or listened to by `add_done_callback`.

    Nobody takes it back: who awaits it and is cancelled misses it, and what was asked for is done.
    """

    __slots__ = ("_callbacks", "_done", "_error", "_result")

    def __init__(self) -> None:
        self._done = False
        # There once it is given.
        self._result: T
        self._error: Exception | None = None
        self._callbacks: tuple[Callable[[Any], None], ...] = ()

    def done(self) -> bool:
        return self._done

    def exception(self) -> Exception | None:
        """The error; None where there is none, or no answer yet."""
        return self._error

    def result(self) -> T:
        """The result of one that is done. Raises its error."""
        if self._error is not None:
            raise self._error
        return self._result

    def set_result(self, result: T) -> None:
        self._result = result
        self._tell()

    def set_exception(self, error: Exception) -> None:
        self._error = error
        self._tell()

    def add_done_callback(self, callback: "Callable[[Answer[T]], None]") -> None:
        """Call with this answer when it is given: at once, where it has been."""
        self._callbacks += (callback,)
        if self._done:
            self._tell()

    def _tell(self) -> None:
        self._done = True
        callbacks, self._callbacks = self._callbacks, ()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("An answer could not be taken", extra={"event": "internal_error"})

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            given = asyncio.Event()
            self.add_done_callback(lambda _: given.set())
            yield from given.wait().__await__()
        return self.result()
