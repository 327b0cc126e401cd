"""The board: the memory that the parent and all workers share.

One anonymous mapping, made before the fork. The parent reads it to know whom to signal, a worker to know
whether it has more connections than the others. Nothing here waits and nothing is locked; what keeps it
whole is that each thing has one writer:

- the slot of a worker, its snapshot and its counters of peers: the process that claimed the slot;
- `stopping` and the settings: the parent;
- the rate buckets: any worker (see `get`).

    board = Board(4)            # in the parent
    ...fork...
    board.claim(2)              # in the worker
    board.state = State.SERVING
    board.beat()
    board.lowest()              # of any process

An aligned field of eight bytes is read and written by one instruction, so none is ever seen half written.
"""

import ipaddress
import mmap
import os
import socket
import time
import zlib
from collections.abc import Callable
from enum import IntEnum
from hashlib import blake2b
from struct import Struct
from typing import NamedTuple

# A worker whose heartbeat is older (seconds) is stopped or stuck; nobody waits for it.
STALE_SECONDS = 0.5
# A snapshot is shown for as long as its worker is heard at least this often (seconds).
SNAPSHOT_STALE_SECONDS = 2.0
# A worker that dies earlier after its start than this (seconds) died young.
YOUNG_SECONDS = 10.0
SNAPSHOT_BYTES = 16 * 1024
# Pages that nothing is written to cost nothing.
SETTINGS_BYTES = 1 << 20

# The fields of a slot, eight bytes each. One slot fills a cache line or two, shared with no other worker.
_PID, _STARTED, _HEARTBEAT, _CONNECTIONS, _STATE, _ACCEPTING, _EARLY, _RESTARTS, _SEQUENCE, _SOCKETS = range(
    10
)
_SLOT_FIELDS = 16
# The fields of the header: the flag, and the number of the settings that are shown.
_STOPPING, _VERSION = range(2)

# Two hashes of 16 bits for the count of peers, and another for the bucket.
_COUNTERS = 1 << 16
_BUCKETS = 1 << 16
_HASHES = Struct("<HHH")
_SNAPSHOT_HEAD = Struct("<II")
_SNAPSHOT_ROOM = _SNAPSHOT_HEAD.size + SNAPSHOT_BYTES
_SETTINGS_ROOM = _SNAPSHOT_HEAD.size + SETTINGS_BYTES


class State(IntEnum):
    """What a worker is doing. GONE: nobody, or the last one left as it should."""

    GONE = 0
    STARTING = 1
    SERVING = 2
    DRAINING = 3


# By number: each connection looks, and a call of the class takes 0.4 us.
_STATES = tuple(State)


class Slot(NamedTuple):
    """One worker, as it was at one moment. Times are of the board's clock, in seconds."""

    pid: int
    started: float
    heartbeat: float
    connections: int
    state: State
    # False while it is out of descriptors or was asked to pause.
    accepting: bool


class Board:
    """See the module. `clock` must be the same for all processes, as CLOCK_MONOTONIC is."""

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.workers = workers
        self._clock = clock
        # This node among all that share a Redis; the host alone would not do for two daemons on it.
        self.name = f"{socket.gethostname()}-{os.urandom(3).hex()}"
        # Secret, so that nobody can choose addresses that fall on one counter.
        self._key = os.urandom(16)
        # The slot that this process writes; -1 in the parent.
        self.index = -1
        self._own = 0

        head = 8 * _SLOT_FIELDS * (1 + workers)
        peers = 4 * 2 * _COUNTERS * workers
        buckets = 8 * _BUCKETS
        snapshots = 2 * _SNAPSHOT_ROOM * workers
        self._memory = memoryview(mmap.mmap(-1, head + peers + buckets + snapshots + 2 * _SETTINGS_ROOM))
        # The header and the slots, as whole numbers and as times.
        self._ints = self._memory[:head].cast("q")
        self._times = self._memory[:head].cast("d")
        self._peers = self._memory[head : head + peers].cast("I")
        self._full_at = self._memory[head + peers : head + peers + buckets].cast("d")
        self._snapshots = self._memory[head + peers + buckets :][:snapshots]
        self._settings = self._memory[head + peers + buckets + snapshots :]
        # The number of the settings that this process has; a fork takes it along.
        self._seen = 0

    # The parent's flag.

    @property
    def stopping(self) -> bool:
        """Whether everything stops: then a worker leaves with 0, and none is replaced."""
        return self._ints[_STOPPING] != 0

    @stopping.setter
    def stopping(self, value: bool) -> None:
        self._ints[_STOPPING] = int(value)

    # Settings that the parent hands to the workers: bytes that have no meaning here.

    def put_settings(self, data: bytes) -> None:
        """Show them to the workers that run; those forked later have them. ValueError if they are too long.

        They go into the one of two buffers that is not shown, and then the number is moved on.
        """
        if len(data) > SETTINGS_BYTES:
            raise ValueError(f"settings have at most {SETTINGS_BYTES} bytes, not {len(data)}")
        version = self._ints[_VERSION] + 1
        start = (version & 1) * _SETTINGS_ROOM
        body = start + _SNAPSHOT_HEAD.size
        _SNAPSHOT_HEAD.pack_into(self._settings, start, len(data), zlib.crc32(data))
        self._settings[body : body + len(data)] = data
        self._ints[_VERSION] = self._seen = version

    def new_settings(self) -> bytes | None:
        """The last ones, where this process has not seen them yet."""
        while (version := self._ints[_VERSION]) != self._seen:
            start = (version & 1) * _SETTINGS_ROOM
            length, checksum = _SNAPSHOT_HEAD.unpack_from(self._settings, start)
            body = start + _SNAPSHOT_HEAD.size
            data = bytes(self._settings[body : body + min(length, SETTINGS_BYTES)])
            if self._ints[_VERSION] == version and zlib.crc32(data) == checksum:
                self._seen = version
                return data
        return None

    # Slots.

    def claim(self, index: int) -> int:
        """Make this process the writer of a slot whose last owner, if any, is dead.

        Returns how many owners in a row died young without `release`, the last one included.
        """
        self.index = index
        self._own = base = self._base(index)
        ints = self._ints
        if ints[base + _PID]:
            young = self._clock() - self._times[base + _STARTED] < YOUNG_SECONDS
            ints[base + _EARLY] = ints[base + _EARLY] + 1 if young else 0
            ints[base + _RESTARTS] += 1
            self._clear()
        else:
            ints[base + _EARLY] = 0
        self.begin()
        ints[base + _PID] = os.getpid()
        return ints[base + _EARLY]

    def begin(self) -> None:
        """The worker's life begins now (its predecessor's death may have held it up)."""
        self._times[self._own + _STARTED] = self._times[self._own + _HEARTBEAT] = self._clock()
        self._ints[self._own + _STATE] = State.STARTING

    def release(self) -> None:
        """Leave the slot as one who was meant to go."""
        self._clear()
        self._ints[self._own + _PID] = 0

    def beat(self) -> None:
        self._times[self._own + _HEARTBEAT] = self._clock()

    @property
    def state(self) -> State:
        return _STATES[self._ints[self._own + _STATE]]

    @state.setter
    def state(self, value: State) -> None:
        self._ints[self._own + _STATE] = value

    @property
    def accepting(self) -> bool:
        """False: serving, but taking no connection, so that the others need not wait for this worker."""
        return self._ints[self._own + _ACCEPTING] != 0

    @accepting.setter
    def accepting(self, value: bool) -> None:
        self._ints[self._own + _ACCEPTING] = int(value)

    @property
    def own_connections(self) -> int:
        return self._ints[self._own + _CONNECTIONS]

    @own_connections.setter
    def own_connections(self, value: int) -> None:
        self._ints[self._own + _CONNECTIONS] = value

    @property
    def own_sockets(self) -> int:
        """Those of this worker's connections that are WebSockets."""
        return self._ints[self._own + _SOCKETS]

    @own_sockets.setter
    def own_sockets(self, value: int) -> None:
        self._ints[self._own + _SOCKETS] = value

    def slot(self, index: int) -> Slot:
        base, ints = self._base(index), self._ints
        return Slot(
            ints[base + _PID],
            self._times[base + _STARTED],
            self._times[base + _HEARTBEAT],
            ints[base + _CONNECTIONS],
            _STATES[ints[base + _STATE]],
            ints[base + _ACCEPTING] != 0,
        )

    def slots(self) -> list[Slot]:
        return [self.slot(index) for index in range(self.workers)]

    def lowest(self, besides: int = -1) -> int | None:
        """The lowest count of connections among the workers that can take another; None if there are none.

        The worker `besides` is left out.
        """
        ints, times = self._ints, self._times
        heard = self._clock() - STALE_SECONDS
        least: int | None = None
        left_out = self._base(besides)
        for base in range(_SLOT_FIELDS, _SLOT_FIELDS * (1 + self.workers), _SLOT_FIELDS):
            if base != left_out and ints[base + _STATE] == State.SERVING and ints[base + _ACCEPTING]:
                count = ints[base + _CONNECTIONS]
                if (least is None or count < least) and times[base + _HEARTBEAT] > heard:
                    least = count
        return least

    def connections(self) -> int:
        """Open connections of all workers."""
        ints = self._ints
        return sum(ints[self._base(index) + _CONNECTIONS] for index in range(self.workers))

    def sockets(self) -> int:
        """Open WebSocket connections of all workers."""
        ints = self._ints
        return sum(ints[self._base(index) + _SOCKETS] for index in range(self.workers))

    def restarts(self) -> int:
        """How many workers have died unbidden since the start."""
        return sum(self._ints[self._base(index) + _RESTARTS] for index in range(self.workers))

    # Connections of one address over all workers: a count-min sketch, of which each worker has its own part.

    def add_peer(self, ip: str) -> None:
        for cell in self._own_cells(ip):
            self._peers[cell] += 1

    def remove_peer(self, ip: str) -> None:
        for cell in self._own_cells(ip):
            if self._peers[cell]:
                self._peers[cell] -= 1

    def peers(self, ip: str) -> int:
        """Open connections of an address over all workers: never too few, rarely some too many."""
        first, second, _ = self._hashes(ip)
        cells, step = self._peers, 2 * _COUNTERS
        one = sum(cells[first + offset] for offset in range(0, len(cells), step))
        two = sum(cells[_COUNTERS + second + offset] for offset in range(0, len(cells), step))
        return min(one, two)

    # Rate buckets.

    def bucket(self, ip: str) -> int:
        """The bucket of an address, one of 65,536. Where two addresses have the same, they share its rate."""
        return self._hashes(ip)[2]

    def get(self, bucket: int) -> float:
        """The time at which the bucket is full again; 0 at first.

        Any worker reads and sets it without a lock. Where two do so at once, one request goes unpaid: less
        than the strictness that a limit by address has anyway.
        """
        return self._full_at[bucket]

    def set(self, bucket: int, full_at: float) -> None:
        self._full_at[bucket] = full_at

    # Snapshots: what a worker tells of itself to the others, in at most SNAPSHOT_BYTES.

    def put_snapshot(self, data: bytes) -> None:
        """Show `data`; ValueError if it is too long.

        A snapshot goes into the one of two buffers that is not shown, and then the sequence number is moved
        on. So a worker that stops half way leaves the older one in place.
        """
        if len(data) > SNAPSHOT_BYTES:
            raise ValueError(f"a snapshot has at most {SNAPSHOT_BYTES} bytes, not {len(data)}")
        sequence = self._ints[self._own + _SEQUENCE] + 1
        start = self._buffer(self.index, sequence)
        body = start + _SNAPSHOT_HEAD.size
        _SNAPSHOT_HEAD.pack_into(self._snapshots, start, len(data), zlib.crc32(data))
        self._snapshots[body : body + len(data)] = data
        self._ints[self._own + _SEQUENCE] = sequence

    def snapshots(self) -> list[tuple[int, int, bytes]]:
        """(index, pid, data) of each living worker that shows something."""
        heard = self._clock() - SNAPSHOT_STALE_SECONDS
        found = []
        for index in range(self.workers):
            base = self._base(index)
            if self._ints[base + _PID] and self._times[base + _HEARTBEAT] > heard:
                data = self._snapshot(index)
                if data:
                    found.append((index, self._ints[base + _PID], data))
        return found

    def _snapshot(self, index: int) -> bytes:
        field = self._base(index) + _SEQUENCE
        for _ in range(100):
            sequence = self._ints[field]
            start = self._buffer(index, sequence)
            length, checksum = _SNAPSHOT_HEAD.unpack_from(self._snapshots, start)
            body = start + _SNAPSHOT_HEAD.size
            data = bytes(self._snapshots[body : body + min(length, SNAPSHOT_BYTES)])
            # Only two snapshots later is this buffer written again. The checksum is for processors that let
            # another core see our writes in another order.
            if self._ints[field] == sequence and zlib.crc32(data) == checksum:
                return data
        return b""

    def _buffer(self, index: int, sequence: int) -> int:
        return (2 * index + (sequence & 1)) * _SNAPSHOT_ROOM

    def _base(self, index: int) -> int:
        return _SLOT_FIELDS * (1 + index)

    def _clear(self) -> None:
        """Take away what the slot's worker counted and showed; its connections are gone with it."""
        ints, base = self._ints, self._own
        ints[base + _STATE] = State.GONE
        ints[base + _CONNECTIONS] = ints[base + _SOCKETS] = ints[base + _ACCEPTING] = 0
        size = 8 * _COUNTERS
        start = self._ints.nbytes + self.index * size
        self._memory[start : start + size] = bytes(size)
        self.put_snapshot(b"")

    def _own_cells(self, ip: str) -> tuple[int, int]:
        first, second, _ = self._hashes(ip)
        start = 2 * _COUNTERS * self.index
        return start + first, start + _COUNTERS + second

    def _hashes(self, ip: str) -> tuple[int, int, int]:
        digest = blake2b(_peer(ip), digest_size=_HASHES.size, key=self._key).digest()
        first, second, third = _HASHES.unpack(digest)
        return first, second, third


def _peer(ip: str) -> bytes:
    """What counts as one peer: an IPv4 address, or the /64 of an IPv6 one, which a single customer has."""
    if ":" not in ip:
        return ip.encode()
    try:
        address = ipaddress.IPv6Address(ip)
    except ValueError:
        return ip.encode()
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped).encode()
    return address.packed[:8]
