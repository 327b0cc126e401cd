"""What anyone may send: scripts for one connection each, made from a seed and a number.

    script(seed=1, number=17).chunks

Knows no socket. The same seed and number give the same script, but for the times in its tokens, so a failing
one can be had again. Most inputs travel many to a connection; those that end one come alone.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jwt
from client import client_frame, handshake

SECRET = "a secret of the fuzz alone, long enough"
HOST = "localhost"
MAX_MESSAGE = 16 * 1024

# The daemon that is fuzzed: every rule has its channels, and nothing is refused for being too much.
INI = f"""
[limits]
rate = 0
max_message_bytes = {MAX_MESSAGE}
max_subscriptions = 20
handshake_timeout = 5s
[auth]
jwt_secret = {SECRET}
[session]
ttl = 1m
[channels]
subscribe = anyone
publish = anyone
dedup_ttl = 1m
[channel kept.*]
persistent = yes
history_size = 20
ack_timeout = 200ms
[channel signed.*]
sender = yes
subscribe = token
publish = token
[channel latest.*]
slow_consumer = latest
[channel closed.*]
subscribe = nobody
publish = server
"""


@dataclass(frozen=True, slots=True)
class Script:
    """What one connection sends."""

    kind: str
    number: int
    # One write each.
    chunks: list[bytes]
    # Frames, requests or handshakes in it.
    inputs: int
    # Of a WebSocket: ids of requests each of which must be answered exactly once.
    asked: tuple[str, ...] = ()
    # Of HTTP: the methods of requests each of which must be answered, unless the connection ends before.
    methods: tuple[str, ...] = ()
    # The server is left to find out by itself that nothing more comes.
    silent: bool = False


# JSON texts, some of which are none.
ODD = (
    *("null", "true", "false", "0", "-0", "1", "-1", "0.5", "1e400", "-1e400", "1e-400", "NaN", "Infinity"),
    *("-Infinity", "9007199254740991", "9007199254740992", "18446744073709551616", "-9223372036854775809"),
    *('""', '"a"', r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', '"é\u2028"', r'"\ud83d\ude00"', "[]", "{}"),
    *("[1,[2,[3]]]", '{"a":1,"a":2}', '{"":{"":{}}}', "01", "+1", ".5", "1.", "0x1", "tru", "'a'", r'"\x"'),
    *('"a', "[1,", "{", '{"a"', "\ufeff1", "1 2", '"\t"', "", " ", "/**/1", '{"__proto__":1}'),
    *('"\U0010ffff"', '{"epoch":"x","seq":1}', '{"epoch":"x","seq":9007199254740992}', '{"seq":-1}'),
)  # fmt: skip
CHANNELS = (
    *("", " ", "$", "$all", "$workers", "a b", "é", "a\x00b", "{a}", "a}b", "*", "?", "/", "..", "a" * 255),
    *("a" * 256, "closed.1", "%2F", "a\r\nb", "[x]", "kept.", ".", "a" * 5000),
)
IDS = ("", " ", "a" * 128, "a" * 129, "é", "a\nb", "\x7f", "m-1", "\x00")
TYPES = ("subscribe", "unsubscribe", "broadcast", "ack", "pong", "auth")
HEADERS = (
    *("Origin: https://any.example", "Origin: null", "Origin: ", "X-Forwarded-For: 1.2.3.4, x"),
    *("X-Real-IP: ::1", "Forwarded: for=1", "Via: 1.1 a"),
    *("X-API-Key: wrong", "Authorization: Bearer x", "Authorization: Basic YTpi", "Authorization: "),
    *("Idempotency-Key: k", "Idempotency-Key: \xe9", "Cookie: a=b; c", "Connection: keep-alive"),
    *("Content-Encoding: gzip", "Accept-Encoding: gzip, br", "Range: bytes=0-1", "If-None-Match: *"),
    *("Content-Type: multipart/form-data; boundary=b", "Content-Type: multipart/form-data"),
    *("Content-Type: application/x-www-form-urlencoded", "Content-Type: \x80", "X-" + "a" * 500 + ": b"),
    *("Sec-WebSocket-Key: x", "Upgrade: h2c", "Accept-Language: " + "x," * 300),
)
# The headers before this one make a request foreign.
FOREIGN = HEADERS.index("X-API-Key: wrong")
PATHS = (
    *("/", "/ws", "/health", "/health", "/health/live", "/health/ready", "/health?deep=1", "/channels"),
    *("/stats", "/metrics", "/broadcast", "/channels/kept.1/history", "/channels/kept.1/history?since=1"),
    *("/channels/kept.2/history?since=9007199254740992&epoch=x", "/channels/kept.2/history?limit=-1"),
    *("/channels/kept.3/history?limit=\xe9", "/channels/a%20b/history", "/channels/%ff/history"),
    *("/channels/closed.1/history?epoch=%00", "/%2e%2e/", "/health?deep=%ff", "/ws?token=x&session=%ff"),
    *("/?" + "a=b&" * 200, "//health", "/health/", "/health;x", "*", "http://localhost/health", "//"),
)  # fmt: skip
METHODS = ("GET", "GET", "GET", "POST", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH")


def smuggled(head: str, body: str, *, method: str = "POST") -> bytes:
    """A request whose end two servers might see in two places."""
    return f"{method} /broadcast HTTP/1.1\r\nHost: {HOST}\r\n{head}\r\n\r\n{body}".encode("latin-1")


_BODY = '{"channel":"fuzz.1","data":1}'
_CHUNKED = f"{len(_BODY):x}\r\n{_BODY}\r\n0\r\n\r\n"
_HIDDEN = f"GET /health/live HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
_LONG = f"Content-Length: {len(_CHUNKED) + len(_HIDDEN)}"
# Each must be refused, and nothing of what follows may be answered.
SMUGGLING = {
    "length and chunks": smuggled(f"{_LONG}\r\nTransfer-Encoding: chunked", _CHUNKED + _HIDDEN),
    "chunks and length": smuggled("Transfer-Encoding: chunked\r\nContent-Length: 4", _CHUNKED + _HIDDEN),
    "two lengths": smuggled("Content-Length: 4\r\nContent-Length: 5", "1234" + _HIDDEN),
    "two lengths in one": smuggled("Content-Length: 4, 5", "1234" + _HIDDEN),
    "a folded line": smuggled("X-A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 4", "1234" + _HIDDEN),
    "a folded value": smuggled("Transfer-Encoding:\r\n chunked", _CHUNKED + _HIDDEN),
    "a space before the colon": smuggled("Transfer-Encoding : chunked", _CHUNKED + _HIDDEN),
    "no colon": smuggled("Transfer-Encoding chunked", _CHUNKED + _HIDDEN),
    "another coding": smuggled("Transfer-Encoding: xchunked", _CHUNKED + _HIDDEN),
    "two codings": smuggled("Transfer-Encoding: chunked, identity", _CHUNKED + _HIDDEN),
    "a coding twice": smuggled(
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", _CHUNKED + _HIDDEN
    ),
    "a tab in the coding": smuggled("Transfer-Encoding: \x0bchunked", _CHUNKED + _HIDDEN),
    "a length with a sign": smuggled("Content-Length: +4", "1234" + _HIDDEN),
    "a length with a point": smuggled("Content-Length: 4.0", "1234" + _HIDDEN),
    "a length in hex": smuggled("Content-Length: 0x4", "1234" + _HIDDEN),
    "a length with a bar": smuggled("Content-Length: 1_0", "1234567890" + _HIDDEN),
    "a length in other digits": smuggled("Content-Length: \xb2", "12" + _HIDDEN),
    "a negative length": smuggled("Content-Length: -1", _HIDDEN),
    "an empty length": smuggled("Content-Length: ", _HIDDEN),
    "a huge length": smuggled("Content-Length: 99999999999999999999", _HIDDEN),
    "a chunk extension": smuggled("Transfer-Encoding: chunked", f"2;a=b\r\n{{}}\r\n0\r\n\r\n{_HIDDEN}"),
    "a chunk with a sign": smuggled("Transfer-Encoding: chunked", f"+2\r\n{{}}\r\n0\r\n\r\n{_HIDDEN}"),
    "a chunk in 0x": smuggled("Transfer-Encoding: chunked", f"0x2\r\n{{}}\r\n0\r\n\r\n{_HIDDEN}"),
    "a chunk with a bar": smuggled("Transfer-Encoding: chunked", f"0_2\r\n{{}}\r\n0\r\n\r\n{_HIDDEN}"),
    "a chunk that ends late": smuggled("Transfer-Encoding: chunked", f"2\r\n{{}}x\r\n0\r\n\r\n{_HIDDEN}"),
    "a trailer": smuggled("Transfer-Encoding: chunked", f"2\r\n{{}}\r\n0\r\nX: y\r\n\r\n{_HIDDEN}"),
    "two hosts": smuggled("Host: other\r\nContent-Length: 2", "{}" + _HIDDEN),
    "a zero byte": smuggled("X-A: \x00\r\nContent-Length: 2", "{}" + _HIDDEN),
    "a bare CR": smuggled("X-A: b\rContent-Length: 2", "{}" + _HIDDEN),
}  # fmt: skip


class Maker:
    """Makes the pieces of one script from its own random numbers."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(seed << 40 | number)
        self.number = number
        # Requests with an answer that is waited for.
        self.asked: list[str] = []

    def one(self, chance: float = 0.5) -> bool:
        return self.random.random() < chance

    # JSON

    def value(self) -> str:
        """The JSON text of any value, or nearly."""
        kind = self.random.random()
        if kind < 0.7:
            return self.random.choice(ODD)
        if kind < 0.72:
            depth = self.random.choice((3, 100, 900, 1100, 4000))
            opening, closing = self.random.choice((("[", "]"), ('{"a":', "}"), ("[", "")))
            return opening * depth + "1" + closing * depth
        if kind < 0.75:
            return self.random.choice('[{"1 ') * self.random.randrange(1, 3000)
        if kind < 0.9:
            return f"[{','.join(self.random.choices(ODD, k=self.random.randrange(4)))}]"
        return f'{{"{self.text()}":{self.random.choice(ODD)},"n":{self.number}}}'

    def text(self) -> str:
        """A few characters, from anywhere."""
        some = ("ab", "é", "\u2028", "\U0001f600", "</script>", "%s{}", "\x7f", "'", " ", "kept", "0")
        return "".join(self.random.choices(some, k=self.random.randrange(6)))

    def channel(self) -> str:
        kind = self.random.choice(("fuzz", "kept", "signed", "latest"))
        return f"{kind}.{self.number % 50}" if self.one(0.85) else self.random.choice(CHANNELS)

    def token(self) -> str:
        token = self.random.choice(tokens())
        return token if self.one(0.3) else self.mutated(token.encode()).decode("latin-1")

    def quoted(self, text: str) -> str:
        """As a JSON string."""
        return '"' + "".join(f"\\u{ord(c):04x}" if c in '"\\' or c < " " else c for c in text) + '"'

    def fields(self) -> dict[str, str]:
        """Name -> JSON text of the fields of a frame that makes sense, but for one or another."""
        kind = self.random.choice(TYPES)
        fields = {"type": f'"{kind}"'}
        if kind in ("subscribe", "unsubscribe", "broadcast", "ack"):
            fields["channel"] = self.quoted(self.channel())
        if kind == "broadcast":
            fields["data"] = self.value()
        if kind == "auth":
            fields["token"] = self.quoted(self.token())
        if kind == "ack":
            fields["seq"] = self.random.choice(("0", "1", "5", "9007199254740991", "9007199254740992", "-1"))
        if kind == "subscribe":
            more = {"ack": "true", "last": "3", "since": '{"epoch":"x","seq":0}'}
            fields |= {name: text for name, text in more.items() if self.one(0.3)}
        if kind != "pong" and self.one(0.6):
            fields["messageId"] = self.quoted(
                self.random.choice(IDS) if self.one(0.2) else f"i{self.random.random()}"
            )
        while self.one(0.25):
            name = self.random.choice((*fields, "ack", "since", "last", "seq", "epoch", "data", self.text()))
            fields[name] = self.value()
        return fields

    def frame_text(self) -> str:
        """A text frame, of which a part is no JSON at all."""
        if self.one(0.03):
            return self.value()
        pairs = [f"{self.quoted(name)}:{text}" for name, text in self.fields().items()]
        if self.one(0.1):
            pairs.insert(self.random.randrange(len(pairs) + 1), self.random.choice(pairs))
        if self.one(0.1):
            self.random.shuffle(pairs)
        text = "{" + self.random.choice((",", ", ", "\n,\t")).join(pairs) + "}"
        if self.one(0.1):
            cut = self.random.randrange(len(text))
            return text[:cut] + self.text() + text[cut + self.random.randrange(3) :]
        return text

    def request(self) -> str:
        """A request in the form of the protocol, whose answer is waited for."""
        self.asked.append(f"q{self.number}-{len(self.asked)}")
        channel = f"{self.random.choice(('fuzz', 'kept', 'closed'))}.{self.number % 50}"
        what = self.random.choice(("subscribe", "unsubscribe", 'broadcast","data":1,"x":"'))
        return f'{{"messageId":"{self.asked[-1]}","channel":"{channel}","type":"{what}"}}'

    # WebSocket

    def mask(self) -> bytes:
        return b"\0\0\0\0" if self.one() else self.random.randbytes(4)

    def well_framed(self, text: str) -> bytes:
        """A message, in one frame or in some with others between them."""
        data = text.encode(errors="replace")[:MAX_MESSAGE].decode(errors="ignore").encode()
        if self.one(0.9):
            return client_frame(data, mask=self.mask())
        cuts = sorted(self.random.randrange(len(data) + 1) for _ in range(self.random.randrange(1, 5)))
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        out = b""
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            out += client_frame(piece, 0 if index else 1, fin=last, mask=self.mask())
            if not last and self.one(0.3):
                control = self.random.choice((9, 10))
                out += client_frame(self.random.randbytes(self.random.randrange(126)), control)
        return out

    def misframed(self) -> bytes:
        """A frame that none should send."""
        some = self.random.randbytes(self.random.choice((0, 1, 2, 5, 125, 126, 300)))
        first: tuple[Callable[[], bytes], ...] = (
            lambda: client_frame(some, 1, mask=None),
            lambda: client_frame(b'{"type":"pong"}', 1, rsv=self.random.randrange(1, 8)),
            lambda: client_frame(some, self.random.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15))),
            lambda: client_frame(some, self.random.choice((8, 9, 10)), fin=self.one()),
            lambda: client_frame(self.random.randrange(65536).to_bytes(2, "big") + some[:100], 8),
            lambda: client_frame(some, 0, fin=self.one()),
            lambda: client_frame(b"a", 1, fin=False) + client_frame(b"b", self.random.choice((1, 2))),
            lambda: client_frame(some, 1),
            lambda: client_frame(some, 1, length=b"\x7f" + self.random.randbytes(8)),
            lambda: client_frame(some, 1, length=b"\x7e" + self.random.randbytes(2)),
            lambda: client_frame(b"x" * (MAX_MESSAGE + 1), 1),
            lambda: client_frame(b"x" * 9000, 1, fin=False) + client_frame(b"x" * 9000, 0),
            lambda: client_frame(b"\xed\xa0\x80", 1) + client_frame(b"\xc3", 1),
            lambda: client_frame(b"{}", 2),
            lambda: self.mutated(self.well_framed(self.frame_text())),
            lambda: self.random.randbytes(self.random.randrange(1, 200)),
        )
        return self.random.choice(first)()

    def mutated(self, data: bytes) -> bytes:
        """Some bytes changed, taken away, repeated or put in."""
        out = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            at = self.random.randrange(len(out) + 1)
            what = self.random.randrange(5)
            if what == 0 and at < len(out):
                out[at] ^= 1 << self.random.randrange(8)
            elif what == 1:
                del out[at : at + self.random.randrange(1, 9)]
            elif what == 2:
                out[at:at] = self.random.randbytes(self.random.randrange(1, 9))
            elif what == 3:
                out[at:at] = out[max(0, at - 20) : at]
            else:
                out[at:at] = self.random.choice((b"\r\n", b"\n", b"\0", b" ", b"\r\n\r\n", b":", b"\xff"))
        return bytes(out)

    def hello(self) -> bytes:
        """A handshake that is let in, whatever it offers."""
        offers: dict[str, str | None] = {}
        if self.one(0.2):
            odd = ("bcast.v1", "session.", "session.unknown", "session.\xe9", "bearer", ",,", "bcast.v1, x")
            offers["Sec-WebSocket-Protocol"] = self.random.choice(odd)
        path = "/ws" if self.one(0.8) else f"/?session={self.text().encode().hex()}"
        return handshake(HOST, path, offers)

    # HTTP

    def body(self) -> bytes:
        items = [self.item() for _ in range(self.random.randrange(4))]
        forms = (
            self.item(),
            f'{{"messages":[{",".join(items)}]}}',
            f'{{"channels":["fuzz.1",{self.quoted(self.channel())}],"data":{self.value()}}}',
            f'{{"channels":{self.value()},"data":1}}',
            f'{{"messages":{self.value()}}}',
            self.value(),
        )
        data = self.random.choice(forms).encode(errors="replace")
        return self.mutated(data) if self.one(0.15) else data

    def item(self) -> str:
        fields = {"channel": self.quoted(self.channel()), "data": self.value()}
        if self.one(0.3):
            fields["messageId"] = self.quoted(self.random.choice((*IDS, f"h{self.random.random()}")))
        if self.one(0.1):
            fields[self.random.choice(("chanel", "data", "messageId", "type"))] = self.value()
        return "{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"

    def http(self, method: str, *, last: bool) -> bytes:
        """A request that is well formed, whatever it asks for."""
        path = self.random.choice(PATHS) if method != "POST" or self.one(0.1) else "/broadcast"
        # Who may not publish is not read on: such a request is for `break_http`.
        headers = HEADERS[FOREIGN:] if path == "/broadcast" else HEADERS
        lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", *self.random.sample(headers, 2)]
        body = b""
        if path == "/broadcast" and method != "POST":
            pass  # Nor is the body of a method that it does not have.
        elif method in ("POST", "PUT", "PATCH") or self.one(0.05):
            body = self.body()
            if self.one(0.2):
                lines.append("Transfer-Encoding: chunked")
                cut = self.random.randrange(len(body) + 1)
                pieces = [piece for piece in (body[:cut], body[cut:]) if piece]
                body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            else:
                lines.append(f"Content-Length: {len(body)}")
        if last:
            lines.append("Connection: close")
        return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body


@cache
def tokens() -> tuple[str, ...]:
    """Good ones and bad ones."""
    now = int(time.time())
    claims = (
        {"sub": "ann", "exp": now + 7200, "subscribe": ["signed.*"], "publish": ["*"]},
        {"sub": "bob", "exp": now + 7200, "subscribe": ["*"], "publish": []},
        {"sub": "ann", "exp": now - 60},
        {"sub": "ann", "exp": now + 7200, "nbf": now + 3600},
        {"sub": 5, "exp": now + 7200},
        {"sub": "ann", "exp": "soon"},
        {"sub": "ann", "exp": 1e300},
        {"sub": "ann", "exp": now + 7200, "subscribe": "*"},
    )
    good = [jwt.encode(one, SECRET, "HS256") for one in claims]
    return (*good, jwt.encode(claims[0], None, "none"), jwt.encode(claims[0], "x" * 32, "HS256"), "", "a.b.c")  # type: ignore[arg-type]


def cut(data: bytes, maker: Maker) -> list[bytes]:
    """The same bytes in several writes."""
    cuts = sorted(maker.random.randrange(len(data) + 1) for _ in range(maker.random.randrange(4)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if end > start]


# The kinds of scripts


def talk(maker: Maker) -> Script:
    """A client that keeps to RFC 6455 and to nothing else; between nonsense it asks for what it gets."""
    frames = [maker.hello()]
    count = maker.random.randrange(60, 240)
    for index in range(count):
        text = maker.request() if index % 20 == 19 or index == count - 1 else maker.frame_text()
        frames.append(maker.well_framed(text))
    return Script("talk", maker.number, cut(b"".join(frames), maker), count + 1, asked=tuple(maker.asked))


def break_frames(maker: Maker) -> Script:
    """A client that breaks RFC 6455 after some good frames."""
    good = [maker.well_framed(maker.frame_text()) for _ in range(maker.random.randrange(4))]
    bad = [maker.misframed() for _ in range(maker.random.randrange(1, 4))]
    data = b"".join((maker.hello(), *good, *bad))
    return Script("break_frames", maker.number, cut(data, maker), 1 + len(good) + len(bad))


def browse(maker: Maker) -> Script:
    """Requests one after the other on one connection, all sent at once."""
    methods = maker.random.choices(METHODS, k=maker.random.randrange(10, 40))
    data = b"".join(
        maker.http(method, last=index == len(methods) - 1) for index, method in enumerate(methods)
    )
    return Script("browse", maker.number, cut(data, maker), len(methods), methods=tuple(methods))


def break_http(maker: Maker) -> Script:
    """A request that is none, or whose end is not where it says."""
    kind = maker.random.random()
    if kind < 0.3:
        data = maker.random.choice(list(SMUGGLING.values()))
        data = maker.mutated(data) if maker.one() else data
    elif kind < 0.6:
        data = maker.mutated(maker.http(maker.random.choice((*METHODS, "BREW", "TRACE")), last=maker.one()))
    elif kind < 0.7:
        many = maker.random.choice(("X-A: b\r\n" * 3000, "X-A: " + "b" * 70_000 + "\r\n", "X: " * 3000))
        data = f"GET /health HTTP/1.1\r\nHost: {HOST}\r\n{many}\r\n".encode()
    elif kind < 0.8:
        data = maker.http("POST", last=True)[: maker.random.randrange(200)]
    else:
        data = maker.random.randbytes(maker.random.randrange(300)) + maker.random.choice((b"", b"\r\n\r\n"))
    return Script("break_http", maker.number, cut(data, maker), 1)


def break_handshake(maker: Maker) -> Script:
    """A handshake that is nearly one."""
    headers: dict[str, str | None] = {
        maker.random.choice(
            ("Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Host", "Origin")
        ): maker.random.choice((None, "", "x", "websocket", "13, 8", "Upgrade, close", "\xe9", "a" * 3000)),
        "Sec-WebSocket-Extensions": maker.random.choice(
            (None, "permessage-deflate", "permessage-deflate; server_max_window_bits=99", ";;", "x" * 500)
        ),
        "Sec-WebSocket-Protocol": maker.random.choice((None, "bearer." + maker.token(), "session.x", ",")),
    }
    data = handshake(HOST, maker.random.choice(("/", "/ws", "/ws?token=" + "x" * 99, "/w")), headers)
    data = maker.mutated(data) if maker.one(0.3) else data
    return Script(
        "break_handshake", maker.number, cut(data + maker.well_framed(maker.frame_text()), maker), 1
    )


def drip(maker: Maker) -> Script:
    """Byte by byte."""
    data = maker.hello() + maker.well_framed(maker.request()) + maker.misframed()[:50]
    return Script("drip", maker.number, [bytes((byte,)) for byte in data], 3)


def stall(maker: Maker) -> Script:
    """A request that never ends, on a connection that stays open."""
    data = maker.hello() if maker.one() else maker.http("POST", last=True)
    return Script("stall", maker.number, [data[: maker.random.randrange(len(data) // 2)]], 1, silent=True)


# Kind -> how many of a thousand scripts.
KINDS: dict[Callable[[Maker], Script], int] = {
    talk: 140,
    break_frames: 300,
    browse: 130,
    break_http: 260,
    break_handshake: 159,
    drip: 10,
    stall: 1,
}


def script(seed: int, number: int) -> Script:
    """The script of this number."""
    maker = Maker(seed, number)
    (kind,) = maker.random.choices(list(KINDS), list(KINDS.values()))
    return kind(maker)
