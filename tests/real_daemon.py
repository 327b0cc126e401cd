"""The real daemon for tests: `tornado-bcast serve` with two workers, its own Redis and a free port."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-W", "error", "-m", "tornado_bcast.cli"]


class RealDaemon:
    """A running one. `log` has each of its lines, parsed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.log: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = str(self.wait_for("serving")["message"]).split()[1]

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._changed:
                self.log.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self.log.append({"event": "eof"})
            self._changed.notify_all()

    def wait_for(self, event: str, count: int = 1, seconds: float = 30) -> dict[str, Any]:
        """The log line in which `event` came for the `count`th time."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log if line["event"] == event][count - 1 :]

        with self._changed:
            ended = self._changed.wait_for(lambda: found() or self.log[-1:] == [{"event": "eof"}], seconds)
            assert ended and found(), (event, self.log)
            return found()[0]

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/broadcast", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=10) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        code = self._process.wait(20)
        self._reader.join(5)
        return code


@contextmanager
def real_daemon(directory: Path, **environment: str) -> Iterator[RealDaemon]:
    """Run it; it must stop well, and nothing above INFO may be in its log."""
    settings = {
        "PORT": "0",
        "WORKERS": "2",
        "BCAST_LOG_FORMAT": "json",
        "BCAST_REDIS_DATA_DIR": str(directory / "redis"),
        **environment,
    }
    process = subprocess.Popen(
        [*COMMAND, "serve"], env=os.environ | settings, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        daemon = RealDaemon(process)
        yield daemon
        assert daemon.stop() == 0, daemon.log
        loud = [line for line in daemon.log if line.get("level", "INFO") not in ("DEBUG", "INFO")]
        assert not loud, loud[:3]
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()
