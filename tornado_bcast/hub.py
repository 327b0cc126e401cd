"""The fan-out of one process: which sinks listen to which channel, and one tight loop that sends to them.

A pure data structure. `fan_out` must not encode, wait, or change who listens while it runs: a sink that
fails closes later, from the loop.
"""

from collections.abc import Iterable, Sequence

from .sink import Sink, SlowConsumer


class Hub:
    """Channel to sinks of this process, and the sinks of all connections."""

    __slots__ = ("_channels", "_everybody")

    def __init__(self) -> None:
        # Insertion-ordered sets, so that no subscriber is always the last.
        self._channels: dict[str, dict[Sink, None]] = {}
        self._everybody: dict[Sink, None] = {}

    def connect(self, sink: Sink) -> None:
        self._everybody[sink] = None

    def disconnect(self, sink: Sink) -> None:
        self._everybody.pop(sink, None)

    def add(self, channel: str, sink: Sink) -> None:
        self._channels.setdefault(channel, {})[sink] = None

    def remove(self, channel: str, sink: Sink) -> None:
        sinks = self._channels.get(channel)
        if sinks is not None and sinks.pop(sink, self) is None and not sinks:
            del self._channels[channel]

    def count(self, channel: str) -> int:
        """How many sinks listen to a channel."""
        return len(self._channels.get(channel, ()))

    def fan_out(
        self, channel: str | None, data: bytes, frames: Sequence[bytes], policy: SlowConsumer
    ) -> tuple[int, Sequence[Sink]]:
        """Send frames (`data` is `frames` joined) to all that listen; None: to every connection.

        Returns how many were sent to, and those that did not take it (policy `wait` alone).
        """
        sinks: Iterable[Sink] = self._everybody if channel is None else self._channels.get(channel, ())
        key = channel or ""
        # A tuple first: closing a connection changes the dict, and that must wait for the end of the loop.
        listening = tuple(sinks)
        refused: list[Sink] = []
        size = len(data)
        # What `Sink.send` does while all goes well, without a call for each: here it is a tenth of the whole.
        for sink in listening:
            if sink.clear:
                try:
                    sent = sink.transmit(data)
                except OSError as error:
                    sink.on_error(data, error)
                else:
                    if sent != size:
                        sink.begin(data, sent)
            elif not sink.send(key, data, frames, policy):
                refused.append(sink)
        return len(listening) - len(refused), refused
