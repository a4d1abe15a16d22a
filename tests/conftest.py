"""A run folder without a training run: tiny models, random weights in the place of trained ones."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning from processes that fork
torch.set_num_threads(1)  # the tests run side by side
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started by a script's &; what the tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():  # kernels run in Triton's interpreter, chosen before anything imports them
    os.environ["TRITON_INTERPRET"] = "1"


def small_values() -> dict:
    """The tiny preset, smaller still: 1 + 1 blocks of width 32, 64 px, two Qwen layers; one stage of all of
    FLUX."""
    from megaflux.config.presets import tiny

    values = copy.deepcopy(tiny())
    model = values["model"]
    model["vlm"] = None  # the shipped one has the preset's sizes
    model["flux_config"] |= {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 24,
    }
    model["vlm_config"]["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    model["vlm_config"]["vision_config"] |= {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    values["data"] |= {"longest_side": 64, "aspect_ratios": ["16:9", "1:1", "1:2"], "cache": []}
    values["stages"] = [
        {"name": "base", "share": 0.5, "blocks": "all", "components": "model"},
        {"name": "stage1", "share": 0.5, "blocks": [1]},
    ]
    values["train"] |= {"updates": 8, "global_batch_size": 2, "micro_batch_size": 2}
    return values


def write_run(root: Path, values: dict, updates: tuple[int, ...] = (4, 8), dtype=torch.float32) -> Path:
    """A run folder as training leaves it, but for DeepSpeed's shards: config.yaml, and checkpoints whose
    trained weights are seeded noise around the initial ones (the update is the seed)."""
    from megaflux.config.parse import build_config
    from megaflux.models.pretrained import load_models
    from megaflux.training.checkpoint import manifest
    from megaflux.training.checkpoint import weights as trained
    from megaflux.training.checkpoint.identity import identity

    config = build_config(values | {"run": {"dir": str(root), "seed": 3}})
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(config.to_yaml())
    models = load_models(config)
    for update in updates:
        stage = next(i for i, end in enumerate(config.stage_ends()) if update <= end)
        generator = torch.Generator().manual_seed(update)
        names = trained.trained_names(config, models.trainable, stage)
        weights = {
            name: (p.detach() + 0.05 * torch.randn(p.shape, generator=generator)).to(dtype)
            for name, p in models.trainable.named_parameters()
            if name in names
        }
        folder = manifest.folder(root) / f"update-{update:07d}"
        folder.mkdir(parents=True)
        save_file(weights, folder / trained.file_name(0, 1))
        content = {
            "format": manifest.FORMAT,
            "update": update,
            "stage": stage,
            "stage_name": config.stages[stage].name,
            "world_size": 1,
            "data": {},
            "identity": identity(config),
            "files": manifest.inventory(folder),
            **models.origin,
            "deepspeed": {"zero_stage": 2, "bf16": True},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest.sealed(content)))
    return root


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture, so that resizing means something."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def published(tmp_path_factory, small_config) -> dict[str, Path]:
    """Tiny FLUX.1 and Qwen2-VL folders in their published layouts, by the libraries' own save_pretrained.
    Read only.

    Every weight is random, proj_out too; the Qwen2-VL holds an lm_head.
    """
    from transformers import Qwen2VLForConditionalGeneration

    from megaflux.models import pretrained, scratch

    root = tmp_path_factory.mktemp("published")
    flux, qwen, model = root / "flux", root / "qwen", small_config.model
    transformer = scratch.build_transformer(model.flux_config, 5)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in transformer.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    transformer.save_pretrained(flux / "transformer")
    pretrained.load_vae("tiny", None).save_pretrained(flux / "vae")
    pretrained.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(flux / "scheduler")
    clip, clip_tokenizer = scratch.build_clip(model.clip_config, 5)
    clip.save_pretrained(flux / "text_encoder")
    clip_tokenizer.save_pretrained(flux / "tokenizer")
    processor = scratch.tiny_processor()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = scratch.vlm_configuration(model.vlm_config, processor.tokenizer)
        config.tie_word_embeddings = False  # as the 7B has it
        Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(qwen)
    processor.save_pretrained(qwen)
    return {"flux": flux, "qwen": qwen}


@pytest.fixture(scope="session")
def dev_meta():
    """(Qwen2VLFlux, trunk) of the preset dev on the meta device."""
    from megaflux.config.parse import build_config
    from megaflux.config.presets import dev
    from megaflux.models.pretrained import meta_models

    return meta_models(build_config(dev()))


@pytest.fixture(scope="session")
def small_config():
    from megaflux.config.parse import build_config

    return build_config(small_values())


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run of 8 updates with two checkpoints. Read only: copy it to break it."""
    return write_run(tmp_path_factory.mktemp("runs") / "small", small_values())


@pytest.fixture(scope="session")
def export_folder(run_folder, tmp_path_factory) -> Path:
    """The export of `run_folder`. Read only."""
    from megaflux.export import export
    from megaflux.runs import find

    out = tmp_path_factory.mktemp("exports") / "small"
    export(find(run_folder), out)
    return out
