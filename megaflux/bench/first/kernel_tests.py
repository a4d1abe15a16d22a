"""Step tests: the kernels' test suite and the tests marked gpu; a failure does not stop the others."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
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
OUTCOMES = ("passed", "failed", "skipped")
NAMED = 5  # failed tests whose names are kept
PROCESSES = 8
LIMITS = {"kernels": 90, "training": 100}  # seconds; what has passed or failed by then is recorded
EACH = 90  # seconds for one test


def run(recorder: Recorder, setting: Setting) -> None:
    for suite in SUITES:
        if suite == "training" and not (find_spec("deepspeed") and find_spec("streaming")):
            continue
        facts = [f"{suite}: {what}" for what in OUTCOMES]
        if recorder.missing(*facts):
            with recorder.measuring(*facts):
                counts, failures, code = results(suite)
                if code not in (0, 1, 2) or not counts["passed"] + counts["failed"]:
                    raise RuntimeError(f"pytest ended with code {code}, and no test ran; see the log")
                for number, line in enumerate(failures[:NAMED], start=1):
                    recorder.add(f"{suite}: failed {number}", line)
                for what, fact in zip(OUTCOMES, facts, strict=True):
                    recorder.add(fact, counts[what], predicted=0 if what == "failed" else None)
                if code == 2:
                    recorder.add(f"{suite}: not all", f"ended after {LIMITS[suite]} s")


def results(suite: str) -> tuple[dict[str, int], list[str], int]:
    """(number of tests of a suite by outcome, as pytest's last line counts them; messages of the failed ones; pytest's
    exit code, 2 where it was ended at its limit). RuntimeError where it wrote no results."""
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
        process, last = start(command, cwd=ROOT, stdout=subprocess.PIPE, text=True), ""
        limit = threading.Timer(LIMITS[suite], process.send_signal, [signal.SIGINT])  # pytest then writes what it has
        limit.start()
        for line in process.stdout or ():  # which is a pipe
            print(line, end="", flush=True)
            last = line if line.strip() else last
        limit.cancel()
        code = process.wait()
        if not junit.is_file():
            raise RuntimeError(f"pytest ended with code {code} and wrote no results; see the log")
        tests = ElementTree.parse(junit).getroot().iter("testcase")
        failures = [_said(test) for test in tests if _is(test, "failure", "error")]
    # In junit's file a test that was under way at the end looks as if it had passed.
    found = dict.fromkeys(OUTCOMES, 0) | {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", last)}
    found["failed"] += found.get("error", 0) + found.get("errors", 0)
    return found, failures, code


def _is(test: ElementTree.Element, *outcomes: str) -> bool:
    return any(part.tag in outcomes for part in test)


def _said(test: ElementTree.Element) -> str:
    why = next(part for part in test if part.tag in ("failure", "error")).get("message", "")
    return " ".join(f"{test.get('name')}: {why}".split())[:200]
