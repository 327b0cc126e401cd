"""One connection of `bcast.v1`, between its session and the node.

A command is decoded by protocol, let pass by the session, and done by the node; answers go out through the
sink. Commands that have to wait for the broker hold up later ones on the same channel, and nothing else.
What is here for each of many thousand connections has slots, and nothing of the HTTP request is kept.
"""

import asyncio
import logging
import random
import time
from functools import partial

from tornado.iostream import SSLIOStream

from ..auth import LEEWAY
from ..brokers import Receipt
from ..config import ChannelRule
from ..errors import BadToken, CloseCode, Refusal, Unavailable
from ..frames import PING, frame
from ..protocol import (
    Ack,
    Auth,
    Broadcast,
    Command,
    Pong,
    Subscribe,
    Unsubscribe,
    decode,
    dump,
    encode_ack,
    encode_error,
    encode_message,
    encode_ping,
)
from ..session import Session
from ..sink import Sink, SlowConsumer
from ..stream import ClientStream
from .base import Context, new_id, now_ms
from .subscriptions import Restored, Subscriptions, make_refusal
from .wire import Wire

logger = logging.getLogger(__name__)


def ping_frames() -> bytes:
    """A heartbeat: the JSON ping and a WebSocket PING frame, in one write."""
    return frame(encode_ping(now_ms())) + frame(b"", PING)


class Connection:
    """An open WebSocket: a Receiver of its wire, the owner of its sink, a Peer of the heartbeat."""

    __slots__ = (
        "_begun",
        "_context",
        "_subscriptions",
        "_wire",
        "closed",
        "expiry",
        "next_ping",
        "pinged",
        "seen",
        "session",
        "sink",
        "slot",
    )

    def __init__(self, context: Context, stream: ClientStream) -> None:
        limits = context.config.limits
        self._context = context
        self.sink = Sink(stream, self, limits.max_queue_bytes, direct=not isinstance(stream, SSLIOStream))
        self._wire = Wire(stream, self, limits.max_message_bytes)
        self._subscriptions = Subscriptions(context, self)
        self.session = Session()
        self.closed = False
        # `connect` has been answered: the connection is counted and registered.
        self._begun = False
        # See heartbeat.Peer.
        self.seen = time.monotonic()
        self.pinged = self.next_ping = 0.0
        self.slot = 0
        # Its place among those whose token ends.
        self.expiry = 0

    def start(self, head: bytes, session_id: str | None, token: str | None) -> None:
        """Begin by the head of the 101, as whom the token says, with the session of this id, if any."""
        # With the answer to `connect`, if that is made at once.
        self._answer_soon(head)
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
        context.hub.connect(self.sink)
        context.keeper.add(self.session, self.end)
        if self.session.changed:
            context.keeper.touch(self.session)
        self._wire.start()
        if context.closing:
            # It came when all others had been told.
            self.end_for_now(CloseCode.RESTART, 1000)

    def on_close(self) -> None:
        """The connection has ended, however: what it held is given back."""
        self.closed = True
        if not self._begun:
            return
        context = self._context
        context.hub.disconnect(self.sink)
        context.disconnect(self)
        context.expiries.discard(self, self.expiry)
        self._subscriptions.close()
        context.keeper.remove(self.session)
        context.metrics.connections -= 1
        context.board.own_sockets -= 1

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        """Close the connection from our side, after what is queued or in its place."""
        if self.closed:
            return
        if not flush:
            self.sink.forget()
        self._wire.close(int(code), reason)

    def end_for_now(self, code: CloseCode, retry_after: int, *, flush: bool = True) -> None:
        """The same with a reason that says when to come back, within so many ms: another time for each."""
        reason = dump({"retryAfter": round(retry_after * random.uniform(0.1, 1.0))})
        self.end(code, reason.decode(), flush=flush)

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
        timestamp = now_ms()
        message_id = command.message_id or new_id()
        sender = None
        if rule.sender:
            sender = {"clientId": self.session.client_id}
            if self.session.who.sub:
                sender["sub"] = self.session.who.sub
        payload = encode_message(command.channel, command.data, message_id, timestamp, sender)
        future = context.node.publish(
            command.channel, rule, message_id, payload, timestamp, given=command.message_id is not None
        )
        future.add_done_callback(partial(self._broadcast_done, command.channel, message_id))

    def _broadcast_done(
        self, channel: str | None, message_id: str, future: "asyncio.Future[Receipt]"
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            receipt = future.result()
            if not receipt.duplicate:
                self._context.metrics.published["ws"] += 1
            if not self.closed and not self._wire.is_closing():
                ack = encode_ack(
                    "broadcast",
                    now_ms(),
                    messageId=message_id,
                    channel=channel,
                    seq=receipt.seq,
                    epoch=receipt.epoch,
                    duplicate=receipt.duplicate or None,
                )
                # Many of one publisher's come together.
                self._answer_soon(frame(ack))
        elif not self.closed:
            self.refuse_command(make_refusal(error, message_id=message_id, channel=channel))

    # Answers

    def answer(self, payload: bytes) -> None:
        if not self._wire.is_closing():
            self.sink.answer(frame(payload))

    def _answer_soon(self, data: bytes) -> None:
        """At the end of this turn of the loop, together with others."""
        if self.sink.gather(data):
            asyncio.get_running_loop().call_soon(self.sink.release)

    def refuse_command(self, refusal: Refusal, command: Command | None = None) -> None:
        context = self._context
        if refusal.message_id is None and command is not None:
            refusal.message_id = getattr(command, "message_id", None)
        if refusal.channel is None and command is not None:
            refusal.channel = getattr(command, "channel", None)
        if refusal.setting:
            context.refusals.add(
                self.seen,
                "limit" if refusal.setting.startswith("[limits]") else "rule",
                refusal.message,
                client_id=self.session.client_id,
                setting=refusal.setting,
                channel=refusal.channel,
            )
        self.answer(
            encode_error(
                refusal.code,
                refusal.message,
                now_ms(),
                message_id=refusal.message_id,
                channel=refusal.channel,
                retry_after=refusal.retry_after,
            )
        )
        if refusal.code == "rate_limited" and self.session.is_flooding(context.config.limits, self.seen):
            self.end_for_now(CloseCode.RATE_IGNORED, 5000, flush=False)

    def _extra(self, event: str) -> dict[str, str]:
        return {"event": event, "clientId": self.session.client_id}
