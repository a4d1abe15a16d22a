"""A run -> a folder that diffusers, transformers and megaflux load: `python -m megaflux.export RUN OUT`.

The layout is described in megaflux/generation/layout.py. The folder is written under a temporary name and
renamed when it is complete; an existing folder is never changed.

`text_encoder/` is Qwen2-VL in its published layout, with the trained last layer and the processor's files. If
the run started from a published Qwen2-VL, its lm_head is copied unchanged; as the layer below it was trained,
text that this model generates is no longer Qwen's. A model without lm_head (one with random initial weights, or
one that ties it to the embeddings) is written as a Qwen2VLModel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megaflux.common.command import EMA_HELP, Parser, add_folder_options
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.generation.layout import check_new_folder, whole_folder

if TYPE_CHECKING:  # torch takes seconds to import: --help and bad input do not wait for it
    from megaflux.runs import TrainedRun


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m megaflux.export", description=__doc__.splitlines()[0], allow_abbrev=True)
    parser.add_argument("run", type=path_option, metavar="RUN", help="the run's folder")
    parser.add_argument("out", type=path_option, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--update", type=int, metavar="N", help="the run's N-th update (default: the newest)")
    parser.add_argument("--ema", action="store_true", help=EMA_HELP)
    add_folder_options(parser.add_argument)
    args = parser.parse_args(argv)
    if not os.path.isdir(args.run):
        raise UserError(f"{args.run}: no such folder; give a run")
    check_new_folder(Path(args.out))
    from megaflux.runs import Folders, find

    # transformers' save_pretrained imports DeepSpeed, which would look for accelerators and log that.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run = find(args.run, args.update, Folders(args.flux, args.vlm, args.vae), args.ema)
    export(run, Path(args.out))
    print(f"{args.out}: update {run.manifest['update']} of {args.run}{', averaged weights' * args.ema}")
    return 0


def export(run: TrainedRun, out: Path) -> None:
    """Write a run's models to the new folder `out`. UserError where it exists or cannot be written."""
    from megaflux.common.paths import SHIPPED
    from megaflux.generation.layout import Settings, write_indexes, write_parts
    from megaflux.models.pretrained import read_lm_head
    from megaflux.runs import attribution, load

    check_new_folder(out)
    models = load(run)
    vlm = run.config.model.vlm
    lm_head = read_lm_head(vlm) if vlm not in (None, SHIPPED) else None
    with whole_folder(out) as partial:
        write_parts(models, lm_head, partial)
        write_indexes(partial, Settings.of(run.config), run.source, attribution(run.config))


if __name__ == "__main__":
    exit_on_user_error(main)
