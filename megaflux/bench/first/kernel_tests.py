"""Step tests: the kernels' test suite, and the tests marked gpu, in parallel processes; a failure ends none of the others."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.processes import start
from megaflux.bench.first.settings import Setting

ROOT = Path(__file__).parents[3]
SUITES = {
    "training": ["tests/training/test_gpu.py", "tests/training/test_waits.py", "-m", "gpu"],
    "kernels": [
        "tests/kernels",
        "tests/models/test_flux.py",
        "--ignore",
        "tests/kernels/test_aot.py",
        "-m",
        "not slow",
    ],
}
NAMED = 5  # failed tests whose names are kept
PROCESSES = 8
LIMITS = {"kernels": 90, "training": 100}  # seconds; what has passed or failed by then is kept
EACH = 90  # seconds for one test


def run(recorder: Recorder, setting: Setting) -> None:
    for suite in SUITES:
        if suite == "training" and not (find_spec("deepspeed") and find_spec("streaming")):
            continue
        facts = [f"{suite}: {what}" for what in ("passed", "failed", "skipped")]
        if recorder.missing(*facts):
            with recorder.measuring(*facts):
                tests, code = results(suite)
                failed = [test for test in tests if _is(test, "failure", "error")]
                skipped = sum(_is(test, "skipped") for test in tests)
                if code not in (0, 1, 2) or len(tests) == skipped:
                    raise RuntimeError(
                        f"pytest ended with code {code}, and {len(tests) - skipped} tests ran; see the log"
                    )
                for number, test in enumerate(failed[:NAMED], start=1):
                    recorder.add(f"{suite}: failed {number}", _said(test))
                recorder.add(facts[0], len(tests) - len(failed) - skipped)
                recorder.add(facts[1], len(failed), predicted=0)
                recorder.add(facts[2], skipped)
                if code == 2:
                    recorder.add(f"{suite}: not all", f"ended after {LIMITS[suite]} s")


def results(suite: str) -> tuple[list[ElementTree.Element], int]:
    """The tests of a suite as junit has them, and pytest's exit code; 2: ended at its limit. RuntimeError without any."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *SUITES[suite],
            "-q",
            "-p",
            "no:cacheprovider",
            "--junitxml",
            str(junit),
        ]
        if find_spec("xdist") and suite == "kernels":
            command += ["-n", str(PROCESSES)]
        if find_spec("pytest_timeout"):
            command += ["--timeout", str(EACH)]
        process = start(command, cwd=ROOT)
        try:
            code = process.wait(LIMITS[suite])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # on which pytest writes what it has
            code = process.wait(20)
        if not junit.is_file():
            raise RuntimeError(f"pytest ended with code {code} and wrote no results; see the log")
        return list(ElementTree.parse(junit).getroot().iter("testcase")), code


def _is(test: ElementTree.Element, *outcomes: str) -> bool:
    return any(part.tag in outcomes for part in test)


def _said(test: ElementTree.Element) -> str:
    why = next(part for part in test if part.tag in ("failure", "error")).get("message", "")
    return " ".join(f"{test.get('name')}: {why}".split())[:200]
