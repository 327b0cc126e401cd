"""`make sdk`: it runs where Node.js is; elsewhere it says loudly that it did not, and fails under CI.

What it runs are the SDK's own tests: sdk/react/test and sdk/react/e2e.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from daemon import ROOT


def make_sdk(place: Path, *programs: str, ci: str = "") -> tuple[int, str]:
    """Exit code and output where only these programs are; `npm` is one that just says what it is told."""
    for program in ("make", "sh", *programs):
        path = shutil.which(program)
        if path is None:
            pytest.skip(f"no {program} on PATH")
        (place / program).symlink_to(Path(path).resolve())
    (place / "npm").write_text(f'#!{place}/sh\necho "npm $1 $2"\n')
    (place / "npm").chmod(0o755)
    done = subprocess.run(
        ["make", "-o", ".venv/run", f"SHELL={place}/sh", "sdk"],
        cwd=ROOT,
        env={"PATH": str(place), "CI": ci},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    return done.returncode, done.stdout


def test_it_runs_where_node_is(tmp_path: Path) -> None:
    node = shutil.which("node")
    version = node and subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    if not version or int(version[1:].split(".")[0]) < 20:
        pytest.skip("no Node.js 20 on PATH")
    code, said = make_sdk(tmp_path, "node", ci="true")
    assert (code, said.splitlines()) == (0, ["npm ci --no-audit", "npm run check", "npm run e2e"])


@pytest.mark.parametrize(("ci", "ends_with"), [("", 0), ("true", 2)])
def test_elsewhere_it_says_so_and_fails_under_ci(ci: str, ends_with: int, tmp_path: Path) -> None:
    code, said = make_sdk(tmp_path, ci=ci)
    assert (code, "the React SDK was NOT tested" in said) == (ends_with, True)


def test_ci_looks_for_node_as_make_does() -> None:
    question = "node -e 'process.exit(+(parseInt(process.versions.node) < 20))' 2>/dev/null"
    for name in ("Makefile", ".ci/run"):
        assert question in (ROOT / name).read_text()
