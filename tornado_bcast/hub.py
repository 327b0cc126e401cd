"""The fan-out of one process: which sinks listen to which channel, and one tight loop that sends to them.

A pure data structure. `fan_out` must not encode, wait, or change who listens while it runs: a sink that
fails closes later, from the loop.
"""

from array import array
from collections.abc import Sequence

from .direct import DESCRIPTORS, SendEach, fastest_send_each
from .sink import Sink, SlowConsumer


class _Listeners:
    """The sinks that hear the same, and their slots in a row."""

    __slots__ = ("_row", "sinks")

    def __init__(self) -> None:
        # An insertion-ordered set.
        self.sinks: dict[Sink, None] = {}
        # Made by the first message after a change. It holds the sinks, so their slots stay theirs.
        self._row: tuple[tuple[Sink, ...], array[int]] | None = None

    def add(self, sink: Sink) -> None:
        self.sinks[sink] = self._row = None

    def remove(self, sink: Sink) -> None:
        if self.sinks.pop(sink, self) is None:
            self._row = None

    def row(self) -> "tuple[tuple[Sink, ...], array[int]]":
        """They as they are now, whatever changes while the row is used."""
        if self._row is None:
            self._row = tuple(self.sinks), array("i", [sink.slot for sink in self.sinks])
        return self._row


class Hub:
    """Channel to sinks of this process, and the sinks of all connections."""

    __slots__ = ("_channels", "_everybody", "_send_each")

    def __init__(self, send_each: SendEach = fastest_send_each) -> None:
        self._send_each = send_each
        self._channels: dict[str, _Listeners] = {}
        self._everybody = _Listeners()

    def sibling(self) -> "Hub":
        """An empty one that sends in the same way, for those who get the same in another form."""
        return Hub(self._send_each)

    def connect(self, sink: Sink) -> None:
        self._everybody.add(sink)

    def disconnect(self, sink: Sink) -> None:
        self._everybody.remove(sink)

    def add(self, channel: str, sink: Sink) -> None:
        listeners = self._channels.get(channel)
        if listeners is None:
            listeners = self._channels[channel] = _Listeners()
        listeners.add(sink)

    def remove(self, channel: str, sink: Sink) -> None:
        listeners = self._channels.get(channel)
        if listeners is not None:
            listeners.remove(sink)
            if not listeners.sinks:
                del self._channels[channel]

    def count(self, channel: str | None) -> int:
        """How many sinks listen to a channel; None: how many connections there are."""
        listeners = self._everybody if channel is None else self._channels.get(channel)
        return len(listeners.sinks) if listeners else 0

    def fan_out(
        self, channel: str | None, data: bytes, frames: Sequence[bytes], policy: SlowConsumer
    ) -> tuple[int, Sequence[Sink]]:
        """Send frames (`data` is `frames` joined) to all that listen; None: to every connection.

        Returns how many were sent to, and those that did not take it (policy `wait` alone).
        """
        listeners = self._everybody if channel is None else self._channels.get(channel)
        if listeners is None:
            return 0, []
        sinks, slots = listeners.row()
        refused: list[Sink] = []
        for index, sent in self._send_each(DESCRIPTORS, slots, data):
            sink = sinks[index]
            if sent is not None:
                sink.finish(data, sent)
            elif not sink.send(channel or "", data, frames, policy):
                refused.append(sink)
        return len(sinks) - len(refused), refused
