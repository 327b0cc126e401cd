"""The entrances: the only WebSocketHandler and RequestHandlers of the package."""

from collections.abc import Awaitable
from typing import Any

from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.web import Application

from .base import BaseHandler, NotFoundHandler
from .broadcast import BroadcastHandler
from .context import Context
from .status import ChannelsHandler, HealthHandler, HistoryHandler, MetricsHandler, StatsHandler
from .websocket import SocketHandler

__all__ = ["make_routes"]


class Entrances(Application):
    """The application, with a shorter way for what comes most often: the upgrade of a WebSocket.

    Such a request has no body, so its handler need not wait for one in a task of its own: it runs where its
    headers were read, to the end of the handshake.
    """

    def find_handler(  # type: ignore[override]  # Tornado's Router says HTTPMessageDelegate.
        self, request: HTTPServerRequest, **options: Any
    ) -> HTTPMessageDelegate:
        headers = request.headers
        if (
            request.path in ("/ws", "/")
            and request.method == "GET"
            and headers.get("Upgrade", "").lower() == "websocket"
            and "Content-Length" not in headers
            and "Transfer-Encoding" not in headers
        ):
            return _Upgrade(SocketHandler(self, request, context=self.settings["context"]))
        return super().find_handler(request, **options)


class _Upgrade(HTTPMessageDelegate):
    def __init__(self, handler: SocketHandler) -> None:
        self._handler = handler

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None]:
        return self._handler._execute([])

    def finish(self) -> None:
        """There was no body."""

    def on_connection_close(self) -> None:
        """The handler is done before anybody looks for this."""


def make_routes(context: Context) -> Application:
    """The Tornado application over all entrances, for one worker."""
    own = {"context": context}
    routes: list[Any] = [
        (r"/(?:ws)?", SocketHandler, own),
        (r"/broadcast", BroadcastHandler, own),
        (r"/health(?:/(live|ready))?", HealthHandler, own),
        (r"/stats", StatsHandler, own),
        (r"/metrics", MetricsHandler, own),
        (r"/channels", ChannelsHandler, own),
        (r"/channels/(.+)/history", HistoryHandler, own),
    ]
    return Entrances(
        routes,
        default_handler_class=NotFoundHandler,
        default_handler_args=own,
        log_function=_log_nothing,
        context=context,
    )


def _log_nothing(handler: BaseHandler) -> None:
    """No access log: a line for each request is a proxy's work, and its query may hold a token."""
