"""The protocol as data: every command, every way to get one wrong, and any JSON value on its way out."""

import doctest
import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tornado_bcast import protocol
from tornado_bcast.errors import ErrorCode, Refusal
from tornado_bcast.protocol import (
    MAX_SEQ,
    Ack,
    Auth,
    Broadcast,
    Command,
    Pong,
    Position,
    Subscribe,
    Unsubscribe,
    check_message_id,
    decode,
    decode_item,
    encode_ack,
    encode_error,
    encode_message,
    encode_ping,
    encode_redelivery,
)
from tornado_bcast.rules import check_channel

numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def refused(text: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        decode(text)
    # A sentence, or the list of characters.
    assert caught.value.message[0].isupper() or caught.value.message[0] == "`"
    assert caught.value.message[-1] in ".~"
    return caught.value


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(protocol).attempted and not doctest.testmod(protocol).failed


@pytest.mark.parametrize(
    ("frame", "command"),
    [
        ({"type": "subscribe", "channel": "a"}, Subscribe("a")),
        ({"type": "subscribe", "channel": "a", "ack": True, "last": 7}, Subscribe("a", None, True, None, 7)),
        ({"type": "subscribe", "channel": "a", "ack": False, "last": 0}, Subscribe("a", last=0)),
        (
            {
                "type": "subscribe",
                "channel": "a",
                "messageId": "i",
                "since": {"epoch": "e", "seq": 3, "x": 1},
            },
            Subscribe("a", "i", since=Position("e", 3)),
        ),
        ({"type": "subscribe", "channel": "a", "since": None, "last": None}, Subscribe("a")),
        ({"type": "unsubscribe", "channel": "a", "messageId": "i"}, Unsubscribe("a", "i")),
        ({"type": "broadcast", "data": None}, Broadcast(None, None)),
        ({"type": "broadcast", "channel": None, "data": 1}, Broadcast(None, 1)),
        ({"type": "broadcast", "channel": "a", "data": [{}], "messageId": "i"}, Broadcast("a", [{}], "i")),
        ({"type": "ack", "channel": "a", "seq": 5}, Ack("a", 5)),
        ({"type": "ack", "channel": "a", "seq": MAX_SEQ, "epoch": "e"}, Ack("a", MAX_SEQ, "e")),
        ({"type": "pong"}, Pong()),
        ({"type": "auth", "token": "t", "messageId": "i"}, Auth("t", "i")),
    ],
)
def test_commands(frame: dict[str, Any], command: Command) -> None:
    assert decode(json.dumps(frame)) == command
    # What a later version adds is no error now.
    assert decode(json.dumps({**frame, "later": {"x": [1]}})) == command


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad_message"),
        ("hello", "bad_message"),
        ("{", "bad_message"),
        ('{"type": "pong"} x', "bad_message"),
        ("null", "bad_message"),
        ("1", "bad_message"),
        ('"pong"', "bad_message"),
        ('[{"type": "pong"}]', "bad_message"),
        ("{}", "bad_message"),
        ('{"type": 1}', "bad_message"),
        ('{"type": null}', "bad_message"),
        ('{"type": ["pong"]}', "bad_message"),
        ('{"type": "PONG"}', "unknown_type"),
        ('{"type": "message", "data": 1}', "unknown_type"),
        ('{"type": ""}', "unknown_type"),
        ('{"type": "subscribe"}', "bad_channel"),
        ('{"type": "subscribe", "channel": null}', "bad_channel"),
        ('{"type": "subscribe", "channel": 1}', "bad_channel"),
        ('{"type": "subscribe", "channel": ["a"]}', "bad_channel"),
        ('{"type": "subscribe", "channel": ""}', "bad_channel"),
        ('{"type": "subscribe", "channel": "a b"}', "bad_channel"),
        ('{"type": "subscribe", "channel": "a\\n"}', "bad_channel"),
        ('{"type": "subscribe", "channel": "é"}', "bad_channel"),
        ('{"type": "subscribe", "channel": "$worker:1"}', "bad_channel"),
        ('{"type": "broadcast", "channel": "$all", "data": 1}', "bad_channel"),
        ('{"type": "broadcast", "channel": "", "data": 1}', "bad_channel"),
        ('{"type": "broadcast", "channel": false, "data": 1}', "bad_channel"),
        ('{"type": "broadcast", "channel": "a"}', "bad_message"),
        ('{"type": "broadcast"}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "ack": 1}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "ack": "true"}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "last": -1}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "last": 1.5}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "last": true}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "since": 3}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "since": {"seq": 3}}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "since": {"epoch": "e"}}', "bad_message"),
        ('{"type": "subscribe", "channel": "a", "since": {"epoch": 1, "seq": 3}}', "bad_message"),
        (
            '{"type": "subscribe", "channel": "a", "since": {"epoch": "%s", "seq": 3}}' % ("e" * 33),
            "bad_message",
        ),
        ('{"type": "ack", "channel": "a"}', "bad_message"),
        ('{"type": "ack", "channel": "a", "seq": "1"}', "bad_message"),
        ('{"type": "ack", "channel": "a", "seq": true}', "bad_message"),
        ('{"type": "ack", "channel": "a", "seq": -1}', "bad_message"),
        (f'{{"type": "ack", "channel": "a", "seq": {2**53}}}', "bad_message"),
        ('{"type": "ack", "channel": "a", "seq": 1, "epoch": 1}', "bad_message"),
        ('{"type": "auth"}', "bad_message"),
        ('{"type": "auth", "token": 1}', "bad_message"),
        ('{"type": "pong", "messageId": ""}', "bad_message"),
        ('{"type": "pong", "messageId": 7}', "bad_message"),
        ("[" * 100_000, "bad_message"),
        ('{"type": "pong", "a": ' + "[" * 5000 + "]" * 5000 + "}", "bad_message"),
    ],
)
def test_what_is_wrong_is_refused(text: str, code: ErrorCode) -> None:
    assert refused(text).code == code


def test_a_refusal_names_what_could_be_read() -> None:
    refusal = refused('{"type": "subscribe", "channel": "a", "last": -1, "messageId": "i"}')
    assert (refusal.message_id, refusal.channel) == ("i", "a")
    assert refused('{"type": "nothing", "messageId": "i"}').message_id == "i"
    # An id that is none is not echoed.
    assert refused('{"type": "nothing", "messageId": "\\u0000"}').message_id is None


def test_a_refusal_never_quotes_the_frame() -> None:
    for text in (
        'secret"',
        '{"type": "secret"}',
        '{"type": "pong", "messageId": "secret\\n"}',
        '{"type": "subscribe", "channel": "secret !"}',
        '{"type": "broadcast", "data": secret}',
        '{"type": "auth", "token": ["secret"]}',
    ):
        assert "secret" not in refused(text).message
    with pytest.raises(Refusal) as caught:
        decode_item({"secret": 1, "data": 1}, frozenset(("data",)))
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("good", ["a", "x" * 128, "a b", "~!", "d9b2d63d-a233-4123-847a-7090f9f4b5b6"])
def test_message_ids(good: str) -> None:
    check_message_id(good)


@pytest.mark.parametrize("bad", ["", "x" * 129, "é", "a\n", "\x7f", "\x00", 1, None, ["a"], True])
def test_bad_message_ids(bad: object) -> None:
    with pytest.raises(Refusal, match="messageId"):
        check_message_id(bad)


def test_a_message_id_may_have_spaces_around() -> None:
    """CONTRACT 2: 1-128 printable ASCII characters, and a space is one."""
    check_message_id(" a ")
    check_message_id(" ")


@given(st.text())
def test_any_text_is_a_command_or_refused(text: str) -> None:
    try:
        decode(text)
    except Refusal:
        pass


_fields = st.sampled_from(
    ["type", "channel", "data", "messageId", "ack", "since", "last", "seq", "epoch", "token"]
)
_types = st.sampled_from([*protocol.TYPES, "message", ""])


@given(st.dictionaries(_fields, values), _types)
def test_any_object_is_a_command_or_refused(fields: dict[str, Any], kind: str) -> None:
    try:
        command = decode(json.dumps({**fields, "type": kind}))
    except Refusal as refusal:
        assert refusal.message_id is None or refusal.message_id == fields["messageId"]
    else:
        assert type(command).__name__.lower() == kind


# Items of HTTP bodies

_ONE = frozenset(("channel", "data", "messageId"))


def test_items() -> None:
    assert decode_item({"data": 1}, _ONE) == Broadcast(None, 1)
    assert decode_item({"channel": "a", "data": None, "messageId": "i"}, _ONE) == Broadcast("a", None, "i")


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (1, "bad_message"),
        (None, "bad_message"),
        ([], "bad_message"),
        ({}, "bad_message"),
        ({"channel": "a"}, "bad_message"),
        ({"chanel": "a", "data": 1}, "bad_message"),
        ({"channel": "a", "data": 1, "type": "broadcast"}, "bad_message"),
        # More likely a variable that was not set than a message to everybody.
        ({"channel": None, "data": 1}, "bad_channel"),
        ({"channel": "", "data": 1}, "bad_channel"),
        ({"channel": "$x", "data": 1}, "bad_channel"),
        ({"channel": "a", "data": 1, "messageId": ""}, "bad_message"),
        ({"channel": "a", "data": 1, "messageId": 5}, "bad_message"),
    ],
)
def test_bad_items(item: object, code: ErrorCode) -> None:
    with pytest.raises(Refusal) as caught:
        decode_item(item, _ONE)
    assert caught.value.code == code


@given(st.dictionaries(st.sampled_from(["channel", "data", "messageId", "chanel"]), values) | values)
def test_any_item_is_a_broadcast_or_refused(item: Any) -> None:
    try:
        broadcast = decode_item(item, _ONE)
    except Refusal as refusal:
        # What it names has been found good, so that the answer can hold it.
        assert refusal.channel is None or check_channel(refusal.channel)
        assert refusal.message_id is None or refusal.message_id == item["messageId"]
    else:
        assert broadcast == Broadcast(item.get("channel"), item["data"], item.get("messageId"))
        assert set(item) <= _ONE


# Events


@given(values)
@example({"a": "</script>\u2028\u2029\u0000\U0001f600"})
@example([1e308, -1e-308, 5e-324, -0.0, 0.1 + 0.2, 2**64 - 1, -(2**63)])
@example("/")
def test_any_data_arrives_as_an_equal_value(data: Any) -> None:
    command = decode(json.dumps({"type": "broadcast", "channel": "a", "data": data}))
    assert isinstance(command, Broadcast)
    payload = encode_message("a", command.data, "i", 17)
    event = json.loads(payload)
    assert event == {"type": "message", "channel": "a", "data": data, "messageId": "i", "timestamp": 17}
    # The broker puts what it adds before the closing brace, and the frame is UTF-8.
    assert payload.endswith(b"}") and payload.decode()


def test_integers_beyond_64_bits_keep_their_value_or_are_refused() -> None:
    for number in (2**64, -(2**63) - 1, 10**40):
        text = f'{{"type": "broadcast", "channel": "a", "data": {number}}}'
        try:
            command = decode(text)
            assert isinstance(command, Broadcast)
            payload = encode_message("a", command.data, "i", 17)
        except Refusal as refusal:
            assert refusal.code == "bad_message"
        else:
            assert json.loads(payload)["data"] == number


def test_the_fields_of_a_message() -> None:
    assert json.loads(encode_message(None, 1, "i", 17)) == {
        "type": "message",
        "data": 1,
        "messageId": "i",
        "timestamp": 17,
    }
    event = json.loads(encode_message("a", 1, "i", 17, {"clientId": "c"}))
    assert event["from"] == {"clientId": "c"}


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "data",
    [math.nan, math.inf, -math.inf, {"a": [math.nan]}, "\ud800", {"\udfff": 1}, [["\ud83d"]], _nested(3000)],
    ids=["nan", "inf", "-inf", "nan inside", "half pair", "half pair as a key", "half inside", "deep"],
)
def test_what_is_no_json_after_all_is_refused(data: Any) -> None:
    with pytest.raises(Refusal) as caught:
        encode_message("a", data, "i", 17)
    refusal = caught.value
    assert (refusal.code, refusal.message_id, refusal.channel) == ("bad_message", "i", "a")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', '{"\\udc00": 1}'])
def test_what_the_parser_lets_through_is_refused_on_the_way_out(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        command = decode(f'{{"type": "broadcast", "channel": "a", "data": {text}}}')
        assert isinstance(command, Broadcast)
        encode_message("a", command.data, "i", 17)
    assert caught.value.code == "bad_message"


@pytest.mark.parametrize("depth", [1, 10, 100, 500, 900, 1000, 1020, 1023, 1024, 1025, 1100, 2000, 10_000])
def test_deep_nesting_is_taken_whole_or_refused(depth: int) -> None:
    text = '{"type": "broadcast", "channel": "a", "data": %s}' % ("[" * depth + "]" * depth)
    try:
        command = decode(text)
        assert isinstance(command, Broadcast)
        payload = encode_message("a", command.data, "i", 17)
    except Refusal as refusal:
        assert refusal.code == "bad_message" and depth > 500
    else:
        assert payload.count(b"[") == depth


def test_redeliveries_say_so() -> None:
    payload = b'{"type":"message","data":1,"seq":4,"epoch":"e"}'
    assert json.loads(encode_redelivery(payload, 2)) == {**json.loads(payload), "redelivered": 2}


def test_answers_leave_out_what_is_not_set() -> None:
    assert json.loads(encode_ack("subscribe", 17, messageId=None, channel="a", persistent=False, seq=0)) == {
        "type": "ack",
        "op": "subscribe",
        "channel": "a",
        "persistent": False,
        "seq": 0,
        "timestamp": 17,
    }
    assert json.loads(encode_error("internal", "Sorry.", 17)) == {
        "type": "error",
        "code": "internal",
        "message": "Sorry.",
        "timestamp": 17,
    }
    error = encode_error(
        "history_lost", "Gone.", 17, message_id="i", channel="a", retry_after=0, epoch="e", seq=1
    )
    assert json.loads(error) == {
        "type": "error",
        "code": "history_lost",
        "message": "Gone.",
        "messageId": "i",
        "channel": "a",
        "retryAfter": 0,
        "epoch": "e",
        "seq": 1,
        "timestamp": 17,
    }
    assert json.loads(encode_ping(17)) == {"type": "ping", "timestamp": 17}
