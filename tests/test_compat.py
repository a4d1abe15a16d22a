"""Modules that are put off until they are used: nothing is missing, and what does not use them starts without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import forked

NEEDED = """
import sys
import megaflux.data.verify, megaflux.data.prepare, megaflux.data.loader
modules = {name: sys.modules.get(name) for name in ("transformers", "diffusers", "torchvision", "scipy.stats")}
print([name for name, module in modules.items() if getattr(module, "__file__", None)])
"""
USED = """
import inspect, sys
from megaflux.common import compat
import streaming, torch
late = [name for name, module in sys.modules.items() if isinstance(module, compat.Late)]
inspect.getmodule(inspect.currentframe())  # which looks at every module
assert [name for name, module in sys.modules.items() if isinstance(module, compat.Late)] == late
assert {"streaming.text", "streaming.multimodal", "streaming.vision", "streaming.base.dataloader"} <= set(late)

assert issubclass(streaming.text.StreamingC4, streaming.StreamingDataset)
from streaming.vision import StreamingImageNet
import streaming.multimodal.webvid as webvid  # the module first, then its package
assert issubclass(streaming.multimodal.StreamingInsideWebVid, streaming.StreamingDataset)
assert streaming.multimodal.webvid is webvid
assert streaming.multimodal.StreamingInsideWebVid is webvid.StreamingInsideWebVid
assert not isinstance([], streaming.StreamingDataLoader)
class Own(streaming.StreamingDataLoader):
    pass
assert isinstance(Own([1]), torch.utils.data.DataLoader) and isinstance(Own([1]), streaming.StreamingDataLoader)
loader = streaming.StreamingDataLoader([1, 2, 3], batch_size=3)
assert isinstance(loader, torch.utils.data.DataLoader) and next(iter(loader)).tolist() == [1, 2, 3]
if "scipy.stats" in late:
    from scipy import integrate
    import scipy.stats
    assert scipy.stats.norm.cdf(0) == 0.5 and integrate.quad(lambda x: x, 0, 1)[0] == 0.5
    from scipy.optimize import linear_sum_assignment, minimize
    assert list(linear_sum_assignment([[1, 0], [0, 1]])[1]) == [1, 0]
    from scipy.stats import *
    assert beta.cdf(1, 2, 3) == 1
print("as they are")
"""


def test_data_commands_start_without_model_libraries():
    done = subprocess.run([sys.executable, "-c", NEEDED], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_late_modules_are_whole_when_they_are_used():
    done = forked.run(["-c", USED])
    assert done.stdout.endswith("as they are\n"), done.stderr


def test_the_placeholders_of_deepspeed_and_streaming_fit_the_pinned_versions():
    """Other versions import everything at once: slower, and for whoever raises the pin to look at."""
    from importlib.metadata import version

    from megaflux.common import compat

    assert (version("deepspeed"), version("mosaicml-streaming")) == (compat.DEEPSPEED, compat.STREAMING)


def test_a_late_module_has_no_attributes_of_its_own():
    from megaflux.common.compat import Late

    late = Late("a_module_that_is_not_there")
    with pytest.raises(ModuleNotFoundError):
        late.anything  # noqa: B018
    with pytest.raises(AttributeError):
        late.__wrapped__  # noqa: B018
