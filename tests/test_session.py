"""One client's state: which command may pass, and for what price."""

from collections.abc import Mapping
from typing import Any

import pytest

from tornado_bcast.config import Config, default_config
from tornado_bcast.errors import ErrorCode, Refusal
from tornado_bcast.protocol import Ack, Auth, Broadcast, Command, Pong, Subscribe, Unsubscribe
from tornado_bcast.rules import NOBODY, ChannelRules, Principal
from tornado_bcast.session import Session, Subscription

NOW = 5000.0


class Client:
    """A session under a configuration."""

    def __init__(self, **sections: Mapping[str, str]) -> None:
        self.config: Config = default_config(**sections)
        self.rules = ChannelRules(self.config.channels)
        self.session = Session()

    def receive(self, command: Command, now: float = NOW) -> Any:
        return self.session.receive(command, self.rules, self.config.limits, now)

    def refused(self, command: Command, now: float = NOW) -> Refusal:
        with pytest.raises(Refusal) as caught:
            self.receive(command, now)
        return caught.value

    def subscribed(self, *channels: str) -> None:
        for channel in channels:
            self.session.subscriptions[channel] = Subscription(self.rules.find(channel), None)


def test_ids_are_secret_public_and_never_the_same() -> None:
    sessions = [Session() for _ in range(100)]
    assert len({session.id for session in sessions} | {session.client_id for session in sessions}) == 200
    # 128 random bits, in a form that fits into a subprotocol's name (RFC 6455, section 4.1).
    assert all(
        len(session.id) >= 22 and session.id.replace("-", "").replace("_", "").isalnum()
        for session in sessions
    )


def test_the_name_of_a_session_does_not_give_it_away() -> None:
    session = Session()
    assert Session.name(session.id) == Session.name(session.id) != Session.name(session.client_id)
    assert session.id not in Session.name(session.id)


def test_what_may_pass_comes_with_its_rule() -> None:
    client = Client(channels={"sender": "yes"})
    assert client.receive(Subscribe("a")).sender
    assert client.receive(Broadcast("a", 1)).sender
    assert client.receive(Unsubscribe("a")) is None
    assert client.receive(Ack("a", 1)) is None and client.receive(Pong()) is None


@pytest.mark.parametrize(
    ("command", "code", "setting"),
    [
        (Subscribe("a"), "forbidden", "[channels] subscribe"),
        (Broadcast("a", 1), "forbidden", "[channels] publish"),
        (Broadcast(None, 1), "forbidden", "[channels] publish_all"),
    ],
)
def test_what_may_not_pass(command: Command, code: ErrorCode, setting: str) -> None:
    refusal = Client(channels={"subscribe": "nobody", "publish": "server"}).refused(command)
    assert (refusal.code, refusal.setting) == (code, setting)


def test_nobody_becomes_somebody_but_nobody_else() -> None:
    session = Session()
    session.is_stored = True
    session.admit(Principal("ann", ("a.*",)))
    # It is stored anew, for its principal is another one.
    assert not session.is_stored and session.take_change("owner").principal == "ann"
    session.is_stored = True
    session.admit(Principal("ann", ("b.*",)))
    assert session.is_stored and session.who.subscribe == ("b.*",)
    for other in (Principal("bob"), NOBODY):
        with pytest.raises(Refusal) as caught:
            session.admit(other)
        assert caught.value.code == "forbidden" and session.who.sub == "ann"


@pytest.mark.parametrize(
    ("who", "command", "code"),
    [
        (NOBODY, Subscribe("a"), "unauthorized"),
        (NOBODY, Broadcast("a", 1), "unauthorized"),
        (NOBODY, Broadcast(None, 1), "unauthorized"),
        (Principal("ann"), Subscribe("a"), "forbidden"),
        (Principal("ann"), Broadcast("a", 1), "forbidden"),
        (Principal("ann", ("b",), ("a",)), Subscribe("a"), "forbidden"),
        (Principal("ann", ("a",), ("a", "?", "**")), Broadcast(None, 1), "forbidden"),
        (Principal("ann", ("x", "a*")), Subscribe("a"), None),
        (Principal("ann", (), ("?",)), Broadcast("a", 1), None),
        (Principal("ann", (), ("*",)), Broadcast(None, 1), None),
    ],
)
def test_what_a_token_allows(who: Principal, command: Command, code: ErrorCode | None) -> None:
    client = Client(channels={"subscribe": "token", "publish": "token", "publish_all": "token"})
    client.session.admit(who)
    if code is None:
        assert client.receive(command)
    else:
        assert client.refused(command).code == code


def test_no_token_opens_what_is_closed() -> None:
    client = Client(channels={"subscribe": "nobody", "publish": "server"})
    client.session.admit(Principal("ann", ("*",), ("*",)))
    for command in (Subscribe("a"), Broadcast("a", 1), Broadcast(None, 1)):
        assert client.refused(command).code == "forbidden"


def no_room(client: Client, channel: str, *starting: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        client.session.check_room(channel, client.config.limits, set(starting))
    return caught.value


def test_subscriptions_are_counted() -> None:
    client = Client(limits={"max_subscriptions": "2"})
    limits = client.config.limits
    client.session.check_room("a", limits, set())
    client.subscribed("a", "b")
    refusal = no_room(client, "c")
    assert (refusal.code, refusal.channel) == ("too_many_subscriptions", "c")
    assert refusal.setting == "[limits] max_subscriptions" and "2" in refusal.message
    # One that is there may be asked for again, and one given up makes room.
    client.session.check_room("b", limits, {"b"})
    del client.session.subscriptions["a"]
    client.session.check_room("c", limits, set())
    client.session.check_room("c", limits, {"b"})


def test_subscriptions_on_their_way_count_once() -> None:
    client = Client(limits={"max_subscriptions": "2"})
    client.subscribed("a")
    client.session.check_room("b", client.config.limits, {"a"})
    no_room(client, "b", "c")
    no_room(client, "b", "a", "c")


def test_no_limit_of_subscriptions() -> None:
    client = Client(limits={"max_subscriptions": "0"})
    client.subscribed(*(f"c{number}" for number in range(500)))
    client.session.check_room("a", client.config.limits, {"b"})


LIMITS = {"limits": {"rate": "10", "burst": "3"}}


@pytest.mark.parametrize(
    "command", [Subscribe("a"), Unsubscribe("a"), Broadcast("a", 1), Broadcast(None, 1), Auth("t")], ids=str
)
def test_each_costs_a_token(command: Command) -> None:
    client = Client(**LIMITS)
    for _ in range(3):
        try:
            client.receive(command)
        except Refusal as refusal:
            # What is refused has been paid for as well.
            assert refusal.code != "rate_limited"
    refusal = client.refused(command)
    assert (refusal.code, refusal.setting) == ("rate_limited", "[limits] rate")
    assert refusal.retry_after is not None and 100 <= refusal.retry_after <= 102
    assert client.refused(command, NOW + 0.05).code == "rate_limited"
    try:
        client.receive(command, NOW + refusal.retry_after / 1000)
    except Refusal as later:
        assert later.code != "rate_limited"


def test_acks_and_pongs_are_free() -> None:
    client = Client(**LIMITS)
    for _ in range(100):
        client.receive(Pong())
        client.receive(Ack("a", 1))
    for _ in range(3):
        client.receive(Broadcast("a", 1))
    assert client.refused(Broadcast("a", 1)).code == "rate_limited"
    client.receive(Pong())


def test_without_a_rate_there_is_no_limit() -> None:
    client = Client(limits={"rate": "0"})
    for _ in range(10_000):
        client.receive(Broadcast("a", 1))


def test_who_heeds_the_limit_is_never_thrown_out() -> None:
    client = Client(**LIMITS)
    now = NOW
    for _ in range(500):
        try:
            client.receive(Broadcast("a", 1), now)
        except Refusal as refusal:
            assert refusal.retry_after
            assert not client.session.is_flooding(client.config.limits, now)
            now += refusal.retry_after / 1000


def test_who_does_not_is_thrown_out_after_a_while() -> None:
    client = Client(**LIMITS)
    refused = 0
    for _ in range(100):
        try:
            client.receive(Broadcast("a", 1))
        except Refusal:
            refused += 1
            if client.session.is_flooding(client.config.limits, NOW):
                break
    # A few bursts' worth: no accident of a good client.
    assert 3 * 3 < refused < 50


def test_a_bad_frame_costs_a_token() -> None:
    client = Client(**LIMITS)
    for _ in range(3):
        client.session.pay(client.config.limits, NOW)
    assert client.refused(Broadcast("a", 1)).code == "rate_limited"
