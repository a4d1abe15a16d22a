"""Records what megaflux computes, to the bit, and compares two recordings: for changes that must not change any result.

    python tests/golden.py record DIR [--old-run DIR/interrupted] [--only PART,...] [--runs NAME,...]
    python tests/golden.py compare DIR_A DIR_B

Only the command lines that people type are used, and the files that they write, never an import of megaflux: the same
script records before and after files have moved. It runs the code of the checkout that it lies in.

train     30 updates over all stages of the preset tiny, on one and two ranks, in fp32 and bf16, with caches and without:
          losses, validation, panels, caches, every tensor of every checkpoint, and of the export
infer     pixels of every mode of generation, from the run fp32-1 (which is made where it is not there)
dry_run   the dry run's JSON of the preset dev
prepare   every file of datasets made from a folder, from tars and from parquet
resume    runs stopped after 18 updates (DIR/interrupted, or those that --old-run names and older code wrote), copied and
          resumed to the end

DIR/golden.json holds a part's values as key -> text: hashes and numbers, floats by repr. Times, speeds and memory are left
out, and DIR in a text is written as DIR. Parts that --only leaves out stay as they were recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
Values = dict[str, str]
MIXED = ["--data.condition.image", "0.5", "--data.condition.image_text", "0.3", "--data.condition.text", "0.2"]
CACHED = ["--data.cache", "latents,trunk"]
# name -> (DeepSpeed's configuration, precision, ranks, options over the preset tiny and COMMON)
RUNS: dict[str, tuple[str, str, int, list[str]]] = {
    "fp32-1": ("zero2", "fp32", 1, [*MIXED, "--data.cache", "none", "--train.micro_batch_size", "2"]),
    "fp32-2": ("zero2", "fp32", 2, CACHED),
    "bf16-1": ("zero2", "bf16", 1, [*CACHED, "--train.drawn_per_rank", "4", "--train.micro_batch_size", "auto"]),
    "bf16-2": (
        "zero2",
        "bf16",
        2,
        [*MIXED, "--data.cache", "latents", "--data.num_workers", "1", "--train.micro_batch_size", "2"],
    ),
    "zero3-2": ("zero3", "bf16", 2, CACHED),
    "off-1": (
        "zero2",
        "fp32",
        1,
        [
            "--data.cache",
            "none",
            "--kernels",
            "off",
            "--data.sample_posterior",
            "true",
            "--model.activation_checkpointing",
            "full",
            "--flow.density",
            "logit_normal",
            "--flow.shift",
            "resolution",
        ],
    ),
}
COMMON = [
    "--preset",
    "tiny",
    "--model.vlm",
    "none",  # as it was before Qwen2-VL's weights were shipped
    "--data.source",
    "none",
    "--data.aspect_ratios",
    "1:1,2:1",
    "--train.updates",
    "30",
    "--train.global_batch_size",
    "8",
    "--train.checkpoint_every",
    "10",
    "--train.keep_checkpoints",
    "9",
    "--monitor.every",
    "1",
    "--monitor.grad_norms_every",
    "10",
    "--monitor.peak_tflops",
    "0.1",
    "--validation.every",
    "10",
    "--validation.samples",
    "4",
    "--validation.panel_samples",
    "2",
    "--validation.steps",
    "4",
]
STOP = 18
RESUMED = {"fp32-1": 1, "fp32-2": 2, "bf16-2": 1}  # name -> ranks that it goes on with
# {cat} and the like are files of write_inputs, {net} and the like folders of write_nets.
MODES: dict[str, str] = {
    "variation": "--reference {cat} --count 2 --seed 5",
    "export": "--checkpoint {export} --reference {cat} --count 2 --seed 5",
    "earlier": "--update 10 --reference {cat} --kernels off --aspect 2:1",
    "text": "--prompt 'a red fox' --guidance 2",
    "several": "--reference {cat}:0.7 {dog}:1.5 --prompt fox --variety 0.3 --reference-tokens 9 --count 3 --batch-size 2",
    "dots": "--reference {cat} {dog} --dot 0.5,0.5,0.6,3 --dot 2:0.1,0.1,0.9,0.5 --background 0.5 --preserve-mass "
    "--attention-map",
    "dots-file": "--reference {cat} --dots {dots} --downsample 2 --match-input-size",
    "img2img": "--image {room} --reference {cat} --strength 0.6 --shift 2",
    "inpaint": "--image {room} --mask {mask} --reference {cat} --save-control --dot 0.2,0.2,0.5,2",
    "inpaint-point": "--image {room} --mask-point 0.5,0.5 --mask-point 0.1,0.2,0 --sam-model {sam} --save-control",
    "depth": "--image {room} --reference {cat} --control depth:0.6 --controlnet {net} --depth-model {depth} --save-control",
    "line": "--image {room} --reference {cat} --control line:0.5 --controlnet {net} --line-model {line} --save-control",
    "controls": "--image {room} --control canny:0.4 --control-image depth={map}:0.2 --reference {cat} --controlnet {net} "
    "--control-start 0.2 --control-end 0.8 --save-control",
    "control-noise": "--reference {cat} --control-image depth={map} --controlnet {net}",
    "control-inpaint": "--image {room} --mask {mask} --control canny --controlnet {net}",
    "bfloat16": "--reference {cat} --prompt fox --dtype bfloat16 --aspect 16:9 --sizes release",
    "fp8": "--reference {cat} --quantize fp8",
}
DRY_RUNS: dict[str, str] = {
    "8": "--world-size 8",
    "1-h200": "--world-size 1 --gpu h200 --train.global_batch_size 8",
    "64-h100-cached": "--world-size 64 --gpu h100 --cache latents,trunk",
    "8-given": "--world-size 8 --gpu-memory 60 --mfu 0.3 --peak-tflops 500 --train.micro_batch_size 2 --cache latents",
    "16-zero3": "--world-size 16 --deepspeed ds_configs/zero3.json --model.activation_checkpointing full",
    "8-offload": "--world-size 8 --deepspeed ds_configs/zero2_offload.json --kernels off",
}


# --- commands ---


def run(command: list[str], stdin: str | None = None) -> str:
    """A command in the checkout's folder with this checkout's code, on one thread; its output. Leaves where it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRITON_INTERPRET")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=env, input=stdin, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"$ {' '.join(command)}\n{done.stdout[-4000:]}\nexit code {done.returncode}")
    return done.stdout


def module(name: str, *arguments: object, stdin: str | None = None) -> str:
    return run([sys.executable, "-m", name, *map(str, arguments)], stdin)


def train(out: Path, name: str, folder: Path, data: Path, ranks: int, *options: object) -> None:
    """Start a run of RUNS, or go on with it."""
    base, precision, _, _ = RUNS[name]
    values = json.loads((ROOT / "ds_configs" / f"{base}.json").read_text())
    if precision == "fp32":
        values["bf16"] = {"enabled": False}
    (out / f"{name}.json").write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(
        [
            "deepspeed",
            "--num_accelerators",
            str(ranks),
            "--master_port",
            str(port),
            "launch/train.py",
            "--deepspeed",
            str(out / f"{name}.json"),
            "--run.dir",
            str(folder),
            "--data.path",
            str(data),
            *map(str, options),
        ]
    )


def prepare(source: Path, out: Path, *options: object) -> None:
    module("megaflux.data.prepare", source, out, "--longest-side", 128, "--aspect-ratios", "1:1,2:1", *options)


# --- what is given to them ---


def write_pictures(folder: Path, count: int = 40) -> Path:
    """Smooth random pictures with captions, those with an even number half as high."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        picture.resize((128, 128 if i % 2 else 64), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder


def write_inputs(folder: Path) -> dict[str, Path]:
    """Pictures for generation, a mask and a file of dots."""
    pictures = write_pictures(folder / "pictures", 8)
    mask = Image.new("L", (128, 64))
    ImageDraw.Draw(mask).rectangle([32, 16, 95, 47], fill=255)
    mask.save(folder / "mask.png")
    dots = {"dots": [{"x": 0.3, "y": 0.4, "radius": 0.5, "weight": 2.5, "reference": 1}], "background": 0.7}
    (folder / "dots.json").write_text(json.dumps(dots))
    names = {"cat": 1, "room": 2, "dog": 3, "map": 4}
    return {"mask": folder / "mask.png", "dots": folder / "dots.json"} | {
        name: pictures / f"{i:03d}.png" for name, i in names.items()
    }


def write_nets(folder: Path, flux_config: dict[str, Any]) -> dict[str, Path]:
    """A ControlNet and the detectors with random weights, tiny where their classes allow it."""
    try:  # torchvision for CUDA beside a torch for CPUs does not load, but for these two names
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
    warnings.simplefilter("ignore")
    from controlnet_aux.teed.ted import TED
    from diffusers import FluxControlNetModel
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
        Sam2Config,
        Sam2ImageProcessorFast,
        Sam2Model,
        Sam2Processor,
    )

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    depth = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            neck_hidden_sizes=[4, 4, 8, 8],
            fusion_hidden_size=8,
            head_hidden_size=4,
        )
    )
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "global_attention_blocks": [3],
        "num_attention_heads_per_stage": [1, 1, 2, 4],
        "window_size_per_stage": [8, 4, 4, 2],
        "window_positional_embedding_background_size": [4, 4],
    }
    sam = Sam2Model(
        Sam2Config(
            vision_config={
                "backbone_config": hiera,
                "backbone_channel_list": [64, 32, 16, 8],
                "fpn_hidden_size": 32,
                "model_type": "sam2_vision_model",
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": 64, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        )
    )
    net, line = FluxControlNetModel(**flux_config, num_mode=10), TED()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model, scale in ((net, 0.3), (depth, 0.2), (sam, 0.3), (line, 0.2)):
            for parameter in model.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        depth.head.conv3.weight.abs_()  # the ReLU behind would leave nothing of a negative depth
        depth.head.conv3.bias.fill_(1.0)
    paths = {name: folder / name for name in ("net", "depth", "sam", "line")}
    for name, model in (("net", net), ("depth", depth), ("sam", sam)):
        model.save_pretrained(paths[name])
    size = {"height": 56, "width": 56}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(paths["depth"])
    size = {"height": 64, "width": 64}
    Sam2Processor(Sam2ImageProcessorFast(size=size, mask_size={"height": 16, "width": 16})).save_pretrained(
        paths["sam"]
    )
    paths["line"].mkdir()
    torch.save(line.state_dict(), paths["line"] / "MTEED.pth")
    return paths


LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


# --- what came out ---


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every number, text and tensor in nested data, as (key, text)."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield key, f"{value.dtype} {list(value.shape)} {digest(raw)}"
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in CHECKOUT_OWN:
                yield from leaves(item, f"{key}/{name}")
    elif isinstance(value, list | tuple) and (len(value) <= 32 or isinstance(value[0], dict)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{key}/{i}")
    else:
        text = repr(value)
        yield key, text if len(text) <= 200 else digest(text.encode())


def in_dir(text: str) -> str:
    """A text with DIR in the place of the folders of recordings that it names."""
    for folder in sorted(CALLED_DIR, key=len, reverse=True):
        text = text.replace(folder, "DIR")
    return text


def file_values(path: Path) -> Iterator[tuple[str, str]]:
    """What a file holds: tensors, pixels, the values of JSON and YAML, or its bytes."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                yield from leaves(file.get_tensor(name), f"/{name}")
    elif path.suffix == ".pt":
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # DeepSpeed's own classes are in it
            content = torch.load(path, map_location="cpu", weights_only=False)
        yield from leaves(content)
    elif path.suffix == ".png":
        picture = Image.open(path)
        yield "", f"{picture.mode} {picture.size} {digest(picture.tobytes())}"
    elif path.suffix in (".json", ".jsonl", ".yaml") and path.name not in ("tokenizer.json", "vocab.json"):
        text = in_dir(path.read_text())
        if path.suffix == ".yaml":
            yield from leaves(yaml.safe_load(text))
        else:
            for i, line in enumerate([text] if path.suffix == ".json" else text.splitlines()):
                yield from leaves(json.loads(line), "" if path.suffix == ".json" else f"/{i}")
    else:
        yield "", digest(path.read_bytes())


CALLED_DIR: set[str] = set()
# The folder that the tiny VAE was read from, and the entry of the file that names it: they tell where the checkout lies.
CHECKOUT_OWN = ("_name_or_path", "vae/config.json")
LEFT_OUT = re.compile(r"\.verified.*|\.lock|.*tfevents.*|events\.jsonl|manifest\.json|memory\.json")


def folder_values(folder: Path) -> Values:
    """What all files in a folder hold, key -> text."""
    values: Values = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not LEFT_OUT.fullmatch(path.name):
            name = str(path.relative_to(folder))
            values |= {name + key: text for key, text in file_values(path)}
    return values


def run_values(folder: Path) -> Values:
    """What a run has written: every file, the curves, what happened, and what each checkpoint says of itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = folder_values(folder)
    curves = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    for tag in curves.Tags()["scalars"]:
        if not tag.startswith(("speed/", "memory/")):
            values |= {f"{tag}@{point.step}": repr(point.value) for point in curves.Scalars(tag)}
    events = [json.loads(in_dir(line)) for line in (folder / "events.jsonl").read_text().splitlines()]
    # Another program's leftovers in /dev/shm are this machine's.
    for i, event in enumerate(event for event in events if event.get("what") != "stale_shared_memory"):
        kept = {k: v for k, v in event.items() if k not in ("time", "pid", "host", "seconds", "data_wait")}
        values[f"events.jsonl/{i}"] = json.dumps(kept, sort_keys=True)
    for path in sorted(folder.glob("checkpoints/*/manifest.json")):
        content = json.loads(in_dir(path.read_text()))
        for name in ("files", "seal", "started_with"):  # sizes and hashes of pickles
            content.pop(name, None)
        values |= {f"{path.relative_to(folder)}{key}": text for key, text in leaves(content)}
    return values


def prefixed(prefix: str, values: Values) -> Values:
    return {f"{prefix}/{key}": text for key, text in values.items()}


# --- the parts ---


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def make_run(out: Path, name: str) -> Path:
    """A run of RUNS from the start to its end, with its own copy of the data, and its export."""
    folder = fresh(out / "runs" / name)
    prepare(write_pictures(folder / "pictures"), folder / "data", "--held-out", 0.2, "--format", "png", "--workers", 1)
    train(out, name, folder / "run", folder / "data", RUNS[name][2], *COMMON, *RUNS[name][3])
    module("megaflux.export", folder / "run", folder / "export")
    return folder


def record_train(out: Path, args: argparse.Namespace) -> Values:
    values: Values = {}
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda name: make_run(out, name), args.runs))
    for name, folder in zip(args.runs, folders, strict=True):
        values |= prefixed(name, run_values(folder / "run"))
        values |= prefixed(f"{name}/export", folder_values(folder / "export"))
        values |= prefixed(f"{name}/data", folder_values(folder / "data"))
    return values


def record_infer(out: Path, args: argparse.Namespace) -> Values:
    made = out / "runs" / "fp32-1"
    if not (made / "export").is_dir():
        make_run(out, "fp32-1")
    folder = fresh(out / "infer")
    config = yaml.safe_load((made / "run" / "config.yaml").read_text())["model"]["flux_config"]
    paths = write_inputs(folder) | write_nets(folder / "nets", config) | {"export": made / "export"}

    def generate(mode: str) -> None:
        words = [word.format(**paths) for word in shlex.split(MODES[mode])]
        source = [] if "--checkpoint" in words else ["--checkpoint", made / "run"]
        count = [] if "--count" in words else ["--count", 1]
        module("megaflux.infer", *source, *words, *count, "--steps", 4, "--out", folder / mode)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generate, MODES))
    module("megaflux.infer", "--from-image", folder / "dots" / "001-seed0.png", "--out", folder / "replay")
    lines = f"{paths['cat']}\n{paths['cat']} {paths['dog']}:0.5 a red fox --count 2 --seed 3\na blue fox\nquit\n"
    module(
        "megaflux.infer",
        "--checkpoint",
        made / "run",
        "--interactive",
        "--steps",
        2,
        "--count",
        1,
        "--out",
        folder / "lines",
        stdin=lines,
    )
    values: Values = {}
    for mode in [*MODES, "replay", "lines"]:
        values |= prefixed(mode, folder_values(folder / mode))
    return values


def record_dry_run(out: Path, args: argparse.Namespace) -> Values:
    folder = fresh(out / "dry_run")
    # A folder that says it holds what dev trains on, so that the plan is whole and no problem is found.
    pictures = write_pictures(folder / "pictures", 2)
    module("megaflux.data.prepare", pictures, folder / "data", "--allow-upscale", "--held-out", 0, "--workers", 1)

    def plan(name: str) -> Values:
        options = DRY_RUNS[name].split()
        try:
            run(
                [
                    sys.executable,
                    "launch/train.py",
                    "--preset",
                    "dev",
                    "--dry-run",
                    *options,
                    "--data.path",
                    str(folder / "data"),
                    "--run.dir",
                    str(folder / "run"),
                    "--json",
                    str(folder / f"{name}.json"),
                ]
            )
        except SystemExit:  # a problem was found, and is in the JSON
            if not (folder / f"{name}.json").is_file():
                raise
        return {name + key: text for key, text in file_values(folder / f"{name}.json")}

    with ThreadPoolExecutor(2) as pool:
        return {key: text for values in pool.map(plan, DRY_RUNS) for key, text in values.items()}


def record_prepare(out: Path, args: argparse.Namespace) -> Values:
    import pyarrow
    from pyarrow import parquet

    folder = fresh(out / "prepare")
    pictures = write_pictures(folder / "images")
    (pictures / "bad.png").write_bytes(b"no picture")
    turned = Image.open(pictures / "001.png").rotate(20)
    exif = turned.getexif()
    exif[274] = 6  # lies on its side
    turned.save(pictures / "turned.jpg", exif=exif)
    turned.convert("CMYK").save(pictures / "cmyk.jpg")
    turned.convert("RGBA").save(pictures / "alpha.webp", lossless=True)
    files = sorted(pictures.iterdir())
    (folder / "tars").mkdir()
    for part in range(2):
        with tarfile.open(folder / "tars" / f"{part:05d}.tar", "w") as archive:
            for file in files[: len(files) // 2] if part == 0 else files[len(files) // 2 :]:
                info = tarfile.TarInfo(file.name)
                info.size = file.stat().st_size
                archive.addfile(info, io.BytesIO(file.read_bytes()))
    images = [file for file in files if file.suffix != ".txt"]
    captions = [f.with_suffix(".txt").read_text() if f.with_suffix(".txt").is_file() else None for f in images]
    table = {"key": [f.name for f in images], "image": [f.read_bytes() for f in images], "caption": captions}
    (folder / "parquet").mkdir()
    parquet.write_table(pyarrow.table(table), folder / "parquet" / "a.parquet")
    values: Values = {}
    for name, options in {
        "images": ["--format", "png", "--chunk", 16, "--workers", 2],
        "tars": ["--workers", 1],
        "parquet": ["--format", "webp", "--quality", 80, "--shard-size", 70000, "--workers", 2],
    }.items():
        data = folder / f"{name}-data"
        prepare(folder / name, data, "--held-out", 0.2, "--max-bad", 3, *options)
        values |= prefixed(
            name, {str(f.relative_to(data)): digest(f.read_bytes()) for f in sorted(data.rglob("*")) if f.is_file()}
        )
    return values


def record_resume(out: Path, args: argparse.Namespace) -> Values:
    old, folder, values = args.old_run, fresh(out / "resumed"), Values()
    if old is None:
        old = fresh(out / "interrupted")
        prepare(write_pictures(old / "pictures"), old / "data", "--held-out", 0.2, "--format", "png", "--workers", 1)
        for name in RESUMED:  # one after the other, as they put their caches into the same data
            options = [*COMMON, *RUNS[name][3], "--train.stop_after", STOP]
            train(out, name, old / name, old / "data", RUNS[name][2], *options)

    def resume(name: str) -> None:
        data = shutil.copytree(old / "data", folder / f"{name}-data")
        copy = shutil.copytree(old / name, folder / name)
        train(out, name, copy, data, RESUMED[name])  # everything else is as the run was begun

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(resume, RESUMED))
    for name in RESUMED:
        values |= prefixed(name, run_values(folder / name))
    return values


PARTS: dict[str, Callable[[Path, argparse.Namespace], Values]] = {
    "train": record_train,
    "infer": record_infer,
    "dry_run": record_dry_run,
    "prepare": record_prepare,
    "resume": record_resume,
}


def record(args: argparse.Namespace) -> int:
    out = args.dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.old_run:
        args.old_run = args.old_run.resolve()
    CALLED_DIR.update({str(out)} | ({str(args.old_run.parent)} if args.old_run else set()))
    file = out / "golden.json"
    for part in args.only:
        started = time.monotonic()
        values = PARTS[part](out, args)
        golden = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(golden | {part: values}, indent=0, sort_keys=True) + "\n")
        print(f"{part}: {len(values)} values in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def compare(args: argparse.Namespace) -> int:
    before, after = (json.loads((folder / "golden.json").read_text()) for folder in (args.dir_a, args.dir_b))
    code = 0
    for part in sorted(before.keys() | after.keys()):
        if part not in before or part not in after:
            print(f"{part}: only in {args.dir_a if part in before else args.dir_b}")
            code = 1
            continue
        a, b = before[part], after[part]
        differing = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        for key in differing:
            print(f"{part}: {key}: {a.get(key, 'missing')} | {b.get(key, 'missing')}")
        many = len(a.keys() | b.keys())
        print(f"{part}: {len(differing)} of {many} values differ" if differing else f"{part}: same ({many} values)")
        code |= bool(differing)
    return code


def main() -> int:
    def some_of(known: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(known):
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: known: {', '.join(known)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record", help="run everything and write DIR/golden.json")
    one.add_argument("dir", type=Path)
    one.add_argument("--old-run", type=Path, help="another recording's DIR/interrupted, resumed here")
    one.add_argument("--only", type=some_of(PARTS), default=list(PARTS), help=f"of {','.join(PARTS)}")
    one.add_argument("--runs", type=some_of(RUNS), default=list(RUNS), help=f"for train, of {','.join(RUNS)}")
    one.set_defaults(call=record)
    two = commands.add_parser("compare", help="print what differs; exit code 1 where anything does")
    two.add_argument("dir_a", type=Path)
    two.add_argument("dir_b", type=Path)
    two.set_defaults(call=compare)
    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    sys.exit(main())
