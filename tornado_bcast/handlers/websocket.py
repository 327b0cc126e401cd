"""The entrance of WebSocket connections: who may upgrade, and the page for those who do not.

The only WebSocket handler. It lives as long as the handshake; the connection is in connection.py.
"""

from importlib.resources import files

from tornado.iostream import IOStream
from tornado.websocket import WebSocketHandler

from ..compression import negotiate
from ..errors import Refusal
from ..protocol import SUBPROTOCOL
from ..stream import ClientStream
from .base import BaseHandler
from .connection import Connection
from .wire import Handshake

# The page at `/` in development: one file, all of it inline, and nothing from elsewhere.
_PAGE = files(__package__.rpartition(".")[0]).joinpath("page.html")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self' ws: wss:;"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A subprotocol that begins so asks to resume the session whose id follows, or has the token.
_SESSION_PREFIX = "session."
_TOKEN_PREFIX = "bearer."


class SocketHandler(BaseHandler, WebSocketHandler):
    """Made for each request to `/` and `/ws`."""

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
        self._count_as_client()
        try:
            self._find_room()
        except Refusal as refusal:
            self.refuse(refusal, kind="limit")

    def _find_room(self) -> None:
        server = self.context.config.server
        board = self.context.board
        self.context.overload.check()
        if board.own_sockets >= self.context.own_capacity or board.sockets() >= self.context.capacity:
            raise Refusal(
                "unavailable",
                "There is no room for more connections; try again later.",
                setting="[server] max_connections",
            )
        if 0 < server.max_connections_per_ip < board.peers(self.remote_ip):
            raise Refusal(
                "rate_limited",
                "There are too many connections from your address; close some.",
                setting="[server] max_connections_per_ip",
            )

    def _count_as_client(self) -> None:
        """Behind a trusted proxy the connection counts for the one that it was made for."""
        self._count_as(self.remote_ip)

    def _count_as(self, address: str) -> None:
        if self.context.config.server.trusted_proxies and (stream := self.counted_stream) is not None:
            stream.count_as(address)

    def on_finish(self) -> None:
        super().on_finish()
        # Without an upgrade the proxy may send another client's request next.
        if self.get_status() != 101:
            self._count_as(self.request.remote_ip or "")

    def check_origin(self, origin: str) -> bool:
        # `prepare` has refused foreign ones.
        return True

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return SUBPROTOCOL if SUBPROTOCOL in subprotocols else None

    def get_websocket_protocol(self) -> Handshake | None:
        if self.request.headers.get("Sec-WebSocket-Version") != "13":
            return None
        return Handshake(self)

    def accept(self, accept_value: str) -> IOStream:
        """Take the stream, with the head of the 101 (RFC 6455, section 4.2.2) as its first bytes to send."""
        offered = self.request.headers.get("Sec-WebSocket-Protocol")
        chosen = self.select_subprotocol([name.strip() for name in offered.split(",")]) if offered else None
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {accept_value}",
        ]
        if chosen is not None:
            lines.append(f"Sec-WebSocket-Protocol: {chosen}")
        extensions = self.request.headers.get("Sec-WebSocket-Extensions")
        agreed = negotiate(extensions) if extensions and self.context.config.server.compression else None
        self._compressed = agreed is not None
        if agreed is not None:
            lines.append(f"Sec-WebSocket-Extensions: {agreed}")
        own = ("Connection", "Content-Type")
        lines += [f"{name}: {value}" for name, value in self._headers.get_all() if name not in own]
        # From here on the connection has its own way to be waited for.
        self.set_busy(False)
        self._head = "\r\n".join((*lines, "\r\n")).encode("latin-1")
        return self._detach_stream()

    def open(self, *args: str, **kwargs: str) -> None:
        """The handshake is done: from here on the stream belongs to a Connection."""
        stream = self.ws_connection and self.ws_connection.stream
        assert isinstance(stream, ClientStream)  # worker.py makes them.
        # Where it is closed, the peer did not wait for the answer.
        if not stream.closed():
            connection = Connection(self.context, stream, compressed=self._compressed)
            connection.start(self._head, self._offered_session(), self._offered_token())
        # What Tornado leaves to the end of the connection: this handler's end is here.
        self.ws_connection = None
        self._on_close_called = True
        self._break_cycles()

    def _offered_session(self) -> str | None:
        """The secret id of the session to resume, by subprotocol or query."""
        session = self._offered(_SESSION_PREFIX)
        return self.get_query_argument("session", None) if session is None else session

    def _offered(self, prefix: str) -> str | None:
        """What stands after this prefix in a subprotocol."""
        offered = self.request.headers.get("Sec-WebSocket-Protocol", "")
        for name in offered.split(","):
            if name.strip().startswith(prefix):
                return name.strip().removeprefix(prefix)
        return None

    def _offered_token(self) -> str | None:
        """The first of: subprotocol, header, query."""
        token = self._offered(_TOKEN_PREFIX)
        if token is None:
            token = self.bearer()
        return self.get_query_argument("token", None) if token is None else token
