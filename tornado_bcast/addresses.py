"""Addresses as kinds of value: where to listen, whom to trust, web origins, and the URL of Redis.

The same `Kind` as in values.py, for what has a syntax of its own. Nothing here resolves or opens an address.
"""

import ipaddress
import re
from urllib.parse import parse_qsl, urlsplit

from .values import MASK, Kind, nearest, quote, suggest

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# sockaddr_un.sun_path holds 108 bytes with the final zero (man 7 unix).
_MAX_SOCKET_PATH = 107
_URL_SCHEMES = ("embedded:", "memory:", "unix://", "redis://", "rediss://", "sentinel://", "cluster://")
# What may stand behind the `?` of a Redis URL. redis-py takes more, but time limits are not its business.
_URL_OPTIONS = (
    "db",
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
)
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.ASCII | re.DOTALL)
# Browsers leave these out of `Origin`, so an entry with one never matches (RFC 6454, section 6.1).
_DEFAULT_PORTS = {"http": "80", "https": "443", "ws": "80", "wss": "443"}


def bind_address() -> Kind:
    """An IP address or a host name."""

    def read(text: str) -> str:
        bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        try:
            return str(ipaddress.ip_address(bare))
        except ValueError:
            pass
        if text == "*":
            raise ValueError("`*` is no address: write `0.0.0.0`, or `::` for IPv6 as well")
        # A name of digits and dots is an address with a typing error, never a host.
        if len(text) > 253 or not _HOST.fullmatch(text.lower()) or re.fullmatch(r"[0-9.]+", text):
            raise ValueError(
                f"{quote(text)} is neither an IP address nor a host name (the port has its own key)"
            )
        return text

    return Kind(read)


def networks() -> Kind:
    """IP addresses and networks, separated by commas, spaces or lines."""

    def read(text: str) -> tuple[Network, ...]:
        return tuple(_read_network(item) for item in _items(text))

    return Kind(read, lambda value: ", ".join(map(str, value)), lines=True)


def _read_network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f"{quote(text)} is neither an IP address nor a network such as `10.0.0.0/8`"
        ) from None
    raise ValueError(f"{quote(text)} has bits set behind its mask; did you mean `{meant}`?")


def origins() -> Kind:
    """`*`, `null`, and origins as browsers send them, separated by commas, spaces or lines."""

    def read(text: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_read_origin(item) for item in _items(text)))

    return Kind(read, ", ".join, lines=True)


def _read_origin(text: str) -> str:
    """RFC 6454, section 6: `null`, or scheme, host and a port that is not the scheme's own."""
    if text in ("*", "null"):
        return text
    match = _ORIGIN.fullmatch(text.lower())
    if not match:
        raise ValueError(f"{quote(text)} is no origin{_meant(f'https://{text.lower()}') or _ORIGIN_FORM}")
    scheme, rest = match.groups()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if authority != rest:
        raise ValueError(
            f"{quote(text)}: an origin ends with its host or port{_meant(f'{scheme}://{authority}')}"
        )
    # An IPv6 address has colons of its own, within brackets.
    colon = ":" if ":" in authority.rpartition("]")[2] else ""
    host, _, port = authority.rpartition(":") if colon else (authority, "", "")
    if colon and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError(f"{quote(text)} has a bad port")
    if colon and port == _DEFAULT_PORTS.get(scheme):
        raise ValueError(
            f"{quote(text)}: browsers leave the scheme's own port out{_meant(f'{scheme}://{host}')}"
        )
    if not _valid_host(host.removeprefix("*.")):
        raise ValueError(
            f"{quote(text)} has a bad host{_meant_idna(scheme, host, colon + port) or _ORIGIN_FORM}"
        )
    return f"{scheme}://{authority}"


_ORIGIN_FORM = (
    ": write `https://example.com`, `https://*.example.com`, `http://localhost:3000`, `null` or `*`"
)


def _valid_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        try:
            return ipaddress.ip_address(host[1:-1]).version == 6
        except ValueError:
            return False
    return len(host) <= 253 and bool(_HOST.fullmatch(host))


def _meant(origin: str) -> str:
    """A suggestion, if it is itself an origin."""
    try:
        return f"; did you mean `{_read_origin(origin)}`?" if _ORIGIN.fullmatch(origin) else ""
    except ValueError:
        return ""


def _meant_idna(scheme: str, host: str, port: str) -> str:
    """Browsers send the ASCII form of an international name."""
    if host.isascii():
        return ""
    try:
        return _meant(f"{scheme}://{host.encode('idna').decode()}{port}")
    except UnicodeError:
        return ""


def _items(text: str) -> list[str]:
    return [item for item in re.split(r"[,\s]+", text) if item]


def redis_url() -> Kind:
    """Where the broker is. The sentences never repeat the URL, it may hold a password."""

    def read(text: str) -> str:
        scheme = next((scheme for scheme in _URL_SCHEMES if text.startswith(scheme)), None)
        if scheme is None:
            name = text.partition(":")[0] + ":"
            near = nearest(name, _URL_SCHEMES)
            raise ValueError(
                f"this is no Redis URL{f'; did you mean `{near}`?' if near else f': {_URL_FORM}'}"
            )
        if scheme in ("embedded:", "memory:") and text != scheme:
            raise ValueError(f"nothing may stand behind `{scheme}`")
        if scheme in ("unix://", "redis://", "rediss://"):
            _check_url(text, scheme)
        return text

    return Kind(read, mask_url)


_URL_FORM = "write `embedded:`, `memory:`, `unix:///PATH`, `redis://HOST:PORT/DB` or `rediss://HOST:PORT/DB`"
_URL_ESCAPES = "in a password # / ? @ are written %23 %2F %3F %40"


def _check_url(text: str, scheme: str) -> None:
    if not text.isprintable() or " " in text:
        raise ValueError("it has white space or an unprintable character; those are written with %")
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError(f"its host or port is wrong ({_URL_ESCAPES})") from None
    if "#" in text or "@" in url.query:
        raise ValueError(f"a `#` or `@` stands in the wrong place ({_URL_ESCAPES})")
    options = parse_qsl(url.query, keep_blank_values=True)
    for name, value in options:
        if name not in _URL_OPTIONS:
            raise ValueError(f"its option {quote(name)} is unknown here{suggest(name, _URL_OPTIONS)}")
        if name == "db" and not re.fullmatch(r"[0-9]{1,5}", value):
            raise ValueError("its option `db` is no number")
    if scheme == "unix://":
        if not url.path.startswith("/") or url.path == "/" or url.hostname:
            raise ValueError("it needs an absolute path: `unix:///run/redis.sock`")
        if len(url.path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(f"the path of a socket has at most {_MAX_SOCKET_PATH} bytes")
        return
    if not url.hostname or not _valid_host(f"[{url.hostname}]" if ":" in url.hostname else url.hostname):
        raise ValueError(f"it needs one host: `redis://HOST:PORT/DB` ({_URL_ESCAPES})")
    if port == 0:
        raise ValueError("its port must be 1 to 65535")
    if not re.fullmatch(r"(/[0-9]{0,5})?", url.path):
        raise ValueError("behind the host and port stands the number of the database, nothing else")


def mask_url(text: str) -> str:
    """The URL without its passwords, and without a lone name before the `@`, which may be one by mistake."""
    text = re.sub(r"(?<=[?&]password=)[^&]*", MASK, text)
    scheme, separator, rest = text.partition("://")
    userinfo, at, place = rest.rpartition("@")
    if not (separator and at):
        return text
    user, colon, _ = userinfo.partition(":")
    return f"{scheme}://{user if colon else ''}{colon}{MASK}@{place}"
