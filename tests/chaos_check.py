"""What must be true when a chaos.World has come to rest: its subscribers and publishers against Redis.

A position is *on the line* of a channel when Redis still counts it: it is of the present epoch, or of an
earlier one and not past the place where that ended. What was processed off the line was lost by Redis.
"""

import asyncio
import json
from collections import defaultdict
from itertools import pairwise
from typing import Any

from chaos import Position, Receipt, World


class Stream:
    """One channel as Redis has it at the end."""

    def __init__(self, redis: Any, prefix: str, channel: str) -> None:
        key = f"{prefix}:{{{channel}}}:"
        state = {name.decode(): value.decode() for name, value in redis.hgetall(key + "h").items()}
        self.head = Position(state["epoch"], int(state["seq"]))
        # Where earlier epochs ended.
        self.ends = {
            epoch: int(end) for epoch, end in (one.split(":") for one in state["ends"].split(",") if one)
        }
        self.messages: list[tuple[Position, str]] = []
        for _, fields in redis.xrange(key + "s"):
            header, _, payload = fields[b"m"].partition(b"\n")
            seq, epoch, _ = header.decode().split()
            self.messages.append((Position(epoch, int(seq)), json.loads(payload)["messageId"]))

    def has(self, place: Position) -> bool:
        """Whether a position is on the line."""
        return place.seq <= (
            self.head.seq if place.epoch == self.head.epoch else self.ends.get(place.epoch, -1)
        )


def read_streams(world: World, redis: Any, prefix: str) -> dict[str, Stream]:
    return {channel: Stream(redis, prefix, channel) for channel in world.channels}


async def catch_up(world: World, streams: dict[str, Stream], seconds: float = 30) -> None:
    """Wait until every subscriber has everything; who has not is found by `check`."""
    try:
        async with asyncio.timeout(seconds):
            while any(line.position != streams[channel].head for channel, line in world.lines()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass


def check(world: World, streams: dict[str, Stream], *, losses: int = 0) -> None:
    """Complain of everything that the guarantees exclude. `losses`: how often Redis lost what it had."""
    ledger = world.ledger
    for channel, stream in streams.items():
        _check_stream(world, channel, stream)
    _check_order(world)
    told = 0
    for channel, line in world.lines():
        stream = streams[channel]
        *lost, last = line.spans
        told += len(lost)
        if len(lost) > losses:
            ledger.complain(f"{line.name}: told of {len(lost)} losses")
        for span in lost:
            end = span.messages[-1][0] if span.messages else span.start
            if stream.has(end):
                ledger.complain(f"{line.name}: told of a loss at {end}, and there was none")
        kept = [message for message in stream.messages if message[0].seq > last.start.seq]
        if last.messages != kept:
            missing = [message for message in kept if message not in set(last.messages)]
            ledger.complain(
                f"{line.name}: after {last.start} {len(last.messages)} processed, {len(kept)} kept,"
                f" {len(missing)} missing: {missing[:3]}, at {line.position} of {stream.head};"
                f" pending {line.pending}, {list(line.trace)}"
            )
    ledger.counts["losses told"] = told


def _check_stream(world: World, channel: str, stream: Stream) -> None:
    """What Redis has: no holes, every id once and one of ours, and every receipt that is on the line."""
    ledger = world.ledger
    seqs = [place.seq for place, _ in stream.messages]
    first = seqs[0] if seqs else stream.head.seq + 1
    if seqs != list(range(first, stream.head.seq + 1)):
        ledger.complain(f"{channel}: a hole in the stream")
    ids = [message_id for _, message_id in stream.messages]
    if len(set(ids)) < len(ids) or not ledger.sent.issuperset(ids):
        ledger.complain(f"{channel}: an id was taken twice, or is nobody's")
    ledger.counts["messages kept"] += len(ids)
    for place, message_id in stream.messages:
        ledger.note(channel, place, message_id)
    kept = set(stream.messages)
    for receipt in ledger.receipts:
        if receipt.channel != channel:
            continue
        if not stream.has(receipt.place):
            ledger.counts["acknowledged and lost"] += 1
        elif receipt.place.seq >= first and (receipt.place, receipt.message_id) not in kept:
            ledger.complain(f"{channel}: {receipt} is not in the stream")


def _check_order(world: World) -> None:
    """What one connection or request has sent to a channel kept its order."""
    groups: defaultdict[tuple[str, str, int, str], list[Receipt]] = defaultdict(list)
    for receipt in world.ledger.receipts:
        if not receipt.duplicate:
            groups[receipt.publisher, receipt.channel, receipt.order[0], receipt.place.epoch].append(receipt)
    for receipts in groups.values():
        receipts.sort(key=lambda receipt: receipt.order)
        for before, after in pairwise(receipts):
            if before.place.seq >= after.place.seq:
                world.ledger.complain(f"out of order: {before} and {after}")


def report(world: World) -> str:
    """The counts, one a line."""
    return "\n".join(f"{number:8} {name}" for name, number in sorted(world.ledger.counts.items()) if number)
