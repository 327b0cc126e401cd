"""Frames of RFC 6455: writing them, any way of cutting up what is read, every way to break the rules."""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import pack

import pytest
from client import client_frame
from hypothesis import given
from hypothesis import strategies as st

from tornado_bcast import frames
from tornado_bcast.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    FrameParser,
    ProtocolViolation,
    frame,
    is_close_code,
)

LIMIT = 70_000


@pytest.fixture(autouse=True, scope="module", params=[frames.fastest_take_whole, frames.take_whole])
def reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test with the part in C, where it was built, and with the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "fastest_take_whole", request.param)
        yield


def read(*pieces: bytes, limit: int = LIMIT) -> list[tuple[int, bytes]]:
    parser = FrameParser(limit)
    return [message for piece in pieces for message in parser.feed(piece)]


def violation(*pieces: bytes, limit: int = LIMIT) -> int:
    with pytest.raises(ProtocolViolation) as caught:
        read(*pieces, limit=limit)
    assert caught.value.reason
    # A close frame's reason has at most 123 bytes.
    assert len(caught.value.reason.encode()) <= 123
    return caught.value.code


def test_what_a_frame_lacks() -> None:
    whole, long = client_frame(b"x" * 10), client_frame(b"y" * 1000)
    for pieces, missing in (
        ((whole,), 0),
        ((long[:-3],), 3),
        ((whole + long[:500],), len(long) - 500),
        ((long[:-3], long[-3:]), 0),
        ((long[:-3], long[-3:] + long[:-1]), 1),
        # What it lacks is not known before its head is there.
        ((long[:3],), 0),
        ((client_frame(b"z" * 300, fin=False), client_frame(b"z" * 300, 0)[:-5]), 5),
    ):
        parser = FrameParser(LIMIT)
        for piece in pieces:
            list(parser.feed(piece))
        assert parser.missing == missing, pieces


# Writing


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_frame_has_the_shortest_length(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    written = frame(payload)
    head = 2 if size < 126 else 4 if size < 65536 else 10
    assert len(written) == head + size and written[head:] == payload
    assert written[0] == 0x81 and not written[1] & 0x80, "in one piece, and not masked"
    assert written[:head][1:] == client_frame(payload, mask=None)[1:head]


def test_opcodes() -> None:
    assert [frame(b"", opcode)[0] for opcode in (TEXT, BINARY, CLOSE, PING, PONG)] == [
        0x81,
        0x82,
        0x88,
        0x89,
        0x8A,
    ]


# Reading


@dataclass
class Message:
    """A message in fragments, with a control frame after some of them."""

    opcode: int
    fragments: list[tuple[bytes, tuple[int, bytes] | None]]

    def encode(self, mask: bytes) -> Iterator[bytes]:
        for index, (payload, control) in enumerate(self.fragments):
            last = index == len(self.fragments) - 1
            yield client_frame(payload, self.opcode if index == 0 else 0, fin=last, mask=mask)
            if control is not None:
                yield client_frame(control[1], control[0], mask=mask)

    def expected(self) -> list[tuple[int, bytes]]:
        controls = [control for _, control in self.fragments]
        whole = (self.opcode, b"".join(payload for payload, _ in self.fragments))
        inside = [control for control in controls[:-1] if control]
        return [*inside, whole, *([controls[-1]] if controls[-1] else [])]


payloads = st.binary(max_size=20) | st.integers(120, 300).map(lambda size: b"x" * size)
controls = st.none() | st.tuples(st.sampled_from([PING, PONG, CLOSE]), st.binary(max_size=125))
messages = st.builds(
    Message,
    st.sampled_from([TEXT, BINARY]),
    st.lists(st.tuples(payloads, controls), min_size=1, max_size=4),
)


@given(st.lists(messages, max_size=6), st.binary(min_size=4, max_size=4), st.data())
def test_any_way_of_cutting_it_up_gives_the_same(
    sent: list[Message], mask: bytes, data: st.DataObject
) -> None:
    stream = b"".join(piece for message in sent for piece in message.encode(mask))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    expected = [one for message in sent for one in message.expected()]
    assert read(*pieces) == expected
    assert read(stream) == expected
    if len(stream) < 2000:
        assert read(*(bytes([byte]) for byte in stream)) == expected


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, LIMIT])
def test_every_form_of_length(size: int) -> None:
    payload = b"x" * size
    sent = client_frame(payload)
    assert read(sent) == [(TEXT, payload)]
    assert read(sent[:3], sent[3:9], sent[9:]) == [(TEXT, payload)]


def test_an_unfinished_frame_waits() -> None:
    sent = client_frame(b"hello")
    for cut in range(len(sent)):
        assert read(sent[:cut]) == []


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_a_violation(data: bytes) -> None:
    try:
        read(data)
    except ProtocolViolation as broken:
        assert broken.code in (1002, 1009)


# Violations


@pytest.mark.parametrize("rsv", range(1, 8))
def test_reserved_bits(rsv: int) -> None:
    assert violation(client_frame(b"a", rsv=rsv)) == 1002
    assert violation(client_frame(b"a", PING, rsv=rsv)) == 1002


def test_a_frame_that_is_not_masked() -> None:
    assert violation(client_frame(b"a", mask=None)) == 1002
    assert violation(client_frame(b"", PING, mask=None)) == 1002
    # A mask of zeros is one.
    assert read(client_frame(b"a", mask=bytes(4))) == [(TEXT, b"a")]


@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF])
def test_unknown_opcodes(opcode: int) -> None:
    assert violation(client_frame(b"", opcode)) == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_control_frame_is_short_and_in_one_piece(opcode: int) -> None:
    assert read(client_frame(b"x" * 125, opcode)) == [(opcode, b"x" * 125)]
    assert violation(client_frame(b"x" * 126, opcode)) == 1002
    assert violation(client_frame(b"x", opcode, fin=False)) == 1002
    # It is refused by its head, before the rest has come.
    assert violation(client_frame(b"x" * 126, opcode)[:2]) == 1002


def test_fragments_out_of_place() -> None:
    assert violation(client_frame(b"a", 0)) == 1002
    assert violation(client_frame(b"a", 0, fin=False)) == 1002
    assert violation(client_frame(b"a", fin=False), client_frame(b"b")) == 1002
    assert violation(client_frame(b"a", fin=False), client_frame(b"b", BINARY, fin=False)) == 1002
    # After the end of one message the next may begin.
    whole = client_frame(b"a", fin=False) + client_frame(b"b", 0)
    assert read(whole, client_frame(b"c")) == [(TEXT, b"ab"), (TEXT, b"c")]
    assert violation(whole, client_frame(b"c", 0)) == 1002


def test_what_is_too_big_is_refused_by_its_head() -> None:
    assert violation(client_frame(b"x" * 11), limit=10) == 1009
    assert read(client_frame(b"x" * 10), limit=10) == [(TEXT, b"x" * 10)]
    for length in (b"\x7e\xff\xff", b"\x7f" + pack("!Q", 1 << 20), b"\x7f" + b"\xff" * 8):
        assert violation(client_frame(length=length), limit=1000) == 1009


def test_fragments_that_are_too_big_together() -> None:
    first = client_frame(b"x" * 6, fin=False)
    assert violation(first, client_frame(b"x" * 5, 0), limit=10) == 1009
    assert violation(first, client_frame(b"x" * 5, 0, fin=False), limit=10) == 1009
    assert read(first, client_frame(b"x" * 4, 0), limit=10) == [(TEXT, b"x" * 10)]
    # Control frames do not count.
    assert read(first, client_frame(b"x" * 100, PING), client_frame(b"", 0), limit=10)


def test_fragments_without_an_end_cannot_fill_the_memory() -> None:
    parser = FrameParser(100)
    assert not list(parser.feed(client_frame(b"x" * 100, fin=False)))
    for _ in range(1000):
        # Empty ones may come for ever: each costs its sender more than us.
        assert not list(parser.feed(client_frame(b"", 0, fin=False)))
    with pytest.raises(ProtocolViolation):
        list(parser.feed(client_frame(b"x", 0, fin=False)))


def test_close_codes() -> None:
    """RFC 6455, section 7.4, and IANA's registry of close codes."""
    good = [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999]
    bad = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]
    assert [code for code in good if not is_close_code(code)] == []
    assert [code for code in bad if is_close_code(code)] == []
