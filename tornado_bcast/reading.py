"""Reading the configuration, a layer over the other.

Owns where a value comes from, which names may stand where, and what holds between keys. Which keys there are
is the table of settings.py, how a value is written is in values.py and addresses.py, the file's syntax in
ini.py, what a key is in keys.py. Touches the file, the environment that it is given, and the files that
[auth] and TLS name.
"""

import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import keys
from .errors import ConfigError
from .ini import MAX_BYTES, MAX_FAULTS, IniKey, IniSection, parse_ini
from .settings import (
    SETTINGS,
    AuthConfig,
    ChannelRule,
    ChannelsConfig,
    Config,
    CorsConfig,
    HeartbeatConfig,
    LimitsConfig,
    LogConfig,
    RedisConfig,
    ServerConfig,
    SessionConfig,
    Setting,
    default_access,
    unsupported,
)
from .values import Given, is_glob, nearest, printable, quote, suggest

# Section -> key -> row. `[channel GLOB]` takes the rows of `[channels]` that are marked as a rule's.
_KEYS = {
    section: {row.key: row for row in SETTINGS if row.section == section}
    for section in dict.fromkeys(row.section for row in SETTINGS)
}
RULE_KEYS = {row.key: row for row in SETTINGS if row.rule}
_VARIABLES = frozenset(name for row in SETTINGS for name in row.variables)
# Those of `tornado-bcast publish` and `tail`, no settings of the daemon.
_CLIENT_VARIABLES = ("BCAST_URL", "BCAST_KEY")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written. `name` is the file or the variable, `line` that of the file."""

    source: Literal["default", "file", "env", "command line"]
    name: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"file {self.place}" if self.source == "file" else self.place

    @property
    def place(self) -> str:
        """How a sentence about it begins."""
        if self.source == "file":
            return f"{self.name}:{self.line}" if self.line else self.name
        return f"{self.source} {self.name}".rstrip()


DEFAULT = Origin("default")
_COMMAND_LINE = Origin("command line")


@dataclass(slots=True)
class Reading:
    """One run: the values so far, lowest precedence first, and every fault and warning."""

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    origins: dict[tuple[str, str], Origin] = field(default_factory=dict)
    # Of the rules, in the order of the file.
    patterns: list[str] = field(default_factory=list)
    faults: list[tuple[Origin, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Keys with a fault: what follows from their value is not worth a second one.
    unsound: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for row in SETTINGS:
            self.values[row.section, row.key] = row.kind.read(row.default)
            self.origins[row.section, row.key] = DEFAULT

    def add_file(self, path: str) -> None:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            self.faults.append((Origin("file", path), f"the file cannot be read: {reason}"))
            return
        sections, faults = parse_ini(data)
        self.faults += [(Origin("file", path, fault.number), fault.sentence) for fault in faults]
        for origin in self._set_sections(sections, path):
            if len(self.faults) >= MAX_FAULTS:
                self.faults.append((origin, "too many faults, the rest of the file was not checked"))
                return

    def _set_sections(self, sections: list[IniSection], path: str) -> Iterator[Origin]:
        """Take the sections of a file, a step at a time."""
        for section in sections:
            origin = Origin("file", path, section.number)
            known = self._open_section(section.name, origin)
            yield origin
            for key in section.keys if known else ():
                origin = Origin("file", path, key.number)
                self._set_from_file(section.name, key, origin)
                yield origin

    def _set_from_file(self, section: str, key: IniKey, origin: Origin) -> None:
        row = self._find(section, key.name, origin)
        if row is None:
            return
        lines = [
            (line.number, line.text if row.kind.verbatim else line.without_comment) for line in key.lines
        ]
        lines = [(number, text) for number, text in lines if text]
        if not row.kind.lines and len(lines) > 1:
            self._fault(section, key.name, _ONE_LINE, Origin("file", origin.name, lines[1][0]))
            return
        self._set(section, row, "\n".join(text for _, text in lines), origin)

    def add_environ(self, environ: Mapping[str, str]) -> None:
        for row in SETTINGS:
            given = [(name, environ[name].strip()) for name in row.variables if environ.get(name, "").strip()]
            for name, text in given:
                self._set(row.section, row, text, Origin("env", name))
            if len({text for _, text in given}) > 1:
                short, long = row.variables
                self.warnings.append(f"env {short} and {long} differ; {long} counts")
        for name in sorted(environ):
            if name.startswith("BCAST_") and name not in _VARIABLES and name not in _CLIENT_VARIABLES:
                near = _near_variable(name)
                meant = f"; did you mean `{near}`?" if near else ""
                self.warnings.append(f"env {printable(name)}: unknown variable, ignored{meant}")

    def add_overrides(self, overrides: Mapping[tuple[str, str], str]) -> None:
        for (section, key), text in overrides.items():
            if self._open_section(section, _COMMAND_LINE):
                row = self._find(section, key, _COMMAND_LINE)
                if row is not None:
                    self._set(section, row, text.strip(), _COMMAND_LINE)

    def _open_section(self, name: str, origin: Origin) -> bool:
        """Whether there is such a section; a rule's begins to count here, also without keys."""
        if name in _KEYS:
            return True
        word, _, glob = name.partition(" ")
        if word != "channel":
            near = nearest(word, ["channel"] if glob else [*_KEYS, "channel"])
            meant = f"[{near} GLOB]" if near == "channel" else f"[{near}]"
            valid = ", ".join(f"[{section}]" for section in _KEYS)
            hint = f"; did you mean `{meant}`?" if near else f"; valid: {valid}, [channel GLOB]"
            self.faults.append((origin, f"[{printable(name)}]: unknown section{hint}"))
            return False
        if not is_glob(glob):
            self.faults.append((origin, f"[{printable(name)}]: {_BAD_GLOB}"))
            return False
        if glob not in self.patterns:
            self.patterns.append(glob)
        return True

    def _find(self, section: str, key: str, origin: Origin) -> Setting | None:
        valid = _KEYS.get(section, RULE_KEYS)
        if key in valid:
            return valid[key]
        elsewhere = [f"`[{name}]`" for name, keys in _KEYS.items() if key in keys]
        hint = f" here; it belongs to {' or '.join(elsewhere)}" if elsewhere else suggest(key, valid)
        self._fault(section, printable(key), f"unknown key{hint}", origin)
        return None

    def _set(self, section: str, row: Setting, text: str, origin: Origin) -> None:
        try:
            if not text and row.default:
                raise ValueError(f"has no value; leave the line out for the default, `{row.default}`")
            value = row.kind.read(text)
            refusal = unsupported(row, value)
            if refusal:
                raise ValueError(refusal)
        except ValueError as error:
            self._fault(section, row.key, str(error), origin)
            return
        self.values[section, row.key] = value
        self.origins[section, row.key] = origin

    def _fault(self, section: str, key: str, sentence: str, origin: Origin | None = None) -> None:
        """Note what is wrong with a key: with what stands at `origin`, or with its value so far."""
        self.faults.append((origin or self.origins[section, key], f"[{section}] {key}: {sentence}"))
        self.unsound.add((section, key))

    def finish(self, cores: Callable[[], int]) -> Config:
        """Check what concerns several keys, fill in what is found out at the start, and build the result."""
        self._check_tls()
        self._check_redis()
        self._check_auth()
        self._resolve(cores)
        if self.faults:
            raise ConfigError(
                [f"{origin.place}: {sentence}" for origin, sentence in sorted(self.faults, key=_order)]
            )
        return self._build()

    def _check_tls(self) -> None:
        paths = {key: self.values["server", key] for key in ("certfile", "keyfile")}
        for key, other in (("certfile", "keyfile"), ("keyfile", "certfile")):
            if paths[key] is None:
                continue
            if paths[other] is None and ("server", other) not in self.unsound:
                self._fault("server", key, f"`{other}` must be set as well")
            try:
                open(paths[key], "rb").close()
            except OSError as error:
                self._fault("server", key, f"{quote(paths[key])} cannot be read: {error.strerror}")
        if not all(paths.values()) or self.unsound & {("server", "certfile"), ("server", "keyfile")}:
            return
        try:
            # Without a password function OpenSSL would ask for a passphrase on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(**paths, password=lambda: "")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            self._fault("server", "keyfile", f"it and {quote(paths['certfile'])} cannot serve TLS: {reason}")

    def _check_redis(self) -> None:
        url, workers = self.values["redis", "url"], self.values["server", "workers"]
        if ("redis", "url") in self.unsound:
            return
        if url == "memory:" and workers is not None and workers > 1:
            self._fault(
                "server", "workers", f"`memory:` lives in one process, {workers} need another [redis] url"
            )
        if url in ("memory:", "embedded:") and self.values["redis", "wait_replicas"]:
            self._fault(
                "redis", "wait_replicas", f"`{url}` has no replicas, no publish would be acknowledged"
            )

    def _check_auth(self) -> None:
        """Read the files that [auth] names, and look at every key."""
        readers: dict[str, tuple[Callable[[str], list[str]], Callable[[str], object]]] = {
            "jwt_secret": (str.splitlines, self._check_secret),
            "jwt_public_key": (keys.split_pem, keys.read_public_key),
            "jwks_file": (_whole, keys.read_key_set),
            "jwt_audience": (str.splitlines, _whole),
            "jwt_issuer": (str.splitlines, _whole),
            "api_keys": (_uncommented, self._check_api_key),
        }
        for key, (split, check) in readers.items():
            found: list[Given] = []
            for given in self.values["auth", key]:
                where = f"{quote(given.path)}: " if given.path else ""
                try:
                    texts = [text.strip() for text in split(_contents(given))] if given.path else [given.text]
                    texts = [text for text in texts if text]
                    if not texts:
                        raise ValueError("the file is empty")
                    for text in texts:
                        check(text)
                except OSError as error:
                    self._fault("auth", key, f"{where}the file cannot be read: {error.strerror}")
                except ValueError as error:
                    self._fault("auth", key, f"{where}{error}")
                else:
                    found += (Given(text, given.path) for text in texts)
            self.values["auth", key] = tuple(found)
        digests = [given.text.split()[0].lower() for given in self.values["auth", "api_keys"]]
        if len(set(digests)) < len(digests):
            self._fault("auth", "api_keys", "a key stands there twice")

    def _check_secret(self, text: str) -> None:
        keys.read_secret(text)
        if len(text.encode()) < keys.MIN_SECRET_BYTES and self.values["server", "env"] == "production":
            raise ValueError(
                f"a secret of fewer than {keys.MIN_SECRET_BYTES} bytes can be guessed, production takes none;"
                " make one with `openssl rand -base64 32`"
            )

    def _check_api_key(self, line: str) -> None:
        key = keys.read_api_key(line)
        if self.values["server", "env"] == "production":
            for known in keys.KNOWN_KEYS:
                if key.digest == keys.digest(known):
                    raise ValueError(
                        f"`{known}` is known to everybody, and production takes no such key;"
                        " `tornado-bcast key` makes one"
                    )

    def _resolve(self, cores: Callable[[], int]) -> None:
        """Give the keys whose default depends on others their value."""
        values = self.values
        if values["server", "workers"] is None:
            values["server", "workers"] = 1 if values["redis", "url"] == "memory:" else cores()
        if values["log", "format"] is None:
            values["log", "format"] = "text" if values["server", "env"] == "development" else "json"
        for key in ("subscribe", "publish"):
            if self.origins["channels", key] is DEFAULT:
                values["channels", key] = default_access(AuthConfig(**self._section("auth")))
        for pattern in self.patterns:
            for key in RULE_KEYS:
                name = f"channel {pattern}", key
                values.setdefault(name, values["channels", key])
                self.origins.setdefault(name, self.origins["channels", key])

    def _section(self, name: str) -> dict[str, Any]:
        return {key: self.values[name, key] for key in _KEYS[name]}

    def _rule(self, section: str, pattern: str) -> ChannelRule:
        return ChannelRule(pattern, **{key: self.values[section, key] for key in RULE_KEYS})

    def _build(self) -> Config:
        return Config(
            server=ServerConfig(**self._section("server")),
            redis=RedisConfig(**self._section("redis")),
            cors=CorsConfig(**self._section("cors")),
            auth=AuthConfig(**self._section("auth")),
            limits=LimitsConfig(**self._section("limits")),
            heartbeat=HeartbeatConfig(**self._section("heartbeat")),
            session=SessionConfig(**self._section("session")),
            log=LogConfig(**self._section("log")),
            channels=ChannelsConfig(
                default=self._rule("channels", ""),
                rules=tuple(self._rule(f"channel {pattern}", pattern) for pattern in self.patterns),
                publish_all=self.values["channels", "publish_all"],
            ),
        )


_BAD_GLOB = (
    "channels have a section such as `[channel chat.*]`; a glob has 1 to 255 of "
    "A-Z a-z 0-9 _ - . : @ = + / ~ and the signs * and ?"
)
_ONE_LINE = "the key takes one value on one line; this line is indented, so it belongs to the key above"


def _contents(given: Given) -> str:
    assert given.path is not None
    with open(given.path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError("the file is too large to hold keys")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the file is no UTF-8 text") from None


def _whole(text: str) -> list[str]:
    return [text]


def _uncommented(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def _near_variable(name: str) -> str | None:
    """The variable that was meant: one whose section was left out, else the nearest spelling."""
    rest = name.removeprefix("BCAST_").lower()
    row = next((row for row in SETTINGS if row.key == rest), None)
    longs = {f"{row.section}_{row.key}": row for row in SETTINGS}
    row = row or longs.get(nearest(rest, longs) or "")
    return row.variables[-1] if row else None


def _order(fault: tuple[Origin, str]) -> tuple[int, int]:
    sources = ("file", "env", "command line", "default")
    return sources.index(fault[0].source), fault[0].line
