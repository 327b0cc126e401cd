"""The entrances: the only WebSocketHandler and RequestHandlers of the package."""

from typing import Any

from tornado.web import Application

from .base import BaseHandler, Context, NotFoundHandler
from .broadcast import BroadcastHandler
from .status import ChannelsHandler, HealthHandler, HistoryHandler, MetricsHandler, StatsHandler
from .websocket import SocketHandler

__all__ = ["make_routes"]


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
    return Application(
        routes,
        default_handler_class=NotFoundHandler,
        default_handler_args=own,
        log_function=_log_nothing,
    )


def _log_nothing(handler: BaseHandler) -> None:
    """No access log: a line for each request is a proxy's work, and its query may hold a token."""
