"""permessage-deflate (RFC 7692) without context takeover: what is agreed on, and both directions.

No message depends on one before it, so a connection keeps nothing for compression, and a message is
compressed once for all that take it so. Stands above frames.py, whose frames it rewrites; it knows no sockets
and no connections.
"""

import re
import zlib

from .errors import CloseCode
from .frames import COMPRESSED, ProtocolViolation, frame, payload_of

# Bytes of a frame; a shorter one stays as it is. There a fifth would be saved, of bytes that travel in one
# packet in either form.
THRESHOLD = 256

_ANSWER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*(?:=\s*("?)({_TOKEN})\2\s*)?')
# What an offer may ask for (RFC 7692, section 7.1). A window of ours that is smaller than zlib's is declined,
# since the frames are shared; that of the client is its own affair.
_PARAMETERS = {
    "server_no_context_takeover": re.compile(""),
    "client_no_context_takeover": re.compile(""),
    "server_max_window_bits": re.compile("15"),
    "client_max_window_bits": re.compile("|[89]|1[0-5]"),
}

# What the sender has left out, and an empty last block: without it nobody could tell whether data ends early.
_END = b"\x00\x00\xff\xff" + b"\x01\x00\x00\xff\xff"


def negotiate(offers: str) -> str | None:
    """The answer to these `Sec-WebSocket-Extensions`; None: there is no offer that can be taken.

    The first one that can counts. One that nobody understands is declined, like one that asks for too much.
    """
    for offer in offers.split(","):
        name, *parameters = offer.split(";")
        if name.strip() == "permessage-deflate":
            asked = _parse(parameters)
            if asked is not None:
                window = "; server_max_window_bits=15" if "server_max_window_bits" in asked else ""
                return _ANSWER + window
    return None


def _parse(parameters: list[str]) -> set[str] | None:
    """The names of an offer's parameters; None where one is unknown, twice there, or has a bad value."""
    names: set[str] = set()
    for parameter in parameters:
        match = _PARAMETER.fullmatch(parameter)
        if match is None:
            return None
        name, value = match[1], match[3] or ""
        if name in names or name not in _PARAMETERS or not _PARAMETERS[name].fullmatch(value):
            return None
        names.add(name)
    return names


def inflate(data: bytes, limit: int) -> bytes:
    """A compressed message's payload, of at most `limit` bytes (RFC 7692, section 7.2.2).

    Raises ProtocolViolation: 1009 for a longer one, of which no more than that is ever unpacked, 1007 for
    data that is no DEFLATE or ends early.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        payload = inflater.decompress(data + _END, limit + 1)
    except zlib.error:
        raise ProtocolViolation(1007, "a compressed message must be DEFLATE data") from None
    if len(payload) > limit:
        raise ProtocolViolation(CloseCode.TOO_BIG, "message too big")
    # Some senders mark their last block as such, and add an empty one (section 7.2.3.4).
    if not inflater.eof or inflater.unused_data not in (b"", b"\x00" + _END):
        raise ProtocolViolation(1007, "a compressed message must end with a whole block")
    return payload


class Compressor:
    """Compresses whole frames. One serves a whole process, for after each message it forgets everything.

    A new compressor for each message would cost four times as much: most of that is its memory.
    """

    __slots__ = ("_deflater",)

    def __init__(self) -> None:
        # Made when it is first needed: 268 KB.
        self._deflater: zlib._Compress | None = None

    def compress(self, plain: bytes) -> bytes:
        """The compressed form of a frame of `frames.frame`; the same one where nothing would be saved."""
        if len(plain) < THRESHOLD:
            return plain
        if self._deflater is None:
            self._deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        # After a full flush nothing refers to what came before. Its last four bytes are left out (7.2.1).
        packed = self._deflater.compress(payload_of(plain)) + self._deflater.flush(zlib.Z_FULL_FLUSH)
        compressed = frame(packed[:-4], COMPRESSED | plain[0] & 0x0F)
        return compressed if len(compressed) < len(plain) else plain
