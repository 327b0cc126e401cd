"""A timer wheel: many items with due times behind one timer (heartbeats, acks). Knows no clock."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Seconds between two turns of a worker's wheels. One timer turns them all (application.py).
TICK = 0.25


class Wheel(Generic[Item]):
    """Items by due time, in slots of `tick` seconds: no timer for each, and no search for those due."""

    __slots__ = ("_slots", "_tick", "_turned")

    def __init__(self, tick: float = TICK) -> None:
        self._tick = tick
        self._slots: dict[int, dict[Item, None]] = {}
        # The last slot that was emptied; what is overdue already goes into the next one.
        self._turned = -1

    def slot(self, due: float) -> int:
        """Where an item with this due time stands: the earlier, the lower."""
        return max(int(due / self._tick) + 1, self._turned + 1)

    def add(self, item: Item, due: float) -> int:
        """Put an item in; the slot returned takes it out again by `discard`."""
        slot = self.slot(due)
        self._slots.setdefault(slot, {})[item] = None
        return slot

    def discard(self, item: Item, slot: int) -> None:
        items = self._slots.get(slot)
        if items is not None:
            items.pop(item, None)
            if not items:
                # Its turn may be days away.
                del self._slots[slot]

    def expired(self, now: float) -> Iterator[Item]:
        """Take out and yield what is due: never early, and late by at most one tick."""
        turn = int(now / self._tick)
        # Few slots have passed, unless it is the first time; there may be many that have not.
        due: Iterable[int] = range(self._turned + 1, turn + 1)
        if turn - self._turned > len(self._slots):
            due = sorted(slot for slot in self._slots if slot <= turn)
        self._turned = turn
        for slot in due:
            yield from self._slots.pop(slot, ())
