"""How many cores this process may use; the default of `[server] workers`.

Reads the affinity mask and the files of the kernel's control groups, and nothing else.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(affinity: int | None = None, root: Path = Path("/")) -> int:
    """The number of whole cores, at least 1: the affinity, or the lowest CPU quota where that is less.

    `affinity` and `root` (where `proc` and `sys` are) are for tests. A quota of two and a half cores counts
    as two: one worker too many and all of them are stopped in each period of the quota.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([affinity, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas in cores that hold for this process, its own group's and those of the groups above.

    The files are described in the kernel's Documentation/admin-guide/cgroup-v2.rst ("cpu.max") and
    Documentation/scheduler/sched-bwc.rst (version 1).
    """
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _number, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if not colon:
            continue
        if not controllers:
            mounts = [base, base / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [base / controllers, base / "cpu"]
        else:
            continue
        # In a container the path may be that of the host and not exist here; then its top directory counts.
        path = PurePosixPath(group.lstrip("/"))
        for directory in (mount / level for mount in mounts for level in (path, *path.parents)):
            limit, _, period = _read(directory / "cpu.max").partition(" ")
            if not limit:
                limit, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
            # No limit is `max` in version 2 and -1 in version 1.
            if limit.isdecimal() and period.isdecimal() and int(period):
                yield int(limit) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
