"""A Qwen2-VL folder as this or another tool saved it: its config.json and its processor, before any weight is read.

Taken are the published layout and what transformers 4.45 to 5 write: a flat or a nested config.json, RoPE as
`rope_scaling` and `rope_theta` or as `rope_parameters`; the image processor in preprocessor_config.json or in
processor_config.json; the chat template in a file of its own or in tokenizer_config.json, alone or among named ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common import compat  # noqa: F401  (before transformers)

# isort: split
import transformers
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLProcessor
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.models.chat_turn import REMEDY, CaptionTokens, ChatTurns, Mode
from megaflux.models.loading_errors import named
from megaflux.models.sources import TOKENIZER, opened, source_problems
from megaflux.models.strict import FOLDER_FILES, silent_libraries

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@dataclass(frozen=True)
class VlmFolder:
    """A Qwen2-VL folder whose small files have been read."""

    source: str
    """As the user named it."""
    place: str
    """As the libraries' from_pretrained takes it."""
    config: Qwen2VLConfig
    processor: Qwen2VLProcessor

    def check_turns(self, modes: Iterable[Mode]) -> None:
        """UserError where the chat template does not make the turns of these modes."""
        turns = ChatTurns(self.processor, self.config.image_token_id, self.source)
        for mode in modes:
            turns.surroundings(mode)


def open_vlm(source: str, attention: str | None = None) -> VlmFolder:
    """Configuration and processor of a Qwen2-VL folder or hub name. UserError, naming it, where they cannot be read."""
    place = opened(source, FOLDER_FILES)
    with named(source), silent_libraries():
        config = read_config(place, source, attention)
        config.name_or_path = source
        processor: Any = Qwen2VLProcessor.from_pretrained(place, use_fast=True, **_tokenizer_options(place))
    processor.chat_template = _template(processor, source)
    return VlmFolder(source, place, config, processor)


def open_caption_tokens(source: str) -> CaptionTokens:
    """What makes tokens of captions, of a Qwen2-VL folder or hub name, or of a folder with the files of its tokenizer alone.
    UserError, naming it, where they cannot be read."""
    for line in source_problems(source, {"": TOKENIZER}):
        raise UserError(line)
    place = opened(source, FOLDER_FILES[:-1])
    with named(source), silent_libraries():
        return CaptionTokens(AutoTokenizer.from_pretrained(place, use_fast=True, **_tokenizer_options(place)))


def read_config(place: str, source: str, attention: str | None = None) -> Qwen2VLConfig:
    """config.json of a folder or hub name. attention: transformers' name of an implementation, None: its default.

    UserError, naming `source`, where it does not say how M-RoPE divides the frequencies."""
    values, _ = Qwen2VLConfig.get_config_dict(place)
    text = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    rope = text.get("rope_parameters")
    if TRANSFORMERS_4 and isinstance(rope, dict):
        # As transformers 5 writes it; 4 would keep it as an unknown field, and rope_theta at its default.
        del text["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        text["rope_scaling"] = text.get("rope_scaling") or scaling
        text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", 1e6))
    given = {} if attention is None else {"attn_implementation": attention}
    config = Qwen2VLConfig.from_dict(values, **given)
    found = getattr(config.text_config, "rope_scaling" if TRANSFORMERS_4 else "rope_parameters", None)
    if not isinstance(found, dict) or "mrope_section" not in found:
        raise UserError(
            f"{source}/config.json: neither rope_scaling nor rope_parameters gives an mrope_section; "
            "use the config.json that belongs to the weights"
        )
    return config


def _tokenizer_options(place: str) -> dict[str, Any]:
    """What transformers 4 has to be told of a tokenizer that transformers 5 saved."""
    extra = get_tokenizer_config(place).get("extra_special_tokens")
    if TRANSFORMERS_4 and isinstance(
        extra, list
    ):  # 5's list of what 4 calls additional_special_tokens; there it is a dict
        return {"additional_special_tokens": extra, "extra_special_tokens": {}}
    return {}


def _template(processor: Any, source: str) -> str:
    """The one chat template of a processor: its own, or its tokenizer's; of several, the one named default."""
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found and len(found) > 1:
            raise UserError(
                f"{source}: its chat templates are named {', '.join(sorted(found))}, and none default; {REMEDY}"
            )
        found = found.get("default") or next(iter(found.values()), None)
    if not found:
        raise UserError(
            f"{source}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; {REMEDY}"
        )
    return found


def write_processor(processor: Any, folder: Path) -> None:
    """A processor's files, with the chat template in chat_template.json too: the only file of it that transformers 4.45
    reads, which the authors' code pins."""
    processor.save_pretrained(folder)
    _write(folder / "chat_template.json", {"chat_template": processor.chat_template})


def rewrite_as_published(folder: Path) -> None:
    """Rewrite the small files of a Qwen2-VL folder as Qwen published them, which is what transformers 4.45 reads: a flat
    config.json, preprocessor_config.json of the first image processor, chat_template.json. Files that are so already, and
    weights, stay as they are."""
    found = open_vlm(str(folder))
    if not (folder / "chat_template.json").is_file():
        _write(folder / "chat_template.json", {"chat_template": getattr(found.processor, "chat_template", None)})
    config = json.loads((folder / "config.json").read_text())
    if isinstance(config.get("text_config"), dict):
        _write(folder / "config.json", _flat(config))
    file = folder / "preprocessor_config.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if stored.get("image_processor_type") != "Qwen2VLImageProcessor" or stored.get("min_pixels") is None:
        image_processor: Any = getattr(found.processor, "image_processor", None)
        given = {name: value for name, value in image_processor.to_dict().items() if value is not None}
        size = given.pop("size")
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
        _write(file, given | limits | names)
        (folder / "processor_config.json").unlink(missing_ok=True)  # transformers 5's file of the same


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config.json with the text model's fields beside the others."""
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters", None)
    if rope is not None:
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    scaling = text.get("rope_scaling")
    if scaling and scaling.get("rope_type", scaling.get("type")) == "default":
        text["rope_scaling"] = {"type": "mrope", "mrope_section": scaling["mrope_section"]}
    flat = {name: value for name, value in config.items() if name not in ("text_config", "dtype")}
    own = {name: value for name, value in text.items() if name not in ("model_type", "layer_types", "dtype")}
    dtype = config.get("dtype", text.get("dtype"))
    return own | flat | ({} if dtype is None else {"torch_dtype": dtype})


def _write(file: Path, content: dict[str, Any]) -> None:
    write_json(file, content, indent=2, sort_keys=False)
