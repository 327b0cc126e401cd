"""The subscriptions of one connection: made, ended, acked, restored.

A subscribe or unsubscribe has to wait for the broker and for the session to be saved; later ones on the same
channel wait behind it, and nothing else does. What the node gives (a held topic, an attached subscriber) is
given back here, whenever the connection ends.
"""

import asyncio
import logging
from typing import NamedTuple, Protocol

from ..config import ChannelRule
from ..delivery import Delivery
from ..errors import CloseCode, Refusal, Unavailable
from ..protocol import Ack, Position, Subscribe, Unsubscribe, encode_ack, encode_error
from ..session import Session, Subscription, decode_subscription
from ..sink import Sink
from ..topic import Subscriber, Topic
from .context import Context, now_ms

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """The connection."""

    session: Session
    sink: Sink
    closed: bool

    def answer(self, payload: bytes) -> None:
        """Send an event."""

    def refuse_command(self, refusal: Refusal) -> None:
        """Send an error, and log it where an INI key decided."""

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        """Close the connection."""


class Restored(NamedTuple):
    """A subscription of a resumed session. `topic` is held, and nothing is attached yet."""

    topic: Topic
    subscription: Subscription
    # It goes on where the client had acked, with nothing lost between.
    recovered: bool


class Subscriptions:
    """See the module. `owner.session` is there from `begin` on."""

    __slots__ = ("_context", "_owner", "_starting", "_waiting")

    def __init__(self, context: Context, owner: Owner) -> None:
        self._context = context
        self._owner = owner
        # Channels with a command under way, and the commands on them that came since.
        self._waiting: dict[str, list[Subscribe | Unsubscribe]] = {}
        # Those whose command is a subscribe.
        self._starting: set[str] = set()

    # Resuming

    async def restore(self, session: Session) -> tuple[list[Restored], list[Refusal]]:
        """Hold the channels of a resumed session again. What the rules of now refuse is left out."""
        restored: list[Restored] = []
        refused: list[Refusal] = []
        outcomes = await asyncio.gather(
            *(self._restore_one(channel, value) for channel, value in session.restorable.items()),
            return_exceptions=True,
        )
        session.restorable = {}
        failure = None
        for outcome in outcomes:
            if isinstance(outcome, Refusal):
                refused.append(outcome)
                if outcome.channel is not None:
                    session.changed.add(outcome.channel)
            elif isinstance(outcome, BaseException):
                failure = outcome
            else:
                restored.append(outcome)
        if failure is not None:
            for one in restored:
                self._context.node.leave(one.topic)
            raise failure
        return restored, refused

    async def _restore_one(self, channel: str, value: str) -> Restored:
        node = self._context.node
        topic = await node.join(channel, self._check(channel))
        if not topic.rule.persistent:
            return Restored(topic, Subscription(topic.rule, None), False)
        position = decode_subscription(value)
        try:
            start, recovered = await node.locate(topic, position, None)
        except BaseException:
            node.leave(topic)
            raise
        lost = (position.epoch, position.seq) if position is not None and not recovered else None
        delivery = Delivery(topic.rule, topic.epoch_of(start), start, acks=position is not None, lost=lost)
        return Restored(topic, Subscription(topic.rule, delivery), recovered and position is not None)

    def entry(self, one: Restored) -> dict[str, object]:
        """What `connect` tells of a restored subscription: after which position it goes on."""
        entry: dict[str, object] = {"channel": one.topic.channel, "recovered": one.recovered}
        delivery = one.subscription.delivery
        if delivery is not None:
            if not delivery.acks:
                # Nobody knows what this client has seen: it goes on with what comes from now on.
                delivery.restart(one.topic.epoch_of(one.topic.seq), one.topic.seq)
            entry["epoch"], entry["seq"] = delivery.epoch, delivery.cursor
        return entry

    def begin(self, restored: list[Restored]) -> None:
        """Attach what was restored, right after `connect` has told of it."""
        for one in restored:
            self._owner.session.subscriptions[one.topic.channel] = one.subscription
            one.subscription.held = self._attach(one.topic, one.subscription.delivery)

    def give_back(self, restored: list[Restored]) -> None:
        """The connection has gone before it began."""
        for one in restored:
            self._context.node.leave(one.topic)

    def close(self) -> None:
        """The connection has ended."""
        for subscription in self._owner.session.subscriptions.values():
            self._let_go(subscription)

    # Commands

    def receive(self, command: Subscribe | Unsubscribe) -> None:
        """Do a command, when those on its channel that came before are done."""
        waiting = self._waiting.get(command.channel)
        if waiting is not None:
            waiting.append(command)
        elif not self._owner.closed:
            self._waiting[command.channel] = []
            self._context.spawn(self._act_in_turn(command))

    def acknowledge(self, command: Ack) -> None:
        """The client has processed all up to a position. What makes no sense is ignored."""
        subscription = self._owner.session.subscriptions.get(command.channel)
        if subscription is None or subscription.held is None:
            return
        if self._context.node.dispatch.acknowledge(subscription.held, command.epoch, command.seq):
            self._note_position(command.channel)

    def advance(self) -> None:
        """The socket takes more: those that are behind go on."""
        for subscription in self._owner.session.subscriptions.values():
            if subscription.held is not None:
                self._context.node.dispatch.advance(subscription.held)

    def check(self) -> None:
        """End those that the rules or the token do not allow any more."""
        for channel in list(self._owner.session.subscriptions):
            # Where a command is under way, its end comes here again.
            if channel not in self._waiting:
                self._end_forbidden(channel)

    def _check(self, channel: str) -> ChannelRule:
        return self._context.rules.check_subscribe(channel, self._owner.session.who)

    def _end_forbidden(self, channel: str) -> None:
        session = self._owner.session
        if channel not in session.subscriptions:
            return
        try:
            self._check(channel)
        except Refusal as refusal:
            self._let_go(session.subscriptions.pop(channel))
            self._note_position(channel)
            refusal.code = "forbidden"
            self._owner.refuse_command(refusal)

    async def _act_in_turn(self, command: Subscribe | Unsubscribe) -> None:
        """Do what has to wait for the broker; then what came for the same channel meanwhile."""
        channel = command.channel
        try:
            if isinstance(command, Subscribe):
                self._owner.session.check_room(channel, self._context.config.limits, self._starting)
                self._starting.add(channel)
                await self._subscribe(command)
            else:
                await self._unsubscribe(command)
        except Exception as error:
            if not self._owner.closed:
                self._owner.refuse_command(
                    make_refusal(error, message_id=command.message_id, channel=channel)
                )
        self._starting.discard(channel)
        self._end_forbidden(channel)
        for waiting in self._waiting.pop(channel):
            # The first of them makes the rest wait again.
            self.receive(waiting)

    async def _subscribe(self, command: Subscribe) -> None:
        node, channel = self._context.node, command.channel
        subscriptions = self._owner.session.subscriptions
        # Again, for it may have waited, and the token may be another one.
        rule = self._check(channel)
        subscription = subscriptions.get(channel)
        if subscription is None:
            topic = await node.join(channel, rule)
            subscription = Subscription(topic.rule, None)
        elif subscription.delivery is None:
            self._answer_subscribe(command, subscription.held.topic, None, False)
            return
        else:
            topic = subscription.held.topic
        # What is attached goes on until the change is saved, and acks move it.
        old = subscription.delivery
        again = old if _starts_again(command, old) else None
        asked = Position(*again.position) if again is not None else command.since
        try:
            start, recovered = await node.locate(topic, asked, command.last)
            subscription.delivery = again or _place(command, topic, old, start, recovered)
            subscriptions[channel] = subscription
            await self._save(channel)
        except BaseException:
            subscription.delivery = old
            if old is None:
                subscriptions.pop(channel, None)
                node.leave(topic)
            raise
        if self._owner.closed:
            # `close` has given back what was attached, and a new one is not.
            if old is None:
                node.leave(topic)
            return
        # From here on in one turn of the loop, so without a gap or an overlap. What has gathered in this turn
        # goes out before: the old subscription stands where it has been written to.
        node.dispatch.flush(topic)
        if old is not None:
            node.dispatch.detach(subscription.held)
        if again is not None:
            # An ack, or a loss that was told, may have moved it meanwhile, to a place that is there.
            recovered = recovered or asked != Position(*again.position)
            if recovered:
                again.start_again()
            else:
                again.lose(topic.epoch_of(start), start)
        elif command.since is None:
            # Messages have come meanwhile, and the last ones are those before now.
            saved = subscription.encode()
            start = min(topic.seq, max(start, topic.seq - (command.last or 0)))
            subscription.delivery = _place(command, topic, old, start, recovered)
            if subscription.encode() != saved:
                self._note_position(channel)
        self._answer_subscribe(command, topic, subscription.delivery, recovered)
        subscription.held = self._attach(topic, subscription.delivery)

    async def _unsubscribe(self, command: Unsubscribe) -> None:
        session, channel = self._owner.session, command.channel
        subscription = session.subscriptions.pop(channel, None)
        if subscription is not None:
            self._let_go(subscription)
        elif channel not in session.changed:
            raise Refusal("not_subscribed", "There is no subscription to this channel.", channel=channel)
        await self._save(channel)
        self._owner.answer(encode_ack("unsubscribe", now_ms(), messageId=command.message_id, channel=channel))

    async def _save(self, channel: str) -> None:
        """Have a change of subscriptions stored; only then it is acked."""
        self._owner.session.changed.add(channel)
        await self._context.keeper.save(self._owner.session, self._owner.end)

    def _answer_subscribe(
        self, command: Subscribe, topic: Topic, delivery: Delivery | None, recovered: bool
    ) -> None:
        fields: dict[str, object] = {"persistent": delivery is not None}
        if delivery is not None:
            replayed = max(0, topic.seq - delivery.cursor)
            epoch = topic.epoch_of(topic.seq)
            fields |= {"epoch": epoch, "seq": topic.seq, "recovered": recovered, "replayed": replayed}
        elif _wants_place(command):
            fields |= {"recovered": False, "replayed": 0}
        self._owner.answer(
            encode_ack("subscribe", now_ms(), messageId=command.message_id, channel=command.channel, **fields)
        )

    def _attach(self, topic: Topic, delivery: Delivery | None) -> Subscriber:
        subscriber = Subscriber(topic, self._owner.sink, delivery, self._on_lost, self._on_overdue)
        self._context.node.dispatch.attach(subscriber)
        return subscriber

    def _let_go(self, subscription: Subscription) -> None:
        """Give back what a subscription holds, if it holds anything: once, whoever comes first."""
        held, subscription.held = subscription.held, None
        if held is not None:
            self._context.node.dispatch.detach(held)
            self._context.node.leave(held.topic)

    def _note_position(self, channel: str) -> None:
        """An acked position has moved, or a subscription ended: it is saved within a few seconds."""
        self._owner.session.changed.add(channel)
        self._context.keeper.touch(self._owner.session)

    def _on_lost(self, channel: str, epoch: str, seq: int) -> None:
        self._note_position(channel)
        self._owner.answer(
            encode_error(
                "history_lost",
                "Messages of this channel are lost: reload your state. It goes on after `epoch`, `seq`.",
                now_ms(),
                channel=channel,
                epoch=epoch,
                seq=seq,
            )
        )

    def _on_overdue(self, channel: str) -> None:
        logger.info(
            "no acks: a connection is closed",
            extra={"event": "acks_overdue", "clientId": self._owner.session.client_id, "channel": channel},
        )
        self._owner.end(CloseCode.ACKS_OVERDUE, "acks overdue")


def make_refusal(error: BaseException, *, message_id: str | None, channel: str | None) -> Refusal:
    """What a client is told of an error on the way to the broker."""
    if isinstance(error, Refusal):
        refusal = error
    elif isinstance(error, Unavailable):
        refusal = Refusal("unavailable", str(error), retry_after=error.retry_after)
    else:
        logger.error("unexpected error in a command", exc_info=error, extra={"event": "internal_error"})
        refusal = Refusal("internal", "Something went wrong on the server; its log says what.")
    refusal.message_id, refusal.channel = message_id, channel
    return refusal


def _wants_place(command: Subscribe) -> bool:
    return command.since is not None or command.last is not None


def _starts_again(command: Subscribe, old: Delivery | None) -> bool:
    """Whether a second subscribe asks for what is not acked once more."""
    return old is not None and old.acks and command.ack and not _wants_place(command)


def _place(
    command: Subscribe, topic: Topic, old: Delivery | None, start: int, recovered: bool
) -> Delivery | None:
    """A delivery that begins after `start`, or where the old one stands."""
    if not topic.rule.persistent:
        return None
    if old is not None and old.behind and not _wants_place(command):
        return Delivery(topic.rule, old.epoch, old.cursor, acks=command.ack, sent=old.sent, lost=old.lost)
    lost = None
    if command.since is not None and not recovered:
        lost = command.since.epoch, command.since.seq
    return Delivery(topic.rule, topic.epoch_of(start), start, acks=command.ack, lost=lost)
