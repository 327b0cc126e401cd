"""resume.lua and save.lua on real servers, also in states that a worker seldom meets."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import pytest
import redis
from redis_server import RedisServer, binaries

from tornado_bcast.brokers import decode_bus
from tornado_bcast.brokers.redis_commands import RESUME, SAVE

numbers = count()
TTL = 60_000


@dataclass
class Stored:
    """One session, and what its workers do with it."""

    client: redis.Redis
    name: str = field(default_factory=lambda: f"n{next(numbers)}")

    @property
    def key(self) -> str:
        return f"t:session:{self.name}"

    def save(self, generation: int, whole: bool = False, *, ttl: int = TTL, **fields: str) -> str:
        """The script's answer. `fields` are channels and their state, "" takes one away."""
        pairs = [text for channel, value in fields.items() for text in ("s:" + channel, value)]
        head = (generation, ttl, int(whole), "ann", "client", "$worker:1")
        return cast(bytes, self.client.eval(SAVE.text, 1, self.key, *head, *pairs)).decode()

    def resume(
        self, principal: str = "ann", owner: str = "$worker:2", *, ttl: int = TTL
    ) -> dict[str, str] | None:
        answer = cast(Any, self.client.eval(RESUME.text, 1, self.key, principal, owner, "t", ttl, self.name))
        if answer is None:
            return None
        texts = [item.decode() for item in answer]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def content(self) -> dict[str, str]:
        found = cast(Any, self.client.hgetall(self.key))
        return {name.decode(): value.decode() for name, value in found.items()}

    @property
    def ttl(self) -> int:
        return cast(int, self.client.pttl(self.key))

    def head(self, generation: int, owner: str = "$worker:1") -> dict[str, str]:
        return {"generation": str(generation), "principal": "ann", "client": "client", "owner": owner}


@pytest.fixture(scope="module", params=binaries().values(), ids=binaries().keys())
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def stored(client: redis.Redis) -> Stored:
    return Stored(client)


def test_a_change_needs_a_session_and_the_whole_makes_one(stored: Stored) -> None:
    assert stored.save(1, a="e 5") == "missing"
    assert stored.content() == {} and stored.ttl == -2
    assert stored.save(1, whole=True, a="e 5", b="-") == "saved"
    assert stored.content() == stored.head(1) | {"s:a": "e 5", "s:b": "-"}


def test_changes_touch_what_they_name(stored: Stored) -> None:
    stored.save(1, whole=True, a="e 5", b="-", c="e 1")
    assert stored.save(1, a="e 6", b="", d="-", gone="") == "saved"
    assert stored.content() == stored.head(1) | {"s:a": "e 6", "s:c": "e 1", "s:d": "-"}


def test_the_whole_leaves_nothing_else(stored: Stored) -> None:
    stored.save(1, whole=True, a="e 5", b="-")
    assert stored.save(1, whole=True, c="-", d="") == "saved"
    assert stored.content() == stored.head(1) | {"s:c": "-"}


@pytest.mark.parametrize("whole", [False, True])
def test_a_write_of_the_past_changes_nothing(stored: Stored, whole: bool) -> None:
    stored.save(1, whole=True, a="e 5")
    stored.resume(ttl=30_000)
    before = stored.content()
    assert stored.save(1, whole, a="e 9", b="-") == "taken"
    assert stored.content() == before
    assert stored.ttl <= 30_000


def test_an_older_copy_must_be_written_in_whole(stored: Stored) -> None:
    """After a failover, or a restart from an older file."""
    stored.save(2, whole=True, a="e 5")
    before = stored.content()
    assert stored.save(3, b="-") == "missing"
    assert stored.content() == before
    assert stored.save(3, whole=True, b="-") == "saved"
    assert stored.content() == stored.head(3) | {"s:b": "-"}


def test_each_write_renews_the_time(stored: Stored) -> None:
    stored.save(1, whole=True, ttl=5_000)
    assert 0 < stored.ttl <= 5_000
    assert stored.save(1, ttl=50_000) == "saved"
    assert 40_000 < stored.ttl <= 50_000
    stored.save(1, ttl=1)
    while stored.ttl != -2:
        pass
    assert stored.content() == {} and stored.resume() is None
    assert stored.save(1, a="-") == "missing"


def test_resuming_gives_everything_and_raises_the_generation(stored: Stored) -> None:
    stored.save(1, whole=True, a="e 5", b="-", ttl=5_000)
    expected = stored.head(2, "$worker:2") | {"s:a": "e 5", "s:b": "-"}
    assert stored.resume() == expected == stored.content()
    assert 50_000 < stored.ttl <= TTL
    assert (
        stored.resume(owner="$worker:3")
        == stored.content()
        == expected
        | {
            "generation": "3",
            "owner": "$worker:3",
        }
    )


@pytest.mark.parametrize("principal", ["", "an", "anna", "ANN"])
def test_another_principal_gets_nothing_and_changes_nothing(stored: Stored, principal: str) -> None:
    stored.save(1, whole=True, a="e 5", ttl=30_000)
    before = stored.content()
    with stored.client.pubsub(ignore_subscribe_messages=True) as ear:
        ear.psubscribe("t:*")
        ear.get_message(timeout=5)
        assert stored.resume(principal) is None
        stored.client.publish("t:end", "")
        heard = None
        while heard is None:
            heard = ear.get_message(timeout=5)
        assert heard["channel"] == b"t:end"
    assert stored.content() == before
    assert stored.ttl <= 30_000


def test_nobody_is_a_principal_as_well(stored: Stored) -> None:
    """ "" is the empty string, and no name for what is not there."""
    assert stored.resume("") is None
    assert stored.content() == {}
    head = (1, TTL, 1, "", "client", "$worker:1")
    stored.client.eval(SAVE.text, 1, stored.key, *head)
    assert stored.resume("ann") is None
    assert stored.resume("") is not None


def test_who_held_it_is_told(stored: Stored) -> None:
    stored.save(1, whole=True)
    with stored.client.pubsub(ignore_subscribe_messages=True) as ear:
        ear.psubscribe("t:*")
        ear.get_message(timeout=5)
        for owner, told in (("$worker:2", "$worker:1"), ("$worker:3", "$worker:2")):
            answer = stored.resume(owner=owner)
            heard = None
            while heard is None:
                heard = ear.get_message(timeout=5)
            assert heard["channel"].decode() == f"t:{{{told}}}"
            notice = decode_bus(heard["data"])
            assert answer is not None
            assert notice.payload.decode() == f"{stored.name} {answer['generation']}"


def test_a_notice_that_cannot_be_told_is_no_failure(server: RedisServer, stored: Stored) -> None:
    """The older connection finds out by its next write."""
    stored.save(1, whole=True)
    stored.client.acl_setuser(
        "mute", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-publish"], channels=["*"]
    )
    with server.client(username="mute", password="any") as mute:
        assert Stored(mute, stored.name).resume() is not None
    assert stored.content()["generation"] == "2"
    assert stored.save(1) == "taken"


def test_large_generations_stay_whole_numbers(stored: Stored) -> None:
    """Lua's own way to write numbers would be 1e+15."""
    large = 2**52
    stored.save(large, whole=True)
    with stored.client.pubsub(ignore_subscribe_messages=True) as ear:
        ear.psubscribe("t:*")
        ear.get_message(timeout=5)
        answer = stored.resume()
        assert answer is not None and answer["generation"] == str(large + 1)
        heard = None
        while heard is None:
            heard = ear.get_message(timeout=5)
        assert decode_bus(heard["data"]).payload.decode() == f"{stored.name} {large + 1}"
    assert stored.save(large) == "taken"
    assert stored.save(large + 1) == "saved"


def test_a_key_of_another_type_is_an_error_and_stays(stored: Stored) -> None:
    stored.client.set(stored.key, "mine")
    for attempt in (lambda: stored.save(1, whole=True), stored.resume):
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            attempt()
    assert stored.client.get(stored.key) == b"mine"


def test_a_server_without_memory_keeps_what_there_is(stored: Stored) -> None:
    """A change is refused before anything is done. The whole begins with giving memory back, and is taken."""
    stored.save(1, whole=True, a="e 5")
    before = stored.content()
    stored.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            stored.save(1, a="e 6")
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            stored.resume()
        assert stored.content() == before
        assert stored.save(1, whole=True, a="e 6") == "saved"
    finally:
        stored.client.config_set("maxmemory", 0)
    assert stored.content() == before | {"s:a": "e 6"}
