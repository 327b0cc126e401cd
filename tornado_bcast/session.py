"""One client's state: who it is, what it is subscribed to, how fast it may go on. Sans-I/O.

A connection decodes a frame and asks `receive` whether the command may go ahead; what then happens is the
node's work. Times are seconds of any steady clock.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from .config import ChannelRule, LimitsConfig
from .errors import Refusal
from .protocol import Auth, Broadcast, Command, Subscribe, Unsubscribe
from .rules import ChannelRules, take_tokens

# How many bursts' worth of refused requests a client may send before its connection is closed for it.
_PATIENCE = 4


@dataclass(slots=True)
class Subscription:
    """A channel that the client is subscribed to. `held` is the connection's: what it has to give back."""

    rule: ChannelRule
    acks: bool
    held: Any = None


class Session:
    """See the module. `client_id` is public, `id` the secret by which it is resumed."""

    __slots__ = ("_full_at", "_patient_until", "client_id", "id", "subscriptions")

    def __init__(self) -> None:
        self.client_id = secrets.token_urlsafe(9)
        # 128 random bits, from the operating system.
        self.id = secrets.token_urlsafe(16)
        self.subscriptions: dict[str, Subscription] = {}
        # The rate bucket, and the one that refused requests are taken from (rules.take_tokens).
        self._full_at = 0.0
        self._patient_until = 0.0

    def receive(
        self, command: Command, rules: ChannelRules, limits: LimitsConfig, now: float
    ) -> ChannelRule | None:
        """Let a command pass, with its channel's rule, or raise Refusal. Acks and pongs are free."""
        match command:
            case Subscribe(channel=channel):
                self.pay(limits, now)
                rule = rules.check_subscribe(channel)
                if channel not in self.subscriptions and 0 < limits.max_subscriptions <= len(
                    self.subscriptions
                ):
                    raise Refusal(
                        "too_many_subscriptions",
                        f"A connection may have {limits.max_subscriptions} subscriptions; give some up.",
                        channel=channel,
                        setting="[limits] max_subscriptions",
                    )
                return rule
            case Unsubscribe():
                self.pay(limits, now)
            case Broadcast(channel=channel):
                self.pay(limits, now)
                return rules.check_publish(channel, "ws")
            case Auth():
                self.pay(limits, now)
                raise Refusal("unauthorized", "Tokens are not supported by this version of the server yet.")
            case _:
                pass
        return None

    def pay(self, limits: LimitsConfig, now: float) -> None:
        """Take a token, also for a frame that cannot be read; Refusal `rate_limited` when there is none."""
        self._full_at, wait = take_tokens(self._full_at, now, limits.rate, limits.burst)
        if wait:
            raise Refusal(
                "rate_limited",
                f"A connection may send {limits.rate:g} requests a second; wait `retryAfter` milliseconds.",
                retry_after=int(wait * 1000) + 1,
                setting="[limits] rate",
            )

    def is_flooding(self, limits: LimitsConfig, now: float) -> bool:
        """Count a request that was refused for its rate. True: the client does not heed that."""
        self._patient_until, wait = take_tokens(
            self._patient_until, now, limits.rate, _PATIENCE * max(limits.burst, 1)
        )
        return wait > 0
