"""A Qwen2-VL folder in the dress of each tool that saves one gives the plain folder's hidden states, bit for bit, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.models import pretrained
from megaflux.models.sources import VLM, folder_problems
from megaflux.models.vlm import Trunk
from megaflux.models.vlm_folder import open_vlm
from megaflux.models.vlm_parts import split_vlm
from megaflux.training.ds_config import load_ds_config
from megaflux.training.planning.dry_run import dry_run
from tests.conftest import picture, small_values

CAPTION = "a small cat"
SIZE = (48, 64)  # width, height


def trunk_of(folder: Path) -> Trunk:
    vlm, processor = pretrained.load_vlm(str(folder), dtype=torch.float32)
    return Trunk(split_vlm(vlm)[0], processor, 64, 64)


def seen(trunk: Trunk) -> list[torch.Tensor]:
    pixels = torch.from_numpy(np.array(picture(*SIZE, 0))).permute(2, 0, 1)[None]
    return [trunk.encode(pixels, [CAPTION], mode).hidden_states for mode in ("image", "image_text", "text")]


@pytest.fixture(scope="module")
def plain(published) -> Trunk:
    return trunk_of(published["qwen"])


@pytest.fixture
def folder(published, tmp_path) -> Path:
    return Path(shutil.copytree(published["qwen"], tmp_path / "qwen"))


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def take_template(folder: Path) -> str:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    return text


def template_of_the_tokenizer(folder: Path) -> None:
    text = take_template(folder)
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=text))


def template_among_named_ones(folder: Path) -> None:
    named = [{"name": "default", "template": take_template(folder)}, {"name": "tools", "template": "other"}]
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=named))


def the_only_named_template(folder: Path) -> None:
    named = [{"name": "chat", "template": take_template(folder)}]
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=named))


def template_in_json(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": take_template(folder)}))


def template_beside_others(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("other")


def flat_config(folder: Path) -> None:
    """As published, and as transformers 4.45 writes it."""

    def change(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        section = text.pop("rope_scaling")["mrope_section"]
        config |= {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
        config |= {"rope_scaling": {"type": "mrope", "mrope_section": section}, "torch_dtype": config.pop("dtype")}

    edit(folder / "config.json", change)


def rope_parameters(config: dict[str, Any]) -> None:
    rope = config.pop("rope_scaling")
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}


def flat_config_with_rope_parameters(folder: Path) -> None:
    flat_config(folder)
    edit(folder / "config.json", rope_parameters)


def tied_config(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))


def vocabulary_and_merges(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def tokenizer_json_alone(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()


def transformers_5(folder: Path) -> None:
    """RoPE in one field, processors in one file, and the tokenizer in tokenizer.json with its special tokens as a list."""
    edit(folder / "config.json", lambda c: rope_parameters(c["text_config"]))
    parts = {}
    for part, file in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        parts[part] = json.loads((folder / f"{file}.json").read_text())
        (folder / f"{file}.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(parts | {"processor_class": "Qwen2VLProcessor"}))
    tokenizer_json_alone(folder)

    def change(config: dict[str, Any]) -> None:
        del config["added_tokens_decoder"]
        config["extra_special_tokens"] = config.pop("additional_special_tokens")
        config |= {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "is_local": True}

    edit(folder / "tokenizer_config.json", change)


DRESSES = [
    template_of_the_tokenizer,
    template_among_named_ones,
    the_only_named_template,
    template_in_json,
    template_beside_others,
    flat_config,
    flat_config_with_rope_parameters,
    tied_config,
    vocabulary_and_merges,
    tokenizer_json_alone,
    transformers_5,
]


@pytest.mark.parametrize("dress", DRESSES)
def test_every_dress_of_a_folder_is_the_same_model(folder, plain, dress):
    dress(folder)
    assert folder_problems(folder, {"": VLM}) == []
    trunk = trunk_of(folder)
    for ours, theirs in zip(seen(trunk), seen(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert trunk.chat.tokenizer.all_special_tokens == plain.chat.tokenizer.all_special_tokens


def template(folder: Path, parts: str, start: str = "<|im_start|>{{ message['role'] }}\n") -> None:
    text = "{% for message in messages %}" + start + parts + "<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(text)


WORDS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
ALL = ("image", "image_text", "text")


@pytest.mark.parametrize(
    ("parts", "good", "said"),
    [
        ("{{ message['content'] }}", (), "writes out the list of a message's parts in a turn of mode"),
        ("{{ message['content'] | tojson }}", (), "writes out the list of a message's parts in a turn of mode"),
        (
            WORDS,
            ("text",),
            "does not put one <|image_pad|> between <|vision_start|> and <|vision_end|> in a turn of mode",
        ),
        ("{{ 'x' + message['content'] }}", (), "fails .can only concatenate str.* mode image; use the chat template"),
        (WORDS + "<|image_pad|>", ("text",), "does not put one <|image_pad|> between"),
        (WORDS + IMAGE + IMAGE, ("text",), "does not put one <|image_pad|> between"),
        (IMAGE + WORDS, ("image", "text"), "puts the image before the caption.* mode image_text"),
        (WORDS + IMAGE, ("image_text", "text"), "does not put the question behind the image in a turn of mode image"),
        (IMAGE, (), "does not put the question behind the image"),
        ("{{ raise_exception('no\nlists') }}", (), "fails .no lists"),
    ],
)
def test_a_template_that_puts_the_image_elsewhere_is_refused(folder, parts, good, said):
    """The text after the caption of a text-only template was taken for the text before the image."""
    template(folder, parts)
    found = open_vlm(str(folder))
    found.check_turns(good)
    for mode in set(ALL) - set(good):
        with pytest.raises(UserError) as caught:
            found.check_turns([mode])
        assert str(caught.value).startswith(f"{folder}: its chat template") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=said):
        found.check_turns(ALL)


def no_template(folder: Path) -> None:
    take_template(folder)


def several_templates(folder: Path) -> None:
    named = [{"name": name, "template": "x"} for name in ("tools", "rag")]
    take_template(folder)
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=named))


def no_rope(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].pop("rope_scaling"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            no_template,
            "qwen: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; use",
        ),
        (several_templates, "qwen: its chat templates are named rag, tools, and none default; use"),
        (no_rope, "qwen/config.json: neither rope_scaling nor rope_parameters gives an mrope_section; use"),
        (
            lambda folder: edit(folder / "config.json", lambda c: c.pop("image_token_id")),
            "qwen: config.json's image_token_id 151655, .* is not a token of its tokenizer; give",
        ),
    ],
)
def test_what_a_folder_lacks_is_named(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said):
        open_vlm(str(folder)).check_turns(["image"])


def test_training_and_its_dry_run_check_the_turns_that_they_draw(published, folder, monkeypatch, capsys):
    template(folder, IMAGE + WORDS)
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(folder), "vae": None}
    open_vlm(str(folder)).check_turns(build_config(values).data.condition.drawn)
    values["data"]["condition"] = {"image": 0.5, "image_text": 0.5}
    config = build_config(values)
    monkeypatch.setattr(pretrained, "load_transformer", None)  # said before any weight is read
    with pytest.raises(UserError, match="puts the image before the caption"):
        pretrained.load_models(config)
    assert dry_run(config, load_ds_config("ds_configs/zero2.json"), 1) == 2
    assert "puts the image before the caption" in capsys.readouterr().out


@pytest.mark.parametrize(
    "caption",
    ["<|image_pad|>", "a <|im_end|> b", "<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>system", "<tool>"],
)
def test_added_tokens_in_a_caption_are_plain_text(plain, caption):
    turn = plain.turn("image_text", SIZE[::-1], caption)
    rows, columns = turn.grid
    words = [turn.input_ids[place] for place in turn.select[rows * columns :]]
    tokenizer = plain.chat.tokenizer
    assert tokenizer.decode(words) == caption and not set(words) & set(tokenizer.added_tokens_decoder)
    assert turn.input_ids.count(plain.config.image_token_id) == rows * columns


def test_added_tokens_that_are_not_special_are_plain_text_too(folder):
    """As in Qwen's later vocabularies: <tool_call>."""
    trunk = trunk_of(folder)
    tokenizer = trunk.chat.tokenizer
    before = trunk.chat.caption("a <tool_call> b")
    tokenizer.add_tokens(["<tool_call>"])
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in tokenizer("a <tool_call> b")["input_ids"]
    assert trunk.chat.caption("a <tool_call> b") == before
