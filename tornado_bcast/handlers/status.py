"""What operators and monitors ask for: health, statistics, metrics, channels and their history."""

import time
from typing import Any

from .. import __version__
from ..errors import Refusal, Unavailable
from ..metrics import exposition, summary
from ..protocol import MAX_SEQ, dump
from ..rules import check_channel
from .base import BaseHandler

# Messages of a history in one answer: unless asked otherwise, and at most.
_MESSAGES = 100
_MAX_MESSAGES = 1000


class HealthHandler(BaseHandler):
    """`/health`, `/health/live` and `/health/ready`: see docs/PROTOCOL.md, "HTTP". Open to everybody."""

    async def get(self, kind: str | None = None) -> None:
        context = self.context
        if kind == "live":
            # That this is answered shows that the loop turns.
            self.finish_json({"status": "ok"})
            return
        body: dict[str, Any] = {}
        if kind is None and self.get_query_argument("deep", "") == "1":
            try:
                body["canaryMs"] = round(await context.node.broker.probe() * 1000, 2)
            except Unavailable:
                body["canaryMs"] = None
        health = context.node.broker.health()
        up = health.up and body.get("canaryMs", 0) is not None
        overloaded = context.overload.active
        well = up and health.problem is None and not overloaded
        status = "draining" if context.draining else "ok" if well else "degraded"
        body = {
            "status": status,
            "redis": "up" if up else "down",
            "version": __version__,
            "uptimeSeconds": round(time.monotonic() - context.started, 1),
            **body,
        }
        if overloaded:
            body["overloaded"] = True
        if health.problem is not None and self._is_operator():
            # It may name hosts.
            body["problem"] = health.problem
        if status == "draining" or not up:
            self.set_status(503)
        elif status == "degraded" and kind is None:
            self.set_status(503)
        self.finish_json(body)

    def _is_operator(self) -> bool:
        try:
            self.authorize()
        except Refusal:
            return False
        return True

    async def head(self, kind: str | None = None) -> None:
        """The same for monitors that want the status alone."""
        await self.get(kind)


class OperatorHandler(BaseHandler):
    """Entrances that ask for an API key."""

    def prepare(self) -> None:
        super().prepare()
        if self._finished or self.request.method == "OPTIONS":
            return
        try:
            key = self.authorize()
            if key is not None and not key.read:
                raise Refusal(
                    "forbidden",
                    "This API key may not read; its line lacks `read=yes`.",
                    setting="[auth] api_keys",
                )
        except Refusal as refusal:
            self.refuse(refusal)


class StatsHandler(OperatorHandler):
    """`/stats`: all workers of all nodes."""

    async def get(self) -> None:
        context = self.context
        try:
            channels = len(await context.node.channels())
        except Unavailable:
            # How many there are elsewhere cannot be known now; /health tells of Redis.
            channels = context.node.channel_count
        self.finish_json(
            summary(
                context.rows(),
                channels=channels,
                version=__version__,
                uptime=time.monotonic() - context.started,
            )
        )


class MetricsHandler(OperatorHandler):
    """`/metrics`: the workers of this node, for Prometheus."""

    def get(self) -> None:
        context = self.context
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(exposition(context.local_rows(), context.board.restarts(), context.capacity))


class ChannelsHandler(OperatorHandler):
    """`/channels`: those with subscribers, over all nodes."""

    async def get(self) -> None:
        try:
            names = await self.context.node.channels()
        except Unavailable as error:
            self.finish_error(503, "unavailable", str(error), error.retry_after)
            return
        rules = self.context.rules
        self.finish_json(
            {"channels": [{"channel": name, "persistent": rules.find(name).persistent} for name in names]}
        )


class HistoryHandler(OperatorHandler):
    """`/channels/NAME/history`: a piece of a persistent channel's stream, after `since` of `epoch`."""

    async def get(self, channel: str) -> None:
        try:
            check_channel(channel)
            if not self.context.rules.find(channel).persistent:
                raise Refusal("bad_channel", "This channel is not persistent, so it has no history.")
            since = self._number("since", 0, MAX_SEQ, 0)
            limit = self._number("limit", 1, _MAX_MESSAGES, _MESSAGES)
            history = await self.context.node.broker.read(channel, since, limit)
        except Refusal as refusal:
            self.refuse(refusal)
            return
        except Unavailable as error:
            self.finish_error(503, "unavailable", str(error), error.retry_after)
            return
        epoch = self.get_query_argument("epoch", history.epoch)
        head = {
            "channel": channel,
            "epoch": history.epoch,
            "seq": history.seq,
            "first": history.first,
            # Whether nothing between `since` and the first message below is missing.
            "recovered": history.continues(epoch, since),
        }
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        # The messages are JSON already.
        messages = b",".join(message.payload for message in history.messages)
        self.finish(b'%s,"messages":[%s]}' % (dump(head)[:-1], messages))

    def _number(self, name: str, low: int, high: int, default: int) -> int:
        text = self.get_query_argument(name, "")
        if not text:
            return default
        if text.isascii() and text.isdecimal() and low <= int(text) <= high:
            return int(text)
        raise Refusal("bad_message", f"`{name}` must be a whole number from {low} to {high}.")
