"""Every setting of the daemon: what the rest of the package gets, and the table that says how it is written.

`SETTINGS` has one row for each key: section, key, kind, default, and a line of why. Parsing, the variables,
`check-config`, conf/tornado-bcast.ini and docs/CONFIGURATION.md are all read from it or held against it by
tests. `unsupported` is the one place that refuses what this version cannot do yet. Reading files and
variables is done by config.py; nothing here knows them.
"""

from dataclasses import dataclass
from typing import Any, Literal

from . import addresses, values
from .addresses import Network
from .values import Given, Kind

Environment = Literal["development", "production"]
LogFormat = Literal["json", "text"]
MaySubscribe = Literal["anyone", "token", "nobody"]
MayPublish = Literal["anyone", "token", "server"]
SlowConsumer = Literal["disconnect", "drop_oldest", "latest"]

# Times are seconds, sizes bytes, in all of these.


@dataclass(frozen=True, slots=True)
class ServerConfig:
    bind: str
    # 0: any free port.
    port: int
    workers: int
    env: Environment
    # 0: as many as the descriptors allow.
    max_connections: int
    # 0: no limit.
    max_connections_per_ip: int
    drain_seconds: float
    drain_delay: float
    trusted_proxies: tuple[Network, ...]
    # Both or neither.
    certfile: str | None
    keyfile: str | None
    compression: bool


@dataclass(frozen=True, slots=True)
class RedisConfig:
    # Checked, but for what only a connection can tell. May hold a password: show `addresses.mask_url` of it.
    url: str
    prefix: str
    publish_timeout: float
    wait_replicas: int
    # These two are for `embedded:` only.
    appendfsync: str
    data_dir: str | None


@dataclass(frozen=True, slots=True)
class CorsConfig:
    # Lower case, as browsers send them: `*`, `null`, `https://example.com`, `https://*.example.com`.
    origins: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """What stands in files is here as well; keys.py makes keys of it."""

    jwt_secret: tuple[Given, ...]
    jwt_public_key: tuple[Given, ...]
    jwks_file: tuple[Given, ...]
    jwt_audience: tuple[Given, ...]
    jwt_issuer: tuple[Given, ...]
    api_keys: tuple[Given, ...]


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """0 is no limit; a burst of 0 is what the rate gives in one second."""

    rate: float
    burst: int
    max_message_bytes: int
    max_subscriptions: int
    max_queue_bytes: int
    handshake_timeout: float
    max_lag: float
    http_rate: float
    http_burst: int


@dataclass(frozen=True, slots=True)
class HeartbeatConfig:
    interval: float
    timeout: float


@dataclass(frozen=True, slots=True)
class SessionConfig:
    ttl: float


@dataclass(frozen=True, slots=True)
class LogConfig:
    format: LogFormat
    # A name of the logging module: DEBUG, INFO, WARNING, ERROR, CRITICAL.
    level: str


@dataclass(frozen=True, slots=True)
class ChannelRule:
    """What holds for the channels that the glob matches; the pattern of `[channels]` itself is empty."""

    pattern: str
    persistent: bool
    history_size: int
    history_ttl: float
    # 0: off.
    dedup_ttl: float
    subscribe: MaySubscribe
    publish: MayPublish
    sender: bool
    slow_consumer: SlowConsumer
    ack_timeout: float
    max_redeliveries: int
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class ChannelsConfig:
    # For channels that no rule matches.
    default: ChannelRule
    # In the order of the file, the first match counts; what a rule leaves out is filled in from `default`.
    rules: tuple[ChannelRule, ...]
    publish_all: MayPublish


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig
    redis: RedisConfig
    cors: CorsConfig
    auth: AuthConfig
    limits: LimitsConfig
    heartbeat: HeartbeatConfig
    session: SessionConfig
    log: LogConfig
    channels: ChannelsConfig


@dataclass(frozen=True, slots=True)
class Setting:
    """One key.

    `default` is written as it would be in the file; empty: not set. `rule`: it may also stand in
    `[channel GLOB]`. `variable` is its short environment variable, beside `BCAST_<SECTION>_<KEY>`.
    """

    section: str
    key: str
    kind: Kind
    default: str
    why: str
    rule: bool = False
    variable: str | None = None

    @property
    def variables(self) -> tuple[str, ...]:
        """Its environment variables, the one that counts last."""
        long = f"BCAST_{self.section}_{self.key}".upper()
        return (self.variable, long) if self.variable else (long,)


def _setting(
    section: str, key: str, kind: Kind, default: str, why: str, variable: str | None = None
) -> Setting:
    return Setting(section, key, kind, default, why, variable=variable)


def _rule(key: str, kind: Kind, default: str, why: str) -> Setting:
    return Setting("channels", key, kind, default, why, rule=True)


_DAY = 86400.0
_LEVEL = values.choice("debug", "info", "warning", "error", "critical", folded=True)

# fmt: off
SETTINGS: tuple[Setting, ...] = (
    _setting("server", "bind", addresses.bind_address(), "127.0.0.1",
        "The address to listen on; 0.0.0.0 is every one of this machine, :: IPv6 as well.", "BIND"),
    _setting("server", "port", values.whole(0, 65535), "8080",
        "The port to listen on; 0 takes a free one.", "PORT"),
    _setting("server", "workers", values.auto(values.whole(1, 1024)), "auto",
        "Worker processes; auto: one for each core that affinity and CPU quota leave, 1 with memory:.",
        "WORKERS"),
    _setting("server", "env", values.choice("development", "production"), "development",
        "development: text logs, a page at /, no key for what is plainly local; production: none of these.",
        "BCAST_ENV"),
    _setting("server", "max_connections", values.whole(0, 10_000_000), "0",
        "Connections over all workers, one more gets 503; 0: as many as the file descriptors allow."),
    _setting("server", "max_connections_per_ip", values.whole(0, 10_000_000), "0",
        "Connections of one address; 0: no limit, for a whole office may share one."),
    _setting("server", "drain_seconds", values.duration(high=_DAY), "20s",
        "Over how long a reload sends clients away and a stop lets them return, so that not all do at once."),
    _setting("server", "drain_delay", values.duration(high=_DAY), "0s",
        "How long a stopping daemon still takes connections while /health/ready says 503, for balancers."),
    _setting("server", "trusted_proxies", addresses.networks(), "",
        "Addresses and networks of proxies whose X-Forwarded-For and X-Real-IP are believed."),
    _setting("server", "certfile", values.path(), "",
        "The certificate chain (PEM) for TLS; goes together with keyfile."),
    _setting("server", "keyfile", values.path(), "",
        "The private key (PEM, without a passphrase) of certfile."),
    _setting("server", "compression", values.boolean(), "no",
        "yes: clients that offer permessage-deflate are sent compressed messages; fewer bytes for more CPU."),

    _setting("redis", "url", addresses.redis_url(), "embedded:",
        "embedded: starts a private server; unix:///, redis://, rediss:// use yours; memory: is for tests.",
        "REDIS_URL"),
    _setting("redis", "prefix", values.prefix(), "bcast",
        "What every key begins with; daemons with the same one on the same Redis are one service."),
    _setting("redis", "publish_timeout", values.duration(0.01, _DAY), "5s",
        "How long a publish is tried again while Redis is away, before its sender is told `unavailable`."),
    _setting("redis", "wait_replicas", values.whole(0, 100), "0",
        "How many replicas must have a persistent message before it is acknowledged (WAIT)."),
    _setting("redis", "appendfsync", values.choice("always", "everysec", "no"), "always",
        "embedded: only. always: what is acknowledged survives a power cut; everysec may lose 2 s."),
    _setting("redis", "data_dir", values.path(absolute=True), "",
        "embedded: only. Where its data lies; not set: $STATE_DIRECTORY, or ~/.local/state/tornado-bcast."),

    _setting("cors", "origins", addresses.origins(), "*",
        "Web pages that may connect: * is all; else a list, https://*.example.com takes subdomains.",
        "CORS_ORIGIN"),

    _setting("auth", "jwt_secret", values.verbatim_lines(secret=True), "",
        "Secrets that HS256, HS384 and HS512 tokens are checked with, one a line, or file:PATH."),
    _setting("auth", "jwt_public_key", values.verbatim_lines(), "",
        "Public keys that RS256, ES256 and EdDSA tokens are checked with, file:PATH of a PEM file."),
    _setting("auth", "jwks_file", values.verbatim_lines(files=True), "",
        "Files with a JSON Web Key Set, whose kid chooses the key."),
    _setting("auth", "jwt_audience", values.verbatim_lines(), "",
        "A token must be meant for one of these (aud)."),
    _setting("auth", "jwt_issuer", values.verbatim_lines(), "",
        "A token must come from one of these (iss)."),
    _setting("auth", "api_keys", values.verbatim_lines(secret=True), "",
        "Hashes of the keys that open the HTTP endpoints (tornado-bcast key), one a line, or file:PATH."),

    _setting("limits", "rate", values.number(1_000_000), "50",
        "Requests a second of one connection; ack and pong are free. 0: no limit, as in all of these."),
    _setting("limits", "burst", values.whole(0, 10_000_000), "250",
        "Requests that one connection may send at once after a silence; 0: what rate gives in one second."),
    _setting("limits", "max_message_bytes", values.size(), "64k",
        "The largest frame or body from a client."),
    _setting("limits", "max_subscriptions", values.whole(0, 1_000_000), "200",
        "Channels of one connection."),
    _setting("limits", "max_queue_bytes", values.size(), "1m",
        "What may wait for one client that reads slowly, before slow_consumer decides."),
    _setting("limits", "handshake_timeout", values.duration(high=3600), "10s",
        "How long a new connection may take for its request, before it is cut."),
    _setting("limits", "max_lag", values.duration(high=3600), "500ms",
        "A worker whose loop is late by more than this for 2 s refuses new connections and publishes."),
    _setting("limits", "http_rate", values.number(1_000_000), "0",
        "Messages a second that one address may publish over HTTP, on average."),
    _setting("limits", "http_burst", values.whole(0, 10_000_000), "0",
        "Messages that one address may publish at once over HTTP; 0: what http_rate gives in one second."),

    _setting("heartbeat", "interval", values.duration(0.05, 3600), "25s",
        "How often every client is pinged; below the idle timeout of proxies, which is often 60s."),
    _setting("heartbeat", "timeout", values.duration(0.05, 3600), "10s",
        "A client that sends nothing for this long after a ping is closed with 4001."),

    _setting("session", "ttl", values.duration(0.1, 30 * _DAY), "10m",
        "How long after its connection has ended a session can be resumed."),

    _setting("log", "format", values.auto(values.choice("json", "text")), "auto",
        "json: an object a line; text: for people. auto: text in development, json in production."),
    _setting("log", "level", _LEVEL, "info",
        "The lowest level that is written. No level writes payloads, tokens or session ids."),

    _rule("persistent", values.boolean(), "no",
        "yes: messages are kept in Redis and delivered at least once, with seq and epoch."),
    _rule("history_size", values.whole(1, 10_000_000), "1000",
        "How many messages of a persistent channel are kept."),
    _rule("history_ttl", values.duration(1, 366 * _DAY), "1h",
        "How long they are kept, counted from the channel's last message."),
    _rule("dedup_ttl", values.duration(high=30 * _DAY), "5m",
        "How long a messageId is remembered, so that a retry is no second message; 0s: off."),
    _rule("subscribe", values.choice("anyone", "token", "nobody"), "anyone",
        "Who may subscribe: anyone, token (one that allows it; the default with a JWT key) or nobody."),
    _rule("publish", values.choice("anyone", "token", "server"), "anyone",
        "Who may publish: anyone, token (as above) or server (HTTP with a key only)."),
    _rule("sender", values.boolean(), "no",
        "yes: each message says from which client it came."),
    _rule("slow_consumer", values.choice("disconnect", "drop_oldest", "latest"), "disconnect",
        "disconnect, drop_oldest or latest: when max_queue_bytes is full; persistent channels wait instead."),
    _rule("ack_timeout", values.duration(0.05, 3600), "5s",
        "Without progress of its acks for this long, a client is sent its messages again."),
    _rule("max_redeliveries", values.whole(0, 1000), "6",
        "After so many tries without progress the client is closed with 4002."),
    _rule("max_in_flight", values.whole(1, 1_000_000), "1000",
        "Messages that may be on their way to one subscriber without an ack."),
    _setting("channels", "publish_all", values.choice("server", "token", "anyone"), "server",
        "Who may broadcast to everybody: server (HTTP with a key), token (with publish: *) or anyone."),
)
# fmt: on


def unsupported(setting: Setting, value: Any) -> str | None:
    """What this version refuses by name, in a sentence; None where there is nothing to refuse.

    The issue that brings a feature deletes its line here.
    """
    name = setting.section, setting.key
    if name == ("redis", "url") and value.startswith(("sentinel://", "cluster://")):
        scheme = value.partition("://")[0]
        return f"`{scheme}://` comes with the scale-out issue; not supported by this version yet"
    return None


def default_access(auth: AuthConfig) -> Literal["anyone", "token"]:
    """The default of `subscribe` and `publish`: once tokens can be checked, they are asked for.

    `api_keys` alone changes nothing here.
    """
    return "token" if auth.jwt_secret or auth.jwt_public_key or auth.jwks_file else "anyone"
