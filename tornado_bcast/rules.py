"""Who may do what: channel names, globs, channel rules, origins, token buckets.

Pure functions and small tables; nothing here knows sockets or the clock, times come in as seconds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from .config import ChannelRule, ChannelsConfig
from .errors import ErrorCode, Refusal

# RFC 3986's unreserved characters and a few that people use to structure names.
_CHANNEL = re.compile(r"[A-Za-z0-9_\-.:@=+/~]{1,255}")
# How many channel names `ChannelRules` remembers the rule of; a client can invent names without end.
_CACHE_SIZE = 100_000


def check_channel(channel: object) -> str:
    """The name, or Refusal `bad_channel` unless it is one that clients may use."""
    if isinstance(channel, str) and _CHANNEL.fullmatch(channel):
        return channel
    if channel is None:
        raise Refusal("bad_channel", "`channel` is missing.")
    if isinstance(channel, str) and channel.startswith("$"):
        raise Refusal("bad_channel", "Channels that begin with $ are the server's own; choose another name.")
    raise Refusal(
        "bad_channel",
        "`channel` must be a string of 1 to 255 of the characters A-Z a-z 0-9 _ - . : @ = + / ~",
    )


def glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob: `*` any run of characters, `?` one character, nothing else is special."""
    parts = ["".join("." if char == "?" else re.escape(char) for char in part) for part in pattern.split("*")]
    first, *middle = parts[:-1] or [""]
    # What stands between two stars may as well match at its first place; an atomic group never tries another
    # one, so a name that a client has invented costs no time, however many stars there are.
    runs = "".join(f"(?>.*?{part})" for part in middle if part)
    return re.compile(f"{first}{runs}.*{parts[-1]}" if len(parts) > 1 else parts[0], re.DOTALL)


# Those of tokens; most are the same for all, or name one channel and need no pattern.
_compiled = lru_cache(4096)(glob)


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the globs matches the whole name."""
    for pattern in patterns:
        if pattern == name or pattern == "*":
            return True
        if ("*" in pattern or "?" in pattern) and _compiled(pattern).fullmatch(name):
            return True
    return False


def may_publish(patterns: Iterable[str], channel: str | None) -> bool:
    """Whether to this channel; None is to everybody, which only the glob `*` allows."""
    return "*" in patterns if channel is None else matches(patterns, channel)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who somebody is, and what the token says that they may: globs of channels. `sub` "" is nobody.

    `expires_at` is in Unix seconds, None: never.
    """

    sub: str
    subscribe: tuple[str, ...] = ()
    publish: tuple[str, ...] = ()
    expires_at: int | None = None

    def may_subscribe(self, channel: str) -> bool:
        return matches(self.subscribe, channel)

    def may_publish(self, channel: str | None) -> bool:
        return may_publish(self.publish, channel)


# A connection without a token.
NOBODY: Final = Principal("")


class ChannelRules:
    """Finds the rule of a channel: that of the first `[channel GLOB]` that matches, else the defaults."""

    def __init__(self, channels: ChannelsConfig) -> None:
        self._default = channels.default
        self._globs = [(glob(rule.pattern), rule) for rule in channels.rules]
        self._cache: dict[str, ChannelRule] = {}
        self.publish_all = channels.publish_all

    @property
    def everybody(self) -> ChannelRule:
        """What holds for a broadcast to all: the defaults."""
        return self._default

    def find(self, channel: str) -> ChannelRule:
        rule = self._cache.get(channel)
        if rule is None:
            rule = next((rule for pattern, rule in self._globs if pattern.fullmatch(channel)), self._default)
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            self._cache[channel] = rule
        return rule

    def check_subscribe(self, channel: str, who: Principal = NOBODY) -> ChannelRule:
        """The rule of a channel that this client may subscribe to; Refusal otherwise."""
        rule = self.find(channel)
        if rule.subscribe == "anyone" or (rule.subscribe == "token" and who.may_subscribe(channel)):
            return rule
        raise self._refusal(
            "This channel cannot be subscribed to."
            if rule.subscribe == "nobody"
            else "Subscribing to this channel needs a token: connect with one, or send `auth`."
            if not who.sub
            else "Your token does not allow to subscribe to this channel.",
            needs_token=rule.subscribe == "token" and not who.sub,
            channel=channel,
            setting=f"[{_section(rule)}] subscribe",
        )

    def check_publish(
        self, channel: str | None, via: Literal["ws", "http"], who: Principal = NOBODY
    ) -> ChannelRule:
        """The rule of a channel that this publisher may publish to; None is a broadcast to all."""
        rule = self._default if channel is None else self.find(channel)
        allowed, key = (self.publish_all, "publish_all") if channel is None else (rule.publish, "publish")
        if via == "http" or allowed == "anyone" or (allowed == "token" and who.may_publish(channel)):
            return rule
        what = "Messages to everybody" if channel is None else "Messages to this channel"
        raise self._refusal(
            f"{what} are published over HTTP only."
            if allowed == "server"
            else f"{what} need a token: connect with one, or send `auth`."
            if not who.sub
            else f"{what} are not allowed by your token.",
            needs_token=allowed == "token" and not who.sub,
            channel=channel,
            setting=f"[{'channels' if channel is None else _section(rule)}] {key}",
        )

    @staticmethod
    def _refusal(message: str, *, needs_token: bool, channel: str | None, setting: str) -> Refusal:
        code: ErrorCode = "unauthorized" if needs_token else "forbidden"
        return Refusal(code, message, channel=channel, setting=setting)


def _section(rule: ChannelRule) -> str:
    return f"channel {rule.pattern}" if rule.pattern else "channels"


class Origins:
    """Which `Origin` may connect and read: the list of `[cors] origins`.

    `*` is any origin, `https://*.example.com` any host below example.com (not itself), `null` the origin of a
    page opened from disk or a sandboxed frame.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        self._names = {origin.lower() for origin in origins}
        self._any = "*" in self._names
        self._patterns = [
            # A host label never holds a slash, so the wildcard cannot run into another part of the origin.
            re.compile(re.escape(name).replace(r"\*", r"[a-z0-9_.-]+"))
            for name in self._names
            if "*" in name and name != "*"
        ]

    def allow(self, origin: str) -> bool:
        """Whether this origin may use the server."""
        return self._any or self.named(origin)

    def named(self, origin: str) -> bool:
        """Whether this origin stands in the list by name or pattern; `*` does not count."""
        origin = origin.lower()
        return origin in self._names - {"*"} or any(p.fullmatch(origin) for p in self._patterns)


def take_tokens(full_at: float, now: float, rate: float, burst: int, count: int = 1) -> tuple[float, float]:
    """Take `count` tokens of a bucket that holds `burst` and gains `rate` a second.

    The bucket's whole state is one number, the time at which it is full again (the generic cell rate
    algorithm of ITU-T I.371). Returns its new value, and the seconds to wait: 0 when the tokens were taken,
    else nothing was taken. A rate of 0 is no limit; a burst of 0 is one second's worth.
    """
    if rate <= 0:
        return full_at, 0.0
    if full_at <= now:
        # It is full: also a request for more than a whole bucket is let through, or it never would be.
        return now + count / rate, 0.0
    taken = full_at + count / rate
    wait = taken - now - max(burst or rate, 1) / rate
    return (taken, 0.0) if wait <= 1e-9 else (full_at, wait)
