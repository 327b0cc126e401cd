"""Programs that tests run where they are installed, as Debian has them."""

import os
import shutil

import pytest


def program(*names: str, package: str, untested: str) -> str:
    """The path of the first of these that is there. Without one the test is skipped, but under CI it fails.

    `untested` says what nobody has looked at then, `package` what to install on Debian.
    """
    for name in names:
        path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
        if path:
            return path
    reason = f"no {names[0]}: {untested} NOT tested (Debian: apt-get install {package})"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return program(*names, package="chromium", untested="the page was")


def nginx() -> str:
    return program("nginx", package="nginx-light", untested="what stands behind it was")


def haproxy() -> str:
    return program("haproxy", package="haproxy", untested="what stands behind it was")


def promtool() -> str:
    return program("promtool", package="prometheus", untested="the alerts were")
