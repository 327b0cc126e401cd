"""A daemon with a tiny application, for tests with real processes.

    python tests/tiny_daemon.py '{"server": {"workers": "2", "port": "0"}}' DIRECTORY

The first argument has the keys that differ from the defaults, and under `constants` names of daemon.py and
watch.py with other values. Files in DIRECTORY make new workers misbehave: `slow` (they take as many seconds
to start as stand in it), `crash` (they die at once).
"""

import asyncio
import functools
import json
import logging
import os
import socket
import sys
from pathlib import Path

from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler

from tornado_bcast import daemon, logs, watch, worker
from tornado_bcast.board import Board
from tornado_bcast.config import Config, default_config


class Main(RequestHandler):
    async def get(self) -> None:
        """The pid of the worker, after `?sleep=` seconds."""
        await asyncio.sleep(float(self.get_argument("sleep", "0")))
        self.write(str(os.getpid()))


class Slots(RequestHandler):
    def get(self) -> None:
        board: Board = self.settings["board"]
        peers = board.peers("127.0.0.1")
        slots = [slot._asdict() for slot in board.slots()]
        self.write({"slots": slots, "peers": peers, "restarts": board.restarts()})


class RedisUrl(RequestHandler):
    def get(self) -> None:
        self.write(self.settings["redis_url"])


class Hang(RequestHandler):
    def get(self) -> None:
        while True:
            pass


class Echo(WebSocketHandler):
    def open(self) -> None:
        self.settings["clients"].add(self)

    async def on_message(self, message: str | bytes) -> None:
        await self.write_message(message)

    def on_close(self) -> None:
        self.settings["clients"].discard(self)


async def make_application(directory: Path, config: Config, board: Board, index: int) -> worker.Handles:
    if (directory / "crash").exists():
        os._exit(9)
    if (directory / "slow").exists():
        await asyncio.sleep(float((directory / "slow").read_text()))
    clients: set[Echo] = set()
    routes = [("/", Main), ("/slots", Slots), ("/redis", RedisUrl), ("/hang", Hang), ("/ws", Echo)]
    application = Application(
        routes, board=board, clients=clients, redis_url=config.redis.url, log_function=lambda handler: None
    )

    async def send_away(over: float, back: float) -> None:
        for client in list(clients):
            client.close(1012)

    async def close() -> None:
        pass

    return worker.Handles(application, lambda config: None, send_away, close)


def serve(directory: Path, config: Config, sockets: list[socket.socket], board: Board, index: int) -> int:
    logs.configure("json", "INFO", worker=index)
    return worker.serve(config, sockets, board, index, functools.partial(make_application, directory))


def main() -> int:
    logs.configure("json", "INFO")
    logging.getLogger("tornado_bcast").info("hello", extra={"event": "hello"})
    sections = json.loads(sys.argv[1])
    for name, value in sections.pop("constants", {}).items():
        (module,) = [module for module in (daemon, watch) if hasattr(module, name)]
        setattr(module, name, value)
    config = default_config(**sections)
    return daemon.run(config, serve=functools.partial(serve, Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(main())
