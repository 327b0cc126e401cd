"""Clients for tests that know nothing of the package: WebSocket on `websockets`, and both on bare sockets."""

import asyncio
import json
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable, Mapping
from itertools import count
from struct import pack
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import websockets
from planted import PLANTED
from websockets.asyncio.client import ClientConnection, connect

T = TypeVar("T")
Event = dict[str, Any]

# Seconds that a test waits for something that must come.
PATIENCE = 10.0


async def eventually(
    ask: Callable[[], Awaitable[T]], wanted: Callable[[T], Any], seconds: float = PATIENCE
) -> T:
    """Ask again and again until the answer is the wanted one."""
    async with asyncio.timeout(seconds):
        while not wanted(answer := await ask()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return answer


class Client:
    """A connection of `bcast.v1`. It reads all the time; answers are found by their `messageId`.

        async with Client(daemon.ws_url) as client:
            await client.ask("subscribe", channel="news")
            event = await client.message()

    `frames` has everything that came, in order.
    """

    _ids = count()

    def __init__(
        self,
        url: str,
        path: str = "/ws",
        *,
        protocols: list[str] | None = None,
        origin: str | None = None,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        PLANTED.add(*protocols or ())
        PLANTED.add_request(path, headers)
        self._connecting = connect(
            url + path,
            subprotocols=protocols,  # type: ignore[arg-type]
            origin=origin,  # type: ignore[arg-type]
            additional_headers=headers,
            compression=None,
            ping_interval=None,
            max_size=None,
            max_queue=None,
            open_timeout=PATIENCE,
            close_timeout=PATIENCE,
            proxy=None,
            ssl=tls,
        )
        self.socket: ClientConnection
        self.frames: list[Event] = []
        # Where `next` goes on, and where `find` ended.
        self._read = 0
        self._found = 0
        self._came = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        # The first frame.
        self.hello: Event = {}

    async def __aenter__(self) -> Self:
        self.socket = await self._connecting
        self._reader = asyncio.create_task(self._receive())
        self.hello = await self.next()
        PLANTED.add_frame(self.hello)
        assert (self.hello["type"], self.hello["op"]) == ("ack", "connect"), self.hello
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.socket.close()
        if self._reader is not None:
            await self._reader

    async def _receive(self) -> None:
        try:
            async for text in self.socket:
                assert isinstance(text, str)
                self.frames.append(json.loads(text))
                self._came.set()
        except websockets.ConnectionClosed:
            pass
        finally:
            self._came.set()

    async def send(self, **frame: Any) -> None:
        PLANTED.add_frame(frame)
        await self.socket.send(json.dumps(frame))

    async def send_text(self, text: str | bytes) -> None:
        await self.socket.send(text)

    async def next(self, wanted: Callable[[Event], bool] = lambda event: True) -> Event:
        """The next frame that is wanted, after the last one that was returned; heartbeats are passed over."""
        event = await self.find(lambda event: event["type"] != "ping" and wanted(event), self._read)
        self._read = self._found + 1
        return event

    async def ask(self, type: str, **fields: Any) -> Event:
        """Send a request and return its ack or error. What comes before it stays to be read."""
        message_id = fields.setdefault("messageId", f"ask{next(self._ids)}")
        seen = len(self.frames)
        await self.send(type=type, **fields)
        return await self.find(
            lambda event: event["type"] in ("ack", "error") and event.get("messageId") == message_id, seen
        )

    async def error(self, text: str | bytes) -> Event:
        """Send a frame as it is, and return the error that comes next."""
        seen = len(self.frames)
        await self.send_text(text)
        return await self.find(lambda event: event["type"] == "error", seen)

    async def find(self, wanted: Callable[[Event], bool], position: int = 0) -> Event:
        """Wait for a frame that is wanted, among all from `position` on. It stays to be read."""
        async with asyncio.timeout(PATIENCE):
            while True:
                while position < len(self.frames):
                    if wanted(self.frames[position]):
                        self._found = position
                        return self.frames[position]
                    position += 1
                assert self._reader is not None
                if self._reader.done():
                    raise ConnectionError(f"closed with {self.socket.close_code}: {self.frames[-5:]}")
                self._came.clear()
                await self._came.wait()

    async def message(self) -> Event:
        """The next `message`."""
        return await self.next(lambda event: event["type"] == "message")

    async def messages(self, number: int) -> list[Any]:
        """The `data` of so many next messages."""
        return [(await self.message())["data"] for _ in range(number)]

    async def is_alive(self) -> bool:
        """Whether the server still answers here; everything sent to this connection before has come then."""
        answer = await self.ask("unsubscribe", channel="nobody-subscribes-to-this")
        return bool(answer["code"] == "not_subscribed")

    async def closed(self, seconds: float = PATIENCE) -> tuple[int | None, str]:
        """Wait for the server to close; its code and reason."""
        async with asyncio.timeout(seconds):
            await self.socket.wait_closed()
        return self.socket.close_code, self.socket.close_reason or ""


def client_frame(
    payload: bytes = b"",
    opcode: int = 1,
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x01\x80\xff\x00",
    length: bytes | None = None,
) -> bytes:
    """A frame as a client sends it, or one that none should. `length` stands in place of the true one."""
    first = fin << 7 | rsv << 4 | opcode
    size = len(payload)
    if length is None:
        small = size if size < 126 else 126 if size < 1 << 16 else 127
        length = bytes([small]) + (b"" if size < 126 else pack("!H" if small == 126 else "!Q", size))
    masked = length[0] | (0x80 if mask is not None else 0)
    body = payload
    if mask is not None and any(mask):
        # As one operation on two long integers: the fuzz makes many.
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        body = (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")
    return bytes([first, masked]) + length[1:] + (mask or b"") + body


def handshake(host: str, path: str = "/ws", headers: Mapping[str, str | None] | None = None) -> bytes:
    """The request of a WebSocket client. `headers` as in `http`."""
    fields: dict[str, str | None] = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    PLANTED.add_request(path, fields)
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"GET {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


class Raw:
    """A WebSocket connection of single frames, that reads and answers nothing unless told to.

    `window`: bytes that the kernel may hold for it. `extensions`: what it offers; compressed frames are
    unpacked then, each by itself, and `compressed` has their sizes.
    """

    def __init__(self, url: str, *, window: int | None = None, extensions: str | None = None) -> None:
        parts = urlsplit(url)
        self._host = parts.netloc
        self._address = (parts.hostname, parts.port)
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._extensions = extensions
        # What the server has agreed to.
        self.agreed: str | None = None
        self.compressed: list[int] = []
        if window is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self._buffer = b""

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        offer = {"Sec-WebSocket-Extensions": self._extensions}
        await loop.sock_sendall(self._socket, handshake(self._host, headers=offer))
        head = await self._until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head
        for line in head.decode().split("\r\n"):
            name, _, value = line.partition(": ")
            if name.lower() == "sec-websocket-extensions":
                self.agreed = value
        opcode, payload = await self.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "connect"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._socket.close()

    def abort(self) -> None:
        """Close it so that the other end is told of a reset."""
        if self._socket.fileno() >= 0:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
            self._socket.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def send_json(self, **frame: Any) -> None:
        await self.send(client_frame(json.dumps(frame).encode()))

    async def subscribe(self, channel: str) -> None:
        await self.send_json(type="subscribe", channel=channel)
        opcode, payload = await self.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe", payload

    async def frame(self) -> tuple[int, bytes]:
        """The next frame; ConnectionError when there is none any more."""
        head = await self._read(2)
        size = head[1]
        opcode, packed = head[0] & 0x0F, head[0] & 0x70 != 0
        assert head[0] & 0x30 == 0 and size < 128, "other extensions and masks are not for servers"
        assert not packed or (self.agreed and opcode in (1, 2)), "compressed, and not agreed on"
        if size == 126:
            size = int.from_bytes(await self._read(2), "big")
        elif size == 127:
            size = int.from_bytes(await self._read(8), "big")
        payload = await self._read(size)
        if packed:
            self.compressed.append(size)
            payload = zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")
        return opcode, payload

    async def close_code(self) -> tuple[int, str]:
        """Pass over everything up to the close frame; its code and reason."""
        while (frame := await self.frame())[0] != 8:
            pass
        return int.from_bytes(frame[1][:2], "big"), frame[1][2:].decode()

    async def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._receive()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    async def _until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            await self._receive()
        data, _, self._buffer = self._buffer.partition(end)
        return data

    async def _receive(self) -> None:
        async with asyncio.timeout(PATIENCE):
            data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
        if not data:
            raise ConnectionError("closed")
        self._buffer += data


class Answer(NamedTuple):
    status: int
    # Names in lower case.
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def http(
    url: str,
    method: str,
    path: str,
    body: bytes | str | list[Any] | dict[str, Any] | None = None,
    headers: Mapping[str, str | None] | None = None,
    *,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """One request on a connection of its own. `headers` replace what would be sent, None leaves one out."""
    parts = urlsplit(url)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    fields: dict[str, str | None] = {"Host": parts.netloc, "Connection": "close"}
    if data is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
    fields |= headers or {}
    PLANTED.add_request(path, fields, body)
    head = f"{method} {path} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return await raw_http(url, head.encode() + b"\r\n" + (data or b""), tls=tls)


async def raw_http(url: str, request: bytes, *, tls: ssl.SSLContext | None = None) -> Answer:
    """Send bytes and read one answer, until the server closes or its Content-Length is there."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=tls)
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(request)
            status_line = await reader.readline()
            assert status_line, "closed without an answer"
            headers: dict[str, str] = {}
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                headers[name.strip().lower()] = value.strip()
            bare = request.startswith(b"HEAD ") or status_line.split()[1] in (b"101", b"204")
            length = 0 if bare else int(headers.get("content-length", "-1"))
            body = await (reader.read() if length < 0 else reader.readexactly(length))
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            pass
    return Answer(int(status_line.split()[1]), headers, body)
