"""The parent process: listening sockets, workers, the embedded server, and everybody's end.

Owns what is made before the fork, the signals, and the clock by which it watches. It has one thread and no
event loop, and never touches a connection or a message. `tornado.process.fork_processes` makes the workers
and replaces dead ones; what that function leaves open is here:

- A signal to the parent reaches the workers: the handlers run between two returns of its `os.wait`, and find
  the pids on the board.
- A clock (SIGALRM) for deadlines, for the embedded server and for workers that hang. It goes slower while
  nothing is under way, and at once when a child has died (SIGCHLD).
- A worker that dies at once is not forked in a hot loop: its successor pauses first, longer each time.
- No worker leaves with 0, which would end its succession, unless everything stops.
- No orphans: the kernel kills the workers and the embedded server when the parent dies.

    SIGTERM, SIGINT   stop everything; the second one at once
    SIGHUP            read the configuration again; a bad one is told and the old one stays. What running
                      workers can take over goes to them over the board, checked, so that all have the same.
                      Any other change, or none, replaces the workers, one at a time.
"""

import contextlib
import dataclasses
import gc
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from tornado.process import fork_processes

from .acceptor import listening_sockets, place
from .board import Board, State
from .brokers.embedded import EmbeddedServer, die_with_parent
from .brokers.redis import check_server
from .capacity import measure, raise_descriptors
from .config import Config
from .errors import ConfigError
from .forks import ForkLog, pause
from .reload import compare
from .systemd import Notifier
from .watch import Watch

logger = logging.getLogger(__name__)

# Runs one worker in its own process until it is told to leave by SIGTERM. 0: it left as it was told;
# anything else, or an exception, is a death.
Serve = Callable[[Config, list[socket.socket], Board, int], int]
Read = Callable[[], Config]

# The parent's clock: while something is under way, and at most while nothing is.
CLOCK_SECONDS = 0.2
REST_SECONDS = 1.0
# How long (seconds) the workers have to leave when everything stops; then they are killed. In the same way
# the embedded server after them.
STOP_SECONDS = 5.0
# How much longer than `drain_seconds` a worker may take to leave that is replaced.
GRACE_SECONDS = 5.0
# With which a worker leaves that is to be replaced.
REPLACE_EXIT = 3


def run(config: Config, *, serve: Serve, read: Read | None = None) -> int:
    """Run the daemon until it is told to stop; the exit code, 1 if it could not start.

    `serve` runs in each worker with its configuration, in which the URL of an embedded server stands in
    place of `embedded:`, the listening sockets, the board and its index. `read` gives the configuration again
    after SIGHUP, or raises ConfigError.
    """
    try:
        return _Parent(config, serve, read or (lambda: config)).run()
    except ConfigError as error:
        for problem in error.problems:
            logger.error("%s", problem, extra={"event": "start_failed"})
        return 1


class _Parent:
    """See the module. In the workers it is what the fork has left them of the parent."""

    def __init__(self, config: Config, serve: Serve, read: Read) -> None:
        self._config = config
        # As it was read: `_config` has the embedded server's URL in it.
        self._given = config
        self._read = read
        # SIGHUP has come.
        self._reload_asked = False
        self._serve = serve
        self._pid = os.getpid()
        self._sockets: list[socket.socket] = []
        self._board = Board(config.server.workers)
        self._embedded: EmbeddedServer | None = None
        if config.redis.url == "embedded:":
            self._embedded = EmbeddedServer(config.redis.data_dir, config.redis.appendfsync)
        self._fork_log = ForkLog(self._board)
        notifier = Notifier()
        self._watch = Watch(self._board, notifier, self._log_serving)
        # WATCHDOG=1 is due at half of its time, and not to come late.
        self._rest = min(REST_SECONDS, (notifier.watchdog or math.inf) / 4)
        # The clock goes, and `_tick` runs, which a signal may interrupt.
        self._clock_goes = False
        self._ticking = False
        # When everything stops: when the workers must have left, and who has been told.
        self._stop_by = float("inf")
        self._told: set[int] = set()
        # Stop at once: the second signal.
        self._hurry = False
        # Whose turn it is to be replaced: those to come, and the present one's index, pid and last moment.
        self._queue: list[int] = []
        self._leaving: tuple[int, int, float] | None = None

    def run(self) -> int:
        server = self._config.server
        raise_descriptors()
        self._sockets = listening_sockets(server.bind, server.port)
        capacity = measure(server.workers, server.max_connections)
        logger.info("%s", capacity.sentence(), extra={"event": "capacity"})
        handlers = {
            signal.SIGTERM: self._on_stop,
            signal.SIGINT: self._on_stop,
            signal.SIGHUP: self._on_hangup,
            signal.SIGALRM: self._on_clock,
            signal.SIGCHLD: self._on_clock,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            if self._embedded is not None:
                if not self._embedded.start(cancelled=lambda: self._board.stopping):
                    return 0
                self._use_url(self._embedded.url)
            elif not self._config.redis.url.startswith("memory:"):
                # One that will never do is better told of now than by each worker; one that is away may come.
                warning = check_server(self._config.redis.url)
                if warning is not None:
                    logger.warning("%s", warning, extra={"event": "redis_away"})
            self._clock_goes = True
            signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS)
            self._fork()
            logger.info("stopped", extra={"event": "stopped"})
            return 0
        finally:
            self._clock_goes = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self._embedded is not None:
                self._embedded.stop(STOP_SECONDS)
            for number, handler in before.items():
                signal.signal(number, handler)
            for sock in self._sockets:
                sock.close()

    def _use_url(self, url: str) -> None:
        redis = dataclasses.replace(self._config.redis, url=url)
        self._config = dataclasses.replace(self._config, redis=redis)

    def _fork(self) -> None:
        """Make the workers; return when all of them have left for good."""
        if threading.active_count() > 1:
            raise RuntimeError(f"threads before the fork: {threading.enumerate()}")
        tornado_log = logging.getLogger("tornado.general")
        tornado_log.addFilter(self._fork_log)
        # What lives now is never collected, so its pages stay shared.
        gc.collect()
        gc.freeze()
        try:
            index = fork_processes(self._config.server.workers, max_restarts=sys.maxsize)
        except SystemExit:
            return  # So it ends in the parent.
        except OSError as error:
            raise ConfigError([f"no more processes can be made: {error.strerror}"]) from error
        finally:
            tornado_log.removeFilter(self._fork_log)
        self._be_worker(index)

    # In a worker.

    def _be_worker(self, index: int) -> NoReturn:
        """The life of a worker, from the fork to its exit. It never returns into the parent's code."""
        code = 1
        try:
            code = self._work(index)
        except ConfigError as error:
            logger.error("worker %d: %s", index, error, extra={"event": "worker_failed"})
        except BaseException:
            logger.critical("worker %d failed", index, exc_info=True, extra={"event": "worker_failed"})
        finally:
            with contextlib.suppress(Exception):
                logging.shutdown()
                sys.stdout.flush()
            os._exit(code)

    def _work(self, index: int) -> int:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A terminal sends these two to all processes; the parent tells the workers what to do.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        die_with_parent(self._pid)
        if self._embedded is not None:
            self._embedded.forget()
        board = self._board
        early_deaths = board.claim(index)
        # From here on the parent finds this process on the board. It may have begun to stop before.
        if early_deaths and not board.stopping:
            pause(index, early_deaths)
        code = 0
        if not board.stopping:
            board.begin()
            code = self._serve(self._config, self._sockets, board, index)
        if code == 0:
            board.release()
            return 0 if board.stopping else REPLACE_EXIT
        return code

    # The parent's signals. The handlers run in the main thread, wherever it is.

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # In a worker that has not come to `_work` yet. It will read the board.
        self._hurry = self._board.stopping
        if not self._hurry:
            self._board.stopping = True
            seconds = self._config.server.drain_delay + STOP_SECONDS
            self._stop_by = time.monotonic() + seconds
            # The embedded server ends after the workers.
            self._watch.stopping(seconds + STOP_SECONDS)
        else:
            self._stop_by = 0.0
            if self._embedded is not None:
                self._embedded.kill()
        name = signal.Signals(number).name
        logger.info("%s: stopping%s", name, " at once" * self._hurry, extra={"event": "stopping"})
        self._tick()

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid and not self._board.stopping:
            self._reload_asked = True
            self._tick()

    def _reload(self) -> None:
        """Read the configuration again, and do what is to be done about it."""
        self._watch.reloading()
        try:
            change = compare(self._given, self._read())
        except ConfigError as error:
            for problem in error.problems:
                logger.error("SIGHUP: %s", problem, extra={"event": "reload_failed"})
            logger.error("SIGHUP: the old configuration stays", extra={"event": "reload_failed"})
            self._reloaded()
            return
        for sentence in (*change.taken, *change.replacing):
            logger.info("SIGHUP: %s", sentence, extra={"event": "reload"})
        for sentence in change.fixed:
            logger.warning("SIGHUP: only a restart can change %s", sentence, extra={"event": "reload_fixed"})
        url = self._config.redis.url
        self._given = self._config = change.config
        self._use_url(url)
        handed = change.taken and self._hand_over(change.handed)
        if change.replacing or change.fixed or not handed:
            logger.info("SIGHUP: the workers are replaced one by one", extra={"event": "replacing"})
            self._queue = list(range(self._board.workers))
        self._reloaded()

    def _reloaded(self) -> None:
        """Tell that the reload is over, unless workers are still to be replaced."""
        if self._leaving is None and not self._queue:
            self._watch.reloaded()

    def _hand_over(self, config: Config) -> bool:
        """Have the running workers take over what they can. False: it does not fit on the board."""
        try:
            self._board.put_settings(pickle.dumps(config))
        except ValueError:
            return False
        for slot in self._board.slots():
            if self._is_child(slot.pid):
                os.kill(slot.pid, signal.SIGHUP)
        return True

    def _on_clock(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._tick()

    def _tick(self) -> None:
        if self._ticking or not self._clock_goes:
            return
        self._ticking = True
        try:
            now = time.monotonic()
            self._watch.tick(now)
            if self._board.stopping:
                self._stop_workers(now)
            else:
                if self._reload_asked:
                    self._reload_asked = False
                    self._reload()
                self._replace_workers(now)
                if self._embedded is not None:
                    self._embedded.tend(now)
        except Exception:
            # It must not end `os.wait`, and with it the parent.
            logger.exception("an error in the clock of the parent", extra={"event": "clock_failed"})
        finally:
            self._ticking = False
            signal.setitimer(signal.ITIMER_REAL, CLOCK_SECONDS if self._is_busy() else self._rest)

    def _is_busy(self) -> bool:
        """Whether something is under way that the clock is to find at its end."""
        return (
            self._board.stopping
            or not self._watch.is_ready
            or self._leaving is not None
            or bool(self._queue)
            or (self._embedded is not None and not self._embedded.is_up)
        )

    def _stop_workers(self, now: float) -> None:
        for index, slot in enumerate(self._board.slots()):
            if not self._is_child(slot.pid):
                continue
            if now >= self._stop_by:
                if not self._hurry:
                    self._log_killed(index, slot.pid)
                os.kill(slot.pid, signal.SIGKILL)
            elif slot.pid not in self._told:
                self._told.add(slot.pid)
                os.kill(slot.pid, signal.SIGTERM)

    def _replace_workers(self, now: float) -> None:
        if self._leaving is None:
            if not self._queue:
                return
            index = self._queue.pop(0)
            pid = self._board.slot(index).pid
            self._leaving = index, pid, now + self._config.server.drain_seconds + GRACE_SECONDS
            if self._is_child(pid):
                os.kill(pid, signal.SIGTERM)
            return
        index, pid, leave_by = self._leaving
        slot = self._board.slot(index)
        if slot.pid != pid:
            # The next one's turn comes when the successor serves; where none does, the others stay.
            if slot.pid and slot.state is State.SERVING:
                self._leaving = None
                if not self._queue:
                    logger.info("all workers are replaced", extra={"event": "replaced"})
                    self._watch.reloaded()
        elif now > leave_by and self._is_child(pid):
            self._log_killed(index, pid)
            os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _is_child(pid: int) -> bool:
        """Whether this is a process of ours. What a dead worker left on the board may be another's by now."""
        if pid == 0 or not hasattr(os, "waitid"):  # Python 3.11 and 3.12 have none on macOS.
            return pid > 0
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    @staticmethod
    def _log_killed(index: int, pid: int) -> None:
        logger.warning(
            "worker %d (pid %d) did not leave in time and is killed",
            index,
            pid,
            extra={"event": "worker_killed"},
        )

    def _log_serving(self) -> None:
        scheme = "https" if self._config.server.certfile else "http"
        names = [sock.getsockname() for sock in self._sockets]
        places = [name if isinstance(name, str) else f"{scheme}://{place(*name[:2])}" for name in names]
        logger.info(
            "serving %s with %d workers",
            ", ".join(places),
            self._board.workers,
            extra={"event": "serving"},
        )
