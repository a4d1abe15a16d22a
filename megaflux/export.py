"""A run -> a folder that diffusers, transformers and megaflux load: `python -m megaflux.export RUN OUT`.

The layout is described in megaflux/generation/pipeline.py. The folder is written under a temporary name and
renamed when it is whole; one that exists is never touched.

`text_encoder/` is Qwen2-VL in its published layout, with the trained last layer in its place and the
processor's files beside it. Where the run started from a published Qwen2-VL, its lm_head is copied along,
unchanged, though the layer below it has moved: text that this model writes is no longer Qwen's. Where there
is none (a model built from nothing, or one that ties it to the embeddings) none is written, and the folder
holds a Qwen2VLModel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaflux.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from torch import Tensor

    from megaflux.models.pretrained import Models
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
    from megaflux.models.pretrained import read_lm_head
    from megaflux.runs import load

    check_out(out)
    models = load(run)
    lm_head = read_lm_head(run.config.model.vlm) if run.config.model.vlm else None
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_parts(models, lm_head, partial)
        write_indexes(run, partial)
        check_out(out)  # rename() would replace an empty folder
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parts(models: Models, lm_head: Tensor | None, folder: Path) -> None:
    """All weights and their config.json. Uses up the models: trunk and last layer are joined in place."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import Qwen2VLForConditionalGeneration

    from megaflux.generation.pipeline import CONNECTOR, POOLED
    from megaflux.models.vlm import join_vlm

    trainable = models.trainable
    trainable.transformer.save_pretrained(folder / "transformer")
    models.vae.save_pretrained(folder / "vae")
    models.scheduler.save_pretrained(folder / "scheduler")

    text_encoder = join_vlm(models.trunk.vlm, trainable.vlm)
    if lm_head is not None:
        with torch.device("meta"):
            whole = Qwen2VLForConditionalGeneration(text_encoder.config)
        whole.model = text_encoder
        whole.lm_head.weight = nn.Parameter(lm_head.to(text_encoder.dtype))
        text_encoder = whole
    text_encoder.save_pretrained(folder / "text_encoder")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    # transformers 4 puts Qwen2-VL's class name into text_config only; loaders look for it at the top.
    _write_json(folder / "text_encoder/config.json", {"architectures": [type(text_encoder).__name__], **config})
    models.trunk.processor.save_pretrained(folder / "text_encoder")

    connector = trainable.connector
    (folder / CONNECTOR).parent.mkdir()
    save_file({name: p.detach().contiguous() for name, p in connector.named_parameters()}, folder / CONNECTOR)
    _write_json(folder / "connector/config.json", {
        "_class_name": "Linear", "in_features": connector.in_features, "out_features": connector.out_features,
    })  # fmt: skip
    save_file({"pooled_prompt_embeds": models.pooled_projections.contiguous()}, folder / POOLED)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)  # safetensors makes its files readable by their owner only


def write_indexes(run: TrainedRun, folder: Path) -> None:
    """model_index.json and, last, megaflux.json."""
    import diffusers

    from megaflux.generation.pipeline import FORMAT, MANIFEST, Settings
    from megaflux.runs import attribution, versions

    architecture = json.loads((folder / "text_encoder/config.json").read_text())["architectures"][0]
    _write_json(folder / "model_index.json", {
        "_class_name": "Qwen2VLFluxPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", architecture],
    })  # fmt: skip
    _write_json(folder / MANIFEST, {
        "format": FORMAT,
        "settings": Settings.of(run.config).model_dump(mode="json"),
        "source": run.source,
        "attribution": attribution(run.config),
        "versions": versions(),
        "files": inventory(folder),
    })  # fmt: skip


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """{"vae/config.json": {"bytes", "sha256"}, ...} of all files in a folder."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
