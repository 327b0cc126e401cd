"""The benchmark works: what it measures is not judged here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from daemon import ROOT

compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(
    compiler is None, reason="no C compiler (cc): the benchmark's load client cannot be built"
)
BENCH = ROOT / "bench"


def run(*command: str | Path, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


@needs_compiler
def test_the_c_sources_build_without_a_warning(tmp_path: Path) -> None:
    assert compiler is not None
    for name in ("load", "floor"):
        options = ("-O2", "-Wall", "-Wextra", "-Werror")
        built = run(compiler, *options, "-o", tmp_path / name, BENCH / f"{name}.c")
        assert built.returncode == 0, built.stderr


@needs_compiler
def test_the_smallest_run_measures_every_row(tmp_path: Path) -> None:
    """`run.py --quick`: floor and daemon, each job once with a few connections."""
    done = run(
        sys.executable, BENCH / "run.py", "--quick", "--no-peers", "--build", tmp_path, "--out", tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert all(value >= 0 for values in samples.values() for value in values), samples
    assert samples["floor / paced"][0] > 0
    assert samples["daemon memory: / paced"][0] > 0
    if "redis" not in done.stdout:
        assert samples["daemon 2 workers / lost"] == [0]
    results = (tmp_path / "RESULTS.md").read_text()
    assert "What went wrong" not in results
    assert results.count("| met |") + results.count("| **missed** |") > 10
    ElementTree.parse(tmp_path / "results.svg")


def test_compression_is_measured() -> None:
    small = ("--subscribers", "20", "--messages", "10", "--rounds", "1")
    done = run(sys.executable, BENCH / "compression.py", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    plain, packed = (int(line.split()[1]) for line in done.stdout.splitlines())
    assert packed < plain / 2


@pytest.mark.parametrize("name", ["decode", "encode", "frame", "compress", "fan_out", "subscribe"])
def test_micro_benchmarks_run(name: str) -> None:
    done = run(sys.executable, BENCH / "micro.py", "--repeats", "1", "--profile", name)
    assert done.returncode == 0, done.stderr
    assert " us" in done.stdout and "function calls" in done.stdout
