"""A run -> a folder that diffusers, transformers and megaflux load: `python -m megaflux.export RUN OUT`.

The layout is described in megaflux/generation/layout.py. The folder is written under a temporary name and
renamed when it is whole; one that exists is never touched.

`text_encoder/` is Qwen2-VL in its published layout, with the trained last layer in its place and the
processor's files beside it. Where the run started from a published Qwen2-VL, its lm_head is copied along,
unchanged, though the layer below it has moved: text that this model writes is no longer Qwen's. Where there
is none (a model built from nothing, or one that ties it to the embeddings) none is written, and the folder
holds a Qwen2VLModel.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaflux.errors import UserError, exit_on_user_error
from megaflux.generation.layout import inventory as inventory  # of an export's files, for convert

if TYPE_CHECKING:
    from megaflux.runs import TrainedRun


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megaflux.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--update", type=int, metavar="N", help="the run's N-th update (default: the newest)")
    args = parser.parse_args(argv)
    if not Path(args.run).is_dir():
        raise UserError(f"{args.run}: no such folder; give a run")
    check_out(Path(args.out))
    from megaflux.runs import find

    # transformers' save_pretrained imports DeepSpeed, which would look for accelerators and say so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run = find(args.run, args.update)
    export(run, Path(args.out))
    print(f"{args.out}: update {run.manifest['update']} of {args.run}")
    return 0


def check_out(out: Path) -> None:
    """UserError where `out` exists or cannot be made."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; an export never overwrites, give another folder")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, {parent} is not a folder that can be written")


def export(run: TrainedRun, out: Path) -> None:
    """Write a run's models to the folder `out`. UserError where it exists or the disk fails."""
    from megaflux.generation.layout import Settings, write_indexes, write_parts
    from megaflux.models.pretrained import read_lm_head
    from megaflux.runs import attribution, load

    check_out(out)
    models = load(run)
    lm_head = read_lm_head(run.config.model.vlm) if run.config.model.vlm else None
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_parts(models, lm_head, partial)
        write_indexes(partial, Settings.of(run.config), run.source, attribution(run.config))
        check_out(out)  # rename() would replace an empty folder
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    exit_on_user_error(main)
