"""The Dockerfile, built and run: `make image-test`. Not a part of `make test`.

The tests run in their order: the first ones build, the last ones end the containers that they share.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from broker_kit import asynchronous
from builder import PLACE, base_name, build, buildah, make_base, mounted, run, settings_of_image, variables_of
from client import Client, http
from container import STOP_SECONDS, Container, command_of, namespace_of, pids, status_of
from daemon import until

KEY = "bk_image_test"
HEADERS = {"X-API-Key": KEY}
VARIABLES = {
    "BCAST_AUTH_API_KEYS": sha256(KEY.encode()).hexdigest(),
    "BCAST_CHANNELS_PERSISTENT": "yes",
}
VOLUME = "/var/lib/tornado-bcast"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session", autouse=True)
def commit() -> Iterator[None]:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.exit("it needs root, buildah and debootstrap: apt-get install buildah debootstrap", 2)
    PLACE.mkdir(parents=True, exist_ok=True)
    # Of a run that was killed.
    buildah("rm", "--all")
    print(f"commit {run('git', 'describe', '--always', '--dirty')}")
    yield


def test_there_is_a_base_image() -> None:
    print(f"base {base_name()}: {make_base()}")


def test_the_dockerfile_builds() -> None:
    print(f"image: {build()}")


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    return settings_of_image()


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    with mounted() as root:
        yield root


@pytest.fixture(scope="session")
def volume(root: Path) -> Iterator[Path]:
    """A new volume: it takes the owner of the directory in the image."""
    with tempfile.TemporaryDirectory(prefix="bcast-volume") as place:
        owner = (root / VOLUME.removeprefix("/")).stat()
        os.chown(place, owner.st_uid, owner.st_gid)
        yield Path(place)


def test_what_the_image_says_of_itself(settings: dict[str, Any]) -> None:
    user, _, group = settings["User"].partition(":")
    assert int(user) > 0 and int(group) > 0, "a number, so that Kubernetes sees that it is not root's"
    # The exec form: no shell stands between the daemon and its signals.
    assert settings["Entrypoint"] == ["tornado-bcast"] and settings["Cmd"] == ["serve"]
    form, *probe = settings["Healthcheck"]["Test"]
    assert form == "CMD" and "/health/live" in probe[-1] and not {"curl", "wget"} & set(probe)
    variables = variables_of(settings)
    assert (variables["BIND"], variables["BCAST_ENV"]) == ("0.0.0.0", "production")
    assert list(settings["Volumes"]) == [VOLUME] == [variables["STATE_DIRECTORY"]]
    assert list(settings["ExposedPorts"]) == [f"{variables['PORT']}/tcp"]


def test_what_is_in_the_image_and_what_is_not(root: Path) -> None:
    """The loop in C; neither what only the build needs, nor anything of this machine."""
    (package,) = root.glob("opt/tornado-bcast/lib/python3*/site-packages/tornado_bcast")
    assert len(list(package.glob("_speedups*.so"))) == 1
    assert not (root / "src").exists() and not list(root.glob("usr/bin/*gcc*"))
    assert not list(root.glob("usr/bin/*pip*")) and not list(root.glob("usr/lib/python3*/ensurepip"))
    assert not list(root.glob("var/lib/apt/lists/*")) and not list(root.glob("var/cache/**/*.deb"))
    for path in ("etc/pip.conf", "etc/lent.crt", "etc/apt/apt.conf.d/99lent"):
        # Where something was lent to the build an empty file is left.
        assert not (root / path).exists() or (root / path).stat().st_size == 0


# Without a key


@pytest.fixture(scope="module")
def keyless(root: Path, settings: dict[str, Any], volume: Path) -> Iterator[Container]:
    with Container(root, settings, volume) as container:
        container.expect("configuration")
        yield container


@asynchronous
async def test_it_says_so_in_one_line(keyless: Container) -> None:
    lines = [line["message"] for line in keyless.events("configuration")]
    (line,) = [line for line in lines if "no key is set" in line]
    assert "http://0.0.0.0:" in keyless.wait_for_log("serving")["message"]
    assert (await http(keyless.url, "POST", "/broadcast", {"data": 1})).status == 401
    print(line)


def test_it_makes_keys(keyless: Container) -> None:
    """The command that docs/OPERATIONS.md begins with."""
    assert keyless.exec(*keyless.command("key", "--name", "first")) == 0


def test_it_is_not_root_and_its_root_is_read_only(keyless: Container) -> None:
    processes = keyless.processes()
    assert len(processes) == 4, "the daemon, two workers, the private server"
    for pid in processes:
        status = status_of(pid)
        assert set(status["Uid"].split()) == {"10001"} and int(status["CapEff"], 16) == 0
    assert status_of(keyless.pid)["NSpid"].split()[-1] == "1"
    mounts = [line.split() for line in Path(f"/proc/{keyless.pid}/mounts").read_text().splitlines()]
    (options,) = [fields[3] for fields in mounts if fields[1] == "/"]
    assert "ro" in options.split(",")
    for place in ("/", "/tmp", "/opt/tornado-bcast"):
        assert keyless.exec("sh", "-c", f": >{place}/x") != 0
    assert keyless.exec("sh", "-c", f": >{VOLUME}/x") == 0


def test_the_health_check(keyless: Container) -> None:
    """0 while the loops turn, another code when none does."""
    keyless.expect("overloaded")  # Seconds late, when they are let go.
    assert keyless.probe() == 0
    workers = keyless.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert keyless.probe() != 0
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    until(lambda: keyless.probe() == 0)


def test_it_leaves_no_zombies(keyless: Container) -> None:
    """It waits for a worker that was killed, and for orphans, which become children of PID 1."""
    keyless.expect("worker_died", "worker_pausing")
    dead, other = keyless.workers()
    os.kill(dead, signal.SIGKILL)
    until(lambda: len(set(keyless.workers()) - {dead, other}) == 1)
    assert keyless.exec("sh", "-c", "sleep 1 & sleep 1 &") == 0
    assert len([pid for pid in keyless.children() if command_of(pid).startswith("sleep ")]) == 2
    # What has ended stays a child until it has been waited for.
    until(lambda: len(keyless.children()) == 3 and len(keyless.processes()) == 4)


def test_sigterm_ends_it_within_the_time(keyless: Container) -> None:
    keyless.check_log()
    namespace = namespace_of(keyless.pid)
    begun = time.monotonic()
    keyless.stop()
    print(f"SIGTERM: exit code 0 after {time.monotonic() - begun:.1f} s, of {STOP_SECONDS}")
    assert not [pid for pid in pids() if namespace_of(pid) == namespace]


# With one, on the same volume


@asynchronous
async def test_a_message_for_the_next_container(root: Path, settings: dict[str, Any], volume: Path) -> None:
    with Container(root, settings, volume, **VARIABLES) as container:
        container.expect("configuration")
        one = {"channel": "kept", "data": "kept"}
        assert (await http(container.url, "POST", "/broadcast", one, HEADERS)).status == 200


@pytest.fixture(scope="module")
def keyed(root: Path, settings: dict[str, Any], volume: Path) -> Iterator[Container]:
    with Container(root, settings, volume, **VARIABLES) as container:
        # Channels to which anyone may publish.
        container.expect("configuration")
        assert not [line for line in container.events("configuration") if "no key" in line["message"]]
        yield container


@asynchronous
async def test_the_volume_outlives_the_container(keyed: Container) -> None:
    answer = await http(keyed.url, "GET", "/channels/kept/history", headers=HEADERS)
    assert [message["data"] for message in answer.json["messages"]] == ["kept"]


@asynchronous
async def test_a_broadcast_over_two_workers(keyed: Container) -> None:
    """Published over HTTP to one worker, while the client's is stopped; then it comes from that one."""
    with keyed.only(0):
        client = await Client(keyed.ws_url).__aenter__()
    try:
        await client.ask("subscribe", channel="news")
        with keyed.only(1):
            one = {"channel": "news", "data": "hello"}
            answer = await http(keyed.url, "POST", "/broadcast", one, HEADERS)
            assert answer.status == 200
        assert (await client.message())["data"] == "hello"
        keyed.signal(signal.SIGTERM)
        code, reason = await client.closed()
        assert code == 1012 and "retryAfter" in reason
    finally:
        await client.__aexit__()
