"""What `[server] compression` costs and saves: the same messages, to clients with and without it.

    python bench/compression.py                        # 1000 subscribers, 1 KB of JSON, 50 messages/s
    python bench/compression.py --size 16384 --rate 5

Prints, for each form, the bytes and the server's CPU time of a delivery, and the memory (PSS) of a connection
while it is idle and after all that traffic. The load client of `run.py` cannot do this: it looks for its
marker in the bytes that come, and in compressed ones there is none.
"""

import argparse
import json
import os
import random
import resource
import selectors
import socket
import time
from pathlib import Path

from servers import ROOT, Server, Servers

BUILD = ROOT / "build" / "bench"
WORDS = "open close high low volume price symbol active waiting name user region europe asia update".split()
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n"
)
OFFER = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"


def rows(size: int, source: random.Random) -> list[dict[str, object]]:
    """Some records, `size` bytes of JSON: names that come again, numbers and ids that do not."""
    made: list[dict[str, object]] = []
    while len(json.dumps(made, separators=(",", ":"))) < size:
        record = {source.choice(WORDS): source.randrange(100_000) / 100, "id": source.randbytes(4).hex()}
        made.append({**record, "name": f"{source.choice(WORDS)} {source.choice(WORDS)}"})
    return made


def client_frame(text: str) -> bytes:
    data = text.encode()
    length = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
    return b"\x81" + length + bytes(4) + data


def tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found


def cpu(server: Server) -> float:
    """Seconds of CPU of the server's processes."""
    files = [file for pid in tree(server.pid) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def memory(server: Server) -> int:
    """Bytes (PSS) of the server's processes."""
    text = "".join(Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in tree(server.pid))
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


class Clients:
    """Sockets that read and count bytes."""

    def __init__(self, port: int, count: int, offer: bytes) -> None:
        self._selector = selectors.DefaultSelector()
        self.received = 0
        self.sockets: list[socket.socket] = []
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(HANDSHAKE % offer)
            _read_to(client, b'"op":"connect"')
            client.sendall(client_frame('{"type":"subscribe","channel":"news"}'))
            _read_to(client, b'"op":"subscribe"')
            client.setblocking(False)
            self._selector.register(client, selectors.EVENT_READ)
            self.sockets.append(client)

    def read(self, seconds: float) -> bool:
        """Read what comes within so long; whether anything came."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            self.received += len(key.fileobj.recv(1 << 20))
        return bool(ready)

    def close(self) -> None:
        for client in self.sockets:
            client.close()


def _read_to(client: socket.socket, end: bytes) -> None:
    got = b""
    while end not in got:
        piece = client.recv(65536)
        assert piece, got
        got += piece


def measure(name: str, offer: bytes, options: argparse.Namespace) -> None:
    with Servers(BUILD) as servers:
        server = servers.daemon("compression")
        empty = memory(server)
        clients = Clients(server.port, options.subscribers, offer)
        time.sleep(1)
        idle = memory(server)
        publisher = socket.create_connection(("127.0.0.1", server.port))
        publisher.sendall(HANDSHAKE % b"")
        _read_to(publisher, b'"op":"connect"')
        source = random.Random(1)
        texts = [
            json.dumps({"type": "broadcast", "channel": "news", "data": rows(options.size, source)})
            for _ in range(options.messages)
        ]
        begun, spent = time.monotonic(), cpu(server)
        for number, text in enumerate(texts, 1):
            publisher.sendall(client_frame(text))
            while (left := begun + number / options.rate - time.monotonic()) > 0:
                clients.read(left)
        while clients.read(0.5):
            pass
        spent = cpu(server) - spent
        deliveries = options.messages * options.subscribers
        kb = [(size - empty) / options.subscribers / 1024 for size in (idle, memory(server))]
        print(
            f"{name:<12}{clients.received / deliveries:8.0f} bytes{spent / deliveries * 1e6:8.2f} us"
            f"{kb[0]:8.2f} KB idle{kb[1]:8.2f} KB after",
            flush=True,
        )
        publisher.close()
        clients.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="What compression costs and saves.")
    parser.add_argument("--subscribers", type=int, default=1000)
    parser.add_argument("--size", type=int, default=1024, help="bytes of JSON of a message")
    parser.add_argument("--rate", type=float, default=50, help="messages a second")
    parser.add_argument("--messages", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    BUILD.mkdir(parents=True, exist_ok=True)
    os.environ["BCAST_SERVER_COMPRESSION"] = "yes"
    for _ in range(options.rounds):
        measure("plain", b"", options)
        measure("compressed", OFFER, options)


if __name__ == "__main__":
    main()
