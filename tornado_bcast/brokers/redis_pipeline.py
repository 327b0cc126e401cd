"""Commands to Redis: many in one write, their answers in order.

Owns the queue, its bounds and deadlines, and what becomes of each command when the connection fails. What a
command says and what its answer means is the business of `redis_commands.py`.
"""

import asyncio
import logging
import re
from collections import deque
from itertools import islice
from typing import Any, TypeVar

from redis.exceptions import RedisError

from tornado_bcast.answer import Answer
from tornado_bcast.brokers.redis_link import LINK_ERRORS, Link, Server
from tornado_bcast.brokers.redis_wire import RedisWire, pack
from tornado_bcast.errors import Unavailable, later
from tornado_bcast.eventloop import at_turn_end

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One write: enough to be worth it, little enough that the first answers do not wait long.
BATCH_COMMANDS = 500
BATCH_BYTES = 1 << 20
# The part of a command's time that the queue alone may take while Redis answers.
_BEHIND = 0.25
# Seconds between two log lines about one kind of error answer.
COMPLAINT_INTERVAL = 60.0

# Error answers that mean: nothing was done, and the next try may succeed. NOSCRIPT is met on the spot, the
# others by another connection. (A SCRIPT FLUSH that hits a batch in flight is the one thing that can put a
# message behind a later one of its channel: a plain PUBLISH of the same batch needs no script.)
RETRY_CODES = frozenset(
    "BUSY CLUSTERDOWN LOADING MASTERDOWN NOAUTH NOSCRIPT READONLY TRYAGAIN WRONGPASS".split()
)
# What the others mean, for clients and operators alike.
REFUSALS = {
    "OOM": "Redis is out of memory",
    "MISCONF": "Redis cannot write to its disk",
    "NOPERM": "Redis does not allow its user to do this",
    "NOREPLICAS": "Redis has too few replicas",
    "WRONGTYPE": "a key that this channel needs in Redis is of another type",
}
# Those of them that concern whatever is to be stored, and last until somebody mends it.
LASTING = frozenset(("OOM", "MISCONF", "NOREPLICAS"))
# How servers say NOPERM of a command in a script: newer ones, and 6.2.
FORBIDDEN = ("ACL failure in script", "The user executing the script can't")


def error_code(error: Exception) -> str:
    """The code of an error answer, such as OOM; from within a script too."""
    code = getattr(error, "status_code", None)
    if code and code != "ERR":
        return str(code)
    text = str(error)
    if any(phrase in text for phrase in FORBIDDEN):
        return "NOPERM"
    # Redis 6.2 wraps the error of a command in a script: "Error running script (...): ...: -OOM command not".
    wrapped = re.search(r"(?:^|: ?-?)([A-Z]{3,}) ", text)
    return wrapped[1] if wrapped else "ERR"


class Command(Answer[T]):
    """One command, and the answer to it. Subclasses say what is sent and what a reply means."""

    __slots__ = ("deadline", "repeatable", "size", "written")

    # Whether a WAIT must follow before its answer counts.
    replicated = False

    def __init__(self, size: int = 0, repeatable: bool = True) -> None:
        super().__init__()
        self.size = size
        # Whether it may be sent again when it is not known if it was done.
        self.repeatable = repeatable
        # When it fails at the latest, on the loop's clock.
        self.deadline = 0.0
        # Whether it may have been done: it was written, and no answer has said that it was not.
        self.written = False

    def pack(self, server: Server) -> bytes:
        """The command on the wire; asked for at each try."""
        raise NotImplementedError

    def decode(self, answer: Any, server: Server) -> T:
        """What the answer means. May note in `server` what it tells about that."""
        raise NotImplementedError


class Pipeline:
    """A FIFO of commands over one link, with one batch in flight at a time.

    Commands run in the order of `submit`, across reconnects too: those without an answer go back to the
    front. Each one is answered by its deadline, `timeout` seconds after `submit`. With `wait_replicas`
    the answers of a batch count when so many replicas have its writes.
    """

    def __init__(
        self,
        link: Link,
        *,
        timeout: float,
        wait_replicas: int = 0,
        max_commands: int = 20_000,
        max_bytes: int = 64 << 20,
    ) -> None:
        self._link = link
        self._timeout = timeout
        self._wait_replicas = wait_replicas
        self._max_commands = max_commands
        self._max_bytes = max_bytes
        self._waiting: deque[Command[Any]] = deque()
        self._waiting_bytes = 0
        # The present connection while it can be used; done, with the reason, when it cannot any more.
        self._wire: RedisWire | None = None
        self._stopped: asyncio.Future[None] | None = None
        # The batch in flight, in order: how many of it have their answer, and since when it is.
        self._batch: list[Command[Any]] = []
        self._answered = 0
        self._sent_at: float | None = None
        # A WAIT comes after it; the commands with answers that count by that alone.
        self._waits = False
        self._done: list[tuple[Command[Any], Any]] = []
        # The error that keeps some of it for another try.
        self._again: Exception | None = None
        self._is_send_due = False
        # Fires at the earliest deadline, while anything waits. One for all: a timer for each batch would be
        # a tenth of a batch's cost.
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        # Code of an error answer -> when it was last logged.
        self._complaints: dict[str, float] = {}

    def submit(self, command: Command[T]) -> Answer[T]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._closed:
            command.set_exception(Unavailable("the server is stopping", later()))
        elif self._is_full(now):
            command.set_exception(Unavailable("too much is waiting for Redis", later()))
        else:
            command.deadline = now + self._timeout
            self._waiting.append(command)
            self._waiting_bytes += command.size
            self._send_soon()
            if self._timer is None:
                self._timer = loop.call_at(command.deadline, self._expire)
        return command

    def _is_full(self, now: float) -> bool:
        if len(self._waiting) >= self._max_commands or self._waiting_bytes >= self._max_bytes:
            return True
        if not self._waiting or self._sent_at is None:
            return False
        # Where Redis answers and yet the first in the queue has waited for long, more comes than can be
        # carried: what is put behind it would only be given up at its deadline.
        longest = _BEHIND * self._timeout
        return now - self._sent_at < longest and now - self._waiting[0].deadline + self._timeout > longest

    async def run(self) -> None:
        """Drive the link until cancelled."""
        while True:
            wire = await self._link.connect()
            try:
                await self._drive(wire)
            except LINK_ERRORS as error:
                await self._link.drop(error)
            except Exception as error:
                logger.exception("The way to Redis failed", extra={"event": "pipeline_failed"})
                await self._link.drop(error)
            self._put_back()

    async def _drive(self, wire: RedisWire) -> None:
        """Use one connection until it fails."""
        while True:
            self._stopped = asyncio.get_running_loop().create_future()
            self._wire = wire
            self._send_soon()
            try:
                wire.drive(self._hear, self._stop)
                await self._stopped
            finally:
                self._wire = self._sent_at = None
            # Redis has lost the scripts.
            self._put_back()
            async with asyncio.timeout(self._timeout):
                await self._link.prepare(wire)

    def _stop(self, error: Exception | None) -> None:
        """Use the connection no more for now; None: what it was prepared with is missing."""
        self._wire = None
        if self._stopped is None or self._stopped.done():
            return
        if error is None:
            self._stopped.set_result(None)
        else:
            self._stopped.set_exception(error)

    def close(self) -> None:
        """Fail what still waits; `run` has been cancelled before."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for command in (*self._batch, *self._waiting):
            self._fail(command, "the server is stopping")
        self._batch.clear()
        self._waiting.clear()

    def _send_soon(self) -> None:
        """Write the next batch at the end of this turn of the loop, if none is in flight then."""
        if not self._is_send_due:
            self._is_send_due = True
            at_turn_end(self._send)

    def _send(self) -> None:
        self._is_send_due = False
        if self._wire is None or self._sent_at is not None:
            return
        data = self._take(self._link.server)
        if not data:
            return
        self._waits = self._wait_replicas > 0 and any(command.replicated for command in self._batch)
        if self._waits:
            data.append(pack(("WAIT", self._wait_replicas, int(self._timeout * 500))))
        self._sent_at = asyncio.get_running_loop().time()
        self._wire.send(data)

    def _hear(self, reply: Any) -> None:
        """Take the next answer of the batch. Raises where the connection is of no more use."""
        if self._answered < len(self._batch):
            command = self._batch[self._answered]
            self._answered += 1
            if isinstance(reply, Exception):
                command.written = False
                if error_code(reply) in RETRY_CODES:
                    self._again = self._again or reply
                else:
                    self._refuse(command, reply)
            elif self._waits and command.replicated:
                self._done.append((command, reply))
            else:
                self._resolve(command, reply, self._link.server)
            if self._waits or self._answered < len(self._batch):
                return
        elif self._waits:
            self._count_replicas(reply)
        else:
            raise ConnectionError("Redis has answered what nobody asked.")
        self._end_batch()

    def _count_replicas(self, reply: Any) -> None:
        """The answer to WAIT: whether what was written counts."""
        self._waits = False
        done, self._done = self._done, []
        if isinstance(reply, Exception):
            raise reply
        for command, answer in done:
            if reply >= self._wait_replicas:
                self._resolve(command, answer, self._link.server)
            else:
                self._fail(command, "too few replicas have it: send it again with the same messageId")
                self._link.refused("too few replicas have what is published")

    def _end_batch(self) -> None:
        self._sent_at = None
        again, self._again = self._again, None
        if again is None:
            self._batch = []
            self._answered = 0
            self._link.succeeded()
            if self._waiting:
                self._send_soon()
        elif error_code(again) == "NOSCRIPT":
            self._stop(None)
        else:
            raise again

    def _take(self, server: Server) -> list[bytes]:
        """Move the next batch out of the queue; its bytes."""
        self._batch = []
        self._answered = 0
        data: list[bytes] = []
        size = 0
        while self._waiting and len(data) < BATCH_COMMANDS and size < BATCH_BYTES:
            command = self._waiting.popleft()
            self._waiting_bytes -= command.size
            if not command.done():
                self._batch.append(command)
                packed = command.pack(server)
                command.written = True
                data.append(packed)
                size += len(packed)
        return data

    def _put_back(self) -> None:
        """What has no answer goes back to the front, in order, unless that could do it twice."""
        self._waits, self._done, self._again = False, [], None
        for command in reversed(self._batch):
            if command.done():
                continue
            if command.repeatable or not command.written:
                command.written = False
                self._waiting.appendleft(command)
                self._waiting_bytes += command.size
            else:
                self._fail(command, "it is not known whether Redis took it")
        self._batch = []

    def _expire(self) -> None:
        """Fail what is past its deadline, and come again at the next one."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for command in self._batch:
            if command.deadline <= now:
                self._fail(command, "Redis did not answer in time")
        while self._waiting and (self._waiting[0].deadline <= now or self._waiting[0].done()):
            command = self._waiting.popleft()
            self._waiting_bytes -= command.size
            self._fail(command, "Redis cannot be reached")
        # Deadlines rise along the batch and on through the queue.
        ahead = [command.deadline for command in self._batch if not command.done()][:1]
        ahead += [command.deadline for command in islice(self._waiting, 1)]
        if self._sent_at is not None:
            if self._sent_at + self._timeout > now:
                ahead.append(self._sent_at + self._timeout)
            else:
                self._stop(TimeoutError())
        self._timer = loop.call_at(min(ahead), self._expire) if ahead else None

    def _resolve(self, command: Command[Any], answer: Any, server: Server) -> None:
        if not command.done():
            try:
                command.set_result(command.decode(answer, server))
            except Exception as error:
                self._refuse(command, error)

    def _refuse(self, command: Command[Any], error: Exception) -> None:
        """An answer that no other try would better."""
        code = error_code(error)
        reason = REFUSALS.get(code, "Redis refused it")
        self._fail(command, reason)
        if code in LASTING:
            self._link.refused(reason)
        now = asyncio.get_running_loop().time()
        if now - self._complaints.get(code, -COMPLAINT_INTERVAL) >= COMPLAINT_INTERVAL:
            self._complaints[code] = now
            # An unknown command's error goes on with its arguments, and there the payload is; so may the text
            # of an error that is not Redis's own.
            detail = str(error).partition(", with args")[0][:200]
            if not isinstance(error, RedisError):
                detail = type(error).__name__
            logger.error("%s (%s %s)", reason, code, detail, extra={"event": "redis_refused"})

    def _fail(self, command: Command[Any], reason: str) -> None:
        if not command.done():
            command.set_exception(Unavailable(reason, later()))
