"""Straight to the sockets: the descriptors that may be sent to, and the loop over them.

Of each sink, by its slot, DESCRIPTORS has the socket's descriptor while nothing is queued there, else -1. It
is one row of memory and all that the loop reads: thousands of objects are in no cache when a message comes,
and fetching them took longer than the rest of the loop (docs/PERFORMANCE.md).
"""

import errno
import os
from array import array
from collections.abc import Callable

DESCRIPTORS = array("i")
_free_slots: list[int] = []


def take_slot() -> int:
    """A slot of DESCRIPTORS, for whoever gives it back."""
    if _free_slots:
        return _free_slots.pop()
    DESCRIPTORS.append(-1)
    return len(DESCRIPTORS) - 1


give_back_slot = _free_slots.append

# The type of `send_each`.
SendEach = Callable[["array[int]", "array[int]", bytes], list[tuple[int, int | None]]]


def send_each(descriptors: "array[int]", slots: "array[int]", data: bytes) -> list[tuple[int, int | None]]:
    """Send `data` once to `descriptors[slot]` of each slot.

    Returns those that need more than that, by their index in `slots`: with how many bytes were taken or minus
    errno, or with None where there is no descriptor.
    """
    size = len(data)
    rest: list[tuple[int, int | None]] = []
    for index, slot in enumerate(slots):
        descriptor = descriptors[slot]
        if descriptor < 0:
            rest.append((index, None))
            continue
        try:
            sent = os.write(descriptor, data)
        except OSError as error:
            rest.append((index, -(error.errno or errno.EIO)))
        else:
            if sent != size:
                rest.append((index, sent))
    return rest


fastest_send_each: SendEach
try:
    # The same in C (_speedups.c), where it could be built.
    from ._speedups import send_each as fastest_send_each
except ImportError:
    fastest_send_each = send_each
