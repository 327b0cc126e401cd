"""What all entrances of a worker share: the worker as they see it, ids, and the time."""

import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from ..auth import Authenticator
from ..board import Board
from ..config import Config
from ..errors import CloseCode
from ..heartbeat import Peer
from ..keeper import Keeper
from ..logs import RefusalLog
from ..metrics import Metrics, Row
from ..node import Node
from ..overload import Overload
from ..rules import ChannelRules, Origins
from ..sink import Sink
from ..wheel import Wheel


class Context(Protocol):
    """The worker, as its handlers see it. A reload replaces `config`, `auth`, `rules` and `origins`."""

    config: Config
    auth: Authenticator
    rules: ChannelRules
    origins: Origins
    # Connections by the end of their tokens, in Unix seconds.
    expiries: Wheel["Connection"]
    node: Node
    board: Board
    metrics: Metrics
    refusals: RefusalLog
    keeper: Keeper
    overload: Overload
    # WebSocket connections that may be open at once over all workers, and on this one.
    capacity: int
    own_capacity: int
    started: float

    @property
    def draining(self) -> bool:
        """The worker is about to leave; for a while it still takes connections."""

    def connect(self, peer: "Connection") -> None:
        """A connection has been opened: it is pinged from now on, and closed when the worker stops."""

    def disconnect(self, peer: "Connection") -> None:
        """It has been closed."""

    def hold(self, go_on: Callable[[], None]) -> None:
        """Have somebody whose message was refused for overload wait, until the load may have changed."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something to its end, or to that of the worker."""

    def rows(self) -> list[Row]:
        """The rows of statistics of all living workers of all nodes."""

    def local_rows(self) -> list[Row]:
        """Those of this node."""


class Connection(Peer, Protocol):
    """An open WebSocket connection, as its worker sees it."""

    sink: Sink

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        """Close it, after what is queued or in its place."""

    def end_for_now(self, code: CloseCode, retry_after: int, *, flush: bool = True) -> None:
        """Close it with a reason that says in how many milliseconds, at most, to come back."""

    def leave(self, retry_after: int) -> None:
        """Send the client away when what it has published is answered; it is to be back after so many ms."""

    def leave_now(self) -> None:
        """The same without waiting for anything."""

    def expire(self) -> None:
        """Close it, for its token has ended."""

    def check_subscriptions(self) -> None:
        """End the subscriptions that the rules or the token do not allow any more."""


class CountedByPeer(Protocol):
    """A stream that the worker counts by the address of its peer."""

    # A request is being read or answered.
    busy: bool

    def count_as(self, peer: str) -> None:
        """Count it under another address from now on."""


_random: list[str] = []


def new_id() -> str:
    """A message id that nobody else gives, and nobody can guess: who could would have it taken before."""
    if not _random:
        # One system call for many. Never before the fork: workers must not share what is left.
        drawn = secrets.token_hex(16 * 256)
        _random.extend(drawn[start : start + 32] for start in range(0, len(drawn), 32))
    return _random.pop()


def now_ms() -> int:
    """Unix time in milliseconds, as it stands in every event."""
    return time.time_ns() // 1_000_000
