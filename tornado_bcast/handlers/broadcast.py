"""`POST /broadcast`: publishing over HTTP, one message, one to several channels, or a batch."""

from dataclasses import replace
from typing import Any

from tornado.web import stream_request_body

from ..answer import Answer
from ..brokers import Receipt
from ..errors import HTTP_STATUS, Refusal, Unavailable
from ..protocol import Broadcast, check_message_id, decode_item, encode_message, load_object
from ..rules import may_publish
from .base import BaseHandler
from .context import new_id, now_ms

MAX_ITEMS = 1000
# A body may be as large as so many of the largest messages.
_BODY_MESSAGES = 64
# One that is up to so many times as large is read and dropped before it is refused: most clients look for an
# answer only when they have sent everything. A larger one is cut off.
_DISCARDED = 4
# What type, id and timestamp add to a message beside its channel and data.
_ENVELOPE = 256

_ONE = frozenset(("channel", "data", "messageId"))
_SEVERAL = frozenset(("channels", "data", "messageId"))


@stream_request_body
class BroadcastHandler(BaseHandler):
    """Reads the whole body, then publishes all items in their order and answers with the fate of each."""

    def prepare(self) -> None:
        super().prepare()
        if self._finished or self.request.method != "POST":
            return
        self._body = bytearray()
        # Bytes of the body so far, and how many of them may be a body.
        self._size = 0
        self._limit = _BODY_MESSAGES * self.context.config.limits.max_message_bytes
        try:
            # Before the body: who may not publish need not send it.
            self._key = self.authorize()
            if self._key is not None and self._key.publish == ():
                raise Refusal("forbidden", "This API key may not publish.", setting="[auth] api_keys")
        except Refusal as refusal:
            self._refuse_early(refusal)
            return
        if _content_length(self.request.headers.get("Content-Length", "")) > _DISCARDED * self._limit:
            self._refuse_early(self._too_large())
            return
        self.request.connection.set_max_body_size(2 * _DISCARDED * self._limit)  # type: ignore[union-attr]

    def data_received(self, chunk: bytes) -> None:
        if self._finished or self.request.method != "POST":
            return
        self._size += len(chunk)
        if self._size <= self._limit:
            self._body += chunk
            return
        self._body.clear()
        if self._size > _DISCARDED * self._limit:
            self._refuse_early(self._too_large())

    def _too_large(self) -> Refusal:
        return Refusal(
            "too_large",
            f"A body may have {self._limit} bytes; send fewer messages at once.",
            setting="[limits] max_message_bytes",
        )

    def _refuse_early(self, refusal: Refusal) -> None:
        # The rest of the body is not read: this connection is of no further use.
        self.set_header("Connection", "close")
        self.refuse(refusal, kind="limit" if refusal.code == "too_large" else "rule")

    async def post(self) -> None:
        try:
            self.context.overload.check()
            if self._size > self._limit:
                raise self._too_large()
            items = self._items()
            self.check_http_rate(len(items), self._key)
        except Refusal as refusal:
            self.refuse(refusal, kind="limit" if refusal.code in ("rate_limited", "too_large") else "rule")
            return
        # All are handed to the broker in one turn of the loop, so their order is kept.
        fates = [item if isinstance(item, Refusal) else self._publish(item) for item in items]
        results = [_error(fate) if isinstance(fate, Refusal) else await self._result(*fate) for fate in fates]
        refused = [result["error"] for result in results if "error" in result]
        if len(refused) < len(results):
            self.finish_json({"results": results})
            return
        status = HTTP_STATUS[refused[0]["code"]]
        self.set_status(status)
        if status in (429, 503):
            self.set_header("Retry-After", "1")
        # `results` also of a single one: it has the id with which to try again.
        self.finish_json({"error": refused[0], "results": results})

    def _items(self) -> list["Broadcast | Refusal"]:
        """The messages of the body; a bad item of a batch is its refusal, a bad body raises one."""
        body = load_object(bytes(self._body), "The body")
        self._body.clear()
        key = self.request.headers.get("Idempotency-Key")
        if key is not None:
            check_message_id(key, "Idempotency-Key")
        if "messages" in body:
            return self._batch(body, key)
        if "channels" in body:
            channels = body.pop("channels")
            if not isinstance(channels, list) or not 0 < len(channels) <= MAX_ITEMS:
                raise Refusal("bad_message", f"`channels` must be an array of 1 to {MAX_ITEMS} names.")
            item = decode_item(body, _SEVERAL)
            item = replace(item, message_id=item.message_id or key)
            items: list[Broadcast | Refusal] = []
            for channel in channels:
                try:
                    items.append(decode_item({"channel": channel, "data": item.data}, _ONE))
                except Refusal as refusal:
                    refusal.channel = _named(channel)
                    items.append(refusal)
            return [
                replace(one, message_id=item.message_id) if isinstance(one, Broadcast) else one
                for one in items
            ]
        one = decode_item(body, _ONE)
        return [replace(one, message_id=one.message_id or key)]

    def _batch(self, body: dict[str, Any], key: str | None) -> list["Broadcast | Refusal"]:
        messages = body["messages"]
        if len(body) > 1:
            raise Refusal("bad_message", "`messages` stands alone; the other fields belong into its items.")
        if not isinstance(messages, list) or not 0 < len(messages) <= MAX_ITEMS:
            raise Refusal("bad_message", f"`messages` must be an array of 1 to {MAX_ITEMS} objects.")
        items: list[Broadcast | Refusal] = []
        for index, message in enumerate(messages):
            try:
                item = decode_item(message, _ONE)
                if item.message_id is None and key is not None:
                    numbered = f"{key}:{index}"
                    check_message_id(numbered, "Idempotency-Key")
                    item = replace(item, message_id=numbered)
                items.append(item)
            except Refusal as refusal:
                channel = message.get("channel") if isinstance(message, dict) else None
                refusal.channel = _named(channel)
                items.append(refusal)
        return items

    def _publish(self, item: Broadcast) -> "tuple[Broadcast, str, Answer[Receipt]] | Refusal":
        context = self.context
        timestamp = now_ms()
        message_id = item.message_id or new_id()
        try:
            rule = context.rules.check_publish(item.channel, "http")
            if not self._may_publish(item.channel):
                raise Refusal(
                    "forbidden",
                    "This API key may not publish to everybody."
                    if item.channel is None
                    else "This API key may not publish to this channel.",
                    setting="[auth] api_keys",
                )
            payload = encode_message(item.channel, item.data, message_id, timestamp)
            limit = context.config.limits.max_message_bytes
            if len(payload) > limit + _ENVELOPE:
                raise Refusal("too_large", f"A message may have {limit} bytes; send less.")
        except Refusal as refusal:
            refusal.message_id, refusal.channel = message_id, item.channel
            return refusal
        given = item.message_id is not None
        return (
            item,
            message_id,
            context.node.publish(item.channel, rule, message_id, payload, timestamp, given=given),
        )

    def _may_publish(self, channel: str | None) -> bool:
        globs = self._key.publish if self._key is not None else None
        return globs is None or may_publish(globs, channel)

    async def _result(self, item: Broadcast, message_id: str, answer: Answer[Receipt]) -> dict[str, Any]:
        try:
            receipt = await answer
        except Unavailable as error:
            return _error(Refusal("unavailable", str(error), message_id=message_id, channel=item.channel))
        if not receipt.duplicate:
            self.context.metrics.published["http"] += 1
        result = {
            "channel": item.channel,
            "messageId": message_id,
            "seq": receipt.seq,
            "epoch": receipt.epoch,
            "duplicate": receipt.duplicate or None,
        }
        return {name: value for name, value in result.items() if value is not None}


def _named(channel: object) -> str | None:
    """A name that was refused, as it was given, where an answer can hold it."""
    if not isinstance(channel, str):
        return None
    try:
        channel.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can write and UTF-8 cannot.
        return None
    return channel


def _content_length(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        # There is none, or Tornado will refuse it.
        return 0


def _error(refusal: Refusal) -> dict[str, Any]:
    """The fate of an item that was not taken."""
    result = {
        "channel": refusal.channel,
        "messageId": refusal.message_id,
        "error": {"code": refusal.code, "message": refusal.message},
    }
    return {name: value for name, value in result.items() if value is not None}
