"""`make install` below a directory of its own, and the units as systemd reads them.

What it does on a real machine, with a user, a key and a running systemd, is tested by `make systemd-test`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import ROOT

from tornado_bcast import __version__, config, daemon

UNITS = ROOT / "systemd"
SERVICE = (UNITS / "tornado-bcast.service").read_text()
PROGRAM = "usr/lib/tornado-bcast"
KEYS = "/etc/tornado-bcast/api-keys"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `make install` needs of the repository, without dependencies: to fetch them takes longest."""
    place = tmp_path / "clone"
    place.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    for name in ("systemd", "conf", "tornado_bcast"):
        shutil.copytree(ROOT / name, place / name)
    (place / "requirements.lock").write_text("# none\n")
    return place


def make(target: str, clone: Path, destination: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", target, f"DESTDIR={destination}", "PREFIX=/usr"],
        cwd=clone,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def files(place: Path) -> set[str]:
    """All but the virtual environment."""
    found = (str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir())
    return {path for path in found if not path.startswith(PROGRAM)}


def test_install_and_uninstall(clone: Path, tmp_path: Path) -> None:
    tmp_path /= "root"
    make("install", clone, tmp_path)
    assert files(tmp_path) == {
        "etc/tornado-bcast/tornado-bcast.ini",
        "usr/bin/tornado-bcast",
        "usr/lib/systemd/system/tornado-bcast.service",
        "usr/lib/systemd/system/tornado-bcast.socket",
        "usr/lib/sysusers.d/tornado-bcast.conf",
        "usr/lib/tmpfiles.d/tornado-bcast.conf",
        "usr/share/doc/tornado-bcast/tornado-bcast.ini",
    }
    # The programs that the unit names are there, and know nothing of where they were laid out.
    unit = (tmp_path / "usr/lib/systemd/system/tornado-bcast.service").read_text()
    programs = set(re.findall(r"/usr/[\w/.-]+", unit))
    assert programs == {f"/{PROGRAM}/bin/tornado-bcast"}
    script = (tmp_path / PROGRAM / "bin/tornado-bcast").read_text()
    assert script.startswith(f"#!/{PROGRAM}/bin/python")
    found = subprocess.run(["grep", "-rlI", str(tmp_path), tmp_path], capture_output=True, text=True)
    assert found.stdout == ""
    python = tmp_path / PROGRAM / "bin/python"
    version = subprocess.run([python, "-m", "tornado_bcast.cli", "version"], capture_output=True, text=True)
    assert version.stdout == f"tornado-bcast {__version__}\n"
    assert (tmp_path / "usr/bin/tornado-bcast").resolve() == (tmp_path / PROGRAM / "bin/tornado-bcast")

    # Production, and the keys by their file; all else as it is shipped.
    ini = tmp_path / "etc/tornado-bcast/tornado-bcast.ini"
    keys, here = tmp_path / "keys", tmp_path / "here.ini"
    keys.write_text("0" * 64)
    assert ini.read_text().count(KEYS) == 1
    here.write_text(ini.read_text().replace(KEYS, str(keys)))
    settings = config.read(str(here), environ={}).config
    assert settings.server.env == "production" and len(settings.auth.api_keys) == 1
    keys.unlink()
    here.unlink()

    make("uninstall", clone, tmp_path)
    assert files(tmp_path) == {"etc/tornado-bcast/tornado-bcast.ini"}
    assert not (tmp_path / PROGRAM).exists()


needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with a program that is here in place of ours."""
    for name in ("tornado-bcast.service", "tornado-bcast.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(
            text.replace("/usr/local/lib/tornado-bcast/bin/tornado-bcast", "/bin/true")
        )
    return tmp_path


def analyze(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30)


@needs_systemd
def test_systemd_understands_the_units(units: Path) -> None:
    done = analyze(units, "verify", "--man=no", "./tornado-bcast.service", "./tornado-bcast.socket")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_exposure(units: Path) -> None:
    """2.0 or better, in tenths."""
    done = analyze(units, "security", "--offline=true", "--threshold=20", "./tornado-bcast.service")
    assert done.returncode == 0, done.stdout


def test_the_unit_leaves_time_to_stop() -> None:
    """Workers and embedded server, one after the other. For `drain_delay` the daemon asks by itself."""
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)s$", SERVICE, re.MULTILINE)
    assert int(seconds) > 2 * daemon.STOP_SECONDS + 5


def test_what_the_manual_says_of_the_units() -> None:
    """Each line that docs/OPERATIONS.md explains is in a unit."""
    page = (ROOT / "docs/OPERATIONS.md").read_text()
    both = SERVICE + (UNITS / "tornado-bcast.socket").read_text()
    rows = re.findall(
        r"^\| (`[A-Z].*?) \|", page.partition("### The units")[2].partition("\n## ")[0], re.MULTILINE
    )
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row)]
    assert len(lines) > 8
    assert not [line for line in lines if line not in both]
