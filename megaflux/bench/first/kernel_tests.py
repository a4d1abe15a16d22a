"""Step tests: the kernels' test suite, and the tests marked gpu, in parallel processes; a failure ends none of the others."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting

ROOT = Path(__file__).parents[3]
SUITES = {
    "kernels": [
        "tests/kernels",
        "tests/models/test_flux.py",
        "--ignore",
        "tests/kernels/test_aot.py",
        "-m",
        "not slow",
    ],
    "training": ["tests/training/test_gpu.py", "tests/training/test_waits.py", "-m", "gpu"],
}
NAMED = 5  # failed tests whose names are kept
PROCESSES = 8


def run(recorder: Recorder, setting: Setting) -> None:
    for suite, arguments in SUITES.items():
        if suite == "training" and not (find_spec("deepspeed") and find_spec("streaming")):
            continue
        facts = [f"{suite}: passed", f"{suite}: failed"]
        if not recorder.missing(*facts):
            continue
        with recorder.measuring(*facts), tempfile.TemporaryDirectory() as folder:
            junit = Path(folder) / "junit.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                *arguments,
                "-q",
                "-p",
                "no:cacheprovider",
                "--junitxml",
                str(junit),
            ]
            if find_spec("xdist") and suite == "kernels":
                command += ["-n", str(PROCESSES)]
            subprocess.run(command, cwd=ROOT, check=False)
            if not junit.is_file():
                raise RuntimeError("pytest wrote no results; see the log")
            cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
            failed = [case for case in cases if any(part.tag in ("failure", "error") for part in case)]
            skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
            recorder.add(facts[0], len(cases) - len(failed) - skipped)
            recorder.add(facts[1], len(failed), predicted=0)
            for number, case in enumerate(failed[:NAMED], start=1):
                why = next(part for part in case if part.tag in ("failure", "error")).get("message", "")
                recorder.add(f"{suite}: failed {number}", " ".join(f"{case.get('name')}: {why}".split())[:200])
