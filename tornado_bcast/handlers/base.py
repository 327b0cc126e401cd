"""What all handlers share: JSON answers, origins, and who may use HTTP.

No handler touches Redis: they speak to the node. What a client sent is never logged, its query neither.
"""

import ipaddress
import logging
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Any, Literal, cast

from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError, RequestHandler

from ..addresses import Network
from ..errors import HTTP_STATUS, ErrorCode, Refusal
from ..keys import ApiKey
from ..protocol import dump
from ..rules import take_tokens
from .context import Context, CountedByPeer

logger = logging.getLogger(__name__)

_FORWARDED = frozenset(("Forwarded", "X-Real-Ip", "Via"))
_CODES: dict[int, ErrorCode] = {status: code for code, status in reversed(HTTP_STATUS.items())}


def is_loopback(host: str) -> bool:
    """Whether this is a name or address of this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_name(request: HTTPServerRequest) -> str:
    """The `Host` header without its port, and without the brackets of IPv6."""
    host = request.host
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """An address, also with a port or in the form in which IPv6 sockets show IPv4; None where it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_in(text: str, networks: Iterable[Network]) -> bool:
    address = _address(text)
    return address is not None and any(address in network for network in networks)


def _client_of(hops: str, proxies: Iterable[Network]) -> str:
    """The last hop that is no trusted proxy; where all are, the first. "" where there is none to believe."""
    client = ""
    for hop in reversed(hops.split(",")):
        address = _address(hop)
        if address is None:
            # Whatever stands before it was not written by a proxy that is trusted.
            break
        client = str(address)
        if not _is_in(client, proxies):
            break
    return client


class BaseHandler(RequestHandler):
    """A handler that answers in JSON. Subclasses set `kind` for the log of refusals."""

    context: Context

    def initialize(self, context: Context) -> None:
        self.context = context
        self.set_busy(True)

    def on_finish(self) -> None:
        self.set_busy(False)

    def set_busy(self, busy: bool) -> None:
        """Have the worker wait, or no longer, for the end of this request when it leaves."""
        if (stream := self.counted_stream) is not None:
            stream.busy = busy

    @property
    def counted_stream(self) -> CountedByPeer | None:
        stream = getattr(self.request.connection, "stream", None)
        # An `isinstance` of a protocol would cost more than all of this method's callers.
        return cast(CountedByPeer, stream) if hasattr(stream, "count_as") else None

    def set_default_headers(self) -> None:
        self.set_header("Server", "tornado-bcast")
        self.set_header("Cache-Control", "no-store")

    @property
    def remote_ip(self) -> str:
        """The peer's address; behind `[server] trusted_proxies` the last one that no such proxy has."""
        peer: str = self.request.remote_ip or ""
        proxies = self.context.config.server.trusted_proxies
        if not proxies or not _is_in(peer, proxies):
            return peer
        headers = self.request.headers
        forwarded = _client_of(headers.get("X-Forwarded-For", ""), proxies)
        real = _client_of(headers.get("X-Real-IP", ""), proxies)
        # One of the two is enough. Where they differ, the proxy has set one and let the client's other one
        # through; nobody here can know which.
        return (forwarded or real or peer) if not (forwarded and real) or forwarded == real else peer

    def bearer(self) -> str | None:
        """What `Authorization: Bearer` carries (RFC 6750, section 2.1)."""
        scheme, _, value = self.request.headers.get("Authorization", "").strip().partition(" ")
        return value.strip() if scheme.lower() == "bearer" else None

    def prepare(self) -> None:
        """Origins: a foreign page may neither connect nor publish; CORS headers for those that may."""
        if self.context.draining:
            # The next request is another worker's.
            self.set_header("Connection", "close")
        origin = self.request.headers.get("Origin")
        if origin is None:
            return
        # What a cache keeps for one origin is not for another.
        self.set_header("Vary", "Origin")
        if self.context.origins.allow(origin):
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Expose-Headers", "Retry-After")
            return
        self.refuse(
            Refusal(
                "forbidden",
                "This Origin may not use the server; see [cors] origins.",
                setting="[cors] origins",
            ),
            kind="origin",
            origin=origin[:200],
        )

    def options(self, *args: str) -> None:
        """CORS preflight (https://fetch.spec.whatwg.org/#cors-preflight-fetch)."""
        self.set_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
        self.set_header(
            "Access-Control-Allow-Headers", "Authorization, Content-Type, Idempotency-Key, X-API-Key"
        )
        self.set_header("Access-Control-Max-Age", "600")
        self.set_status(204)

    def authorize(self) -> ApiKey | None:
        """The API key of the request; None: it needs none (docs/PROTOCOL.md, "Who may"). Else Refusal."""
        context = self.context
        if not context.auth.has_api_keys:
            if context.config.server.env == "development" and self._is_local():
                return None
            raise Refusal(
                "unauthorized",
                "An API key is needed: set [auth] api_keys and send it as `Authorization: Bearer KEY`."
                " Without a key only requests that are plainly local are taken, and only in development.",
                setting="[auth] api_keys",
            )
        given = self.request.headers.get("X-API-Key") or self.bearer()
        if not given:
            raise Refusal(
                "unauthorized",
                "An API key is needed: send one of [auth] api_keys as `Authorization: Bearer KEY`.",
                setting="[auth] api_keys",
            )
        key = context.auth.find_api_key(given)
        if key is None:
            raise Refusal(
                "unauthorized",
                "The API key is none of [auth] api_keys: their lines have its sha256 hash.",
                setting="[auth] api_keys",
            )
        return key

    def _is_local(self) -> bool:
        headers = self.request.headers
        origin = headers.get("Origin")
        return (
            is_loopback(self.request.remote_ip or "")
            and is_loopback(host_name(self.request))
            and not any(name in _FORWARDED or name.startswith("X-Forwarded-") for name in headers)
            and (origin is None or self.context.origins.named(origin))
        )

    def check_http_rate(self, count: int, key: ApiKey | None) -> None:
        """Take tokens of the buckets that all workers share: the peer's and the key's. Else Refusal."""
        limits = self.context.config.limits
        if limits.http_rate:
            self._take(
                self.remote_ip, limits.http_rate, limits.http_burst, count, "peer", "[limits] http_rate"
            )
        if key is not None and key.rate:
            self._take(f"key {key.digest.hex()}", key.rate, 0, count, "key", "[auth] api_keys")

    def _take(self, owner: str, rate: float, burst: int, count: int, what: str, setting: str) -> None:
        board = self.context.board
        bucket = board.bucket(owner)
        full_at, wait = take_tokens(board.get(bucket), time.monotonic(), rate, burst, count)
        board.set(bucket, full_at)
        if wait:
            raise Refusal(
                "rate_limited",
                f"This {what} may publish {rate:g} messages a second over HTTP; wait for Retry-After.",
                retry_after=int(wait * 1000) + 1,
                setting=setting,
            )

    def refuse(
        self,
        refusal: Refusal,
        *,
        kind: Literal["origin", "rule", "limit"] = "rule",
        origin: str | None = None,
    ) -> None:
        """Answer with an error and log the refusal."""
        if refusal.setting:
            self.context.refusals.add(
                time.monotonic(),
                kind,
                refusal.message,
                setting=refusal.setting,
                remote=self.remote_ip,
                origin=origin,
            )
        self.finish_error(HTTP_STATUS[refusal.code], refusal.code, refusal.message, refusal.retry_after)

    def finish_error(
        self, status: int, code: ErrorCode, message: str, retry_after: int | None = None
    ) -> None:
        self.set_status(status)
        if status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if retry_after is not None or status in (429, 503):
            self.set_header("Retry-After", str(-(-(retry_after or 1000) // 1000)))
        self.finish_json({"error": {"code": code, "message": message}})

    def finish_json(self, value: dict[str, Any]) -> None:
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.finish(dump(value))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Tornado's way to say that something went wrong, in our form and without anything of the inside."""
        if status_code == 405:
            self.set_header("Allow", ", ".join(self._methods()))
            if self.request.method not in self.SUPPORTED_METHODS:
                # Tornado answers before it has read the request, and hangs up.
                self.set_header("Connection", "close")
        code = _CODES.get(status_code, "bad_message" if status_code < 500 else "internal")
        message = {
            400: "The request cannot be understood.",
            403: "This is not allowed.",
            404: "There is nothing here; docs/PROTOCOL.md lists what there is.",
            405: "This method is not allowed here.",
            413: "The request is too large; see [limits] max_message_bytes.",
        }.get(status_code, "Something went wrong on the server; its log says what.")
        self.finish_error(status_code, code, message)

    def _methods(self) -> list[str]:
        """The methods that this handler has (RFC 9110, section 15.5.6)."""
        missing = RequestHandler._unimplemented_method
        return [name for name in self.SUPPORTED_METHODS if getattr(type(self), name.lower()) is not missing]

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """As Tornado's, without the request, whose query may hold secrets."""
        if isinstance(value, HTTPError):
            return
        logger.error(
            "unexpected error in %s",
            type(self).__name__,
            exc_info=(typ, value, tb) if typ and value else None,
            extra={"event": "internal_error"},
        )


class NotFoundHandler(BaseHandler):
    """Everything that is no entrance."""

    def prepare(self) -> None:
        raise HTTPError(404)
