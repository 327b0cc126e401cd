"""One worker process: an event loop, its share of the connections, and an orderly end.

Owns the loop, the heartbeat on the board and the sockets of the clients, each as a stream that is counted for
as long as it is open. What a request means is the business of the application, which a factory makes here,
after the fork.

    startup    broker, node and application (the factory), then the acceptor
    serving    until SIGTERM, which the parent sends
    shutdown   the others take new connections, the clients are sent away, what is under way ends

SIGTERM has one meaning: leave. How depends on what the board says:

- The others go on, and this worker is replaced. They accept in its place, and its clients go to them over
  `drain_seconds`. Should there be none that accepts, this worker does.
- There are no others. Then its clients are sent away at once, or those that have come back would be sent away
  again; it accepts until they have gone, and its successor is there a moment later. They come back over
  `drain_seconds`.
- Everything stops. For `drain_delay` nothing changes but `/health/ready`; then as above, but with an end to
  accepting first.

SIGINT, which a terminal sends to all processes, is for the parent alone. SIGHUP has this
worker look at the board, whether the parent shows other settings there; nobody is disconnected for that.
"""

import asyncio
import gc
import logging
import pickle
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerConnectionDelegate
from tornado.iostream import SSLIOStream
from tornado.netutil import ssl_wrap_socket

from .acceptor import Acceptor
from .board import Board, State
from .capacity import most_connections
from .config import Config
from .eventloop import WorkerLoop
from .farewell import pace
from .reload import take_over
from .stream import ClientStream

logger = logging.getLogger(__name__)

# How long one that has not started yet may take to leave.
STOP_SECONDS = 3.0
# Within how many seconds a client is back that has another worker to go to.
RETURN_SECONDS = 0.4
# How long a connection that was just accepted may take to send its request, and requests under way to end.
REQUEST_SECONDS = 0.3
ANSWER_SECONDS = 1.0
# How long the application may take to close.
CLOSE_SECONDS = 1.0
_POLL_SECONDS = 0.02
# A connection is some dozens of objects that stay. With Python's own thresholds (700, 10, 10) a collection
# comes with every tenth of them, and looks at all that have come before as well.
GC_THRESHOLDS = (20_000, 20, 20)
# Bytes; Tornado's default of 100 MB would be buffered for everybody who sends them.
_MAX_BODY = 64 * 1024


class Handles(NamedTuple):
    """What a worker has of its application."""

    application: HTTPServerConnectionDelegate
    # Takes over what a running worker can.
    configure: Callable[[Config], None]
    # Sends all clients away over so many seconds, each to be back within so many more; returns when they
    # have gone, at most 2 s after the last was told. Who comes meanwhile goes as well.
    send_away: Callable[[float, float], Awaitable[None]]
    # Gives back what the application holds.
    close: Callable[[], Awaitable[None]]


MakeApplication = Callable[[Config, Board, int], Awaitable[Handles]]


def serve(
    config: Config,
    sockets: list[socket.socket],
    board: Board,
    index: int,
    make_application: MakeApplication,
) -> int:
    """Run worker `index` until it is told to leave; 0. To be called in a forked process (daemon.py)."""
    with asyncio.Runner(loop_factory=lambda: WorkerLoop(board.beat)) as runner:
        return runner.run(Worker(config, sockets, board, index, make_application).run())


class Connections:
    """The open streams of this worker, counted on the board: in all, and by the address of the peer.

    It cuts those of which the head of a request does not come in time, by one timer for all: Tornado would
    have one for each request.
    """

    def __init__(self, board: Board, patience: float) -> None:
        self.board = board
        self.streams: set[CountedStream] = set()
        # Seconds that the head of a request may take; 0: as long as it likes.
        self._patience = patience
        # Those that wait for one and since when, the longest first; and what looks at the first of them.
        self._expected: dict[CountedStream, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, stream: "CountedStream") -> None:
        self.streams.add(stream)
        self.board.own_connections = len(self.streams)
        self.board.add_peer(stream.peer)

    def remove(self, stream: "CountedStream") -> None:
        self.streams.remove(stream)
        self.board.own_connections = len(self.streams)
        self.board.remove_peer(stream.peer)

    def set_patience(self, patience: float) -> None:
        self._patience = patience
        self._cut()

    def expect(self, stream: "CountedStream") -> None:
        """It waits for a request, from now until `met`."""
        self._expected[stream] = asyncio.get_running_loop().time()
        if self._timer is None:
            self._cut()

    def met(self, stream: "CountedStream") -> None:
        self._expected.pop(stream, None)

    def _cut(self) -> None:
        """Close those that have waited too long, and come again for the next."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._expected and self._patience:
            stream, since = next(iter(self._expected.items()))
            if (due := since + self._patience) > loop.time():
                self._timer = loop.call_at(due, self._cut)
                return
            del self._expected[stream]
            stream.close()

    def close_idle(self) -> None:
        """Close those that wait for a request. Others are still read, or the answer is to come."""
        for stream in list(self.streams):
            if stream.reading() and not stream.writing() and not stream.busy:
                stream.close()


class CountedStream(ClientStream):
    """A stream that is counted from now until its socket is closed, by whomever and for whatever reason.

    `close_fd` is the one place that every way of closing passes, once. A close callback would not do:
    Tornado's HTTP code takes it away with each request, and a WebSocket leaves the HTTP server altogether.
    """

    __slots__ = ("_connections", "busy", "peer")

    def __init__(
        self, connection: socket.socket, connections: Connections, peer: str, **options: Any
    ) -> None:
        super().__init__(connection, **options)
        self._connections = connections
        # The address under which it is counted.
        self.peer = peer
        # A request is being read or answered; its handler says so.
        self.busy = False
        connections.add(self)

    def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Tornado waits so for the head of a request, and for nothing else."""
        head = super().read_until_regex(regex, max_bytes)
        assert isinstance(head, asyncio.Future)
        if not head.done():
            self._connections.expect(self)
            head.add_done_callback(lambda _: self._connections.met(self))
        return head

    def count_as(self, peer: str) -> None:
        """Count it under another address, as when a trusted proxy tells whom it speaks for."""
        if not self.closed():
            self._connections.remove(self)
            self.peer = peer
            self._connections.add(self)

    def close_fd(self) -> None:
        try:
            super().close_fd()
        finally:
            self._connections.remove(self)


class CountedSSLStream(CountedStream, SSLIOStream):
    """The same over TLS. The handshake is part of the time that a request may take."""


class Worker:
    """See the module. Made in the forked process, before its loop runs."""

    def __init__(
        self,
        config: Config,
        sockets: list[socket.socket],
        board: Board,
        index: int,
        make_application: MakeApplication,
    ) -> None:
        self.config = config
        self.board = board
        self.index = index
        self.connections = Connections(board, config.limits.handshake_timeout)
        self._sockets = sockets
        self._make_application = make_application
        # These come into being in `start`.
        self._tls: ssl.SSLContext | None = None
        self._server: HTTPServer | None = None
        self._acceptor: Acceptor | None = None
        self._handles: Handles | None = None

    async def run(self) -> int:
        leave = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.take_over)
        starting = asyncio.ensure_future(self.start())
        told = asyncio.ensure_future(leave.wait())
        await asyncio.wait({starting, told}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await told
            await self.drain()
        else:
            starting.cancel()
            await asyncio.wait({starting}, timeout=STOP_SECONDS)
        return 0

    async def start(self) -> None:
        """Build everything, then let connections in."""
        server = self.config.server
        if server.certfile:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(server.certfile, server.keyfile)
        self._handles = await self._make_application(self.config, self.board, self.index)
        self._server = HTTPServer(
            self._handles.application,
            # Handlers that have a use for a body set their own bound.
            max_body_size=_MAX_BODY,
            body_timeout=self.config.limits.handshake_timeout or None,
        )
        # See Connections.
        self._server.conn_params.header_timeout = None
        # What was told between the fork and here.
        self.take_over()
        self._acceptor = Acceptor(self._sockets, self.board, self._serve_connection, most_connections())
        # What is here now stays; later collections need not look at it.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        self.board.state = State.SERVING
        self._acceptor.resume()
        logger.info("worker %d serves", self.index, extra={"event": "worker_serving"})

    def take_over(self) -> None:
        """Take over the settings that the parent shows, if they are new. The parent has checked them."""
        if self._handles is None or self._server is None:
            return
        data = self.board.new_settings()
        if data is None:
            return
        self.config = take_over(self.config, pickle.loads(data))
        patience = self.config.limits.handshake_timeout
        self.connections.set_patience(patience)
        self._server.conn_params.body_timeout = patience or None
        self._handles.configure(self.config)
        logger.info("worker %d has taken over new settings", self.index, extra={"event": "settings_taken"})

    async def drain(self) -> None:
        """Leave; see the module."""
        assert self._acceptor is not None and self._handles is not None
        self.board.state = State.DRAINING
        if self.board.stopping:
            # Balancers have time to notice. Nobody else takes the connections that still come.
            await asyncio.sleep(self.config.server.drain_delay)
            self._acceptor.close()
        if self._is_alone() or not await self._hand_over(self._handles.send_away):
            seconds = pace(self.board.sockets(), self.config.server.drain_seconds)
            await self._handles.send_away(0.0, seconds)
        self._acceptor.close()
        await self._end_requests()
        try:
            await asyncio.wait_for(self._handles.close(), CLOSE_SECONDS)
        except Exception:
            logger.exception("the application did not close well", extra={"event": "close_failed"})

    def _is_alone(self) -> bool:
        """Whether no other worker takes connections."""
        return self.board.lowest(besides=self.index) is None

    async def _hand_over(self, send_away: Callable[[float, float], Awaitable[None]]) -> bool:
        """Have the clients go to the other workers. False: everything stops before they have gone."""
        assert self._acceptor is not None
        seconds = pace(self.board.own_sockets, self.config.server.drain_seconds)
        going = asyncio.ensure_future(send_away(seconds, RETURN_SECONDS))
        while not going.done() and not self.board.stopping:
            if self._is_alone():
                self._acceptor.resume()
            else:
                self._acceptor.pause()
            await asyncio.wait({going}, timeout=_POLL_SECONDS)
        if going.done():
            going.result()
            return True
        going.cancel()
        await asyncio.wait({going})
        return False

    async def _end_requests(self) -> None:
        """Wait for requests that are under way, also for those of connections that were just accepted."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while self.connections.streams and loop.time() - begun < ANSWER_SECONDS:
            if loop.time() - begun > REQUEST_SECONDS:
                self.connections.close_idle()
            await asyncio.sleep(_POLL_SECONDS)

    def _serve_connection(self, connection: socket.socket, address: Any) -> None:
        assert self._server is not None
        # A Unix socket has no address; all of its clients count as one peer.
        peer = address[0] if connection.family in (socket.AF_INET, socket.AF_INET6) else ""
        stream: CountedStream
        if self._tls is None:
            stream = CountedStream(connection, self.connections, peer)
        else:
            try:
                wrapped = ssl_wrap_socket(
                    connection, self._tls, server_side=True, do_handshake_on_connect=False
                )
            except OSError:
                # The client has gone already, or sends no TLS.
                connection.close()
                return
            stream = CountedSSLStream(wrapped, self.connections, peer, ssl_options=self._tls)
        self._server.handle_stream(stream, address)
