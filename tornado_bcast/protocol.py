"""The protocol `bcast.v1` as data: what clients may say, and what they are told (docs/PROTOCOL.md).

`decode` makes a command of a text frame, `decode_item` of an HTTP item; `encode_*` make the JSON of a
server's event. Nothing here knows sockets or the clock: times come in as Unix milliseconds.

>>> decode('{"type": "subscribe", "channel": "news"}')
Subscribe(channel='news', message_id=None, ack=False, since=None, last=None)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import ujson

from .errors import ErrorCode, Refusal
from .rules import check_channel

SUBPROTOCOL: Final = "bcast.v1"
# `seq` stays below 2^53, the integers that JavaScript holds exactly.
MAX_SEQ: Final = 2**53 - 1
MAX_EPOCH_LENGTH: Final = 32

_MESSAGE_ID = re.compile(r"[\x20-\x7e]{1,128}")


# Not frozen, though nobody changes them: that would triple the cost of making one, and each frame is one.


@dataclass(slots=True)
class Position:
    """A place in a channel's history: after message `seq` of `epoch`."""

    epoch: str
    seq: int


@dataclass(slots=True)
class Subscribe:
    channel: str
    message_id: str | None = None
    ack: bool = False
    since: Position | None = None
    last: int | None = None


@dataclass(slots=True)
class Unsubscribe:
    channel: str
    message_id: str | None = None


@dataclass(slots=True)
class Broadcast:
    """`channel` None: to every connection. `data` is any JSON value."""

    channel: str | None
    data: Any
    message_id: str | None = None


@dataclass(slots=True)
class Ack:
    channel: str
    seq: int
    epoch: str | None = None


@dataclass(slots=True)
class Pong:
    pass


@dataclass(slots=True)
class Auth:
    token: str
    message_id: str | None = None


Command = Subscribe | Unsubscribe | Broadcast | Ack | Pong | Auth
TYPES: Final = ("subscribe", "unsubscribe", "broadcast", "ack", "pong", "auth")


def load_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Read a JSON object; Refusal `bad_message` where it is none."""
    try:
        value = ujson.loads(text)
    except ValueError as error:
        raise Refusal("bad_message", f"{what} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise Refusal("bad_message", f"{what} must be a JSON object, not {_json_type(value)}.")
    return value


def decode(text: str) -> Command:
    """Make a command of a text frame. Raises Refusal, with the frame's `messageId` where that is valid."""
    frame = load_object(text, "The frame")
    message_id = frame.get("messageId")
    if message_id is not None:
        check_message_id(message_id)
    try:
        return _command(frame, message_id)
    except Refusal as refusal:
        refusal.message_id = message_id
        raise


def _command(frame: dict[str, Any], message_id: str | None) -> Command:
    kind = frame.get("type")
    if not isinstance(kind, str):
        raise Refusal("bad_message", f"The frame needs a `type`, one of {', '.join(TYPES)}.")
    if kind == "pong":
        return Pong()
    if kind == "auth":
        return Auth(_field(frame, "token", str), message_id)
    if kind not in TYPES:
        raise Refusal("unknown_type", f"Unknown `type`; it is one of {', '.join(TYPES)}.")
    channel = frame.get("channel")
    if channel is None and kind == "broadcast":
        return Broadcast(None, _data(frame), message_id)
    channel = check_channel(channel)
    try:
        if kind == "broadcast":
            return Broadcast(channel, _data(frame), message_id)
        if kind == "subscribe":
            return Subscribe(
                channel,
                message_id,
                _field(frame, "ack", bool, False),
                _position(frame.get("since")),
                _count(frame.get("last"), "last"),
            )
        if kind == "unsubscribe":
            return Unsubscribe(channel, message_id)
        seq = _count(_field(frame, "seq", int), "seq")
        assert seq is not None
        return Ack(channel, seq, _epoch(frame.get("epoch")))
    except Refusal as refusal:
        refusal.channel = channel
        raise


def decode_item(item: Any, allowed: frozenset[str]) -> Broadcast:
    """Make a broadcast of one HTTP item. An unknown field is refused, so that a slip is never sent to all."""
    if not isinstance(item, dict):
        raise Refusal("bad_message", f"Each message must be a JSON object, not {_json_type(item)}.")
    for name in item:
        if name not in allowed:
            raise Refusal("bad_message", f"Unknown field; the fields here are {', '.join(sorted(allowed))}.")
    channel = item.get("channel")
    if "channel" in item:
        if channel is None:
            # More likely a variable that was not set than a wish to reach everybody.
            raise Refusal("bad_channel", "`channel` is null; leave the field out to reach everybody.")
        check_channel(channel)
    message_id = item.get("messageId")
    if message_id is not None:
        check_message_id(message_id)
    try:
        return Broadcast(channel, _data(item), message_id)
    except Refusal as refusal:
        refusal.message_id, refusal.channel = message_id, channel
        raise


def check_message_id(message_id: object, name: str = "messageId") -> None:
    """Raises Refusal unless it is 1 to 128 printable ASCII characters."""
    if not isinstance(message_id, str) or not _MESSAGE_ID.fullmatch(message_id):
        raise Refusal("bad_message", f"`{name}` must be a string of 1 to 128 printable ASCII characters.")


def _data(item: dict[str, Any]) -> Any:
    if "data" not in item:
        raise Refusal("bad_message", "`data` is missing; it may be any JSON value, null included.")
    return item["data"]


def _field(frame: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = frame.get(name, default)
    # JSON's true is no number, though Python's bool is an int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refusal("bad_message", f"`{name}` must be {_TYPE_NAMES[kind]}, not {_json_type(value)}.")
    return value


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SEQ:
        raise Refusal("bad_message", f"`{name}` must be an integer from 0 to 2^53 - 1.")
    return value


def _epoch(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_EPOCH_LENGTH:
        raise Refusal("bad_message", f"`epoch` must be a string of at most {MAX_EPOCH_LENGTH} characters.")
    return value


def _position(value: object) -> Position | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise Refusal("bad_message", "`since` must be an object with `epoch` and `seq`.")
    epoch, seq = _epoch(value.get("epoch")), _count(value.get("seq"), "since.seq")
    if epoch is None or seq is None:
        raise Refusal("bad_message", "`since` needs both `epoch` and `seq`.")
    return Position(epoch, seq)


_TYPE_NAMES = {str: "a string", bool: "true or false", int: "an integer"}


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    return "a string" if isinstance(value, str) else "an array" if isinstance(value, list) else "an object"


def dump(value: Mapping[str, Any]) -> bytes:
    """The JSON text of an event of our own, as UTF-8."""
    return ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False).encode()


def encode_message(
    channel: str | None,
    data: Any,
    message_id: str,
    timestamp: int,
    sender: Mapping[str, str] | None = None,
) -> bytes:
    """The JSON of a `message` event, without `seq` and `epoch`, which the broker adds.

    Raises Refusal where `data` is not JSON after all: NaN, Infinity or a lone surrogate, which the parser
    lets through, or nesting that the writer refuses.
    """
    event: dict[str, Any] = {"type": "message"}
    if channel is not None:
        event["channel"] = channel
    event["data"] = data
    event["messageId"] = message_id
    event["timestamp"] = timestamp
    if sender is not None:
        event["from"] = sender
    try:
        return ujson.dumps(event, ensure_ascii=False, escape_forward_slashes=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        problem = "`data` holds half of a surrogate pair, which no UTF-8 text can carry."
    except (OverflowError, ValueError):
        problem = "`data` holds NaN, Infinity, a number too large for JSON, or is nested too deeply."
    raise Refusal("bad_message", problem, message_id=message_id, channel=channel)


def encode_redelivery(payload: bytes, count: int) -> bytes:
    """The same event, marked as sent for the `count`-th time again."""
    return b'%s,"redelivered":%d}' % (payload[:-1], count)


def encode_ack(op: str, timestamp: int, **fields: Any) -> bytes:
    """The JSON of an `ack`. Fields that are None are left out."""
    event = {"type": "ack", "op": op, **fields, "timestamp": timestamp}
    if None in fields.values():
        event = {name: value for name, value in event.items() if value is not None}
    return dump(event)


def encode_error(
    code: ErrorCode,
    message: str,
    timestamp: int,
    *,
    message_id: str | None = None,
    channel: str | None = None,
    retry_after: int | None = None,
    **fields: Any,
) -> bytes:
    """The JSON of an `error`."""
    event: dict[str, Any] = {"type": "error", "code": code, "message": message}
    if message_id is not None:
        event["messageId"] = message_id
    if channel is not None:
        event["channel"] = channel
    if retry_after is not None:
        event["retryAfter"] = retry_after
    event.update(fields)
    event["timestamp"] = timestamp
    return dump(event)


def encode_ping(timestamp: int) -> bytes:
    """The JSON of a `ping`."""
    return dump({"type": "ping", "timestamp": timestamp})
