"""The configuration: what is read, what is refused and how, and that conf/ and docs/ say the same."""

import dataclasses
import hashlib
import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tornado_bcast import config
from tornado_bcast.addresses import mask_url
from tornado_bcast.config import Config, Loaded, Origin, default_config, explain
from tornado_bcast.cores import usable_cores
from tornado_bcast.errors import ConfigError
from tornado_bcast.settings import SETTINGS, Setting, default_access, unsupported
from tornado_bcast.values import Given, masked

ROOT = Path(__file__).parent.parent

# Production as it should be, but for what a test adds: it has a key.
PRODUCTION = f"[server]\nenv = production\n[auth]\napi_keys = {'0' * 64}\n"

# Made for these tests, valid for 100 years, and of use for nothing else.
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBgDCCASWgAwIBAgIUG2xfx3McL25HpH7yQEOrNA5OHVowCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDA5MTMzOVoYDzIxMjYxMDMx
MDkxMzM5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASQLYOAhL4mNo7jFrFmPrbKLNPRTi/G/HvI+YG2/gf/cRGH4g4nTQJO
y7ZSoQQiWN9Eb5shhHUQ3hkz1op/38ZMo1MwUTAdBgNVHQ4EFgQUW6thcT7ZmbdZ
Atdk5VZgwpaetoYwHwYDVR0jBBgwFoAUW6thcT7ZmbdZAtdk5VZgwpaetoYwDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEA7N0oR6GwfWrQsgznvs85
OlKfQfPuk6NLVUfphpj0UtMCIQC8wObvXzlfsDpWqJZpMu9BP3EKA41W+Tb3bGhn
cWt8mQ==
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXhHzaBj5AJycjVUP
0KOE3T7k+9nlfq8H0BN51I5CJTShRANCAASQLYOAhL4mNo7jFrFmPrbKLNPRTi/G
/HvI+YG2/gf/cRGH4g4nTQJOy7ZSoQQiWN9Eb5shhHUQ3hkz1op/38ZM
-----END PRIVATE KEY-----
"""
OTHER_KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQguSIHQ8C+U5FDEn5m
czJmDoeOmoBphjnT74DGPBDFabahRANCAAThXIr8R2ZaE/nsY5Xl2yF1TFsaLPtV
2gUYGoZuqNpM93NnkW/XCNLP+JQuKRQblgcOKBAZryrvzQLFWqN6VWgj
-----END PRIVATE KEY-----
"""
# The passphrase is `x`.
LOCKED_KEY = """-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,55C6D061CB8C05CAE3228E2B09AFE961

RGUK1xhL8XRsoDtBQzVWTU/VOi5rrLfO6oVCXnm/4AlXaOzIBEAzY3PO71OqlbhP
2bt9RChBpntfiNvGkL2GfShqDeA/mbLf6on4GjCeoWDNF/4PoDVNbmwyD3J3Mbaw
GzzeB1Gh0lvEXKLfzfSokAV4eA+Sx1prl0nQo5osp/8=
-----END EC PRIVATE KEY-----
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "bcast.ini"


def read(file: Path, text: str | bytes, environ: dict[str, str] | None = None) -> Loaded:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.read(str(file), environ=environ or {}, cores=lambda: 3)


def load(file: Path, text: str | bytes) -> Config:
    return read(file, text).config


def problems(file: Path, text: str | bytes, environ: dict[str, str] | None = None) -> list[str]:
    """The problems of a file that must not start, the file's name as FILE."""
    with pytest.raises(ConfigError) as caught:
        read(file, text, environ)
    return [problem.replace(str(file), "FILE") for problem in caught.value.problems]


class TestDefaults:
    def test_contract(self) -> None:
        loaded = config.read(environ={}, cores=lambda: 3)
        assert loaded.config == Config(
            server=config.ServerConfig(
                "127.0.0.1", 8080, 3, "development", 0, 0, 20.0, 0.0, (), None, None, compression=False
            ),
            redis=config.RedisConfig("embedded:", "bcast", 5.0, 0, "always", None),
            cors=config.CorsConfig(("*",)),
            auth=config.AuthConfig((), (), (), (), (), ()),
            limits=config.LimitsConfig(50.0, 250, 65536, 200, 1 << 20, 10.0, 0.5, 0.0, 0),
            heartbeat=config.HeartbeatConfig(25.0, 10.0),
            session=config.SessionConfig(600.0),
            log=config.LogConfig("text", "INFO"),
            channels=config.ChannelsConfig(
                config.ChannelRule(
                    pattern="",
                    persistent=False,
                    history_size=1000,
                    history_ttl=3600.0,
                    dedup_ttl=300.0,
                    subscribe="anyone",
                    publish="anyone",
                    sender=False,
                    slow_consumer="disconnect",
                    ack_timeout=5.0,
                    max_redeliveries=6,
                    max_in_flight=1000,
                ),
                (),
                "server",
            ),
        )
        assert loaded.warnings == ()
        assert set(loaded.origins.values()) == {Origin("default")}

    def test_types(self) -> None:
        """A duration or a rate is a float also where its text has no point."""
        loaded = config.load(environ={})
        for section in dataclasses.fields(loaded):
            for item in dataclasses.fields(getattr(loaded, section.name)):
                if item.type is float:
                    assert type(getattr(getattr(loaded, section.name), item.name)) is float, item.name

    def test_table_and_dataclasses(self) -> None:
        loaded = config.load(environ={})
        for section in dataclasses.fields(loaded):
            value = getattr(loaded, section.name)
            keys = [item.name for item in dataclasses.fields(value)]
            if section.name == "channels":
                keys = [*(item.name for item in dataclasses.fields(value.default)[1:]), "publish_all"]
            assert keys == [row.key for row in SETTINGS if row.section == section.name]

    @pytest.mark.parametrize("row", SETTINGS, ids=lambda row: f"{row.section}.{row.key}")
    def test_default_text(self, row: Setting) -> None:
        """Defaults are written as `check-config` shows them, and each is explained in one line."""
        assert row.kind.show(row.kind.read(row.default)) == row.default
        assert row.why.endswith(".") and "\n" not in row.why and len(row.why) <= 108

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.load(environ={}).server.port = 1  # type: ignore[misc]

    def test_default_config(self) -> None:
        changed = default_config(server={"port": "0"}, **{"channel a.*": {"persistent": "yes"}})
        assert changed.server.port == 0
        assert [(rule.pattern, rule.persistent) for rule in changed.channels.rules] == [("a.*", True)]

    def test_log_format_follows_env(self) -> None:
        assert default_config(server={"env": "production"}).log.format == "json"
        assert default_config(server={"env": "production"}, log={"format": "text"}).log.format == "text"
        assert default_config(log={"format": "json"}).log.format == "json"

    def test_access_once_tokens_can_be_checked(self) -> None:
        none = config.load(environ={}).auth
        assert default_access(none) == "anyone"
        assert default_access(dataclasses.replace(none, api_keys=(Given("x"),))) == "anyone"
        for key in ("jwt_secret", "jwt_public_key", "jwks_file"):
            assert default_access(dataclasses.replace(none, **{key: (Given("x"),)})) == "token"

    def test_access_with_a_key(self) -> None:
        secret = "s" * 32
        channels = default_config(auth={"jwt_secret": secret}).channels
        assert (channels.default.subscribe, channels.default.publish) == ("token", "token")
        assert channels.publish_all == "server"
        channels = default_config(auth={"jwt_secret": secret}, channels={"publish": "anyone"}).channels
        assert (channels.default.subscribe, channels.default.publish) == ("token", "anyone")
        channels = default_config(auth={"api_keys": "0" * 64}).channels
        assert (channels.default.subscribe, channels.default.publish) == ("anyone", "anyone")

    def test_what_production_refuses(self) -> None:
        dev_key = hashlib.sha256(b"dev-key").hexdigest()
        for key, text, sentence in (
            ("jwt_secret", "s" * 31, "a secret of fewer than 32 bytes can be guessed"),
            ("api_keys", f"{dev_key} name=x", "`dev-key` is known to everybody"),
        ):
            loaded = config.read(environ={f"BCAST_AUTH_{key.upper()}": text})
            assert len(loaded.warnings) == (key == "jwt_secret")
            with pytest.raises(ConfigError, match=sentence):
                default_config(server={"env": "production"}, auth={key: text})
        assert default_config(server={"env": "production"}, auth={"jwt_secret": "s" * 32})


# Section, key, text, value.
GOOD = [
    ("server", "bind", "0.0.0.0", "0.0.0.0"),
    ("server", "bind", "::", "::"),
    ("server", "bind", "[::1]", "::1"),
    ("server", "bind", "localhost", "localhost"),
    ("server", "port", "0", 0),
    ("server", "port", "65535", 65535),
    ("server", "workers", "7", 7),
    ("server", "workers", "auto", 3),
    ("server", "drain_seconds", "250ms", 0.25),
    ("server", "drain_seconds", "10m", 600.0),
    ("server", "drain_seconds", "1h", 3600.0),
    ("server", "drain_seconds", "1d", 86400.0),
    ("server", "drain_seconds", "1.5h", 5400.0),
    ("server", "drain_seconds", "7", 7.0),
    ("server", "drain_seconds", "0", 0.0),
    (
        "server",
        "trusted_proxies",
        "10.0.0.0/8, ::1 192.0.2.7",
        tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "::1/128", "192.0.2.7/32"))),
    ),
    ("server", "trusted_proxies", "", ()),
    ("redis", "url", "memory:", "memory:"),
    ("redis", "url", "redis://localhost", "redis://localhost"),
    ("redis", "url", "redis://u:p%40@h_1.x:6380/3", "redis://u:p%40@h_1.x:6380/3"),
    ("redis", "url", "redis://[::1]:6379/", "redis://[::1]:6379/"),
    ("redis", "url", "rediss://:a,b@h?ssl_ca_certs=/ca.pem", "rediss://:a,b@h?ssl_ca_certs=/ca.pem"),
    ("redis", "url", "unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
    ("redis", "url", "unix://:pw@/run/redis.sock", "unix://:pw@/run/redis.sock"),
    ("redis", "prefix", "my-app.v2:", "my-app.v2:"),
    ("redis", "data_dir", "/var/lib/x y", "/var/lib/x y"),
    ("redis", "data_dir", "~/bcast", "~/bcast"),
    ("redis", "data_dir", "", None),
    ("cors", "origins", "*", ("*",)),
    ("cors", "origins", "https://A.example, null", ("https://a.example", "null")),
    (
        "cors",
        "origins",
        "https://*.example.com http://[::1]:3000",
        ("https://*.example.com", "http://[::1]:3000"),
    ),
    ("cors", "origins", "* http://localhost:3000 *", ("*", "http://localhost:3000")),
    (
        "cors",
        "origins",
        "chrome-extension://abcdef http://my_host",
        ("chrome-extension://abcdef", "http://my_host"),
    ),
    ("limits", "rate", "0.5", 0.5),
    ("limits", "max_message_bytes", "64K", 65536),
    ("limits", "max_message_bytes", "1m", 1 << 20),
    ("limits", "max_message_bytes", "1g", 1 << 30),
    ("limits", "max_message_bytes", "100", 100),
    ("log", "level", "Warning", "WARNING"),
    ("channels", "publish_all", "anyone", "anyone"),
]


@pytest.mark.parametrize(("section", "key", "text", "value"), GOOD)
def test_good_value(file: Path, section: str, key: str, text: str, value: object) -> None:
    loaded = load(file, f"[{section}]\n{key} = {text}\n")
    assert getattr(getattr(loaded, section), key) == value


@pytest.mark.parametrize("text", ["yes", "true", "on", "1", "YES", "no", "false", "off", "0", "False"])
def test_booleans(file: Path, text: str) -> None:
    expected = text.lower() in ("yes", "true", "on", "1")
    assert load(file, f"[channels]\npersistent = {text}").channels.default.persistent is expected


# Section, key, text, and what the sentence must have.
BAD = [
    ("server", "bind", "*", "write `0.0.0.0`"),
    ("server", "bind", "127.0.0.1:80", "the port has its own key"),
    ("server", "bind", "256.0.0.1", "neither an IP address nor a host name"),
    ("server", "bind", "a b", "neither"),
    ("server", "port", "http", "`http` is no whole number"),
    ("server", "port", "65536", "`65536` is out of range: 0 to 65535"),
    ("server", "port", "-1", "out of range"),
    ("server", "port", "٣", "no whole number"),
    ("server", "port", "8_0", "no whole number"),
    ("server", "port", '"8080"', "no whole number"),
    ("server", "port", "9" * 5000, "no whole number"),
    ("server", "workers", "0", "out of range: 1 to 1024 (or `auto`)"),
    ("server", "workers", "atuo", "no whole number (or `auto`)"),
    ("server", "env", "prodution", "did you mean `production`?"),
    ("server", "env", "Production", "did you mean `production`?"),
    ("server", "max_connections", "-5", "out of range"),
    ("server", "drain_seconds", "10 s", "no duration: write `250ms`, `5s`, `10m`, `1h` or `2d`"),
    ("server", "drain_seconds", "5S", "no duration"),
    ("server", "drain_seconds", "-5s", "no duration"),
    ("server", "drain_seconds", "nan", "no duration"),
    ("server", "drain_seconds", "9999d", "out of range: 0s to 1d"),
    ("server", "trusted_proxies", "10.0.0.1/8", "did you mean `10.0.0.0/8`?"),
    ("server", "trusted_proxies", "10.0.0.0/8, proxy", "`proxy` is neither"),
    ("server", "certfile", "'x.pem'", "without quotation marks"),
    ("redis", "url", "redsi://h", "did you mean `redis://`?"),
    ("redis", "url", "embeded:", "did you mean `embedded:`?"),
    ("redis", "url", "redis:/h", "did you mean `redis://`?"),
    ("redis", "url", "h:6379", "write `embedded:`"),
    ("redis", "url", "memory://", "nothing may stand behind `memory:`"),
    ("redis", "url", "redis://", "it needs one host"),
    ("redis", "url", "redis://h1:1,h2:2", "its host or port is wrong"),
    ("redis", "url", "redis://h1,h2", "it needs one host"),
    ("redis", "url", "redis://h:99999", "its host or port is wrong"),
    ("redis", "url", "redis://h:0", "its port must be 1 to 65535"),
    ("redis", "url", "redis://[::1", "its host or port is wrong"),
    ("redis", "url", "redis://h/name", "the number of the database"),
    ("redis", "url", "redis://h?ssl_cacerts=x", "did you mean `ssl_ca_certs`?"),
    ("redis", "url", "redis://h?db=x", "`db` is no number"),
    ("redis", "url", "redis://h ost", "white space"),
    ("redis", "url", "unix://run/redis.sock", "absolute path: `unix:///run/redis.sock`"),
    ("redis", "url", "unix:///" + "x" * 107, "at most 107 bytes"),
    (
        "redis",
        "url",
        "sentinel://h1:1,h2:2/main/0",
        "comes with the scale-out issue; not supported by this version",
    ),
    ("redis", "url", "cluster://h1:1", "`cluster://` comes with the scale-out issue"),
    ("redis", "prefix", "a{b}", "no braces"),
    ("redis", "prefix", "a*", "must be 1 to 64 of"),
    ("redis", "publish_timeout", "0", "out of range: 10ms to 1d"),
    ("redis", "appendfsync", "allways", "did you mean `always`?"),
    ("redis", "wait_replicas", "1", "`embedded:` has no replicas"),
    ("redis", "data_dir", "data", "is not an absolute path"),
    ("cors", "origins", "example.com", "did you mean `https://example.com`?"),
    ("cors", "origins", "https://example.com/", "did you mean `https://example.com`?"),
    ("cors", "origins", "https://example.com:443", "did you mean `https://example.com`?"),
    ("cors", "origins", "http://localhost:*", "has a bad port"),
    ("cors", "origins", "https://a.*.com", "has a bad host"),
    ("cors", "origins", "https://*", "has a bad host"),
    ("cors", "origins", "https://user@example.com", "has a bad host"),
    ("cors", "origins", "https://[::g]", "has a bad host"),
    ("cors", "origins", "https://bücher.example", "did you mean `https://xn--bcher-kva.example`?"),
    ("cors", "origins", "https://", "has a bad host"),
    ("cors", "origins", "?", "is no origin: write"),
    ("limits", "rate", "fast", "`fast` is no number"),
    ("limits", "rate", "-1", "out of range: 0 to 1000000"),
    ("limits", "rate", "1e3", "no number"),
    ("limits", "rate", "inf", "no number"),
    ("limits", "burst", "1.5", "no whole number"),
    ("limits", "max_message_bytes", "64kb", "no size: write `512`, `64k` or `1m`"),
    ("limits", "max_message_bytes", "2g", "out of range: 0 to 1g"),
    ("heartbeat", "interval", "0", "out of range: 50ms to 1h"),
    ("session", "ttl", "0", "out of range: 100ms to 30d"),
    ("log", "format", "jsn", "did you mean `json`? (or `auto`)"),
    ("log", "level", "warn", "did you mean `warning`?"),
    ("log", "level", "x", "valid: debug, info, warning, error, critical"),
    ("channels", "persistent", "yess", "did you mean `yes`?"),
    ("channels", "history_size", "0", "out of range: 1 to"),
    ("channels", "subscribe", "server", "valid: anyone, token, nobody"),
    ("channels", "publish", "nobody", "valid: anyone, token, server"),
    ("channels", "slow_consumer", "drop-oldest", "did you mean `drop_oldest`?"),
    ("auth", "jwt_secret", "file:/nowhere/x", "`/nowhere/x`: the file cannot be read: No such file"),
    ("auth", "jwt_secret", "file:", "`file:` needs the path of a file"),
    ("auth", "jwt_secret", "-----BEGIN PUBLIC KEY-----", "a public or private key is no secret"),
    ("auth", "jwt_secret", '{"keys": []}', "a key set belongs into jwks_file"),
    ("auth", "jwt_public_key", "s3cret", "no public key that can be read"),
    ("auth", "jwt_public_key", "-----BEGIN PUBLIC KEY-----", "a PEM text ends with"),
    ("auth", "jwks_file", "/nowhere/jwks.json", "`/nowhere/jwks.json`: the file cannot be read"),
    ("auth", "api_keys", "hunter2", "a line begins with the sha256 hash of a key (64 hex digits)"),
    ("auth", "api_keys", "0" * 64 + "\n  " + "0" * 64 + " name=b", "a key stands there twice"),
    ("auth", "api_keys", "0" * 64 + " nam=x", "`nam` is no option of a key; did you mean `name`?"),
    ("auth", "api_keys", "0" * 64 + " read", "`read` is no option of a key"),
    ("auth", "api_keys", "0" * 64 + " read=maybe", "`read` is yes or no"),
    ("auth", "api_keys", "0" * 64 + " rate=fast", "`rate` is a number of messages a second, not `fast`"),
    ("auth", "api_keys", "0" * 64 + " rate=1 rate=2", "`rate` stands twice"),
    ("auth", "api_keys", "0" * 64 + " publish=a,,b", "`` is no glob of channel names"),
    ("auth", "api_keys", "0" * 64 + " publish=$a", "`$a` is no glob of channel names"),
]


@pytest.mark.parametrize(("section", "key", "text", "sentence"), BAD)
def test_bad_value(file: Path, section: str, key: str, text: str, sentence: str) -> None:
    """The same fault, told with its place, from each layer."""
    (problem,) = problems(file, f"\n[{section}]\n# why\n{key} = {text}\n")
    assert problem.startswith(f"FILE:4: [{section}] {key}: ")
    assert sentence in problem
    assert len(problem) < 300 and problem.isprintable()

    told = problem.removeprefix("FILE:4")
    name = f"BCAST_{section}_{key}".upper()
    with pytest.raises(ConfigError) as caught:
        config.load(environ={name: text})
    assert caught.value.problems == [f"env {name}{told}"]
    with pytest.raises(ConfigError) as caught:
        config.load(environ={}, overrides={(section, key): text})
    assert caught.value.problems == [f"command line{told}"]


# The text of a file, and its problems.
BAD_FILES = [
    ("[sever]\nport = 1\n", ["FILE:1: [sever]: unknown section; did you mean `[server]`?"]),
    ("[Redis]\n", ["FILE:1: [Redis]: unknown section; did you mean `[redis]`?"]),
    ("[chanel a.*]\n", ["FILE:1: [chanel a.*]: unknown section; did you mean `[channel GLOB]`?"]),
    ("[channels a.*]\n", ["FILE:1: [channels a.*]: unknown section; did you mean `[channel GLOB]`?"]),
    (
        "[xyzzy]\n",
        [
            "FILE:1: [xyzzy]: unknown section; valid: [server], [redis], [cors], [auth], [limits], "
            "[heartbeat], [session], [log], [channels], [channel GLOB]"
        ],
    ),
    ("[server]\nprot = 1\n", ["FILE:2: [server] prot: unknown key; did you mean `port`?"]),
    ("[server]\nPort = 1\n", ["FILE:2: [server] Port: unknown key; did you mean `port`?"]),
    ("[server]\nurl = memory:\n", ["FILE:2: [server] url: unknown key here; it belongs to `[redis]`"]),
    ("[session]\nxyzzy = 1\n", ["FILE:2: [session] xyzzy: unknown key; valid: ttl"]),
    (
        "[channel a]\npublish_all = server\n",
        ["FILE:2: [channel a] publish_all: unknown key here; it belongs to `[channels]`"],
    ),
    (
        "[channel a]\npersistant = yes\n",
        ["FILE:2: [channel a] persistant: unknown key; did you mean `persistent`?"],
    ),
    ("[channel a]\nsender = x\n", ["FILE:2: [channel a] sender: `x` is neither yes nor no; valid: "]),
    ("[channel]\n", ["FILE:1: [channel]: channels have a section such as `[channel chat.*]`"]),
    ("[channel a b]\n", ["FILE:1: [channel a b]: channels have a section such as"]),
    ("[channel $x]\n", ["FILE:1: [channel $x]: channels have a section such as"]),
    ("[channel " + "a" * 256 + "]\n", ["FILE:1: [channel aaa"]),
    (
        "[server]\nport = 1\n\nport = 2\n",
        ["FILE:4: [server] port: the key stands here twice, first on line 2"],
    ),
    (
        "[server]\nport = 1\n[log]\n[server]\nbind = ::\n",
        ["FILE:4: [server]: the section stands here twice, first on line 1"],
    ),
    (
        "[channel a.*]\n[channel   a.*]\n",
        ["FILE:2: [channel a.*]: the section stands here twice, first on line 1"],
    ),
    ("port = 1\nbind = ::\n", ["FILE:1: a `[section]` must stand before the first key"]),
    ("[server\nport = x\n", ["FILE:1: a section is written `[name]`, the `]` is missing"]),
    ("[server] x\n", ["FILE:1: a section is written `[name]`, the `]` is missing"]),
    ("[ ]\n", ["FILE:1: the section has no name"]),
    ("[server]\nport: 80\n", ["FILE:2: this line is neither `[section]` nor `key = value` nor a comment"]),
    ("[server]\n= 80\n", ["FILE:2: there is no key before the `=`"]),
    (
        "[server]\nport =\n",
        ["FILE:2: [server] port: has no value; leave the line out for the default, `8080`"],
    ),
    ("[server]\nport = ; 80\n", ["FILE:2: [server] port: has no value"]),
    ("[server]\nport = 80\n  bind = ::\n", ["FILE:3: [server] port: the key takes one value on one line"]),
    (
        "[cors]\norigins =\n  https://a\n  b c\n",
        ["FILE:2: [cors] origins: `b` is no origin; did you mean `https://b`?"],
    ),
    (b"[server]\nport = 80\xff\n", ["FILE:2: the file is not UTF-8 text (byte 0xff)"]),
    (b"\xff\xfe[\x00s\x00", ["FILE:1: the file is not UTF-8 text (byte 0xff)"]),
    (b"[server]\nport = 8\x000\n", ["FILE:2: has the control character 0x00, this is no text"]),
    (b"[server]\rport = 80\r", ["FILE:1: has the control character 0x0d, this is no text"]),
    (b"x" * ((1 << 20) + 1), ["FILE:1: the file is larger than 1 MiB, this is no configuration"]),
    (
        "[server]\ncertfile = /nowhere/c.pem\n",
        ["FILE:2: [server] certfile: `keyfile` must be set as well", "FILE:2: "],
    ),
    (
        "[server]\nworkers = 2\n[redis]\nurl = memory:\n",
        ["FILE:2: [server] workers: `memory:` lives in one process, 2 need another [redis] url"],
    ),
    (
        "[redis]\nwait_replicas = 1\nurl = memory:\n",
        ["FILE:2: [redis] wait_replicas: `memory:` has no replicas"],
    ),
    # A URL that nobody knows says nothing about replicas or workers.
    ("[redis]\nwait_replicas = 1\nurl = redsi:\n[server]\nworkers = 2\n", ["FILE:3: [redis] url: "]),
]


@pytest.mark.parametrize(("text", "expected"), BAD_FILES)
def test_bad_file(file: Path, text: str | bytes, expected: list[str]) -> None:
    told = problems(file, text)
    assert len(told) == len(expected), told
    for problem, start in zip(told, expected, strict=True):
        assert problem.startswith(start)


class TestFile:
    def test_all_problems_at_once(self, file: Path) -> None:
        text = "[log]\nlevl = info\n[server]\nport = x\nkey\n[limits]\nburst = -1\n"
        assert [problem.split(" ", 1)[0] for problem in problems(file, text, {"PORT": "y", "BIND": "*"})] == [
            "FILE:2:",
            "FILE:4:",
            "FILE:5:",
            "FILE:7:",
            "env",
            "env",
        ]

    def test_garbage_is_told_shortly(self, file: Path) -> None:
        for text in ("x\n" * 100_000, "[server]\n" + "a=b\n" * 100_000, "[x]\n" * 100_000):
            told = problems(file, text)
            assert len(told) == 21
            assert told[-1].endswith(": too many faults, the rest of the file was not checked")

    def test_missing(self, tmp_path: Path) -> None:
        for path, reason in (
            (tmp_path / "no.ini", "No such file"),
            (tmp_path, "Is a directory"),
            ("a\0b", "null"),
        ):
            with pytest.raises(ConfigError) as caught:
                config.load(str(path), environ={"PORT": "x"})
            first, second = caught.value.problems
            assert first.startswith(f"{path}: the file cannot be read: ") and reason in first
            assert second.startswith("env PORT: ")

    def test_unreadable(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(ConfigError, match="the file cannot be read: Permission denied"):
            config.load(str(file), environ={})

    @pytest.mark.parametrize(
        "text", [b"", b"\n\n", b"# only\n; comments", b"\xef\xbb\xbf", b"[server]", b"[auth]\n"]
    )
    def test_empty(self, file: Path, text: bytes) -> None:
        assert load(file, text) == config.read(environ={}, cores=lambda: 3).config

    def test_mark_and_line_ends(self, file: Path) -> None:
        loaded = load(
            file, b"\xef\xbb\xbf[server]\r\nport = 81\r\n\r\n[cors]\r\norigins = null\r\n  https://a\r\n"
        )
        assert loaded.server.port == 81
        assert loaded.cors.origins == ("null", "https://a")

    def test_comments(self, file: Path) -> None:
        loaded = load(
            file,
            "[server] ; of the section\n# whole\n\tport = 81 # of the line\nbind = :: ; too\n"
            "[redis]\nurl = redis://:a;b@h ; but no sign within\n[cors]\n"
            "origins =\n  # of one value\n  https://a ; here\n\n  https://b\n",
        )
        assert (loaded.server.port, loaded.server.bind) == (81, "::")
        assert loaded.redis.url == "redis://:a;b@h"
        assert loaded.cors.origins == ("https://a", "https://b")

    def test_secrets_have_no_comments(self) -> None:
        row = next(row for row in SETTINGS if row.key == "jwt_secret")
        assert row.kind.verbatim
        assert row.kind.read("one # two\n  three ; four") == (Given("one # two"), Given("three ; four"))

    def test_keys_of_one_indent(self, file: Path) -> None:
        assert load(file, "[server]\n  port = 81\n  bind = ::\n").server.bind == "::"

    def test_tls(self, file: Path, tmp_path: Path) -> None:
        names = {
            "cert": CERTIFICATE,
            "key": PRIVATE_KEY,
            "other": OTHER_KEY,
            "locked": LOCKED_KEY,
            "junk": "junk",
        }
        for name, pem in names.items():
            (tmp_path / name).write_text(pem)

        def text(cert: str, key: str) -> str:
            return f"[server]\ncertfile = {tmp_path / cert}\nkeyfile = {tmp_path / key}\n"

        assert load(file, text("cert", "key")).server.keyfile == str(tmp_path / "key")
        for cert, key in (("cert", "other"), ("cert", "locked"), ("junk", "key"), ("key", "cert")):
            (problem,) = problems(file, text(cert, key))
            assert re.match(r"FILE:3: \[server\] keyfile: it and `.*` cannot serve TLS: ", problem)
        assert "keyfile: " in problems(file, text("cert", "gone"))[0]
        assert "cannot be read: Is a directory" in problems(file, text(".", "key"))[0]
        assert problems(file, f"[server]\nkeyfile = {tmp_path / 'key'}") == [
            "FILE:2: [server] keyfile: `certfile` must be set as well"
        ]


class TestRules:
    TEXT = """
        [channel chat.*]
        persistent = yes
        publish = server
        [channels]
        ack_timeout = 7s
        history_size = 5
        publish_all = anyone
        [channel ?]
        history_size = 6
        [channel all~*]
        """

    def test_order_and_defaults(self, file: Path) -> None:
        channels = load(file, self.TEXT).channels
        assert [rule.pattern for rule in channels.rules] == ["chat.*", "?", "all~*"]
        assert [rule.history_size for rule in channels.rules] == [5, 6, 5]
        assert [rule.ack_timeout for rule in channels.rules] == [7.0, 7.0, 7.0]
        assert [rule.persistent for rule in channels.rules] == [True, False, False]
        assert [rule.publish for rule in channels.rules] == ["server", "anyone", "anyone"]
        assert channels.default.pattern == ""
        assert channels.publish_all == "anyone"

    def test_variables_change_what_rules_leave_out(self, file: Path) -> None:
        environ = {"BCAST_CHANNELS_HISTORY_SIZE": "9", "BCAST_CHANNELS_PUBLISH": "server"}
        loaded = read(file, self.TEXT, environ)
        assert [rule.history_size for rule in loaded.config.channels.rules] == [9, 6, 9]
        assert {rule.publish for rule in loaded.config.channels.rules} == {"server"}
        assert str(loaded.origins["channel chat.*", "history_size"]) == "env BCAST_CHANNELS_HISTORY_SIZE"
        assert str(loaded.origins["channel ?", "history_size"]) == f"file {file}:10"

    def test_overrides(self, file: Path) -> None:
        file.write_text("[channel a]\nsender = no\n")
        overrides = {("channel a", "sender"): "yes", ("channel b", "sender"): "yes"}
        loaded = config.read(str(file), overrides=overrides, environ={})
        assert [(rule.pattern, rule.sender) for rule in loaded.config.channels.rules] == [
            ("a", True),
            ("b", True),
        ]

    def test_production_warns_when_no_key_is_set(self, file: Path) -> None:
        text = "[server]\nenv = production\n[channels]\npublish = server\n"
        (warning,) = read(file, text).warnings
        assert warning.startswith(
            "[auth] api_keys: no key is set, so in production nobody may publish over HTTP"
        )
        assert read(file, text.replace("production", "development")).warnings == ()
        # A key of tokens opens none of these.
        assert read(file, f"{text}[auth]\njwt_secret = {'s' * 32}\n").warnings == (warning,)
        assert read(file, f"{text}[auth]\napi_keys = {'0' * 64}\n").warnings == ()

    def test_production_warns_of_open_doors(self, file: Path) -> None:
        text = PRODUCTION + "[channel a]\npublish = anyone\n[channel b]\npublish = server\n"
        text += "[channel c]\n"
        why = "in production, anyone may publish there"
        assert read(file, text).warnings == (
            f"[channel a] publish = anyone (from: file {file}:6): {why}",
            f"[channel c] publish = anyone (from: default): {why}",
            f"[channels] publish = anyone (from: default): {why}",
        )
        text = PRODUCTION + "[channels]\npublish = server\npublish_all = anyone\n"
        assert read(file, text).warnings == (f"[channels] publish_all = anyone (from: file {file}:7): {why}",)
        assert read(file, text.replace("production", "development")).warnings == ()

    def test_rules_that_never_count(self, file: Path) -> None:
        text = PRODUCTION + "[channel **]\npublish = server\n[channel a]\npublish = anyone\n"
        assert read(file, text).warnings == ("[channel a] never counts: [channel **] matches first",)


class TestPrecedence:
    def test_order(self, file: Path) -> None:
        file.write_text("[server]\nport = 1\n")
        environ = {"PORT": "2"}
        overrides = {("server", "port"): "3"}

        def port(**layers: object) -> tuple[int, str]:
            loaded = config.read(**({"environ": {}} | layers))  # type: ignore[arg-type]
            return loaded.config.server.port, str(loaded.origins["server", "port"])

        assert port() == (8080, "default")
        assert port(path=str(file)) == (1, f"file {file}:2")
        assert port(path=str(file), environ=environ) == (2, "env PORT")
        assert port(path=str(file), environ=environ, overrides=overrides) == (3, "command line")

    def test_hidden_faults_are_told(self, file: Path) -> None:
        assert problems(file, "[server]\nport = x\n", {"PORT": "80"}) == [
            "FILE:2: [server] port: `x` is no whole number"
        ]

    @pytest.mark.parametrize(
        ("name", "text", "section", "key", "value"),
        [
            ("PORT", "81", "server", "port", 81),
            ("BIND", "::", "server", "bind", "::"),
            ("WORKERS", "5", "server", "workers", 5),
            ("BCAST_ENV", "production", "server", "env", "production"),
            ("REDIS_URL", "redis://h", "redis", "url", "redis://h"),
            ("CORS_ORIGIN", "https://a,null", "cors", "origins", ("https://a", "null")),
            ("CORS_ORIGIN", "https://a\nnull", "cors", "origins", ("https://a", "null")),
            ("BCAST_LIMITS_MAX_MESSAGE_BYTES", " 1m ", "limits", "max_message_bytes", 1 << 20),
            ("BCAST_SERVER_PORT", "82", "server", "port", 82),
        ],
    )
    def test_variables(self, name: str, text: str, section: str, key: str, value: object) -> None:
        loaded = config.read(environ={name: text})
        assert getattr(getattr(loaded.config, section), key) == value
        assert str(loaded.origins[section, key]) == f"env {name}"

    def test_every_key_has_a_variable(self) -> None:
        environ = {f"BCAST_{row.section}_{row.key}".upper(): row.default for row in SETTINGS}
        loaded = config.read(environ=environ)
        assert loaded.config == config.load(environ={})
        # appendfsync says something only with another URL; nothing here is unknown.
        assert loaded.warnings == ()

    def test_long_variable_over_short(self) -> None:
        loaded = config.read(environ={"PORT": "1", "BCAST_SERVER_PORT": "2"})
        assert loaded.config.server.port == 2
        assert loaded.warnings == ("env PORT and BCAST_SERVER_PORT differ; BCAST_SERVER_PORT counts",)
        assert config.read(environ={"PORT": "2", "BCAST_SERVER_PORT": "2"}).warnings == ()
        assert config.load(
            environ={"BCAST_ENV": "production", "BCAST_SERVER_ENV": "development"}
        ).server.env == ("development")

    def test_empty_variable_is_none(self, file: Path) -> None:
        loaded = read(
            file, "[server]\nport = 1\n", {"PORT": "", "BCAST_X": "", "BIND": " ", "BCAST_AUTH_API_KEYS": ""}
        )
        assert loaded.config.server.port == 1
        assert str(loaded.origins["server", "bind"]) == "default"

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("BCAST_SERVER_PROT", "; did you mean `BCAST_SERVER_PORT`?"),
            ("BCAST_PORT", "; did you mean `BCAST_SERVER_PORT`?"),
            ("BCAST_XYZZY", ""),
        ],
    )
    def test_unknown_variable_is_a_warning(self, name: str, hint: str) -> None:
        loaded = config.read(environ={name: "secret", "OTHER": "x", "BCAST_URL": "u", "BCAST_KEY": "k"})
        assert loaded.warnings == (f"env {name}: unknown variable, ignored{hint}",)
        assert loaded.config == config.load(environ={})

    def test_unknown_override(self) -> None:
        overrides = {("server", "prot"): "1", ("sever", "port"): "1"}
        with pytest.raises(ConfigError) as caught:
            config.load(overrides=overrides, environ={})
        assert caught.value.problems == [
            "command line: [server] prot: unknown key; did you mean `port`?",
            "command line: [sever]: unknown section; did you mean `[server]`?",
        ]

    def test_environment_of_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PORT", "4711")
        assert config.load().server.port == 4711


class TestBetweenKeys:
    def test_memory_means_one_worker(self) -> None:
        assert default_config(redis={"url": "memory:"}).server.workers == 1
        assert default_config(redis={"url": "memory:"}, server={"workers": "1"}).server.workers == 1
        with pytest.raises(ConfigError) as caught:
            config.load(environ={"REDIS_URL": "memory:", "WORKERS": "2"})
        (problem,) = caught.value.problems
        assert problem.startswith("env WORKERS: [server] workers: `memory:` lives in one process")

    def test_embedded_only(self, file: Path) -> None:
        text = "[redis]\nappendfsync = always\ndata_dir = /x\n"
        assert read(file, text).warnings == ()
        assert read(file, text, {"REDIS_URL": "redis://h"}).warnings == (
            f"[redis] appendfsync (file {file}:2) has no effect, it is for `embedded:` only",
            f"[redis] data_dir (file {file}:3) has no effect, it is for `embedded:` only",
        )

    def test_small_queue(self, file: Path) -> None:
        assert "max_queue_bytes is less" in read(file, "[limits]\nmax_queue_bytes = 1k\n").warnings[0]
        assert read(file, "[limits]\nmax_queue_bytes = 0\n").warnings == ()

    def test_what_is_not_supported_yet_is_refused_in_one_place(self) -> None:
        refused = {
            (row.section, row.key)
            for row in SETTINGS
            for value in ("token", "sentinel://h", "cluster://h")
            if unsupported(row, value)
        }
        assert refused == {("redis", "url")}


class TestExplain:
    def test_every_key(self, file: Path) -> None:
        text = "[limits]\nmax_queue_bytes = 2048\n[channel a.*]\nhistory_ttl = 90m\n"
        text += "[cors]\norigins =\n https://a\n null\n"
        lines = explain(read(file, text, {"PORT": "81"})).split("\n")
        assert len(lines) == len(SETTINGS) + sum(row.rule for row in SETTINGS)
        for line in (
            "server.port = 81  (from: env PORT)",
            "server.workers = 3  (from: default)",
            "server.certfile = (not set)  (from: default)",
            f"limits.max_queue_bytes = 2k  (from: file {file}:2)",
            f"cors.origins = https://a, null  (from: file {file}:6)",
            "channels.history_ttl = 1h  (from: default)",
            f"channel[a.*].history_ttl = 90m  (from: file {file}:4)",
            "channel[a.*].persistent = no  (from: default)",
        ):
            assert line in lines

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://user:hunter2@h:1/2", "redis://user:***@h:1/2"),
            ("rediss://:hunter2@h", "rediss://:***@h"),
            ("redis://hunter2@h", "redis://***@h"),
            ("redis://u:hunter2@hunter2@h", "redis://u:***@h"),
            ("unix://:hunter2@/run/r.sock", "unix://:***@/run/r.sock"),
            ("redis://h:1/2", "redis://h:1/2"),
            ("embedded:", "embedded:"),
        ],
    )
    def test_passwords_are_masked(self, url: str, shown: str) -> None:
        assert mask_url(url) == shown
        assert f"redis.url = {shown}  (from: env REDIS_URL)" in explain(
            config.read(environ={"REDIS_URL": url})
        )

    def test_passwords_in_the_query_are_masked(self) -> None:
        assert mask_url("redis://joe:pw@h:1/2?password=pw&db=1") == "redis://joe:***@h:1/2?password=***&db=1"
        assert mask_url("unix:///run/redis.sock?password=pw") == "unix:///run/redis.sock?password=***"

    def test_secrets_are_masked(self) -> None:
        secret = {
            row.key
            for row in SETTINGS
            if row.section == "auth" and masked(row.kind, (Given("hunter2"),)) == "***"
        }
        assert secret == {"jwt_secret", "api_keys"}

    def test_files_of_secrets_are_named(self, file: Path, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("hunter2\nhunter3\n")
        loaded = read(file, f"[auth]\njwt_secret = file:{secret}\n  hunter4\n")
        assert f"auth.jwt_secret = file:{secret}, ***  (from: file {file}:2)" in explain(loaded).split("\n")
        texts = [given.text for given in loaded.config.auth.jwt_secret]
        assert texts == ["hunter2", "hunter3", "hunter4"]
        assert "hunter" not in repr(loaded) + explain(loaded) + "".join(loaded.warnings)

    @pytest.mark.parametrize(
        "url",
        [
            "redis://u:hunter2@",
            "redis://u:hunter2/@h",
            "redis://u:1/hunter2@h",
            "redis://u:1?hunter2@h",
            "redis://u:hunter2?@h",
            "redis://u:hunter2#@h",
            "redis://u:hunter 2@h",
            "redis://u:hunter2@h:port",
            "redis://u:hunter2@h/x",
            "redis://u:hunter2@h?x=hunter2",
            "rediz://u:hunter2@h",
            "u:hunter2@h",
            "hunter2@h:1",
            "memory:hunter2",
            "sentinel://u:hunter2@h",
            "unix://u:hunter2@h/x",
        ],
    )
    def test_faults_tell_no_password(self, url: str) -> None:
        with pytest.raises(ConfigError) as caught:
            config.load(environ={"REDIS_URL": url})
        assert "hunter" not in str(caught.value)

    def test_faults_tell_no_secret(self, file: Path) -> None:
        for text in ("[auth]\napi_keys = hunter2\n", "[auth]\njwt_secret =\n  one\nhunter2\n"):
            assert "hunter" not in "".join(problems(file, text))


class TestCores:
    def tree(self, root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    V1 = "4:memory:/\n3:cpu,cpuacct:/docker/1\n1:name=systemd:/\n"

    @pytest.mark.parametrize(
        ("files", "cores"),
        [
            ({}, 8),
            ({"proc/self/cgroup": "junk\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 8),
            # Version 2: the group's own, one above, the one of a container, none at all.
            ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n"}, 2),
            ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "350000 100000\n"}, 3),
            ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
            ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
            ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
            ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9000000 100000\n"}, 8),
            ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "junk\n"}, 8),
            (
                {
                    "proc/self/cgroup": "0::/a/b\n",
                    "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                    "sys/fs/cgroup/a/cpu.max": "200000 50000\n",
                },
                4,
            ),
            # Version 1: under the name of both controllers, under one of them, a host's path in a container.
            (
                {
                    "proc/self/cgroup": V1,
                    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "150000\n",
                    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "50000\n",
                },
                3,
            ),
            (
                {
                    "proc/self/cgroup": V1,
                    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                },
                2,
            ),
            (
                {
                    "proc/self/cgroup": V1,
                    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                },
                8,
            ),
        ],
    )
    def test_quota(self, tmp_path: Path, files: dict[str, str], cores: int) -> None:
        assert usable_cores(8, self.tree(tmp_path, files)) == cores

    def test_affinity(self, tmp_path: Path) -> None:
        assert usable_cores(1, tmp_path) == 1
        assert usable_cores() >= 1


# Pieces that make files look enough like a configuration to get past the first checks.
PIECES = st.sampled_from(
    [f"[{row.section}]\n" for row in SETTINGS]
    + [f"{row.key} = " for row in SETTINGS]
    + [f"{row.key} = {row.default}\n" for row in SETTINGS]
    + [
        "[channel a.*]\n",
        "[channel ",
        "]",
        "\n",
        "\n  ",
        "=",
        " ; ",
        "#",
        "redis://u:p@",
        "https://",
        "[::",
        "%",
        "\r",
    ]
    + [
        "sentinel://",
        "9" * 400,
        "1e9",
        "5s",
        "\x00",
        "\x85",
        "\u2028",
        "ß",
        "xn--",
        "*.",
        "/8",
        "::1",
        "auto",
        "token",
    ]
)


# Of the module: hypothesis runs a test many times within one fixture.
@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.ini"


class TestNothingElseIsRaised:
    def check(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        try:
            loaded = config.read(str(path), environ={}, cores=lambda: 1)
        except ConfigError as error:
            assert error.problems
            for problem in error.problems:
                assert problem.startswith(f"{path}:") and problem.isprintable()
        else:
            assert explain(loaded)

    @given(data=st.binary(max_size=400))
    def test_bytes(self, path: Path, data: bytes) -> None:
        self.check(path, data)

    @given(parts=st.lists(PIECES | st.text(max_size=8), max_size=30))
    def test_pieces(self, path: Path, parts: list[str]) -> None:
        self.check(path, "".join(parts).encode("utf-8", "surrogatepass"))

    @given(row=st.sampled_from(SETTINGS), parts=st.lists(PIECES | st.text(max_size=8), max_size=6))
    def test_values(self, row: Setting, parts: list[str]) -> None:
        text = "".join(parts)
        for layers in ({"environ": {row.variables[-1]: text}}, {"overrides": {(row.section, row.key): text}}):
            try:
                value = getattr(config.read(**({"environ": {}} | layers)).config, row.section)
            except ConfigError as error:
                assert all(problem.isprintable() for problem in error.problems)
            else:
                assert value is not None

    @given(section=st.text(max_size=12), key=st.text(max_size=12), text=st.text(max_size=12))
    def test_overrides(self, section: str, key: str, text: str) -> None:
        with pytest.raises(ConfigError):
            config.load(overrides={(section, key): text, ("server", "?"): ""}, environ={f"BCAST_{key}": text})

    @given(milliseconds=st.integers(0, 10**9))
    def test_durations_are_shown_as_they_are_read(self, milliseconds: int) -> None:
        kind = next(row.kind for row in SETTINGS if row.key == "history_ttl")
        shown = kind.show(milliseconds / 1000)
        assert shown == "0s" or milliseconds < 1000 or kind.read(shown) == milliseconds / 1000

    @given(size=st.integers(0, 1 << 30))
    def test_sizes_are_shown_as_they_are_read(self, size: int) -> None:
        kind = next(row.kind for row in SETTINGS if row.key == "max_queue_bytes")
        assert kind.read(kind.show(size)) == size


class TestAnnotatedFile:
    """conf/tornado-bcast.ini: every key, its default, one line of why."""

    PATH = ROOT / "conf" / "tornado-bcast.ini"
    SETTING = re.compile(r"^#?([a-z_]+) =(?: (.*))?$", re.MULTILINE)

    def test_every_key(self) -> None:
        section, previous, found = "", "", []
        for line in self.PATH.read_text().splitlines():
            if line.startswith("["):
                section = line[1:-1]
            elif match := self.SETTING.match(line):
                found.append((section, match[1], match[2] or "", previous.removeprefix("# ")))
            previous = line
        assert found == [(row.section, row.key, row.default, row.why) for row in SETTINGS]

    def test_it_is_the_default(self) -> None:
        expected = config.read(environ={}).config
        loaded = config.read(str(self.PATH), environ={})
        assert (loaded.config, loaded.warnings) == (expected, ())

    def test_it_is_the_default_with_everything_switched_on(self, file: Path) -> None:
        text = re.sub(r"^#(?=[a-z_]+ =)", "", self.PATH.read_text(), flags=re.MULTILINE)
        loaded = read(file, text)
        assert loaded.config == config.read(environ={}, cores=lambda: 3).config
        assert {origin.source for origin in loaded.origins.values()} == {"file"}

    def test_its_example(self, file: Path) -> None:
        text = "\n".join(re.findall(r"^#   (.*)$", self.PATH.read_text(), re.MULTILINE))
        assert [rule.pattern for rule in load(file, text).channels.rules] == ["news.*", "cursor.*"]


class TestDocumentation:
    """docs/CONFIGURATION.md."""

    TEXT = (ROOT / "docs" / "CONFIGURATION.md").read_text()

    def tables(self) -> Iterator[tuple[str, str, str, str]]:
        for heading, part in re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", self.TEXT, re.MULTILINE):
            section = re.match(r"`\[(\w+)\]`", heading)
            if section:
                rows = part.partition("| key | default | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]
                for row in rows.splitlines():
                    key, default, meaning = (cell.strip() for cell in row.strip("|").split(" | "))
                    yield section[1], key, default, meaning

    def test_every_key(self) -> None:
        assert list(self.tables()) == [
            (row.section, f"`{row.key}`", f"`{row.default}`" if row.default else "not set", row.why)
            for row in SETTINGS
        ]

    def test_short_variables(self) -> None:
        found = re.findall(r"^\| `([A-Z_]+)` \| `\[(\w+)\] (\w+)` \|$", self.TEXT, re.MULTILINE)
        assert sorted(found) == sorted(
            (row.variable, row.section, row.key) for row in SETTINGS if row.variable
        )

    def test_long_variables(self) -> None:
        names = {name for row in SETTINGS for name in row.variables}
        client = {"BCAST_URL", "BCAST_KEY"}
        assert set(re.findall(r"\bBCAST_[A-Z_]*[A-Z]", self.TEXT)) <= names | client

    def example(self, first: str) -> str:
        """The indented block that begins with a line."""
        block = re.search(rf"(?:^    {re.escape(first)}\n)(?:    .*\n|\n(?=    ))*", self.TEXT, re.MULTILINE)
        assert block is not None
        return re.sub(r"^    ", "", block[0], flags=re.MULTILINE)

    def test_examples(self, file: Path) -> None:
        loaded = load(file, self.example("# a comment"))
        assert loaded.server.port == 9000
        assert loaded.cors.origins == ("https://example.com", "https://*.example.com")
        channels = load(file, self.example("[channels]")).channels
        assert [rule.pattern for rule in channels.rules] == ["chat.staff.*", "chat.*", "cursor.*"]
        assert [rule.publish for rule in channels.rules] == ["server", "anyone", "anyone"]
        assert channels.rules[0].subscribe == "nobody"
        assert channels.rules[2].dedup_ttl == 0

    def test_faults(self, file: Path) -> None:
        """The faults that it shows are those that are told."""
        text = "\n[server]\nprot = 80\n" + "\n" * 4 + "[redis]\npublish_timeout = 5 s\n"
        told = problems(file, text, {"WORKERS": "four"})
        shown = re.findall(r"^    ((?:/etc/tornado-bcast.ini:\d+|env \w+): .*)$", self.TEXT, re.MULTILINE)
        assert [line.replace("/etc/tornado-bcast.ini", "FILE") for line in shown] == told

    def test_explained_lines(self, file: Path) -> None:
        text = "\n" * 10 + "[redis]\nurl = redis://bcast:pw@db.internal:6379/0\n" + "\n" * 17
        text += "[channel news.*]\npublish = server\n"
        lines = (
            explain(read(file, text, {"PORT": "9000"}))
            .replace(str(file), "/etc/tornado-bcast.ini")
            .split("\n")
        )
        shown = re.findall(r"^    (.* = .*  \(from: .*\))$", self.TEXT, re.MULTILINE)
        assert len(shown) == 4
        assert set(shown) <= set(lines)
