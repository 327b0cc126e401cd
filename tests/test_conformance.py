"""The Autobahn TestSuite against the daemon's framing; `make conformance` runs all of it, compression too."""

from pathlib import Path

import pytest
from autobahn import ECHO, FRAMING, INI, Missing, faults, find, run, summary
from daemon import Daemon


@pytest.mark.timeout(300)
def test_no_case_of_groups_1_to_10_fails(tmp_path: Path) -> None:
    try:
        find()
    except Missing as missing:
        pytest.skip(str(missing))
    with Daemon(INI, program=ECHO) as daemon:
        results = run(daemon, FRAMING, 240, tmp_path)
    assert len(results) > 290, summary(results)
    assert not faults(results), summary(results)


def test_what_counts_as_a_fault() -> None:
    results = {
        "1.1": ("OK", "OK"),
        "1.2": ("NON-STRICT", "INFORMATIONAL"),
        "1.3": ("UNIMPLEMENTED", "OK"),
        "2.1": ("FAILED", "OK"),
        "10.1": ("OK", "UNCLEAN"),
        "10.2": ("OK", "WRONG CODE"),
    }
    assert faults(results) == ["2.1: FAILED / OK", "10.1: OK / UNCLEAN", "10.2: OK / WRONG CODE"]
    assert summary(results).splitlines() == [
        "    1  1 OK, 1 NON-STRICT, 1 UNIMPLEMENTED",
        "    2  1 FAILED",
        "   10  2 OK",
        "  all  3 OK, 1 NON-STRICT, 1 UNIMPLEMENTED, 1 FAILED",
    ]
