"""Names, globs, channel rules, origins, and the bucket."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_bcast.config import default_config
from tornado_bcast.errors import Refusal
from tornado_bcast.rules import ChannelRules, Origins, check_channel, glob, take_tokens

# Channel names


@pytest.mark.parametrize("name", ["a", "A-Z_0.9:x@y=z+/~", "x" * 255, "/", "~", ".", "a/../b"])
def test_channel_names(name: str) -> None:
    assert check_channel(name) == name


@pytest.mark.parametrize(
    "name",
    [None, 1, True, [], {}, "", "x" * 256, "a b", " a", "a\n", "\n", "é", "a$", "a*", "a?", "a{b}", "a\x00"],
)
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(Refusal) as caught:
        check_channel(name)
    assert caught.value.code == "bad_channel"


def test_the_servers_own_names_are_refused_as_such() -> None:
    with pytest.raises(Refusal, match="server's own"):
        check_channel("$stats")


# Globs


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a", "a", True),
        ("a", "A", False),
        ("a", "ab", False),
        ("a", "ba", False),
        ("*", "", True),
        ("*", "a/b:c", True),
        ("a*", "a", True),
        ("a*", "abc", True),
        ("a*", "ba", False),
        ("*a", "cba", True),
        ("a*c", "ac", True),
        ("a*c", "abbc", True),
        ("a*c", "abb", False),
        ("?", "a", True),
        ("?", "", False),
        ("?", "ab", False),
        ("room:?:*", "room:1:x", True),
        ("room:?:*", "room:12:x", False),
        # Nothing else is special.
        ("a.c", "abc", False),
        ("a+", "aa", False),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        ("a|b", "a", False),
        ("(a)", "a", False),
        ("\\d", "1", False),
        ("^a$", "a", False),
    ],
)
def test_globs(pattern: str, name: str, matches: bool) -> None:
    assert bool(glob(pattern).fullmatch(name)) is matches


@given(st.text("ab*?", max_size=8), st.text("ab/", max_size=8))
def test_globs_are_what_a_shell_would_say(pattern: str, name: str) -> None:
    assert bool(glob(pattern).fullmatch(name)) is fnmatch.fnmatchcase(name, pattern)


def test_many_stars_cost_no_time() -> None:
    assert not glob("*a" * 12 + "b").fullmatch("a" * 255)


# Channel rules


def rules(ini: str, tmp_path_factory: pytest.TempPathFactory) -> ChannelRules:
    from tornado_bcast.config import load

    file = tmp_path_factory.mktemp("rules") / "x.ini"
    file.write_text(ini)
    return ChannelRules(load(str(file), environ={}).channels)


INI = """
[channels]
dedup_ttl = 1m
[channel news]
publish = server
[channel n*]
slow_consumer = latest
[channel room:?]
subscribe = nobody
dedup_ttl = 2m
[channel *]
sender = yes
"""


def test_the_first_that_matches_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = rules(INI, tmp_path_factory)
    assert found.find("news").publish == "server"
    assert found.find("news").slow_consumer == "disconnect", "of the first rule alone"
    assert found.find("n").slow_consumer == "latest"
    assert found.find("room:1").dedup_ttl == 120
    assert found.find("room:12").dedup_ttl == 60, "what a rule leaves out comes from [channels]"
    assert found.find("room:12").sender and not found.find("News").subscribe == "nobody"


def test_the_rule_of_a_name_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.rules._CACHE_SIZE", 10)
    found = ChannelRules(default_config().channels)
    for number in range(1000):
        assert found.find(f"c{number}").pattern == ""
    assert len(found._cache) <= 10


def test_who_may_subscribe(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = rules(INI, tmp_path_factory)
    assert found.check_subscribe("news").publish == "server"
    with pytest.raises(Refusal) as caught:
        found.check_subscribe("room:1")
    refusal = caught.value
    assert (refusal.code, refusal.channel) == ("forbidden", "room:1")
    assert refusal.setting == "[channel room:?] subscribe"
    assert "room" not in refusal.message, "the client learns no rule"


def test_who_may_publish(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = rules(INI, tmp_path_factory)
    assert found.check_publish("else", "ws").sender
    assert found.check_publish("news", "http").publish == "server"
    with pytest.raises(Refusal) as caught:
        found.check_publish("news", "ws")
    assert caught.value.setting == "[channel news] publish"


@pytest.mark.parametrize(("value", "may"), [("server", False), ("anyone", True)])
def test_who_may_publish_to_all(value: str, may: bool) -> None:
    found = ChannelRules(default_config(channels={"publish_all": value, "publish": "server"}).channels)
    assert found.check_publish(None, "http").dedup_ttl == 300
    if may:
        assert found.check_publish(None, "ws").pattern == ""
        return
    with pytest.raises(Refusal) as caught:
        found.check_publish(None, "ws")
    assert (caught.value.code, caught.value.setting) == ("forbidden", "[channels] publish_all")


def test_a_rule_of_the_defaults_is_named_by_their_section() -> None:
    found = ChannelRules(default_config(channels={"publish": "server"}).channels)
    with pytest.raises(Refusal) as caught:
        found.check_publish("a", "ws")
    assert caught.value.setting == "[channels] publish"


# Origins


@pytest.mark.parametrize(
    ("listed", "origin", "allowed", "named"),
    [
        ("*", "https://anything.example", True, False),
        ("*", "null", True, False),
        ("https://a.example", "https://a.example", True, True),
        ("https://a.example", "HTTPS://A.EXAMPLE", True, True),
        ("https://a.example", "http://a.example", False, False),
        ("https://a.example", "https://a.example:8443", False, False),
        ("https://a.example", "https://b.a.example", False, False),
        ("https://a.example", "https://a.example.evil", False, False),
        ("https://a.example", "null", False, False),
        ("https://a.example", "", False, False),
        ("null", "null", True, True),
        ("https://*.a.example", "https://b.a.example", True, True),
        ("https://*.a.example", "https://c.b.a.example", True, True),
        ("https://*.a.example", "https://a.example", False, False),
        ("https://*.a.example", "https://.a.example", False, False),
        ("https://*.a.example", "https://evila.example", False, False),
        ("https://*.a.example", "https://evil/.a.example", False, False),
        ("https://*.a.example", "https://evil#.a.example", False, False),
        ("https://*.a.example", "https://evil:80.a.example", False, False),
        ("https://*.a.example", "https://evil@b.a.example", False, False),
        ("https://*.a.example", "http://b.a.example", False, False),
        ("https://*.a.example", "https://b.a.example.evil", False, False),
        ("https://*.a.example", "https://b.aXexample", False, False),
        ("*, https://a.example", "https://a.example", True, True),
        ("*, https://a.example", "https://b.example", True, False),
    ],
)
def test_origins(listed: str, origin: str, allowed: bool, named: bool) -> None:
    origins = Origins(default_config(cors={"origins": listed}).cors.origins)
    assert (origins.allow(origin), origins.named(origin)) == (allowed, named)


# The bucket


def take(times: list[float], rate: float, burst: float, count: int = 1) -> list[bool]:
    """Which of the requests at these times are let through."""
    full_at, taken = 0.0, []
    for now in times:
        full_at, wait = take_tokens(full_at, now, rate, burst, count)
        taken.append(not wait)
    return taken


def test_a_burst_and_then_the_rate() -> None:
    assert take([100.0] * 6, 10, 5) == [True] * 5 + [False]
    assert take([100.0] * 5 + [100.05, 100.1, 100.1], 10, 5) == [True] * 5 + [False, True, False]


def test_no_rate_is_no_limit() -> None:
    assert all(take([1.0] * 1000, 0, 5))


def test_no_burst_is_what_the_rate_gives_in_a_second() -> None:
    assert take([1.0] * 4, 3, 0) == [True, True, True, False]
    assert take([1.0, 1.0, 3.0], 0.5, 0) == [True, False, True]


def test_the_wait_is_long_enough_and_no_longer() -> None:
    full_at, _ = take_tokens(0.0, 50.0, 4, 1)
    full_at, wait = take_tokens(full_at, 50.0, 4, 1)
    assert wait == pytest.approx(0.25)
    assert take_tokens(full_at, 50.0 + wait, 4, 1)[1] == 0
    assert take_tokens(full_at, 50.0 + wait - 0.01, 4, 1)[1] > 0


def test_more_than_a_whole_bucket_is_taken_when_it_is_full() -> None:
    full_at, wait = take_tokens(0.0, 10.0, 10, 5, 20)
    assert wait == 0
    # And it is paid for.
    assert take_tokens(full_at, 11.0, 10, 5)[1] > 0
    assert take_tokens(full_at, 12.1, 10, 5)[1] == 0


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 4)), min_size=1, max_size=60),
    st.floats(0.5, 50),
    st.integers(1, 20),
)
def test_never_more_than_burst_and_rate(steps: list[tuple[float, int]], rate: float, burst: int) -> None:
    now, full_at, taken = 1000.0, 0.0, []
    for pause, count in steps:
        now += pause
        count = min(count, burst)
        full_at, wait = take_tokens(full_at, now, rate, burst, count)
        assert wait >= 0
        if not wait:
            taken.append((now, count))
    for index, (start, _) in enumerate(taken):
        for stop in range(index, len(taken)):
            total = sum(count for _, count in taken[index : stop + 1])
            assert total <= burst + rate * (taken[stop][0] - start) + 0.001
