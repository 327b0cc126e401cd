"""One client's state: who it is, what it is subscribed to, how fast it may go on. Sans-I/O.

A connection decodes a frame and asks `receive` whether the command may go ahead; what then happens is the
node's work. Times are seconds of any steady clock.
"""

import secrets
from collections.abc import Set
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from .brokers import SessionChange, StoredSession
from .config import ChannelRule, LimitsConfig
from .delivery import Delivery
from .errors import Refusal
from .protocol import Auth, Broadcast, Command, Position, Subscribe, Unsubscribe
from .rules import NOBODY, ChannelRules, Principal, take_tokens

# How many bursts' worth of refused requests a client may send before its connection is closed for it.
_PATIENCE = 4


@dataclass(slots=True)
class Subscription:
    """A channel that the client is subscribed to. `delivery` is None on channels that are not persistent."""

    rule: ChannelRule
    delivery: Delivery | None
    # The connection's: what it has to give back to the node.
    held: Any = None

    @property
    def acks(self) -> bool:
        return self.delivery is not None and self.delivery.acks

    def encode(self) -> str:
        """What is stored of it: with acks the epoch and seq up to which all is processed, else `-`."""
        if self.delivery is None or not self.delivery.acks:
            return "-"
        return "{} {}".format(*self.delivery.kept)


def decode_subscription(value: str) -> Position | None:
    """The acked position in what was stored; None for a subscription without acks."""
    # An epoch may be what a client made up, blanks and all.
    epoch, _, seq = value.rpartition(" ")
    return Position(epoch, int(seq)) if seq.isdecimal() else None


class Session:
    """See the module. `client_id` is public, `id` the secret by which it is resumed."""

    __slots__ = (
        "_full_at",
        "_patient_until",
        "changed",
        "client_id",
        "generation",
        "id",
        "is_stored",
        "restorable",
        "subscriptions",
        "taken",
        "who",
    )

    def __init__(self, stored: StoredSession | None = None, session_id: str | None = None) -> None:
        # 128 random bits, from the operating system.
        self.id = session_id or secrets.token_urlsafe(16)
        self.client_id = stored.client_id if stored else secrets.token_urlsafe(9)
        # Who this is. It changes by `admit` alone.
        self.who = NOBODY
        # Higher than that of every connection that held this session before.
        self.generation = stored.generation if stored else 1
        self.is_stored = stored is not None
        # A newer connection has it: nothing of it is written any more.
        self.taken = False
        self.subscriptions: dict[str, Subscription] = {}
        # What was stored of each subscription, until the connection has restored them.
        self.restorable = stored.channels if stored else {}
        # Channels of which the stored state is older than this one.
        self.changed: set[str] = set()
        # The rate bucket, and the one that refused requests are taken from (rules.take_tokens).
        self._full_at = 0.0
        self._patient_until = 0.0

    def admit(self, who: Principal) -> None:
        """The client has shown a token. Nobody may become somebody, but somebody never somebody else."""
        if self.who.sub not in ("", who.sub):
            raise Refusal(
                "forbidden",
                "This token is another one's (`sub`): a connection keeps its own; open a new one for it.",
            )
        if self.who.sub != who.sub:
            # Whose session it is has changed, so what is stored is written anew.
            self.is_stored = False
        self.who = who

    @staticmethod
    def name(session_id: str) -> str:
        """The name under which a session is stored. It does not give the secret id away."""
        return blake2b(session_id.encode(), digest_size=16).hexdigest()

    def take_change(self, owner: str) -> SessionChange:
        """What is to be written now. The caller puts it back by `put_back` when that fails."""
        whole = not self.is_stored
        names = self.subscriptions if whole else self.changed
        channels = {
            name: subscription.encode() if (subscription := self.subscriptions.get(name)) else ""
            for name in names
        }
        self.changed.clear()
        self.is_stored = True
        return SessionChange(self.generation, self.who.sub, self.client_id, owner, channels, whole)

    def put_back(self, change: SessionChange) -> None:
        """A change was not written, or it is not known whether it was."""
        self.changed.update(change.channels)
        self.is_stored = self.is_stored and not change.whole

    def receive(
        self, command: Command, rules: ChannelRules, limits: LimitsConfig, now: float
    ) -> ChannelRule | None:
        """Let a command pass, with its channel's rule, or raise Refusal. Acks and pongs are free."""
        match command:
            case Broadcast():
                self.pay(limits, now)
                return rules.check_publish(command.channel, "ws", self.who)
            case Subscribe():
                self.pay(limits, now)
                return rules.check_subscribe(command.channel, self.who)
            case Unsubscribe() | Auth():
                self.pay(limits, now)
            case _:
                pass
        return None

    def check_room(self, channel: str, limits: LimitsConfig, starting: Set[str]) -> None:
        """Refusal `too_many_subscriptions` where there is no room for another one.

        `starting`: channels whose subscription is on its way; who does not wait has no more than others.
        """
        if channel in self.subscriptions or not limits.max_subscriptions:
            return
        if len(self.subscriptions.keys() | starting) >= limits.max_subscriptions:
            raise Refusal(
                "too_many_subscriptions",
                f"A connection may have {limits.max_subscriptions} subscriptions; give some up.",
                channel=channel,
                setting="[limits] max_subscriptions",
            )

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
