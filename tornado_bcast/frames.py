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

_FIN = 0x80
_RSV = 0x70
_MASKED = 0x80
# (mask, data) -> data without its mask, or with it.
Unmask = Callable[[bytes, bytes], bytes]

_UINT16 = Struct("!H")
_UINT64 = Struct("!Q")


class ProtocolViolation(BcastError):
    """The peer broke RFC 6455; the connection ends with close code `code`."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unfragmented, unmasked frame, as a server sends it (RFC 6455, section 5.2)."""
    length = len(payload)
    if length < 126:
        return bytes((_FIN | opcode, length)) + payload
    if length < 65536:
        return bytes((_FIN | opcode, 126)) + _UINT16.pack(length) + payload
    return bytes((_FIN | opcode, 127)) + _UINT64.pack(length) + payload


def unmask(mask: bytes, data: bytes) -> bytes:
    """XOR with the repeated mask (RFC 6455, section 5.3), as one operation on two long integers."""
    length = len(data)
    repeated = (mask * (length // 4 + 1))[:length]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(length, "little")


def is_close_code(code: int) -> bool:
    """Whether a peer may send this close code (RFC 6455, section 7.4, and IANA's registry)."""
    return 3000 <= code <= 4999 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))


class FrameParser:
    """Turns bytes from one client into `(opcode, payload)` pairs: whole data messages and control frames.

    Holds at most one message of `max_message` bytes and one partial frame. A control frame between the
    fragments of a message is yielded at once, before it (RFC 6455, section 5.4).
    """

    __slots__ = ("_buffer", "_fragments", "_fragments_opcode", "_max_message", "_unmask")

    def __init__(self, max_message: int, unmask: Unmask = unmask) -> None:
        # Bytes; a longer message is a violation with code 1009.
        self._max_message = max_message
        # A faster one may be at hand.
        self._unmask = unmask
        self._buffer = b""
        # The fragments so far of an unfinished message; None between messages.
        self._fragments: bytearray | None = None
        self._fragments_opcode = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield all that is complete. Raises ProtocolViolation; the parser is of no use after that."""
        buffer = self._buffer + data if self._buffer else data
        # Until the caller has taken everything, a further feed would lose what is left: callers drain.
        self._buffer = b""
        position = 0
        end = len(buffer)
        while end - position >= 2:
            first = buffer[position]
            second = buffer[position + 1]
            if first & _RSV:
                raise ProtocolViolation(1002, "reserved bits set, and no extension was agreed on")
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
                    raise ProtocolViolation(CloseCode.TOO_BIG, "message too big")
            start += 4
            stop = start + length
            if stop > end:
                break
            payload = self._unmask(buffer[start - 4 : start], buffer[start:stop]) if length else b""
            position = stop
            if opcode >= CLOSE:
                yield opcode, payload
            elif first & _FIN and opcode:
                yield opcode, payload
            else:
                yield from self._continue(opcode, payload, bool(first & _FIN))
        self._buffer = buffer[position:] if position else buffer

    def _continue(self, opcode: int, payload: bytes, final: bool) -> Iterator[tuple[int, bytes]]:
        if self._fragments is None:
            self._fragments = bytearray(payload)
            self._fragments_opcode = opcode
            return
        self._fragments += payload
        if final:
            message = bytes(self._fragments)
            self._fragments = None
            yield self._fragments_opcode, message
