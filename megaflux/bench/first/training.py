"""One process of the training loop with random models, watched: seconds of an update's eight steps, memory, a save.

    python -m megaflux.bench.first.training CONFIG.yaml [--seen FILE.json]

The loop is that of training/loop.py. To time a step, its functions are wrapped, and each waits for the GPU before and
after, so that a step is charged for what it launched; an update takes longer for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megaflux.bench.random_models import random_models
from megaflux.common.paths import path_option
from megaflux.config.parse import build_config, load_yaml
from megaflux.data.batches import Batch
from megaflux.training import loop, objective, session, upkeep
from megaflux.training.checkpoint import manifest
from megaflux.training.ds_config import load_ds_config, with_defaults
from megaflux.training.engine import StageEngine
from megaflux.training.monitor import Monitor
from megaflux.training.survival.watch import Watch

DS_CONFIG = Path(__file__).parents[3] / "ds_configs" / "zero2.json"
STEPS = (
    "1 batch",
    "2 latents",
    "3 condition",
    "4 time and noise",
    "5 forward",
    "6 backward",
    "7 optimizer",
    "8 monitor",
)
ALL = "all of it, by the clock"


class Seen:
    """What is recorded while the loop runs."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        """Seconds of the steps of each update."""
        self.saves: list[dict[str, float]] = []
        """Seconds of the parts of each save, and "gb"."""
        self.memory: list[tuple[str, float]] = []
        """(when, allocated GB), in order."""
        self.began: float | None = None
        """Of the update under way, when its first batch was asked for."""
        self._update: dict[str, float] = defaultdict(float)
        self._save: dict[str, float] = defaultdict(float)

    def as_json(self) -> dict[str, Any]:
        return {"updates": self.updates, "saves": self.saves, "memory": self.memory}


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Record in `seen` what the loop does inside."""
    with _Wrapped() as wrap:
        timed = functools.partial(_timed, seen._update)
        wrap(loop, "pieces", lambda pieces: lambda *given: _timed_iterator(pieces(*given), seen))
        wrap(Batch, "to", timed("1 batch"))
        wrap(objective, "encode_latents", timed("2 latents"))
        wrap(objective, "encode_condition", timed("3 condition"))
        wrap(objective, "draw_time_and_noise", timed("4 time and noise"))
        # validation calls it as well, with a module instead of an engine
        wrap(objective, "denoising_loss", timed("5 forward", only=lambda given: isinstance(given[0], StageEngine)))
        wrap(StageEngine, "backward", timed("6 backward"))
        wrap(StageEngine, "step", timed("7 optimizer"))
        wrap(Monitor, "update", lambda update: _then(timed("8 monitor")(update), lambda _: _close_update(seen)))

        wrap(manifest, "sync", _timed(seen._save, "sync"))
        wrap(manifest, "inventory", _timed(seen._save, "hash"))
        wrap(
            upkeep,
            "write_checkpoint",
            lambda save: _then(_timed(seen._save, "save")(save), lambda path: _close_save(seen, path)),
        )

        def around(name: str) -> Callable[[Callable], Callable]:
            def wrapper(method: Callable) -> Callable:
                @functools.wraps(method)
                def run(*args: Any, **kwargs: Any) -> Any:
                    _note_memory(seen, f"before {name}")
                    result = method(*args, **kwargs)
                    _note_memory(seen, f"after {name}")
                    return result

                return run

            return wrapper

        wrap(StageEngine, "__init__", around("an engine is built"))
        wrap(StageEngine, "close", around("it is closed"))
        yield


def _timed(seconds: dict[str, float], step: str, only: Callable[[tuple], bool] | None = None) -> Callable:
    def wrapper(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if only is not None and not only(args):
                return function(*args, **kwargs)
            _wait()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            _wait()
            seconds[step] += time.perf_counter() - started
            return result

        return run

    return wrapper


def _timed_iterator(items: Iterator[Any], seen: Seen) -> Iterator[Any]:
    while True:
        started = time.perf_counter()
        if seen.began is None:  # an update begins: what was recorded since the last one is validation's
            seen._update.clear()
            seen.began = started
        try:
            item = next(items)
        except StopIteration:
            return
        seen._update[STEPS[0]] += time.perf_counter() - started
        yield item


def _then(function: Callable, after: Callable[[Any], None]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        after(result)
        return result

    return run


def _close_update(seen: Seen) -> None:
    began = time.perf_counter() if seen.began is None else seen.began
    seen.updates.append(dict(seen._update) | {ALL: time.perf_counter() - began})
    seen._update.clear()
    seen.began = None


def _close_save(seen: Seen, path: Path) -> None:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    seen.saves.append(dict(seen._save) | {"gb": size / 1e9})
    seen._save.clear()


def _note_memory(seen: Seen, when: str) -> None:
    if torch.cuda.is_available():
        seen.memory.append((when, torch.cuda.memory_allocated() / 1e9))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _Wrapped:
    """Replaces attributes; restores them at the end."""

    def __enter__(self) -> Callable[[Any, str, Callable], None]:
        self._before: list[tuple[Any, str, Any]] = []
        return self._wrap

    def _wrap(self, owner: Any, name: str, wrapper: Callable) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrapper(getattr(owner, name)))

    def __exit__(self, *_: object) -> None:
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=path_option)
    parser.add_argument(
        "--seen", type=path_option, metavar="FILE.json", help="watch the loop, and write what was seen there"
    )
    args = parser.parse_args()
    config = build_config(load_yaml(args.config, "--config"))
    ds_config = with_defaults(load_ds_config(DS_CONFIG), None)
    watch = Watch(config.train.hang_timeout, config.train.leave_within)
    if args.seen is None:
        return session.train(config, ds_config, watch, load=random_models)
    seen = Seen()
    with watched(seen):
        code = session.train(config, ds_config, watch, load=random_models)
    Path(args.seen).write_text(json.dumps(seen.as_json()))
    return code


if __name__ == "__main__":
    sys.exit(main())
