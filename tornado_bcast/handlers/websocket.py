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
from typing import NamedTuple

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
from ..session import Session, Subscription, decode_subscription
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


# A subprotocol that begins so asks to resume the session whose id follows.
_SESSION_PREFIX = "session."


def ping_frames() -> bytes:
    """A heartbeat: the JSON ping and a WebSocket PING frame, in one write."""
    return frame(encode_ping(now_ms())) + frame(b"", PING)


class _Restored(NamedTuple):
    """A subscription of a resumed session. `topic` is held."""

    topic: Topic
    subscription: Subscription
    # It goes on where the client had acked, with nothing lost between.
    recovered: bool


def _wants_place(command: Subscribe) -> bool:
    return command.since is not None or command.last is not None


class SocketHandler(BaseHandler, WebSocketHandler):
    """One connection. Made for each request; after the upgrade it is a Receiver, a SinkOwner and a Peer."""

    sink: Sink
    session: Session
    wire: Wire
    closed = True
    # `connect` has been answered: the connection is counted and registered.
    _counted = False
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

    async def open(self, *args: str, **kwargs: str) -> None:
        assert isinstance(self.ws_connection, Wire)
        context = self.context
        stream = self.ws_connection.stream
        stream.set_nodelay(True)
        self.wire = self.ws_connection
        self.closed = False
        self.sink = Sink(
            stream,
            self,
            context.config.limits.max_queue_bytes,
            direct=not isinstance(stream, SSLIOStream),
        )
        # Channels with a subscribe under way, and the commands on them that came since.
        self._waiting: dict[str, list[Subscribe | Unsubscribe]] = {}
        session_id = self._offered_session()
        session = None
        try:
            if session_id is not None:
                session = await context.keeper.resume(session_id, "")
            restored, refused = await self._restore(session)
        except Unavailable as error:
            # Never `resumed: false` then: the session may well be there.
            self.end_for_now(CloseCode.TRY_AGAIN_LATER, 2 * error.retry_after)
            return
        if self.closed:
            for one in restored:
                context.node.leave(one.topic)
            return
        self._begin(session, restored, refused)

    def _offered_session(self) -> str | None:
        """The secret id of the session to resume, by subprotocol or query."""
        offered = self.request.headers.get("Sec-WebSocket-Protocol", "")
        for name in offered.split(","):
            if name.strip().startswith(_SESSION_PREFIX):
                return name.strip().removeprefix(_SESSION_PREFIX)
        return self.get_query_argument("session", None)

    def _begin(
        self,
        session: Session | None,
        restored: "list[_Restored]",
        refused: list[Refusal],
    ) -> None:
        """Answer `connect`, then go on with what was restored: in one turn of the loop, so without a gap."""
        context = self.context
        limits = context.config.limits
        self.session = session or Session()
        context.metrics.connections += 1
        context.board.own_sockets += 1
        self._counted = True
        context.connect(self)
        self._answer(
            encode_ack(
                "connect",
                now_ms(),
                clientId=self.session.client_id,
                session=self.session.id,
                resumed=session is not None,
                heartbeat=round(context.config.heartbeat.interval * 1000),
                subscriptions=[self._restored_entry(one) for one in restored],
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
            self._refuse(refusal)
        for one in restored:
            self.session.subscriptions[one.topic.channel] = one.subscription
            one.subscription.held = self._attach(one.topic, one.subscription.delivery)
        context.hub.connect(self.sink)
        context.keeper.add(self.session, self.end)
        if self.session.changed:
            context.keeper.touch(self.session)

    # Resuming

    async def _restore(self, session: Session | None) -> "tuple[list[_Restored], list[Refusal]]":
        """Hold the channels of a resumed session again. What the rules of now refuse is left out."""
        restored: list[_Restored] = []
        refused: list[Refusal] = []
        if session is None:
            return restored, refused
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
                self.context.node.leave(one.topic)
            raise failure
        return restored, refused

    async def _restore_one(self, channel: str, value: str) -> "_Restored":
        node = self.context.node
        topic = await node.join(channel, self.context.rules.check_subscribe(channel))
        if not topic.rule.persistent:
            return _Restored(topic, Subscription(topic.rule, None), False)
        position = decode_subscription(value)
        try:
            start, recovered = await node.locate(topic, position, None)
        except BaseException:
            node.leave(topic)
            raise
        epoch = position.epoch if position is not None and recovered else topic.epoch
        delivery = Delivery(topic.rule, epoch, start, acks=position is not None)
        return _Restored(topic, Subscription(topic.rule, delivery), recovered and position is not None)

    def _restored_entry(self, one: "_Restored") -> dict[str, object]:
        """What `connect` tells of a restored subscription: after which position it goes on."""
        entry: dict[str, object] = {"channel": one.topic.channel, "recovered": one.recovered}
        delivery = one.subscription.delivery
        if delivery is not None:
            if not delivery.acks:
                # Nobody knows what this client has seen: it goes on with what comes from now on.
                delivery.restart(one.topic.epoch, one.topic.seq)
            elif not one.recovered:
                self.session.changed.add(one.topic.channel)
            entry["epoch"], entry["seq"] = delivery.epoch, delivery.cursor
        return entry

    def _note_position(self, channel: str) -> None:
        """An acked position has moved: it is saved within a few seconds."""
        self.session.changed.add(channel)
        self.context.keeper.touch(self.session)

    def on_close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self._counted:
            return
        context = self.context
        context.hub.disconnect(self.sink)
        context.disconnect(self)
        for subscription in self.session.subscriptions.values():
            self._let_go(subscription)
        context.keeper.remove(self.session)
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
            if subscription.held is not None:
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
                elif not self.closed:
                    self._waiting[command.channel] = []
                    self.context.spawn(self._act_in_turn(command))
            case Ack():
                subscription = self.session.subscriptions.get(command.channel)
                held = subscription.held if subscription is not None else None
                if held is not None and self.context.node.acknowledge(held, command.epoch, command.seq):
                    self._note_position(command.channel)
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

    async def _act_in_turn(self, command: Subscribe | Unsubscribe) -> None:
        """Do what has to wait for the broker; then what came for the same channel meanwhile."""
        channel = command.channel
        try:
            if isinstance(command, Subscribe):
                await self._subscribe(command)
            else:
                await self._unsubscribe(command)
        except Exception as error:
            if not self.closed:
                self._refuse(_refusal(error, message_id=command.message_id, channel=channel))
        for waiting in self._waiting.pop(channel):
            # The first of them makes the rest wait again.
            self._act(waiting, None)

    async def _subscribe(self, command: Subscribe) -> None:
        node, channel = self.context.node, command.channel
        old = self.session.subscriptions.get(channel)
        if old is not None and not old.rule.persistent:
            self._answer_subscribe(command, old.held.topic, None, False)
            return
        topic = (
            old.held.topic if old else await node.join(channel, self.context.rules.check_subscribe(channel))
        )
        try:
            start, recovered = await node.locate(topic, command.since, command.last)
            subscription = self._place(command, topic, old, start, recovered)
            self.session.subscriptions[channel] = subscription
            await self._save(channel)
        except BaseException:
            if old is None:
                self.session.subscriptions.pop(channel, None)
                node.leave(topic)
            else:
                self.session.subscriptions[channel] = old
            raise
        if self.closed:
            # `on_close` has given back what was attached, and this was not.
            if old is None:
                node.leave(topic)
            else:
                self._let_go(old)
            return
        # From here on in one turn of the loop, so without a gap or an overlap.
        if not _wants_place(command):
            subscription.delivery = self._place(command, topic, old, topic.seq, recovered).delivery
        if old is not None:
            node.detach(old.held)
        self._answer_subscribe(command, topic, subscription.delivery, recovered)
        subscription.held = self._attach(topic, subscription.delivery)

    def _place(
        self, command: Subscribe, topic: Topic, old: Subscription | None, start: int, recovered: bool
    ) -> Subscription:
        """A subscription that begins after `start`, or goes on where the old one stands."""
        if not topic.rule.persistent:
            return Subscription(topic.rule, None)
        epoch = topic.epoch
        if _wants_place(command):
            epoch = command.since.epoch if command.since is not None and recovered else topic.epoch
        elif old is not None and old.delivery is not None:
            if command.ack and old.acks:
                epoch, start = old.delivery.position
            elif old.delivery.behind:
                epoch, start = old.delivery.epoch, old.delivery.cursor
        return Subscription(topic.rule, Delivery(topic.rule, epoch, start, acks=command.ack))

    async def _unsubscribe(self, command: Unsubscribe) -> None:
        session, channel = self.session, command.channel
        subscription = session.subscriptions.pop(channel, None)
        if subscription is not None:
            self._let_go(subscription)
        elif channel not in session.changed:
            raise Refusal("not_subscribed", "There is no subscription to this channel.", channel=channel)
        await self._save(channel)
        self._answer(encode_ack("unsubscribe", now_ms(), messageId=command.message_id, channel=channel))

    async def _save(self, channel: str) -> None:
        """Have a change of subscriptions stored; only then it is acked."""
        self.session.changed.add(channel)
        await self.context.keeper.save(self.session, self.end)

    def _answer_subscribe(
        self, command: Subscribe, topic: Topic, delivery: Delivery | None, recovered: bool
    ) -> None:
        fields: dict[str, object] = {"persistent": delivery is not None}
        if delivery is not None:
            replayed = max(0, topic.seq - delivery.cursor)
            fields |= {"epoch": topic.epoch, "seq": topic.seq, "recovered": recovered, "replayed": replayed}
        elif _wants_place(command):
            fields |= {"recovered": False, "replayed": 0}
        self._answer(
            encode_ack("subscribe", now_ms(), messageId=command.message_id, channel=command.channel, **fields)
        )

    def _attach(self, topic: Topic, delivery: Delivery | None) -> Subscriber:
        subscriber = Subscriber(topic, self.sink, delivery, self._on_lost, self._on_overdue)
        # The answer that was just given comes first.
        self.context.node.attach(subscriber)
        return subscriber

    def _let_go(self, subscription: Subscription) -> None:
        """Give back what a subscription holds, if it has come to that."""
        if subscription.held is not None:
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
