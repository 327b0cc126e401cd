"""The configuration: command line over environment over file over defaults.

Owns what the package asks for: `load`, and for `check-config` `read` and `explain`; and the warnings about
what can be used but is hardly meant. Which keys there are is the table of settings.py, the reading itself is
in reading.py. Never touches Tornado or Redis.

    config = load("/etc/tornado-bcast.ini")            # ConfigError with every fault at once
    print(explain(read("/etc/tornado-bcast.ini")))     # what holds, and where each value was written
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .cores import usable_cores
from .keys import MIN_SECRET_BYTES
from .reading import DEFAULT, RULE_KEYS, Origin, Reading
from .settings import (
    SETTINGS,
    AuthConfig,
    ChannelRule,
    ChannelsConfig,
    Config,
    CorsConfig,
    Environment,
    HeartbeatConfig,
    LimitsConfig,
    LogConfig,
    LogFormat,
    MayPublish,
    MaySubscribe,
    RedisConfig,
    ServerConfig,
    SessionConfig,
    Setting,
    SlowConsumer,
)
from .values import masked

# The rest of the package imports the classes of the sections from here.
__all__ = [
    "AuthConfig",
    "ChannelRule",
    "ChannelsConfig",
    "Config",
    "CorsConfig",
    "Environment",
    "HeartbeatConfig",
    "LimitsConfig",
    "Loaded",
    "LogConfig",
    "LogFormat",
    "MayPublish",
    "MaySubscribe",
    "Origin",
    "RedisConfig",
    "ServerConfig",
    "SessionConfig",
    "SlowConsumer",
    "default_config",
    "explain",
    "load",
    "read",
]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that can be used, and how it came about.

    `origins` has each section and key, for rules with the section `channel GLOB`. `warnings` are sentences
    for the log: nothing in them stops the start.
    """

    config: Config
    origins: Mapping[tuple[str, str], Origin]
    warnings: tuple[str, ...]


def load(
    path: str | None = None,
    *,
    overrides: Mapping[tuple[str, str], str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """The effective configuration; see `read`."""
    return read(path, overrides=overrides, environ=environ).config


def default_config(**sections: Mapping[str, str]) -> Config:
    """The defaults with some keys changed: `default_config(server={"port": "0"})`. Reads no environment."""
    overrides = {(section, key): text for section, keys in sections.items() for key, text in keys.items()}
    return load(overrides=overrides, environ={})


def read(
    path: str | None = None,
    *,
    overrides: Mapping[tuple[str, str], str] | None = None,
    environ: Mapping[str, str] = os.environ,
    cores: Callable[[], int] = usable_cores,
) -> Loaded:
    """Read all there is: `overrides` (section and key to text) over `environ` over the file over defaults.

    A value is checked also where another one hides it. Raises ConfigError with all problems at once.
    """
    reading = Reading()
    if path is not None:
        reading.add_file(path)
    reading.add_environ(environ)
    reading.add_overrides(overrides or {})
    config = reading.finish(cores)
    return Loaded(config, reading.origins, (*reading.warnings, *_doubts(config, reading.origins)))


def explain(loaded: Loaded) -> str:
    """Every effective key in a line, `section.key = value  (from: where)`, secrets masked."""
    return "\n".join(
        f"{name} = {masked(row.kind, value) or '(not set)'}  (from: {origin})"
        for name, row, value, origin in _effective(loaded)
    )


def _effective(loaded: Loaded) -> Iterator[tuple[str, Setting, Any, Origin]]:
    for row in SETTINGS:
        section = getattr(loaded.config, row.section)
        value = getattr(section.default if row.rule else section, row.key)
        yield f"{row.section}.{row.key}", row, value, loaded.origins[row.section, row.key]
    for rule in loaded.config.channels.rules:
        for key, row in RULE_KEYS.items():
            origin = loaded.origins[f"channel {rule.pattern}", key]
            # Globs have dots of their own.
            yield f"channel[{rule.pattern}].{key}", row, getattr(rule, key), origin


def _doubts(config: Config, origins: Mapping[tuple[str, str], Origin]) -> Iterator[str]:
    """What can be used but is hardly meant, or should be known in production."""
    url, limits = config.redis.url, config.limits
    if url != "embedded:":
        for key in ("appendfsync", "data_dir"):
            if origins["redis", key] is not DEFAULT:
                yield f"[redis] {key} ({origins['redis', key]}) has no effect, it is for `embedded:` only"
    if 0 < limits.max_queue_bytes < limits.max_message_bytes:
        yield "[limits] max_queue_bytes is less than max_message_bytes: one large message overfills a queue"
    if any(len(given.text.encode()) < MIN_SECRET_BYTES for given in config.auth.jwt_secret):
        yield (
            f"[auth] jwt_secret ({origins['auth', 'jwt_secret']}): a secret of fewer than {MIN_SECRET_BYTES}"
            " bytes can be guessed; production refuses it"
        )
    rules = config.channels.rules
    reached = _reached(rules)
    for rule in rules[reached:]:
        yield f"[channel {rule.pattern}] never counts: [channel {rules[reached - 1].pattern}] matches first"
    if config.server.env == "production":
        if not config.auth.api_keys:
            yield (
                "[auth] api_keys: no key is set, so in production nobody may publish over HTTP or read"
                " /stats, /metrics and /channels; `tornado-bcast key` makes one"
            )
        yield from _open_doors(config.channels, origins)


def _reached(rules: tuple[ChannelRule, ...]) -> int:
    """How many rules can count at all: none does after one that matches every name."""
    return next((n for n, rule in enumerate(rules, 1) if not rule.pattern.strip("*")), len(rules))


def _open_doors(channels: ChannelsConfig, origins: Mapping[tuple[str, str], Origin]) -> Iterator[str]:
    """Each key by which anyone may publish."""
    rules = channels.rules[: _reached(channels.rules)]
    doors = [(f"channel {rule.pattern}", "publish", rule.publish) for rule in rules]
    if not rules or rules[-1].pattern.strip("*"):
        doors.append(("channels", "publish", channels.default.publish))
    doors.append(("channels", "publish_all", channels.publish_all))
    for section, key, value in doors:
        if value == "anyone":
            where = origins[section, key]
            yield f"[{section}] {key} = anyone (from: {where}): in production, anyone may publish there"
