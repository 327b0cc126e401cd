"""The errors of the package, the codes that clients see, and the close codes.

Owns names and numbers only; imports nothing of the package.

    BcastError
    +-- ConfigError          the configuration cannot be used; the start stops
    +-- BadToken             somebody's token cannot be accepted
    +-- Refusal              a request is answered by an `error` (WebSocket) or an error body (HTTP)
    +-- Unavailable          the broker did not take (or may not have taken) something; try again later
"""

import random
from enum import IntEnum
from typing import Literal

ErrorCode = Literal[
    "bad_message",
    "unknown_type",
    "bad_channel",
    "unauthorized",
    "forbidden",
    "rate_limited",
    "too_large",
    "too_many_subscriptions",
    "not_subscribed",
    "unavailable",
    "history_lost",
    "internal",
]

# The HTTP status of each code (docs/PROTOCOL.md, "Errors").
HTTP_STATUS: dict[ErrorCode, int] = {
    "bad_message": 400,
    "unknown_type": 400,
    "bad_channel": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "rate_limited": 429,
    "too_large": 413,
    "too_many_subscriptions": 429,
    "not_subscribed": 400,
    "unavailable": 503,
    "history_lost": 410,
    "internal": 500,
}


def later() -> int:
    """Milliseconds after which a client should try again; not the same for all."""
    return random.randint(500, 1500)


class CloseCode(IntEnum):
    """Close codes of `bcast.v1`.

    Below 4500 a client reconnects with backoff; from 4500 on it does not, but once with a fresh token
    after 4500 and 4501. The numbers below 4000 are those of RFC 6455, section 7.4.1, and IANA's registry.
    """

    GOING_AWAY = 1001
    TOO_BIG = 1009
    RESTART = 1012
    TRY_AGAIN_LATER = 1013
    HEARTBEAT_MISSED = 4001
    ACKS_OVERDUE = 4002
    SLOW_CONSUMER = 4008
    SESSION_TAKEN = 4009
    RATE_IGNORED = 4029
    BAD_TOKEN = 4500
    TOKEN_EXPIRED = 4501
    FORBIDDEN = 4503


class BcastError(Exception):
    """The root: whatever the package raises on purpose."""


class ConfigError(BcastError):
    """The configuration cannot be used. `problems` has one sentence for each fault, all of them at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BadToken(BcastError):
    """A token cannot be accepted. `str(error)` is a sentence for its owner, and never quotes it."""


class Refusal(BcastError):
    """A request that is answered by an error.

    `message` is a sentence that says what to do. `retry_after` is in milliseconds. `setting` names the INI
    key that decided, for the log; it never reaches the client.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        message_id: str | None = None,
        channel: str | None = None,
        retry_after: int | None = None,
        setting: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.message_id = message_id
        self.channel = channel
        self.retry_after = retry_after
        self.setting = setting


class Unavailable(BcastError):
    """The broker cannot take a request now, or it is not known whether it did.

    `retry_after` (milliseconds) is when to try again, with the same message id.
    """

    def __init__(self, message: str, retry_after: int = 1000) -> None:
        super().__init__(message)
        self.retry_after = retry_after
