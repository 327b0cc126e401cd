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
from ..session import Session
from ..sink import Sink, SlowConsumer
from .base import BaseHandler, new_id, now_ms
from .subscriptions import Restored, Subscriptions, make_refusal
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
    next_ping: float
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
        if self.context.closing:
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
        self.subscriptions = Subscriptions(context, self)
        session_id = self._offered_session()
        session = None
        try:
            if session_id is not None:
                session = await context.keeper.resume(session_id, "")
            restored, refused = await self.subscriptions.restore(session)
        except Unavailable as error:
            # Never `resumed: false` then: the session may well be there.
            self.end_for_now(CloseCode.TRY_AGAIN_LATER, 2 * error.retry_after)
            return
        if self.closed:
            self.subscriptions.give_back(restored)
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
        restored: list[Restored],
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
        self.answer(
            encode_ack(
                "connect",
                now_ms(),
                clientId=self.session.client_id,
                session=self.session.id,
                resumed=session is not None,
                heartbeat=round(context.config.heartbeat.interval * 1000),
                subscriptions=[self.subscriptions.entry(one) for one in restored],
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
        self.subscriptions.begin(restored)
        context.hub.connect(self.sink)
        context.keeper.add(self.session, self.end)
        if self.session.changed:
            context.keeper.touch(self.session)

    def on_close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self._counted:
            return
        context = self.context
        context.hub.disconnect(self.sink)
        context.disconnect(self)
        self.subscriptions.close()
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
        """The same with a reason that says when to come back, within so many ms: another time for each."""
        self.end(
            code, dump({"retryAfter": round(retry_after * random.uniform(0.1, 1.0))}).decode(), flush=flush
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
        size = self.context.config.limits.max_message_bytes
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
            self.session.pay(self.context.config.limits, self.seen)
        except Refusal as limit:
            limit.message_id = refusal.message_id
            refusal = limit
        self.refuse_command(refusal)

    # What the sink tells

    def on_slow(self) -> None:
        logger.info("a slow consumer is disconnected", extra=self._extra("slow_consumer"))
        self.context.metrics.drop("disconnected")
        self.end_for_now(CloseCode.SLOW_CONSUMER, 2000, flush=False)

    def on_drained(self) -> None:
        # What waited has been taken by the peer's kernel: it is alive, though it may say nothing.
        self.seen = time.monotonic()
        self.wire.pong()
        if self._counted:
            self.subscriptions.advance()

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        self.context.metrics.drop(policy, count)

    # Commands

    def _act(self, command: Command, rule: ChannelRule | None) -> None:
        match command:
            case Broadcast():
                assert rule is not None
                self._broadcast(command, rule)
            case Subscribe() | Unsubscribe():
                self.subscriptions.receive(command)
            case Ack():
                self.subscriptions.acknowledge(command)
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
                self.answer(
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
            self.refuse_command(make_refusal(error, message_id=message_id, channel=channel))

    # Answers

    def answer(self, payload: bytes) -> None:
        if not self.wire.is_closing():
            self.sink.answer(frame(payload))

    def refuse_command(self, refusal: Refusal, command: Command | None = None) -> None:
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

    def write_error(self, status_code: int, **kwargs: object) -> None:
        if status_code == 405:
            self.set_header("Allow", "GET, OPTIONS")
        super().write_error(status_code, **kwargs)

    def head(self, *args: str) -> None:
        raise HTTPError(405)
