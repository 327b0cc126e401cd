"""Reading streams for many at once: bounded, and one read for all who stand at the same place."""

import asyncio

from .brokers import Broker, History

# Messages in a piece, and how many reads run at once on a node: with the broker's bound on the bytes of an
# answer, this bounds the memory of all subscribers that are behind.
PIECE = 128
MAX_READS = 32


class StreamReader:
    """Reads pieces of persistent channels' streams. All methods raise Unavailable as the broker does."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        # Reads under way, by channel, position and size.
        self._pieces: dict[tuple[str, int, int], asyncio.Task[History]] = {}
        self._reads = asyncio.Semaphore(MAX_READS)

    async def read(self, channel: str, after: int, limit: int) -> History:
        """A read of one's own: it begins after this call."""
        async with self._reads:
            return await self._broker.read(channel, after, limit)

    async def piece(self, channel: str, after: int, limit: int = PIECE) -> History:
        """The same, or the answer to one that somebody else has begun."""
        key = channel, after, limit
        task = self._pieces.get(key)
        if task is None:
            task = self._pieces[key] = asyncio.create_task(self.read(*key))
            task.add_done_callback(lambda _: self._pieces.pop(key, None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._pieces.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
