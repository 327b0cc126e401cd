"""One connection of `bcast.v1`, between its session and the node.

A command is decoded by protocol, let pass by the session, and done by the node; answers go out through the
sink. Commands that have to wait for the broker hold up later ones on the same channel, and nothing else.
What is here for each of many thousand connections has slots, and nothing of the HTTP request is kept.
"""

import asyncio
import logging
import time
from functools import partial
from typing import Any

from tornado.iostream import SSLIOStream

from ..answer import Answer
from ..auth import LEEWAY
from ..brokers import Receipt
from ..config import ChannelRule
from ..errors import BadToken, CloseCode, Refusal, Unavailable
from ..frames import frame
from ..protocol import (
    Ack,
    Auth,
    Broadcast,
    Command,
    Pong,
    Subscribe,
    Unsubscribe,
    decode,
    encode_ack,
    encode_message,
)
from ..sink import Sink, SlowConsumer
from ..stream import ClientStream
from .context import Context, new_id, now_ms
from .outgoing import Outgoing
from .subscriptions import Restored, Subscriptions, make_refusal
from .wire import Wire

logger = logging.getLogger(__name__)


class Connection(Outgoing):
    """An open WebSocket: a Receiver of its wire, the owner of its sink, a Peer of the heartbeat."""

    __slots__ = ("_begun", "_subscriptions", "expiry", "next_ping", "pinged", "slot")

    def __init__(self, context: Context, stream: ClientStream, *, compressed: bool) -> None:
        super().__init__(context)
        limits = context.config.limits
        direct = not isinstance(stream, SSLIOStream)
        self.sink = Sink(stream, self, limits.max_queue_bytes, direct=direct, compressed=compressed)
        self._wire = Wire(stream, self, limits.max_message_bytes, compressed=compressed)
        self._subscriptions = Subscriptions(context, self)
        # `connect` has been answered: the connection is counted and registered.
        self._begun = False
        # See heartbeat.Peer.
        self.seen = time.monotonic()
        self.pinged = self.next_ping = 0.0
        self.slot = 0
        self.expiry = 0  # Its place among those whose token ends.

    def start(self, head: bytes, session_id: str | None, token: str | None) -> None:
        """Begin by the head of the 101, as whom the token says, with the session of this id, if any."""
        self.answer_soon(head)  # With the answer to `connect`, if that is made at once.
        if token is not None:
            try:
                self.session.admit(self._context.auth.check_token(token))
            except BadToken as error:
                self._log_bad_token(str(error))
                self.end(CloseCode.BAD_TOKEN, str(error))
                self._wire.start()
                return
        if session_id is None:
            self._begin([], [], resumed=False)
        else:
            self._context.spawn(self._resume(session_id))

    async def _resume(self, session_id: str) -> None:
        context = self._context
        try:
            session = await context.keeper.resume(session_id, self.session.who)
            if session is not None:
                self.session = session
            restored, refused = await self._subscriptions.restore(self.session)
        except Unavailable as error:
            # Never `resumed: false` then: the session may well be there.
            self.end_for_now(CloseCode.TRY_AGAIN_LATER, 2 * error.retry_after)
            self._wire.start()
        except asyncio.CancelledError:  # The worker has said goodbye to all others, and ends.
            self.end_for_now(CloseCode.RESTART, 1000)
            self._wire.start()
            raise
        else:
            self._begin(restored, refused, resumed=session is not None)

    def _begin(self, restored: list[Restored], refused: list[Refusal], *, resumed: bool) -> None:
        """Answer `connect`, then go on with what was restored: in one turn of the loop, so without a gap."""
        context = self._context
        limits = context.config.limits
        context.metrics.connections += 1
        context.board.own_sockets += 1
        self._begun = True
        context.connect(self)
        self._watch_expiry()
        self.answer(
            encode_ack(
                "connect",
                now_ms(),
                clientId=self.session.client_id,
                session=self.session.id,
                resumed=resumed,
                expiresAt=self._expires_at(),
                heartbeat=round(context.config.heartbeat.interval * 1000),
                subscriptions=[self._subscriptions.entry(one) for one in restored],
                limits={
                    "rate": limits.rate,
                    "burst": limits.burst,
                    "maxMessageBytes": limits.max_message_bytes,
                    "maxSubscriptions": limits.max_subscriptions,
                    "dedupTtl": round(context.config.channels.default.dedup_ttl * 1000),
                },
            )
        )
        for refusal in refused:
            self.refuse_command(refusal)
        self._subscriptions.begin(restored)
        context.node.connect(self.sink)
        context.keeper.add(self.session, self.end)
        if self.session.changed:
            context.keeper.touch(self.session)
        self._wire.start()

    def on_close(self) -> None:
        """The connection has ended, however: what it held is given back."""
        self.closed = True
        if not self._begun:
            return
        context = self._context
        context.node.disconnect(self.sink)
        context.disconnect(self)
        context.expiries.discard(self, self.expiry)
        self._subscriptions.close()
        context.keeper.remove(self.session)
        context.metrics.connections -= 1
        context.board.own_sockets -= 1

    # Tokens

    def _watch_expiry(self) -> None:
        """Have `expire` called when the token ends."""
        expiries, end = self._context.expiries, self.session.who.expires_at
        expiries.discard(self, self.expiry)
        if end is not None:
            # The leeway lets a token in that has just ended; it does not lengthen the others.
            self.expiry = expiries.add(self, end if end > time.time() else end + LEEWAY)

    def _expires_at(self) -> int | None:
        end = self.session.who.expires_at
        return None if end is None else end * 1000

    def expire(self) -> None:
        """The token has ended."""
        self.end(CloseCode.TOKEN_EXPIRED, "token expired")

    def check_subscriptions(self) -> None:
        """End those that the rules or the token do not allow any more."""
        self._subscriptions.check()

    def _renew(self, command: Auth) -> None:
        try:
            who = self._context.auth.check_token(command.token)
        except BadToken as error:
            raise Refusal("unauthorized", str(error), setting="[auth]") from None
        self.session.admit(who)
        self._watch_expiry()
        if self.session.is_stored:
            self._renewed(command)
        else:
            self._context.spawn(self._save_and_answer(command))

    async def _save_and_answer(self, command: Auth) -> None:
        """Whose session it is has changed: that is stored before it is acked."""
        try:
            await self._context.keeper.save(self.session, self.end)
        except Unavailable as error:
            self.refuse_command(make_refusal(error, message_id=command.message_id, channel=None))
        else:
            self._renewed(command)

    def _renewed(self, command: Auth) -> None:
        self.answer(encode_ack("auth", now_ms(), messageId=command.message_id, expiresAt=self._expires_at()))
        self.check_subscriptions()

    def _log_bad_token(self, reason: str) -> None:
        self._context.refusals.add(
            self.seen, "rule", reason, client_id=self.session.client_id, setting="[auth]"
        )

    # What the wire tells

    def on_sign_of_life(self) -> None:
        self.seen = time.monotonic()

    def on_text(self, text: str) -> None:
        try:
            command = decode(text)
        except Refusal as refusal:
            self._refuse_frame(refusal)
            return
        if self.is_leaving and not isinstance(command, Ack):
            # As if its goodbye had been said already.
            return
        context = self._context
        try:
            rule = self.session.receive(command, context.rules, context.config.limits, self.seen)
            self._act(command, rule)
        except Refusal as refusal:
            self.refuse_command(refusal, command)
        except Exception:
            logger.exception("unexpected error in a command", extra=self._extra("internal_error"))
            self.refuse_command(
                Refusal("internal", "Something went wrong on the server; its log says what."), command
            )

    def on_binary(self) -> None:
        self._refuse_frame(
            Refusal("bad_message", "Send text frames; binary ones have no meaning in bcast.v1.")
        )

    def on_too_big(self) -> None:
        size = self._context.config.limits.max_message_bytes
        self.refuse_command(
            Refusal(
                "too_large",
                f"A frame may have {size} bytes; send less.",
                setting="[limits] max_message_bytes",
            )
        )

    def _refuse_frame(self, refusal: Refusal) -> None:
        """Answer a frame that is no command; it costs a token like any other."""
        try:
            self.session.pay(self._context.config.limits, self.seen)
        except Refusal as limit:
            limit.message_id = refusal.message_id
            refusal = limit
        self.refuse_command(refusal)

    # What the sink tells

    def on_slow(self) -> None:
        logger.info("a slow consumer is disconnected", extra=self._extra("slow_consumer"))
        self._context.metrics.drop("disconnected")
        self.end_for_now(CloseCode.SLOW_CONSUMER, 2000, flush=False)

    def on_drained(self) -> None:
        # What waited has been taken by the peer's kernel: it is alive, though it may say nothing.
        self.seen = time.monotonic()
        self._wire.on_drained()
        if self._begun:
            self._subscriptions.advance()

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        self._context.metrics.drop(policy, count)

    # Commands

    def _act(self, command: Command, rule: ChannelRule | None) -> None:
        match command:
            case Broadcast():
                assert rule is not None
                self._broadcast(command, rule)
            case Subscribe() | Unsubscribe():
                self._subscriptions.receive(command)
            case Ack():
                self._subscriptions.acknowledge(command)
            case Auth():
                self._renew(command)
            case Pong():
                pass

    def _broadcast(self, command: Broadcast, rule: ChannelRule) -> None:
        context = self._context
        try:
            context.overload.check()
        except Refusal:
            self._hold()
            raise
        timestamp = now_ms()
        message_id = command.message_id or new_id()
        sender = None
        if rule.sender:
            sender = {"clientId": self.session.client_id}
            if self.session.who.sub:
                sender["sub"] = self.session.who.sub
        payload = encode_message(command.channel, command.data, message_id, timestamp, sender)
        answer = context.node.publish(
            command.channel, rule, message_id, payload, timestamp, given=command.message_id is not None
        )
        self._unanswered += 1
        answer.add_done_callback(partial(self._broadcast_done, command.channel, message_id))
        if answer.exception() is not None:
            # The broker's queue is full.
            self._hold()

    def _hold(self) -> None:
        """Nothing more was taken: what has come behind it waits, or refusing would take all the time."""
        self._wire.hold()
        self._context.hold(self._wire.go_on)

    def _broadcast_done(self, channel: str | None, message_id: str, answer: Answer[Receipt]) -> None:
        self._unanswered -= 1
        error = answer.exception()
        if error is None:
            receipt = answer.result()
            if not receipt.duplicate:
                self._context.metrics.published["ws"] += 1
            if not self.closed and not self._wire.is_closing():
                fields: dict[str, Any] = {"messageId": message_id, "channel": channel}
                if receipt.seq is not None:
                    fields.update(seq=receipt.seq, epoch=receipt.epoch)
                if receipt.duplicate:
                    fields["duplicate"] = True
                # Many of one publisher's come together.
                self.answer_soon(frame(encode_ack("broadcast", now_ms(), **fields)))
        elif not self.closed:
            self.refuse_command(make_refusal(error, message_id=message_id, channel=channel))
        self._leave_if_done()

    def _extra(self, event: str) -> dict[str, str]:
        return {"event": event, "clientId": self.session.client_id}
