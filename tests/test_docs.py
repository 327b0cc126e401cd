"""README, TROUBLESHOOTING and PUBLISHING, done as they say: in a shell, in Python, in a real Chromium."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_kit import asynchronous
from browser import Browser
from client import Client
from daemon import ROOT, Daemon

README = (ROOT / "README.md").read_text()
PUBLISHING = (ROOT / "docs/PUBLISHING.md").read_text()
CHECKS = (ROOT / "docs/TROUBLESHOOTING.md").read_text().partition("## Other signs")[0]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One with the defaults, but for its port and its place."""
    with Daemon(redis="embedded:", workers=2) as daemon:
        yield daemon


def shell(command: str, daemon: Daemon) -> str:
    """What a command prints, errors as well, where the server has the port of `daemon`."""
    if "curl" in command and not shutil.which("curl"):
        pytest.skip("no curl on PATH")
    done = subprocess.run(
        ["bash", "-c", command.replace("127.0.0.1:8080", f"127.0.0.1:{daemon.port}")],
        env=os.environ
        | {
            # The package's command without an installation, and curl without what a user has configured.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "BCAST_URL": daemon.url,
            "CURL_HOME": str(daemon.place),
        },
        cwd=daemon.place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=30,
    )
    return done.stdout.strip()


def is_like(shown: str, printed: str) -> bool:
    """Whether this was printed; `...` in what is shown stands for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.split("..."))
    return re.fullmatch(pattern, printed.replace("\r", ""), re.DOTALL) is not None


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Each command of an indented block that begins with `$ `, and what it prints."""
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        lines = [line[4:] for line in block.splitlines()]
        if lines[0].startswith("$ "):
            yield lines[0][2:], "\n".join(lines[1:])


def test_there_are_seven_checks() -> None:
    assert re.findall(r"^### (\d)\. ", CHECKS, re.MULTILINE) == list("1234567")
    for check in re.split(r"^### \d\. ", CHECKS, flags=re.MULTILINE)[1:]:
        assert list(blocks(check)) and "Bad:" in check


@pytest.mark.parametrize("number", [1, 2, 3, 5, 6, 7])
@asynchronous
async def test_checks(number: int, daemon: Daemon) -> None:
    """The good case of each; `Bad:` was seen when it was written down."""
    check = re.split(r"^### \d\. ", CHECKS, flags=re.MULTILINE)[number]
    ((command, shown),) = list(blocks(check))
    (daemon.place / "bcast.log").write_text("10:08:45.051 INFO     w0   worker_serving     worker 0 serves\n")
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="news")
        printed = shell(command, daemon)
    assert is_like(shown, printed), printed


def test_listening_and_publishing(daemon: Daemon) -> None:
    """The fourth check: the two commands, in two terminals."""
    check = re.split(r"^### \d\. ", CHECKS, flags=re.MULTILINE)[4]
    (listen, heard), (publish, taken) = blocks(check)
    both = (
        f"({listen} & echo $! >tail.pid; wait) 2>&1 | (read -r first; echo $first; {publish} >taken; head -1)"
    )
    printed = shell(f"{both}; kill $(cat tail.pid) 2>/dev/null", daemon)
    assert is_like(heard, printed), printed
    assert is_like(taken, (daemon.place / "taken").read_text().strip())


def test_the_commands_of_the_readme(daemon: Daemon) -> None:
    lines = [line[4:] for line in README.splitlines() if line.startswith("    ")]
    # The one with the key is test_proxies.py's.
    (curl,) = [line for line in lines if line.startswith("curl ") and "dev-key" not in line]
    assert is_like('{"results":[{"channel":"news","messageId":"..."}]}', shell(curl, daemon))
    (cron,) = [line for line in lines if line.startswith("*/5 ")]
    # As cron reads it: five fields, then a command in which a percent sign is escaped.
    command = re.sub(r"^(\S+ ){5}", "", cron).replace(r"\%", "%")
    printed = shell(command, daemon)
    assert is_like('{"results":[{"channel":"news","messageId":"tick-..."}]}', printed), printed
    (publish,) = [line for line in lines if "publish" in line]
    printed = shell(publish.removeprefix(".venv/bin/"), daemon)
    assert is_like('{"channel": "news", "messageId": "..."}', printed), printed


def test_the_page_of_the_readme(daemon: Daemon, tmp_path: Path) -> None:
    """Saved and opened from disk, in two windows: what one says both see."""
    (page,) = re.findall(r"```html\n(.*?)```", README, re.DOTALL)
    assert len(page.splitlines()) == 10
    path = tmp_path / "hello.html"
    path.write_text(page.replace("127.0.0.1:8080", f"127.0.0.1:{daemon.port}"))
    with Browser() as browser:
        windows = [browser.open(path.as_uri()) for _ in range(2)]
        for window in windows:
            window.wait_for("document.querySelector('pre').innerText.includes('\"op\":\"subscribe\"')")
        windows[0].click("button")
        for window in windows:
            window.wait_for("document.querySelector('pre').innerText.includes('\"data\":\"hello\"')")
            assert window.errors == []


# Publishing


def test_the_python_of_publishing(daemon: Daemon) -> None:
    programs = re.findall(r"```python\n(.*?)```", PUBLISHING, re.DOTALL)
    assert len(programs) == 3
    for program in programs:
        path = daemon.place / "program.py"
        path.write_text(program.replace("127.0.0.1:8080", f"127.0.0.1:{daemon.port}"))
        printed = shell(f"python -W error {path} && echo good", daemon)
        assert re.fullmatch(r"([0-9a-f-]{36}\n)?good", printed), printed


def test_the_shell_of_publishing(daemon: Daemon) -> None:
    several = list(blocks(PUBLISHING))
    assert len(several) == 2
    for command, shown in several:
        printed = shell(command, daemon)
        assert is_like(shown, printed), printed


def test_the_timer_of_publishing(daemon: Daemon) -> None:
    """The units are right, as far as systemd can tell, and their command publishes once."""
    service, timer = re.findall(r"```ini\n(.*?)```", PUBLISHING, re.DOTALL)
    (line,) = re.findall(r"^ExecStart=(.*)$", service.replace("\\\n", " "), re.MULTILINE)
    # As systemd reads it: `%%` is a percent sign, `$$` a dollar, and the rest is quoted as in a shell.
    command = line.replace("%%", "%").replace("$$", "$").replace("/usr/local/bin/report", "echo 17")
    (daemon.place / "bcast-key").write_text("some-key\n")
    for duplicate in ("", ', "duplicate": true'):
        printed = shell(f"export CREDENTIALS_DIRECTORY={daemon.place}; {command}", daemon)
        assert is_like(f'{{"channel": "reports", "messageId": "report-..."{duplicate}}}', printed), printed
    if not shutil.which("systemd-analyze"):
        pytest.skip("the units are NOT checked: no systemd-analyze on PATH")
    for name, text in (("report.service", service), ("report.timer", timer)):
        (daemon.place / name).write_text(text)
    printed = shell(
        f"systemd-analyze verify {daemon.place}/report.service {daemon.place}/report.timer", daemon
    )
    assert "report" not in printed, printed
