"""The protocol module against the wire examples of tests/vectors, which the SDK's tests read as well."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tornado_bcast import protocol
from tornado_bcast.errors import CloseCode, Refusal
from tornado_bcast.protocol import Broadcast, Command, decode, encode_message

VECTORS = Path(__file__).parent / "vectors"


def load(name: str, array: str) -> list[Any]:
    """The entries of a file, as pytest's parameters with their names."""
    content = json.loads((VECTORS / f"{name}.json").read_text())
    assert set(content) == {"about", array}
    return [pytest.param(entry, id=entry["name"]) for entry in content[array]]


def text_of(entry: dict[str, Any]) -> str:
    """The frame or body as it goes over the wire."""
    value = entry.get("frame", entry.get("body"))
    return str(entry["text"]) if "text" in entry else json.dumps(value, ensure_ascii=False)


def understood(command: Command) -> dict[str, Any]:
    """A command in the words of the wire, with the fields that are set."""
    names = {"message_id": "messageId"}
    fields = {names.get(name, name): value for name, value in dataclasses.asdict(command).items()}
    kept = {
        name: value
        for name, value in fields.items()
        if name == "data" or (value is not None and value is not False)
    }
    return {"type": type(command).__name__.lower(), **kept}


@pytest.mark.parametrize("name", ["client-frames", "server-frames", "http-bodies", "close-codes"])
def test_names_are_unique(name: str) -> None:
    content = json.loads((VECTORS / f"{name}.json").read_text())
    names = [entry["name"] for array in content.values() if isinstance(array, list) for entry in array]
    assert len(names) == len(set(names)) > 0
    assert f"`{name}.json`" in (VECTORS / "README.md").read_text()


@pytest.mark.parametrize("entry", load("client-frames", "frames"))
def test_client_frames(entry: dict[str, Any]) -> None:
    assert ("command" in entry) != ("error" in entry)
    try:
        command = decode(text_of(entry))
        if isinstance(command, Broadcast):
            # What the parser lets through and no JSON can carry is found here.
            encode_message(command.channel, command.data, command.message_id or "id", 0)
    except Refusal as refusal:
        answer = {"code": refusal.code, "messageId": refusal.message_id, "channel": refusal.channel}
        assert {name: value for name, value in answer.items() if value is not None} == entry.get("error")
    else:
        assert understood(command) == entry.get("command")


def test_client_frames_show_every_type() -> None:
    seen = {entry.values[0].get("command", {}).get("type") for entry in load("client-frames", "frames")}
    assert seen - {None} == set(protocol.TYPES)


@pytest.mark.parametrize("entry", load("server-frames", "frames"))
def test_server_frames(entry: dict[str, Any]) -> None:
    arguments = dict(entry["arguments"])
    match entry["encode"]:
        case "message":
            sender = arguments.pop("from", None)
            message_id = arguments.pop("messageId")
            text = protocol.encode_message(
                arguments.pop("channel", None), message_id=message_id, sender=sender, **arguments
            )
            if "position" in entry:
                # As the brokers do it: in front of the closing brace.
                text = text[:-1] + b"," + protocol.dump(entry["position"])[1:]
            if "redelivered" in entry:
                text = protocol.encode_redelivery(text, entry["redelivered"])
        case "ack":
            text = protocol.encode_ack(arguments.pop("op"), arguments.pop("timestamp"), **arguments)
        case "error":
            names = {"messageId": "message_id", "retryAfter": "retry_after"}
            fields = {names.get(name, name): value for name, value in arguments.items()}
            text = protocol.encode_error(
                fields.pop("code"), fields.pop("message"), fields.pop("timestamp"), **fields
            )
        case "ping":
            text = protocol.encode_ping(**arguments)
        case other:
            pytest.fail(f"unknown encoder {other!r}")
    assert json.loads(text) == entry["frame"]


def test_close_codes() -> None:
    content = json.loads((VECTORS / "close-codes.json").read_text())["codes"]
    assert {entry["name"]: entry["code"] for entry in content} == {code.name: int(code) for code in CloseCode}
    for entry in content:
        # CONTRACT 2: what the ranges say.
        expected = "backoff" if entry["code"] < 4500 else "fresh token" if entry["code"] <= 4501 else "stop"
        assert entry["then"] == expected, entry
