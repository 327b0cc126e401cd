"""The fuzzing client of the Autobahn TestSuite against the daemon.

https://github.com/crossbario/autobahn-testsuite

    python tests/autobahn.py              # install it where it is not, then all cases: about 13 minutes
    python tests/autobahn.py --install    # install it alone: a minute
    python tests/autobahn.py 1.* 12.1.3   # some cases

It runs on Python 2.7 only and is installed into build/autobahn. What it talks to is echo_daemon.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from daemon import ROOT, Daemon

VERSION = "25.10.1"
PLACE = ROOT / "build" / "autobahn"
# The last one that can make environments for Python 2.7.
_VIRTUALENV = "virtualenv==20.21.1"

# Groups 1-10: framing, pings, reserved bits, opcodes, fragments, UTF-8, closing, limits.
FRAMING = tuple(f"{group}.*" for group in range(1, 11))
# 12 and 13: compression, and what is offered and agreed on. A run for each, so that none is for nothing.
_GROUPS = (
    FRAMING,
    *((f"12.{number}.*",) for number in range(1, 6)),
    *((f"13.{number}.*",) for number in range(1, 8)),
)
# For all of them. On a quiet machine they take 13 minutes.
_SECONDS = 3600.0

# The largest messages of the suite have 16 MB.
INI = """
[server]
compression = yes
[limits]
max_message_bytes = 17m
max_queue_bytes = 64m
"""
ECHO = (str(ROOT / "tests" / "echo_daemon.py"),)
# Behaviour of a case, and of its closing handshake, that is a fault of the server.
_FAULTS = ("FAILED", "UNCLEAN", "WRONG CODE")

# Case -> its behaviour, and that of its closing handshake.
Results = dict[str, tuple[str, str]]


class Missing(Exception):
    """Autobahn is not here, and why."""


def find() -> Path:
    """The suite's command. Raises Missing."""
    installed = PLACE / "bin" / "wstest"
    if installed.exists():
        return installed
    elsewhere = shutil.which("wstest")
    if elsewhere is None:
        raise Missing("the Autobahn TestSuite is not installed: `make conformance` does it where it can")
    return Path(elsewhere)


def install() -> None:
    """Make build/autobahn. Raises Missing where there is no Python 2.7, or no compiler for it."""
    python = _python27()
    if python is None:
        raise Missing("it needs Python 2.7: install one (`pyenv install 2.7.18`), or name it in PYTHON27")
    shutil.rmtree(PLACE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as tools:
        # Of its own, for that old version must not meet what the tests use.
        _run(sys.executable, "-m", "venv", tools)
        _run(f"{tools}/bin/python", "-m", "pip", "install", "-q", _VIRTUALENV)
        _run(f"{tools}/bin/virtualenv", "-q", "-p", python, str(PLACE))
    try:
        _run(str(PLACE / "bin" / "pip"), "install", "-q", f"autobahntestsuite=={VERSION}")
    except Missing:
        shutil.rmtree(PLACE)
        raise


def _python27() -> str | None:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = [
        os.environ.get("PYTHON27"),
        shutil.which("python2.7"),
        *map(str, root.glob("versions/2.7*/bin/python2.7")),
    ]
    for one in candidates:
        # A shim of pyenv is there whether or not the version behind it is switched on.
        if one and not subprocess.run([one, "-c", ""], capture_output=True, timeout=30).returncode:
            return one
    return None


def _run(*command: str) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300
    )
    if done.returncode:
        raise Missing(f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}")


def run(
    daemon: Daemon,
    cases: Sequence[str],
    seconds: float,
    reports: Path,
    tell: Callable[[str], None] = lambda line: None,
) -> Results:
    """Run cases against an echo daemon, for at most so many seconds: then TimeoutError.

    `tell` hears of each group of cases.
    """
    spec = {
        "outdir": str(reports),
        "servers": [{"agent": "tornado_bcast", "url": daemon.ws_url + "/ws"}],
        "cases": list(cases),
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    reports.mkdir(parents=True, exist_ok=True)
    file = reports / "spec.json"
    file.write_text(json.dumps(spec))
    command = ["timeout", str(max(1, round(seconds))), str(find()), "-m", "fuzzingclient", "-s", str(file)]
    group, last = "", ""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as client:
        try:
            assert client.stdout is not None
            for line in client.stdout:
                last = line
                if line.startswith("Running test case ID "):
                    running = line.split()[4].rpartition(".")[0]
                    if running != group:
                        group = running
                        tell(f"{group}.*")
            status = client.wait()
        finally:
            client.kill()
    if status == 124:
        raise TimeoutError(f"{group}.*: not done within the time for all")
    assert status == 0, last
    found = json.loads((reports / "index.json").read_text())["tornado_bcast"]
    return {case: (result["behavior"], result["behaviorClose"]) for case, result in found.items()}


def faults(results: Results) -> list[str]:
    """The cases that failed, with how."""
    return [f"{case}: {' / '.join(result)}" for case, result in results.items() if set(result) & set(_FAULTS)]


def summary(results: Results) -> str:
    """A line for each group: how many cases behaved how."""
    groups: dict[int, Counter[str]] = {}
    for case, (behaviour, _) in results.items():
        groups.setdefault(int(case.partition(".")[0]), Counter())[behaviour] += 1
    groups = dict(sorted(groups.items()))
    lines = [f"{group:>5}  {_counts(counter)}" for group, counter in groups.items()]
    return "\n".join([*lines, f"  all  {_counts(sum(groups.values(), Counter()))}"])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {behaviour}" for behaviour, count in counter.most_common())


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The Autobahn TestSuite against the daemon.")
    parser.add_argument("cases", nargs="*", help="all, unless some are named: 1.* 12.1.3")
    parser.add_argument("--install", action="store_true", help="install it and do nothing else")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        find()
    except Missing:
        try:
            print(f"installing the Autobahn TestSuite {VERSION} into {PLACE.relative_to(ROOT)}", flush=True)
            install()
        except Missing as missing:
            print(f"The Autobahn TestSuite cannot be run here: {missing}")
            return 1
    if options.install:
        return 0
    results: Results = {}
    begun = time.monotonic()
    failed: list[str] = []

    def tell(line: str) -> None:
        print(f"{time.monotonic() - begun:6.0f} s  {line}", flush=True)

    with Daemon(INI, program=ECHO) as daemon:
        for number, cases in enumerate([options.cases] if options.cases else _GROUPS):
            left = _SECONDS - (time.monotonic() - begun)
            try:
                results |= run(daemon, cases, left, ROOT / "build" / "conformance" / str(number), tell)
            except TimeoutError as error:
                failed.append(str(error))
                break
    print(summary(results))
    failed += faults(results)
    print("\n".join(failed) or "no case failed")
    print("the reports: build/conformance/*/index.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
