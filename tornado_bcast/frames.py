"""RFC 6455 frames, without a socket: `frame` writes one, `FrameParser` reads what a client sent.

The parser is fed bytes as they come and yields whole messages and control frames. It is stricter than
Tornado's own reader, which takes unmasked frames and any close code, and leaner: one pass over the buffer,
no future for each read.
"""

from collections.abc import Callable, Iterator
from struct import Struct

from .errors import BcastError, CloseCode

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA
# The bit RSV1 of a message's first frame: it is compressed (RFC 7692, section 6).
COMPRESSED = 0x40

_FIN = 0x80
_RSV = 0x70
_MASKED = 0x80
# (mask, data) -> data without its mask, or with it.
Unmask = Callable[[bytes, bytes], bytes]
# (compressed message, limit) -> its payload of at most `limit` bytes. Raises ProtocolViolation.
Inflate = Callable[[bytes, int], bytes]

_UINT16 = Struct("!H")
_UINT64 = Struct("!Q")


class ProtocolViolation(BcastError):
    """The peer broke RFC 6455; the connection ends with close code `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unfragmented, unmasked frame, as a server sends it (RFC 6455, section 5.2).

    `COMPRESSED | TEXT` is the opcode of a compressed message.
    """
    length = len(payload)
    if length < 126:
        return bytes((_FIN | opcode, length)) + payload
    if length < 65536:
        return bytes((_FIN | opcode, 126)) + _UINT16.pack(length) + payload
    return bytes((_FIN | opcode, 127)) + _UINT64.pack(length) + payload


def payload_of(data: bytes) -> memoryview:
    """What is inside a whole frame that `frame` has made."""
    length = data[1]
    return memoryview(data)[2 if length < 126 else 4 if length == 126 else 10 :]


def unmask(mask: bytes, data: bytes) -> bytes:
    """XOR with the repeated mask (RFC 6455, section 5.3), as one operation on two long integers."""
    length = len(data)
    repeated = (mask * (length // 4 + 1))[:length]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(length, "little")


def is_close_code(code: int) -> bool:
    """Whether a peer may send this close code (RFC 6455, section 7.4, and IANA's registry)."""
    return 3000 <= code <= 4999 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))


def take_whole(buffer: bytes, position: int, limit: int) -> tuple[list[tuple[int, bytes]], int]:
    """From `position` on, messages that stand in one frame each: `(opcode, payload)`, and where they end.

    It may take fewer than there are, even none.
    """
    return [], position


try:
    # This is in C alone (_speedups.c): FrameParser reads any frame.
    from ._speedups import take_whole as fastest_take_whole
except ImportError:
    fastest_take_whole = take_whole


class FrameParser:
    """Turns bytes from one client into `(opcode, payload)` pairs: whole data messages and control frames.

    Holds at most one message of `max_message` bytes and one partial frame. A control frame between the
    fragments of a message is yielded at once, before it (RFC 6455, section 5.4). With `inflate` messages may
    be compressed; they are unpacked when they are whole, so that nothing is kept for it in between.
    """

    __slots__ = ("_buffer", "_first", "_fragments", "_inflate", "_max_message", "_unmask", "missing")

    def __init__(self, max_message: int, unmask: Unmask = unmask, inflate: Inflate | None = None) -> None:
        # Bytes; a longer message is a violation with code 1009.
        self._max_message = max_message
        # A faster one may be at hand.
        self._unmask = unmask
        # None: compression was not agreed on.
        self._inflate = inflate
        self._buffer = b""
        # How many bytes a frame that has begun lacks, as far as is known. To be asked when `feed` is through.
        self.missing = 0
        # The fragments so far of an unfinished message; None between messages.
        self._fragments: bytearray | None = None
        # Opcode of that message, and whether it is compressed; 0 between messages.
        self._first = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield all that is complete. Raises ProtocolViolation; the parser is of no use after that."""
        buffer = self._buffer + data if self._buffer else data
        # Until the caller has taken everything, a further feed would lose what is left: callers drain.
        self._buffer = b""
        self.missing = 0
        position = 0
        end = len(buffer)
        while end - position >= 2:
            if self._fragments is None:
                messages, position = fastest_take_whole(buffer, position, self._max_message)
                yield from messages
                if end - position < 2:
                    break
            first = buffer[position]
            second = buffer[position + 1]
            if first & _RSV:
                self._check_reserved(first)
            if not second & _MASKED:
                raise ProtocolViolation(1002, "a client's frames must be masked")
            opcode = first & 0x0F
            length = second & 0x7F
            start = position + 2
            if opcode >= CLOSE:
                if opcode > PONG:
                    raise ProtocolViolation(1002, "unknown opcode")
                if length > 125 or not first & _FIN:
                    raise ProtocolViolation(1002, "a control frame is short and in one piece")
            else:
                if opcode > BINARY:
                    raise ProtocolViolation(1002, "unknown opcode")
                if (opcode == 0) != (self._fragments is not None):
                    raise ProtocolViolation(
                        1002, "a continuation without a start, or a start inside a message"
                    )
                if length == 126:
                    if end - start < 2:
                        break
                    (length,) = _UINT16.unpack_from(buffer, start)
                    start += 2
                elif length == 127:
                    if end - start < 8:
                        break
                    (length,) = _UINT64.unpack_from(buffer, start)
                    start += 8
                if length + len(self._fragments or b"") > self._max_message:
                    self._check_size(first, length)
            start += 4
            stop = start + length
            if stop > end:
                self.missing = stop - end
                break
            payload = self._unmask(buffer[start - 4 : start], buffer[start:stop]) if length else b""
            position = stop
            if opcode >= CLOSE:
                yield opcode, payload
            elif first & _FIN and opcode:
                yield opcode, self._unpack(payload) if first & COMPRESSED else payload
            else:
                yield from self._continue(first, payload)
        self._buffer = buffer[position:] if position else buffer

    def _check_reserved(self, first: int) -> None:
        """RFC 6455, section 5.2, and RFC 7692, section 6.1."""
        opcode = first & 0x0F
        if self._inflate is None or first & _RSV != COMPRESSED:
            raise ProtocolViolation(1002, "reserved bits set, and no extension was agreed on that uses them")
        if opcode == 0 or opcode >= CLOSE:
            raise ProtocolViolation(1002, "only the first frame of a message says that it is compressed")

    def _check_size(self, first: int, length: int) -> None:
        """What cannot be compressed grows a little by it (zlib's deflateBound); all else is too big."""
        longest = self._max_message + self._max_message // 8 + 64
        if not (first | self._first) & COMPRESSED or length + len(self._fragments or b"") > longest:
            raise ProtocolViolation(CloseCode.TOO_BIG, "message too big")

    def _unpack(self, data: bytes) -> bytes:
        assert self._inflate is not None
        return self._inflate(data, self._max_message)

    def _continue(self, first: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
        if self._fragments is None:
            self._fragments = bytearray(payload)
            self._first = first & (COMPRESSED | 0x0F)
            return
        self._fragments += payload
        if first & _FIN:
            message, begun = bytes(self._fragments), self._first
            self._fragments = None
            self._first = 0
            yield begun & 0x0F, self._unpack(message) if begun & COMPRESSED else message
