"""The only WebSocket handler: one connection of `bcast.v1`, between its session and the node.

A command is decoded by protocol, let pass by the session, and done by the node; answers go out through the
sink. Commands that have to wait for the broker hold up later ones on the same channel, and nothing else.
"""

import asyncio
import logging
import random
import time
from functools import partial
from importlib.resources import files

from tornado.iostream import SSLIOStream
from tornado.web import HTTPError
from tornado.websocket import WebSocketHandler

from ..brokers import Receipt
from ..config import ChannelRule
from ..delivery import Delivery
from ..errors import CloseCode, Refusal, Unavailable
from ..frames import PING, frame
from ..protocol import (
    SUBPROTOCOL,
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
from ..session import Session, Subscription
from ..sink import Sink, SlowConsumer
from ..topic import Subscriber, Topic
from .base import BaseHandler, new_id, now_ms
from .wire import Wire

logger = logging.getLogger(__name__)

# The page at `/` in development: one file, all of it inline, and nothing from elsewhere.
_PAGE = files(__package__.rpartition(".")[0]).joinpath("page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self' ws: wss:;"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def ping_frames() -> bytes:
    """A heartbeat: the JSON ping and a WebSocket PING frame, in one write."""
    return frame(encode_ping(now_ms())) + frame(b"", PING)


class SocketHandler(BaseHandler, WebSocketHandler):
    """One connection. Made for each request; after the upgrade it is a Receiver, a SinkOwner and a Peer."""

    sink: Sink
    session: Session
    wire: Wire
    closed: bool
    # See heartbeat.Peer.
    seen: float
    pinged: float
    slot: int

    # Before the upgrade

    async def get(self, *args: str, **kwargs: str) -> None:
        if self.request.headers.get("Upgrade", "").lower() == "websocket":
            self._check_capacity()
            if not self._finished:
                await super().get(*args, **kwargs)
        elif self.request.path == "/" and self.context.config.server.env == "development":
            self.set_header("Content-Type", "text/html; charset=UTF-8")
            self.set_header("Content-Security-Policy", _PAGE_POLICY)
            self.finish(_PAGE.read_bytes())
        else:
            self.set_header("Upgrade", "websocket")
            self.finish_error(
                426, "bad_message", "This is a WebSocket endpoint: connect with ws:// or wss://."
            )

    def _check_capacity(self) -> None:
        """Refuse the upgrade where there is no room, before it costs anything."""
        server = self.context.config.server
        board = self.context.board
        if self.context.draining:
            self.finish_error(503, "unavailable", "This server is stopping; connect again.")
        elif 0 < self.context.capacity <= board.sockets():
            setting = "[server] max_connections"
            self.refuse(
                Refusal(
                    "unavailable", "There is no room for more connections; try again later.", setting=setting
                ),
                kind="limit",
            )
        elif 0 < server.max_connections_per_ip < board.peers(self.remote_ip):
            self.refuse(
                Refusal(
                    "rate_limited",
                    "There are too many connections from your address; close some.",
                    setting="[server] max_connections_per_ip",
                ),
                kind="limit",
            )

    def check_origin(self, origin: str) -> bool:
        # `prepare` has refused foreign ones.
        return True

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in subprotocols else None

    def get_websocket_protocol(self) -> Wire | None:
        if self.request.headers.get("Sec-WebSocket-Version") != "13":
            return None
        return Wire(self, self, self.context.config.limits.max_message_bytes)

    # The connection

    def open(self, *args: str, **kwargs: str) -> None:
        assert isinstance(self.ws_connection, Wire)
        context = self.context
        limits = context.config.limits
        stream = self.ws_connection.stream
        stream.set_nodelay(True)
        self.wire = self.ws_connection
        self.closed = False
        self.session = Session()
        self.sink = Sink(stream, self, limits.max_queue_bytes, direct=not isinstance(stream, SSLIOStream))
        # Channels with a subscribe under way, and the commands on them that came since.
        self._waiting: dict[str, list[Subscribe | Unsubscribe]] = {}
        context.board.own_sockets += 1
        context.metrics.connections += 1
        context.connect(self)
        context.hub.connect(self.sink)
        self._answer(
            encode_ack(
                "connect",
                now_ms(),
                clientId=self.session.client_id,
                session=self.session.id,
                resumed=False,
                heartbeat=round(context.config.heartbeat.interval * 1000),
                subscriptions=[],
                limits={
                    "rate": limits.rate,
                    "burst": limits.burst,
                    "maxMessageBytes": limits.max_message_bytes,
                    "maxSubscriptions": limits.max_subscriptions,
                    "dedupTtl": round(context.config.channels.default.dedup_ttl * 1000),
                },
            )
        )

    def on_close(self) -> None:
        self.closed = True
        context = self.context
        context.hub.disconnect(self.sink)
        context.disconnect(self)
        for subscription in self.session.subscriptions.values():
            self._let_go(subscription)
        context.metrics.connections -= 1
        context.board.own_sockets -= 1

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        """Close the connection from our side, after what is queued or in its place."""
        if self.closed:
            return
        if not flush:
            self.sink.forget()
        self.wire.close(int(code), reason)

    def end_for_now(self, code: CloseCode, retry_after: int, *, flush: bool = True) -> None:
        """The same with a reason that says when to come back: another time for each client."""
        self.end(
            code, dump({"retryAfter": round(retry_after * random.uniform(0.5, 1.0))}).decode(), flush=flush
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
        context = self.context
        try:
            rule = self.session.receive(command, context.rules, context.config.limits, self.seen)
            self._act(command, rule)
        except Refusal as refusal:
            self._refuse(refusal, command)
        except Exception:
            logger.exception("unexpected error in a command", extra=self._extra("internal_error"))
            self._refuse(
                Refusal("internal", "Something went wrong on the server; its log says what."), command
            )

    def on_binary(self) -> None:
        self._refuse_frame(
            Refusal("bad_message", "Send text frames; binary ones have no meaning in bcast.v1.")
        )

    def on_too_big(self) -> None:
        size = self.context.config.limits.max_message_bytes
        self._refuse(
            Refusal(
                "too_large",
                f"A frame may have {size} bytes; send less.",
                setting="[limits] max_message_bytes",
            )
        )

    def _refuse_frame(self, refusal: Refusal) -> None:
        """Answer a frame that is no command; it costs a token like any other."""
        try:
            self.session.pay(self.context.config.limits, self.seen)
        except Refusal as limit:
            limit.message_id = refusal.message_id
            refusal = limit
        self._refuse(refusal)

    # What the sink tells

    def on_slow(self) -> None:
        logger.info("a slow consumer is disconnected", extra=self._extra("slow_consumer"))
        self.context.metrics.drop("disconnected")
        self.end_for_now(CloseCode.SLOW_CONSUMER, 2000, flush=False)

    def on_drained(self) -> None:
        # What waited has been taken by the peer's kernel: it is alive, though it may say nothing.
        self.seen = time.monotonic()
        self.wire.pong()
        for subscription in self.session.subscriptions.values():
            self.context.node.advance(subscription.held)

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        self.context.metrics.drop(policy, count)

    # Commands

    def _act(self, command: Command, rule: ChannelRule | None) -> None:
        match command:
            case Broadcast():
                assert rule is not None
                self._broadcast(command, rule)
            case Subscribe() | Unsubscribe():
                waiting = self._waiting.get(command.channel)
                if waiting is not None:
                    waiting.append(command)
                elif isinstance(command, Unsubscribe):
                    self._unsubscribe(command)
                else:
                    self._waiting[command.channel] = []
                    self.context.spawn(self._subscribe_in_turn(command))
            case Ack():
                subscription = self.session.subscriptions.get(command.channel)
                if subscription is not None:
                    self.context.node.acknowledge(subscription.held, command.epoch, command.seq)
            case Pong() | Auth():
                pass

    def _broadcast(self, command: Broadcast, rule: ChannelRule) -> None:
        context = self.context
        timestamp = now_ms()
        message_id = command.message_id or new_id()
        sender = {"clientId": self.session.client_id} if rule.sender else None
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
                self.context.metrics.published["ws"] += 1
            if not self.closed:
                self._answer(
                    encode_ack(
                        "broadcast",
                        now_ms(),
                        messageId=message_id,
                        channel=channel,
                        seq=receipt.seq,
                        epoch=receipt.epoch,
                        duplicate=receipt.duplicate or None,
                    )
                )
        elif not self.closed:
            self._refuse(_refusal(error, message_id=message_id, channel=channel))

    async def _subscribe_in_turn(self, command: Subscribe) -> None:
        channel = command.channel
        try:
            await self._subscribe(command)
        except Exception as error:
            self._refuse(_refusal(error, message_id=command.message_id, channel=channel))
        for waiting in self._waiting.pop(channel):
            if self.closed:
                break
            try:
                # The first subscribe among them makes the rest wait for it again.
                self._act(waiting, None)
            except Refusal as refusal:
                self._refuse(refusal, waiting)

    async def _subscribe(self, command: Subscribe) -> None:
        node = self.context.node
        channel = command.channel
        old = self.session.subscriptions.get(channel)
        if old is not None:
            topic: Topic = old.held.topic
        else:
            topic = await node.join(channel, self.context.rules.check_subscribe(channel))
            if self.closed:
                node.leave(topic)
                return
        subscription = Subscription(topic.rule, command.ack and topic.rule.persistent)
        try:
            await self._start(command, topic, old, subscription)
        except BaseException:
            if old is None:
                node.leave(topic)
            raise

    async def _start(
        self, command: Subscribe, topic: Topic, old: Subscription | None, subscription: Subscription
    ) -> None:
        """Find the place to begin at; then answer and attach in one turn of the loop, without a gap."""
        node = self.context.node
        wants_place = command.since is not None or command.last is not None
        if not topic.rule.persistent:
            self._answer_subscribe(
                command, persistent=False, **({"recovered": False, "replayed": 0} if wants_place else {})
            )
            if old is None:
                subscription.held = self._attach(topic, None)
                self.session.subscriptions[command.channel] = subscription
            return
        start, recovered = await node.locate(topic, command.since, command.last)
        if self.closed:
            if old is None:
                node.leave(topic)
            return
        epoch = command.since.epoch if command.since is not None and recovered else topic.epoch
        stays = old is not None and not wants_place and not command.ack
        if not wants_place:
            epoch, start = topic.epoch, topic.seq
            if old is not None and command.ack and old.acks:
                epoch, start = old.held.delivery.position
        self._answer_subscribe(
            command,
            persistent=True,
            epoch=topic.epoch,
            seq=topic.seq,
            recovered=recovered,
            replayed=0 if stays else max(0, topic.seq - start),
        )
        if stays:
            return
        if old is not None:
            node.detach(old.held)
        subscription.held = self._attach(topic, Delivery(topic.rule, epoch, start, acks=subscription.acks))
        self.session.subscriptions[command.channel] = subscription

    def _answer_subscribe(self, command: Subscribe, **fields: object) -> None:
        self._answer(
            encode_ack("subscribe", now_ms(), messageId=command.message_id, channel=command.channel, **fields)
        )

    def _attach(self, topic: Topic, delivery: Delivery | None) -> Subscriber:
        subscriber = Subscriber(topic, self.sink, delivery, self._on_lost, self._on_overdue)
        # The answer that was just given comes first.
        self.context.node.attach(subscriber)
        return subscriber

    def _unsubscribe(self, command: Unsubscribe) -> None:
        subscription = self.session.subscriptions.pop(command.channel, None)
        if subscription is None:
            raise Refusal(
                "not_subscribed", "There is no subscription to this channel.", channel=command.channel
            )
        self._let_go(subscription)
        self._answer(
            encode_ack("unsubscribe", now_ms(), messageId=command.message_id, channel=command.channel)
        )

    def _let_go(self, subscription: Subscription) -> None:
        self.context.node.detach(subscription.held)
        self.context.node.leave(subscription.held.topic)

    def _on_lost(self, channel: str, epoch: str, seq: int) -> None:
        self._answer(
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
            "no acks: a connection is closed", extra={**self._extra("acks_overdue"), "channel": channel}
        )
        self.end(CloseCode.ACKS_OVERDUE, "acks overdue")

    # Answers

    def _answer(self, payload: bytes) -> None:
        if not self.wire.is_closing():
            self.sink.answer(frame(payload))

    def _refuse(self, refusal: Refusal, command: Command | None = None) -> None:
        context = self.context
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
        self._answer(
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

    def write_error(self, status_code: int, **kwargs: object) -> None:
        if status_code == 405:
            self.set_header("Allow", "GET, OPTIONS")
        super().write_error(status_code, **kwargs)

    def head(self, *args: str) -> None:
        raise HTTPError(405)


def _refusal(error: BaseException, *, message_id: str | None, channel: str | None) -> Refusal:
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
