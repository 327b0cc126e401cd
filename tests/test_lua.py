"""publish.lua and read.lua on real servers, in states that a broker seldom meets."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import redis
from redis_server import RedisServer, binaries

from tornado_bcast.brokers.redis_commands import EMPTY_TTL, PUBLISH, READ, STATE_TTL

MASTER = "a" * 40
numbers = count()


@dataclass
class Channel:
    """One channel, and the arguments of its next call."""

    client: redis.Redis
    # What the caller takes for the master_replid; "" stands for what INFO says.
    replid: str = ""
    name: str = field(default_factory=lambda: f"c{next(numbers)}")

    def __post_init__(self) -> None:
        self.replid = self.replid or self.client.info("replication")["master_replid"]

    def key(self, kind: str) -> str:
        return f"t:{{{self.name}}}:{kind}"

    def publish(self, message_id: str, token: str | None = None, **more: Any) -> list[Any]:
        """The script's answer: duplicate, seq, epoch and, where it asked, the master_replid."""
        options = {"epoch": f"e{next(numbers)}", "size": 1000, "ttl": 60_000, "dedup": 60_000} | more
        payload = json.dumps({"data": message_id}, separators=(",", ":"))
        return self.client.eval(
            PUBLISH.text,
            3,
            *(self.key("id:" + message_id), self.key("h"), self.key("s")),
            *(f"t:{{{self.name}}}", payload, 1234, token or f"t{next(numbers)}", options["dedup"]),
            *(options["epoch"], self.replid, options["size"], options["ttl"], STATE_TTL),
        )

    def publish_plain(self, message_id: str, token: str = "t") -> list[Any]:
        key, name = self.key("id:" + message_id), f"t:{{{self.name}}}"
        return self.client.eval(PUBLISH.text, 1, key, name, '{"data":1}', 1234, token, 60_000)

    def read(self, after: int = 0, limit: int = 1000, size: int = 1 << 20, epoch: str = "eread") -> list[Any]:
        """The script's answer: epoch, seq, ends, first, messages and, where it asked, the master_replid."""
        keys = (self.key("h"), self.key("s"))
        wanted, times = (after, limit, size), (STATE_TTL, EMPTY_TTL)
        return self.client.eval(READ.text, 2, *keys, epoch, self.replid, *wanted, *times)

    def hash(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in self.client.hgetall(self.key("h")).items()}

    def stored(self) -> list[tuple[int, str]]:
        """(seq, data) of what the stream keeps."""
        entries = self.client.xrange(self.key("s"))
        read = []
        for entry_id, fields in entries:
            header, _, payload = fields[b"m"].partition(b"\n")
            message = json.loads(payload)
            seq, epoch, timestamp = header.decode().split(" ")
            assert entry_id.decode() == f"{seq}-0"
            assert (message["seq"], message["epoch"], timestamp) == (int(seq), epoch, "1234")
            read.append((int(seq), message["data"]))
        return read

    def state(self) -> Any:
        """All that the server keeps of the channel, to compare."""
        keys = sorted(self.client.scan_iter(f"t:{{{self.name}}}*"))
        return [(key, self.client.dump(key)) for key in keys]


@pytest.fixture(scope="module", params=binaries().values(), ids=binaries().keys())
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def channel(client: redis.Redis) -> Channel:
    return Channel(client)


def heard(client: redis.Redis, channel: Channel) -> "redis.client.PubSub":
    ear = client.pubsub(ignore_subscribe_messages=True)
    ear.subscribe(f"t:{{{channel.name}}}")
    assert ear.get_message(timeout=5) is None
    return ear


class TestPublish:
    def test_first_second_and_again(self, client: redis.Redis, channel: Channel) -> None:
        with heard(client, channel) as ear:
            duplicate, seq, epoch, master = channel.publish("a")
            assert (duplicate, seq, master.decode()) == (0, b"1", channel.replid)
            assert channel.publish("b") == [0, b"2", epoch]
            assert channel.publish("a") == [1, b"1", epoch]
            assert channel.publish("b", dedup=1) == [1, b"2", epoch]
            told = [ear.get_message(timeout=1)["data"] for _ in range(2)]
            assert ear.get_message(timeout=0.05) is None
        assert channel.stored() == [(1, "a"), (2, "b")]
        assert told == [fields[b"m"] for _, fields in client.xrange(channel.key("s"))]
        assert channel.hash() == {
            "epoch": epoch.decode(),
            "seq": "2",
            "replid": channel.replid,
            "ends": "",
        }

    def test_another_try_of_the_same_publication_is_no_duplicate(self, channel: Channel) -> None:
        first = channel.publish("a", token="mine")[:3]
        assert channel.publish("a", token="mine") == [0, *first[1:]]
        assert channel.publish("a", token="other") == [1, *first[1:]]
        assert channel.publish_plain("x", "mine") == channel.publish_plain("x", "mine") == [0, b"0", b"-"]
        assert channel.publish_plain("x", "other") == [1, b"0", b"-"]

    def test_a_hit_writes_but_does_not_prolong(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a")
        channel.publish_plain("b")
        for message_id, publish in (("a", channel.publish), ("b", channel.publish_plain)):
            key = channel.key("id:" + message_id)
            client.pexpire(key, 30_000)
            client.config_resetstat()
            assert publish(message_id, token="other")[0] == 1
            assert client.info("commandstats")["cmdstat_pexpire"]["calls"] == 1
            assert 20_000 < client.pttl(key) <= 30_000
            # Somebody took its time away: it gets one again.
            client.persist(key)
            assert publish(message_id, token="other")[0] == 1
            assert 0 < client.pttl(key) <= 60_000

    def test_times(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", ttl=5_000, dedup=7_000)
        assert 4_000 < client.pttl(channel.key("s")) <= 5_000
        assert 6_000 < client.pttl(channel.key("id:a")) <= 7_000
        assert STATE_TTL - 60_000 < client.pttl(channel.key("h")) <= STATE_TTL
        client.pexpire(channel.key("h"), STATE_TTL - 2 * 86_400_000)
        channel.publish("b", ttl=50_000)
        assert client.pttl(channel.key("s")) > 5_000
        assert client.pttl(channel.key("h")) > STATE_TTL - 60_000

    def test_maxlen_is_exact(self, client: redis.Redis, channel: Channel) -> None:
        for step in range(250):
            channel.publish(str(step), size=100)
            assert client.xlen(channel.key("s")) == min(step + 1, 100)
        assert channel.stored()[0] == (151, "150")
        # A smaller size takes hold at the next publish.
        channel.publish("last", size=10)
        assert client.xlen(channel.key("s")) == 10

    def test_large_numbers(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a")
        client.hset(channel.key("h"), "seq", 2**53 - 3)
        client.delete(channel.key("s"))
        assert channel.publish("b")[1] == b"9007199254740990"
        assert channel.publish("c")[1] == b"9007199254740991"
        assert [seq for seq, _ in channel.stored()] == [2**53 - 2, 2**53 - 1]
        assert len(channel.read(2**53 - 2)[4]) == 1

    def test_without_the_hash_everything_begins_anew(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        channel.publish("b")
        client.delete(channel.key("h"))
        assert channel.publish("c", epoch="e2")[1:3] == [b"1", b"e2"]
        assert channel.stored() == [(1, "c")]
        assert channel.hash()["ends"] == ""

    @pytest.mark.parametrize("part", ["epoch", "seq"])
    def test_a_hash_that_lacks_something_is_no_hash(
        self, client: redis.Redis, channel: Channel, part: str
    ) -> None:
        channel.publish("a", epoch="e1")
        client.hdel(channel.key("h"), part)
        assert channel.publish("c", epoch="e2")[1:3] == [b"1", b"e2"]
        assert channel.stored() == [(1, "c")]

    def test_without_the_stream_the_count_goes_on(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        channel.publish("b")
        client.delete(channel.key("s"))
        assert channel.publish("c", epoch="e2") == [0, b"3", b"e1"]
        assert channel.stored() == [(3, "c")]

    def test_a_stream_that_is_ahead_is_gone_on_above(self, client: redis.Redis, channel: Channel) -> None:
        for message_id in "abcde":
            channel.publish(message_id, epoch="e1")
        client.hset(channel.key("h"), "seq", 3)
        assert channel.publish("f", epoch="e2") == [0, b"6", b"e2"]
        assert channel.hash() | {"replid": ""} == {"epoch": "e2", "seq": "6", "replid": "", "ends": "e1:3"}
        assert channel.stored()[-2:] == [(5, "e"), (6, "f")]
        assert channel.publish("g") == [0, b"7", b"e2"]
        # Also where what is above has been deleted.
        client.xdel(channel.key("s"), "7-0")
        client.hset(channel.key("h"), "seq", 6)
        assert channel.publish("h", epoch="e3") == [0, b"8", b"e3"]
        assert channel.hash()["ends"] == "e1:3,e2:6"

    def test_another_master_begins_an_epoch(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        # As after a failover: the hash came from a master that is not this one.
        client.hset(channel.key("h"), "replid", MASTER)
        answer = channel.publish("b", epoch="e2")
        assert answer == [0, b"2", b"e2", channel.replid.encode()]
        assert channel.hash() == {"epoch": "e2", "seq": "2", "replid": channel.replid, "ends": "e1:1"}
        # Only once.
        assert channel.publish("c", epoch="e3") == [0, b"3", b"e2"]

    def test_a_caller_who_is_mistaken_about_the_master_is_told(self, channel: Channel) -> None:
        real = channel.replid
        channel.publish("a", epoch="e1")
        channel.replid = MASTER
        assert channel.publish("b", epoch="e2") == [0, b"2", b"e1", real.encode()]
        channel.replid = ""
        assert channel.publish("c", epoch="e3") == [0, b"3", b"e1", real.encode()]
        assert channel.hash() == {"epoch": "e1", "seq": "3", "replid": real, "ends": ""}

    def test_ends_of_the_last_epochs_are_kept(self, client: redis.Redis, channel: Channel) -> None:
        for step in range(40):
            channel.publish(str(step), epoch=f"e{step}")
            client.hset(channel.key("h"), "replid", MASTER)
        ends = channel.hash()["ends"].split(",")
        assert ends == [f"e{step}:{step + 1}" for step in range(23, 39)]

    def test_a_restart_begins_an_epoch(self, server: RedisServer) -> None:
        options = ("--appendonly", "yes", "--appendfsync", "always")
        with RedisServer(server.binary, *options) as server:
            with server.client() as client:
                channel = Channel(client)
                channel.publish("a", epoch="e1")
            server.stop()
            server.start()
            with server.client() as client:
                again = Channel(client, name=channel.name)
                assert again.replid != channel.replid
                assert again.publish("a", epoch="e2")[:3] == [1, b"1", b"e1"]
                assert again.publish("b", epoch="e2")[:3] == [0, b"2", b"e2"]
                assert again.read()[2] == b"e1:1"


class TestTrouble:
    """A failure anywhere leaves no hole and nothing half done."""

    @pytest.mark.parametrize("kind", ["h", "s", "id:x"])
    def test_a_key_of_another_type(self, client: redis.Redis, channel: Channel, kind: str) -> None:
        channel.publish("a", epoch="e1")
        key = channel.key(kind)
        client.rename(key, channel.key("aside")) if client.exists(key) else None
        client.lpush(key, "not ours")
        before = channel.state()
        with heard(client, channel) as ear:
            with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
                channel.publish("x")
            assert ear.get_message(timeout=0.05) is None
        assert channel.state() == before
        client.delete(key)
        client.rename(channel.key("aside"), key) if kind != "id:x" else None
        assert channel.publish("x") == [0, b"2", b"e1"]
        assert channel.stored() == [(1, "a"), (2, "x")]

    def test_a_foreign_key_of_a_new_channel(self, client: redis.Redis, channel: Channel) -> None:
        client.lpush(channel.key("id:x"), "not ours")
        for publish in (channel.publish, channel.publish_plain):
            before = channel.state()
            with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
                publish("x")
            assert channel.state() == before

    def test_out_of_memory(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        fresh = Channel(client)
        before = channel.state()
        client.config_set("maxmemory", 1)
        try:
            with heard(client, channel) as ear:
                for one in (channel, fresh):
                    for publish in (one.publish, one.publish_plain):
                        with pytest.raises(redis.ResponseError, match=r"OOM|maxmemory"):
                            publish("x")
                assert ear.get_message(timeout=0.05) is None
            # What was taken is known all the same.
            assert channel.publish("a") == [1, b"1", b"e1"]
        finally:
            client.config_set("maxmemory", 0)
        assert channel.state() == before
        assert fresh.state() == []
        assert channel.publish("x") == [0, b"2", b"e1"]

    def test_a_replica(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        client.execute_command("REPLICAOF", "127.0.0.1", 1)
        try:
            for publish in (channel.publish, channel.publish_plain):
                with pytest.raises(redis.ResponseError, match=r"READONLY|read only replica"):
                    publish("x")
        finally:
            client.execute_command("REPLICAOF", "NO", "ONE")
        # It was promoted, so it is another master now; a broker has learnt it, for it connected anew.
        channel = Channel(client, name=channel.name)
        assert channel.publish("x", epoch="e2")[:3] == [0, b"2", b"e2"]
        assert channel.stored() == [(1, "a"), (2, "x")]

    def test_a_user_who_may_not_publish(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        client.acl_setuser("dumb", enabled=True, nopass=True, categories=["+@all"], keys=["*"], reset=True)
        client.execute_command("ACL", "SETUSER", "dumb", "resetchannels")
        with client.client() as other:
            other.execute_command("AUTH", "dumb", "x")
            dumb = Channel(other, replid=channel.replid, name=channel.name)
            with pytest.raises(redis.ResponseError):
                dumb.publish_plain("x")
            assert not client.exists(channel.key("id:x"))
            with pytest.raises(redis.ResponseError):
                dumb.publish("y")
            # This one is taken, in every respect: readers find it in the stream.
            assert channel.publish("y") == [1, b"2", b"e1"]
            assert channel.stored() == [(1, "a"), (2, "y")]
            other.execute_command("AUTH", "default", "")

    def test_a_user_who_may_not_ask(self, client: redis.Redis, channel: Channel) -> None:
        """Without INFO the caller's word counts."""
        channel.publish("a", epoch="e1")
        client.acl_setuser(
            "deaf",
            enabled=True,
            nopass=True,
            categories=["+@all"],
            commands=["-info"],
            keys=["*"],
            reset=True,
        )
        client.execute_command("ACL", "SETUSER", "deaf", "allchannels")
        with client.client() as other:
            other.execute_command("AUTH", "deaf", "x")
            deaf = Channel(other, replid=channel.replid, name=channel.name)
            assert deaf.publish("b") == [0, b"2", b"e1"]
            deaf.replid = MASTER
            assert deaf.publish("c", epoch="e2") == [0, b"3", b"e2"]
            other.execute_command("AUTH", "default", "")


class TestRead:
    def test_pieces(self, channel: Channel) -> None:
        for step in range(100):
            channel.publish(str(step), epoch="e1")
        epoch, seq, ends, first, messages = channel.read()
        assert (epoch, seq, ends, first, len(messages)) == (b"e1", b"100", b"", b"1", 100)
        assert messages[0].startswith(b"1 e1 1234\n") and messages[-1].startswith(b"100 e1 1234\n")
        assert channel.read(limit=0)[4] == []
        assert channel.read(90, 7)[4] == messages[90:97]
        assert channel.read(100)[4] == []
        assert channel.read(-40)[4] == messages[60:]
        assert channel.read(-4000)[4] == messages
        # By size: as many as fit, and one at least.
        assert channel.read(size=len(messages[0]) * 3 + 1)[4] == messages[:3]
        assert channel.read(5, size=1)[4] == messages[5:6]

    def test_a_new_channel_begins(self, client: redis.Redis, channel: Channel) -> None:
        epoch, seq, ends, first, messages, master = channel.read(epoch="e1")
        assert (epoch, seq, ends, first, messages) == (b"e1", b"0", b"", b"1", [])
        assert master.decode() == channel.replid
        assert channel.hash() == {"epoch": "e1", "seq": "0", "replid": channel.replid, "ends": ""}
        # Briefly: whoever subscribes to many names fills Redis for no longer than this.
        assert EMPTY_TTL - 60_000 < client.pttl(channel.key("h")) <= EMPTY_TTL
        assert channel.read(epoch="e2")[:2] == [b"e1", b"0"]
        assert channel.publish("a", epoch="e2") == [0, b"1", b"e1"]
        assert STATE_TTL - 60_000 < client.pttl(channel.key("h")) <= STATE_TTL

    def test_a_head_check_keeps_an_empty_channel(self, client: redis.Redis, channel: Channel) -> None:
        channel.read(epoch="e1")
        client.pexpire(channel.key("h"), EMPTY_TTL // 2)
        assert channel.read(limit=0, epoch="e2")[:2] == [b"e1", b"0"]
        assert EMPTY_TTL - 60_000 < client.pttl(channel.key("h")) <= EMPTY_TTL

    def test_a_new_channel_has_the_real_master(self, channel: Channel) -> None:
        real, channel.replid = channel.replid, MASTER
        channel.read(epoch="e1")
        assert channel.hash()["replid"] == real

    def test_a_stream_without_its_hash_goes(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a", epoch="e1")
        client.delete(channel.key("h"))
        assert channel.read(epoch="e2")[:5] == [b"e2", b"0", b"", b"1", []]
        assert not client.exists(channel.key("s"))

    def test_nothing_above_the_head(self, client: redis.Redis, channel: Channel) -> None:
        for message_id in "abcde":
            channel.publish(message_id, epoch="e1")
        client.hset(channel.key("h"), "seq", 3)
        assert len(channel.read()[4]) == 3
        assert [message[:1] for message in channel.read(-2)[4]] == [b"2", b"3"]

    def test_a_trimmed_stream_and_an_expired_one(self, client: redis.Redis, channel: Channel) -> None:
        for step in range(20):
            channel.publish(str(step), size=5)
        assert channel.read()[3] == b"16"
        client.delete(channel.key("s"))
        assert channel.read()[1:5] == [b"20", b"", b"21", []]

    def test_a_head_check_writes_only_now_and_then(self, client: redis.Redis, channel: Channel) -> None:
        channel.publish("a")
        client.config_resetstat()
        for _ in range(5):
            channel.read(limit=0)
        assert "cmdstat_pexpire" not in client.info("commandstats")
        client.pexpire(channel.key("h"), 1000)
        channel.read(limit=0)
        assert client.pttl(channel.key("h")) > STATE_TTL - 60_000
