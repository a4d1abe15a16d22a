"""Writes the runs and the export that tests/test_old_runs.py resumes, exports and generates from.

    git worktree add OLD a9a4819
    PYTHONPATH=OLD:OLD/kernels python tests/old_runs/make.py tests/old_runs/a9a4819      # from a copy of this folder in OLD

Run once at commit a9a4819, and never again for that folder: it is what that commit wrote. A later format gets a folder of
its own.

data/    12 pictures of 64 px, prepared
tiny/    preset tiny at sizes of a test: one rank, stopped after update 4 of 6, in its second stage
small/   preset dev at sizes of a test: two ranks, stopped after update 2 of 4, in its first stage
export/  of tiny, without the weights of the VAE, which are megaflux/assets/tiny's
end.json losses of the last validation of each run when it was not stopped
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

VLM = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
}
FLUX = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
    "joint_attention_dim": 24,
}
COMMON = {
    "validation": {"every": 0, "panel_every": 0, "samples": 3, "panel_samples": 2, "steps": 2},
    "monitor": {"every": 1, "grad_norms_every": 0, "peak_tflops": 0.1},
}


def main(out: Path) -> None:
    make_data(out / "data")
    runs = {"tiny": (tiny(out / "data"), 1, 4), "small": (small(out / "data"), 2, 2)}
    ends = {}
    for name, (values, ranks, stop) in runs.items():
        config = out / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        whole = out / f"{name}-whole"
        train(config, ranks, "--run.dir", whole)
        ends[name] = [json.loads(line)["loss"] for line in (whole / "validation.jsonl").read_text().splitlines()]
        shutil.rmtree(whole)
        run = out / name
        train(config, ranks, "--run.dir", run, "--train.stop_after", stop)
        for path in (*(run / "checkpoints").glob("update-*"), run / "tensorboard", run / "samples"):
            if path.is_dir() and path.name != f"update-{stop:07d}":
                shutil.rmtree(path)
        (run / ".lock").unlink()
    (out / "end.json").write_text(json.dumps(ends, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "megaflux.export", str(out / "tiny"), str(out / "export")], check=True)
    (out / "export/vae/diffusion_pytorch_model.safetensors").unlink()


def tiny(data: Path) -> dict:
    """Values over the preset tiny."""
    return COMMON | {
        "preset": "tiny",
        "model": {"vlm": None, "flux_config": FLUX, "vlm_config": VLM},
        "data": {"path": str(data), "source": None, "longest_side": 64, "aspect_ratios": ["1:1", "2:1"], "cache": []},
        "stages": [
            {"name": "base", "share": 1.0, "blocks": "all", "components": "model"},
            {"name": "one", "share": 1.0, "blocks": [0, 2]},
        ],
        "train": {"updates": 6, "global_batch_size": 4, "checkpoint_every": 2},
    }


def small(data: Path) -> dict:
    """Values over the preset dev."""
    from megaflux.config.presets import tiny as preset

    model = preset()["model"]
    vlm = {part: model["vlm_config"][part] | VLM[part] for part in VLM}
    return COMMON | {
        "preset": "dev",
        "model": {
            "flux": None,
            "vlm": None,
            "vae": "tiny",
            "flux_config": model["flux_config"] | FLUX,
            "vlm_config": vlm,
            "clip_config": model["clip_config"],
            "latent_channels": model["latent_channels"],
            "vlm_max_tokens": 16,
        },
        "data": {"path": str(data), "longest_side": 64, "aspect_ratios": ["1:1", "2:1"], "num_workers": 0},
        "stages": [
            {"name": "stage1", "share": 1.0, "blocks": "all", "components": "model"},
            {"name": "stage2", "share": 1.0, "blocks": [0]},
        ],
        "train": {"updates": 4, "global_batch_size": 8, "micro_batch_size": 2, "checkpoint_every": 2},
        "optim": {"lr": 1e-3},
    }


def make_data(folder: Path) -> None:
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    source, rng = folder.with_name("pictures"), np.random.default_rng(0)
    source.mkdir(parents=True)
    for i in range(16):
        height = 64 if i % 2 else 32
        picture = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((64, height), Image.Resampling.BICUBIC).save(source / f"{i:03d}.png")
    options = Options(longest_side=64, aspect_ratios=("1:1", "2:1"), held_out=0.3, encoding="png")
    prepare(str(source), folder, options, workers=1, progress=False)
    shutil.rmtree(source)


def train(config: Path, ranks: int, *options: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    command = [
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(port),
        str(root / "launch/train.py"),
        "--config",
        str(config),
        *map(str, options),
    ]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
