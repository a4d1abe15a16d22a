"""A step for tests of the runner: python first_step.py KIND OUT."""

import os
import signal
import sys
import time
from pathlib import Path

from megaflux.bench.first.facts import Facts, Recorder
from megaflux.bench.first.runner import SINCE

kind, out = sys.argv[1], Path(sys.argv[2])
facts = Facts(out / "facts.jsonl")
recorder = Recorder(facts, kind, True, int(os.environ[SINCE]))
mended = (out / "mended").exists()
for name in ("one", "two", "three"):
    if not recorder.missing(name):
        continue
    with recorder.measuring(name):
        if name == "two" and not mended:
            if kind == "fails":
                raise ValueError("this one is not to be had")
            if kind == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "breaks":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if kind == "hangs":
                time.sleep(600)
        recorder.add(name, 1.5, "ms")
if kind == "useless" and not mended:
    sys.exit("nothing here works")
