"""The board: one writer for each slot, and what readers see of it, also while it is written."""

import ipaddress
import os
import signal
import time
from collections.abc import Callable

import pytest

from tornado_bcast.board import SNAPSHOT_BYTES, STALE_SECONDS, YOUNG_SECONDS, Board, State

# From Python 3.12 on a fork warns where there are threads, as pytest-xdist has; these children need no lock.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def serving(board: Board, index: int, connections: int) -> None:
    """This process writes all slots in turn, as the workers would."""
    board.claim(index)
    board.state = State.SERVING
    board.accepting = True
    board.own_connections = connections


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked process; the pid. It ends with 0, or with 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_a_slot_tells_what_its_worker_wrote() -> None:
    clock = Clock()
    board = Board(2, clock)
    assert board.slot(1).state is State.GONE and board.slot(1).pid == 0

    def work() -> None:
        board.claim(1)
        clock.now += 2
        board.beat()
        board.state = State.SERVING
        board.own_connections = 7

    pid = in_child(work)
    assert os.waitpid(pid, 0)[1] == 0
    assert board.slot(1) == (pid, 1000.0, 1002.0, 7, State.SERVING, False)
    assert [slot.pid for slot in board.slots()] == [0, pid]
    assert board.connections() == 7


def test_lowest_is_of_workers_that_can_take_a_connection() -> None:
    clock = Clock()
    board = Board(4, clock)
    assert board.lowest() is None
    for index, count in enumerate((30, 20, 10, 5)):
        serving(board, index, count)
    assert board.lowest() == 5
    board.state = State.DRAINING
    assert board.lowest() == 10
    board.claim(2)
    assert board.lowest() == 20  # One that starts takes none.
    serving(board, 1, 20)
    board.accepting = False
    assert board.lowest() == 30


def test_lowest_passes_over_a_worker_that_is_not_heard() -> None:
    clock = Clock()
    board = Board(2, clock)
    serving(board, 0, 3)
    clock.now += STALE_SECONDS + 0.1
    assert board.lowest() is None
    serving(board, 1, 8)
    assert board.lowest() == 8


def test_a_claim_counts_early_deaths_and_forgets_them() -> None:
    clock = Clock()
    board = Board(1, clock)
    assert board.claim(0) == 0
    assert [board.claim(0) for _ in range(3)] == [1, 2, 3]
    clock.now += YOUNG_SECONDS + 1
    board.begin()  # The pause was long, but the life after it short.
    assert board.claim(0) == 4
    clock.now += YOUNG_SECONDS + 1
    assert board.claim(0) == 0
    assert board.restarts() == 5
    board.release()
    assert board.claim(0) == 0, "who left with `release` did not die"
    assert board.restarts() == 5


def test_stopping_is_seen_by_all() -> None:
    board = Board(1)
    pid = in_child(lambda: os._exit(2) if board.stopping else None)
    assert os.waitpid(pid, 0)[1] == 0
    board.stopping = True
    pid = in_child(lambda: os._exit(2) if board.stopping else None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2


def test_peers_are_counted_over_all_workers() -> None:
    board = Board(3)
    for index in range(3):
        board.claim(index)
        for _ in range(index + 1):
            board.add_peer("192.0.2.1")
        board.add_peer("192.0.2.2")
    assert board.peers("192.0.2.1") == 6
    assert board.peers("192.0.2.2") == 3
    assert board.peers("192.0.2.3") == 0
    board.remove_peer("192.0.2.1")
    assert board.peers("192.0.2.1") == 5
    for _ in range(9):
        board.remove_peer("192.0.2.1")
    assert board.peers("192.0.2.1") == 3, "a worker takes away only what it has"


def test_a_successor_clears_what_its_predecessor_counted() -> None:
    board = Board(2)
    for index in range(2):
        board.claim(index)
        board.add_peer("192.0.2.1")
        board.own_connections = 4
        board.put_snapshot(b"old")
    board.claim(1)
    assert board.peers("192.0.2.1") == 1
    assert board.connections() == 4
    assert [row[0] for row in board.snapshots()] == [0]


def test_ten_thousand_peers_are_never_undercounted() -> None:
    board = Board(2)
    addresses = [str(ipaddress.IPv4Address(0x0A000000 + n * 7)) for n in range(10_000)]
    for n, address in enumerate(addresses):
        if n % 5000 == 0:
            board.claim(n // 5000)
        board.add_peer(address)
    counts = [board.peers(address) for address in addresses]
    assert min(counts) >= 1
    assert sum(count > 1 for count in counts) < 1000


def test_one_ipv6_customer_is_one_peer() -> None:
    board = Board(1)
    board.claim(0)
    board.add_peer("2001:db8:0:1::1")
    board.add_peer("2001:db8:0:1:ffff::2")
    board.add_peer("::ffff:192.0.2.1")
    assert board.peers("2001:db8:0:1::9") == 2
    assert board.peers("2001:db8:0:2::1") == 0
    assert board.peers("192.0.2.1") == 1
    assert board.peers("fe80::1%lo") == 0
    assert board.peers("not:an:address") == 0


def test_a_bucket_belongs_to_an_address_and_to_all_workers() -> None:
    board = Board(1)
    bucket = board.bucket("192.0.2.1")
    assert board.get(bucket) == 0.0
    board.set(bucket, 12.5)
    pid = in_child(lambda: board.set(bucket, board.get(board.bucket("192.0.2.1")) + 1))
    assert os.waitpid(pid, 0)[1] == 0
    assert board.get(bucket) == 13.5


def test_the_board_keeps_its_areas_apart() -> None:
    board = Board(2)
    for index in range(2):
        board.claim(index)
        board.put_snapshot(bytes([255]) * SNAPSHOT_BYTES)
        for n in range(3000):
            board.add_peer(f"198.51.100.{n}")
    for bucket in range(1 << 16):
        board.set(bucket, -1.0)
    assert [row[2] for row in board.snapshots()] == [b"\xff" * SNAPSHOT_BYTES] * 2
    assert board.peers("198.51.100.7") >= 2
    board.claim(1)
    assert [row[2] for row in board.snapshots()] == [b"\xff" * SNAPSHOT_BYTES]
    assert board.get(0) == board.get(65535) == -1.0


def test_snapshots_are_of_the_living() -> None:
    clock = Clock()
    board = Board(3, clock)
    board.claim(0)
    board.claim(1)
    assert board.snapshots() == []
    board.put_snapshot(b"one")
    board.put_snapshot(b"two")
    assert board.snapshots() == [(1, os.getpid(), b"two")]
    clock.now += 3
    assert board.snapshots() == []
    board.beat()
    assert board.snapshots() == [(1, os.getpid(), b"two")]
    board.release()
    assert board.snapshots() == []
    with pytest.raises(ValueError, match="at most"):
        board.put_snapshot(bytes(SNAPSHOT_BYTES + 1))


def test_a_reader_never_sees_half_a_snapshot() -> None:
    board = Board(1)

    def write() -> None:
        board.claim(0)
        n = 0
        while True:
            n += 1
            board.put_snapshot(bytes([n % 255 + 1]) * (100 + n % 12_000))
            board.beat()

    pid = in_child(write)
    try:
        seen = set()
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            for index, owner, data in board.snapshots():
                assert (index, owner) == (0, pid)
                assert len(set(data)) == 1, "of two snapshots"
                seen.add(data[0])
        assert len(seen) > 20
        # A writer that stops anywhere, also half way, leaves a whole one.
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert len(set(board.snapshots()[0][2])) == 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
