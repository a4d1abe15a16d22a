"""The weights of what a run begins from: of an export or of a run's checkpoint, by one set of names, and whether they belong to the
new run's base weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED
from megaflux.config.schema import Config
from megaflux.generation import layout
from megaflux.models import pretrained, reading
from megaflux.models.connector import build_connector
from megaflux.models.loading_errors import named
from megaflux.models.parameters import (
    LAYERS,
    base_fingerprints,
    beginnings,
    decoder_layers,
    fingerprint,
    weights_fingerprint,
)
from megaflux.models.pretrained import Models
from megaflux.models.sources import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
from megaflux.models.strict import read_tensors
from megaflux.models.vlm_folder import read_config
from megaflux.training.checkpoint import init_folder, saved, weights
from megaflux.training.checkpoint.init_folder import Source

if TYPE_CHECKING:
    from transformers import Qwen2VLModel

    from megaflux.models.qwen2vl_flux import Qwen2VLFlux

QWEN_FIELDS = ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling")
"""Of Qwen2-VL's configuration: what changes its output and is not seen in the shapes of its weights."""


@dataclass
class Values:
    """Where the tensors of a source are, by the names of `beginnings` (models/parameters.py)."""

    stored: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Name -> file and key."""
    drawn: dict[str, Tensor] = field(default_factory=dict)
    """Those in no file."""

    def add(self, files: list[Path], rename: Callable[[str], str | None], wanted: Mapping[str, nn.Parameter]) -> None:
        """Take the tensors of safetensors files; rename: key -> name, None: not one of them. UserError naming the file and the
        key for a tensor that the run has not, or has in another shape."""
        for file in files:
            with named(str(file)):
                shapes = reading.shapes(file)
            for key, shape in shapes.items():
                name = rename(key)
                if name is None:
                    continue
                if name not in wanted:
                    raise UserError(
                        f"model.init: {file}: unexpected key {key}; it belongs to other models than model.* names"
                    )
                if shape != tuple(wanted[name].shape):
                    raise UserError(
                        f"model.init: {file}: wrong shape {key}: {list(shape)}, the run's models have "
                        f"{list(wanted[name].shape)}; give the sizes that it was trained with"
                    )
                self.stored[name] = file, key

    def each(self, only: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all, or of these, file by file and always in the same order."""
        names = {at: name for name, at in self.stored.items() if only is None or name in only}
        for file in sorted({file for file, _ in names}):
            with named(str(file)):
                for key, tensor in reading.tensors(file, sorted(key for at, key in names if at == file)):
                    if not tensor.is_floating_point():
                        raise UserError(
                            f"model.init: {file}: {key} is stored as {tensor.dtype}; quantized weights are not read"
                        )
                    yield names[file, key], tensor
        yield from ((name, t) for name, t in sorted(self.drawn.items()) if only is None or name in only)


def stored(source: Source, trainable: Qwen2VLFlux, trunk: Qwen2VLModel) -> Values:
    """Where a source's tensors are, for a run of these models, of which only names and shapes are read: they may be on the meta
    device. UserError naming the file and the key of what does not fit."""
    wanted = beginnings(trainable, trunk)
    if source.kind == "shipped":
        values = Values()
        values.add([source.path], lambda key: key, wanted)
        return values
    if source.kind == "run":
        return _of_runs_files(source, wanted, len(decoder_layers(trainable, trunk)))
    return _of_exports_files(source.path, wanted)


# --- a run as a source ----------------------------------------------------------------------------------------------


def of_run(source: Source, base: Models, config: Config) -> Values:
    """What a run changed: what it began from itself, and its checkpoint's weights over that."""
    content, values = source.content, stored(source, base.trainable, base.trunk.vlm)
    theirs = saved.completed(content["identity"], content["format"])
    seed, way = saved.at(theirs, "run.seed"), saved.at(theirs, "model.seeded")
    old = base.trainable.connector
    connector = build_connector(old.in_features, old.out_features, seed, way).to(old.weight.dtype)
    drawn = {f"connector.{name}": p.detach() for name, p in connector.named_parameters()}
    values.drawn = {name: p for name, p in drawn.items() if name not in values.stored}
    # Whatever the seed, if the weights are published ones: only the connector is drawn, and the source brings its own.
    same, parts = base_fingerprints(base.trainable, base.trunk.vlm, base.vae, connector=connector)
    parts = base.base_parts | parts  # and CLIP's
    if content["base"] != same or weights.other_clip(content, parts):
        which = weights.options_of(weights.other_parts(content, parts))
        draws = [f"--run.seed {seed}"] * (config.run.seed != seed) + [f"--model.seeded {way}"] * (
            config.model.seeded != way
        )
        if "vlm" in weights.other_parts(content, parts) and config.model.vlm == SHIPPED:
            draws.append("--model.vlm null")  # the preset tiny drew it before it had the shipped one
        redraw = f", or, of what is drawn, {' '.join(draws)}" if draws else ""
        raise UserError(
            f"model.init: {source.path}: began from other base weights than this run's {which}; give those{redraw}"
        )
    return values


def _of_runs_files(source: Source, wanted: Mapping[str, nn.Parameter], layers: int) -> Values:
    """layers: of Qwen2-VL, whose last ones a checkpoint numbers from 0."""
    content, checkpoint, values = source.content, source.checkpoint, Values()
    assert checkpoint is not None
    first = layers - int(saved.at(saved.completed(content["identity"], content["format"]), "model.vlm_layers"))
    if content.get("init") is not None:
        root = init_folder.folder(source.path)
        values.add([root / name for name in init_folder.read(source.path)["files"]], lambda key: key, wanted)

    def absolute(key: str) -> str:
        if not key.startswith("vlm.layers."):
            return key
        number, _, rest = key.removeprefix("vlm.layers.").partition(".")
        return f"vlm.layers.{first + int(number)}.{rest}"

    values.add([checkpoint / name for name in weights.files_of(content, checkpoint)], absolute, wanted)
    return values


# --- an export as a source ------------------------------------------------------------------------------------------


def of_export(source: Source, base: Models) -> Values:
    """An export's transformer, connector and decoder layers; its other parts must be the run's."""
    root, values = source.path, stored(source, base.trainable, base.trunk.vlm)
    others = {
        pretrained.vlm_name(key) or "": (file, key)
        for file in _files(root, "text_encoder", TRANSFORMERS_WEIGHTS)
        for key in reading.shapes(file)
        if not (pretrained.vlm_name(key) or "").startswith(LAYERS)
    }
    _check_fields(root, base)
    _check_same(root, base, others)
    return values


def _of_exports_files(root: Path, wanted: Mapping[str, nn.Parameter]) -> Values:
    values = Values()
    values.add(_files(root, "transformer", DIFFUSERS_WEIGHTS), lambda key: f"transformer.{key}", wanted)
    values.add(_files(root, "text_encoder", TRANSFORMERS_WEIGHTS), _layer_name, wanted)
    values.add([root / layout.CONNECTOR], lambda key: f"connector.{key}", wanted)
    if missing := sorted(set(wanted) - set(values.stored)):
        raise UserError(f"model.init: {root}: missing key {missing[0]} (of {len(missing)}); export again")
    return values


def _files(root: Path, part: str, names: tuple[str, ...]) -> list[Path]:
    with named(str(root / part)):
        return reading.weight_files(str(root), part, names)


def _layer_name(key: str) -> str | None:
    name = pretrained.vlm_name(key) or ""
    return f"vlm.{name.removeprefix('language_model.')}" if name.startswith(LAYERS) else None


def _check_fields(root: Path, base: Models) -> None:
    """UserError where the export's networks compute otherwise than the run's, though with weights of the same shapes."""
    with named(f"{root}/transformer/config.json"):
        values = pretrained.FluxTransformer2DModel.load_config(root, subfolder="transformer")
    flux: Any = base.trainable.transformer.config
    pairs = {name: (values.get(name, flux[name]), flux[name]) for name in flux if not name.startswith("_")}
    with named(f"{root}/text_encoder/config.json"):
        theirs = read_config(str(root / "text_encoder"), str(root / "text_encoder")).text_config
    ours = base.trunk.config.text_config
    for part, option, found in (
        ("transformer", "flux", pairs),
        ("text_encoder", "vlm", {n: (getattr(theirs, n, None), getattr(ours, n, None)) for n in QWEN_FIELDS}),
    ):
        for name, (then, now) in found.items():
            if _plain(then) != _plain(now):
                raise UserError(
                    f"model.init: {root}/{part}/config.json: {name} is {then}, the run's model.{option} has {now}; give the "
                    "one that it was trained on"
                )


def _plain(value: Any) -> Any:
    """A value of a configuration, without what differs by the version that wrote it."""
    if isinstance(value, dict):  # rope_scaling
        return value.get("mrope_section")
    return list(value) if isinstance(value, tuple) else value


def _check_same(root: Path, base: Models, others: Mapping[str, tuple[Path, str]]) -> None:
    """UserError where what an export does not train (VAE, Qwen2-VL's vision part, token embeddings and final norm, CLIP's
    pooled vector) is not the run's. Compared in bfloat16, so that an export in any dtype passes. others: name in Qwen2VLModel ->
    where it is."""
    vae = pretrained.load_vae(None, str(root))
    if weights_fingerprint(vae, dtype=torch.bfloat16) != weights_fingerprint(base.vae, dtype=torch.bfloat16):
        raise UserError(
            f"model.init: {root}/vae: is not the run's VAE, on which it was trained; give it with --model.vae {root}/vae"
        )
    ours = {name: p for name, p in base.trunk.vlm.named_parameters() if not name.startswith(LAYERS)}
    ours["language_model.norm.weight"] = base.trainable.vlm.norm.weight
    if missing := sorted(set(ours) - set(others)):
        raise UserError(f"model.init: {root}/text_encoder: missing key {missing[0]} (of {len(missing)}); export again")
    for name, p in ours.items():
        file, key = others[name]
        with named(str(file)):
            ((_, tensor),) = reading.tensors(file, [key])
        if len({fingerprint([(name, t)], torch.bfloat16) for t in (tensor, p)}) > 1:
            raise UserError(
                f"model.init: {file}: {key} is not that of the run's Qwen2-VL, on which it was trained; give its own with "
                f"--model.vlm {root}/text_encoder"
            )
    pooled = read_tensors(root / layout.POOLED, {"pooled_prompt_embeds"})["pooled_prompt_embeds"].float()
    now = base.pooled_projections.float()
    if pooled.shape != now.shape or not torch.allclose(
        pooled, now, rtol=0.02, atol=0.02
    ):  # stored in bfloat16, perhaps
        raise UserError(
            f"model.init: {root}/{layout.POOLED}: is not the vector of the run's CLIP; give the FLUX.1 folder (--model.flux) "
            "that it was trained on"
        )
