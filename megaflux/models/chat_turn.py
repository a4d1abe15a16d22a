"""Qwen2-VL's chat turn as tokens: rendered by the folder's own chat template, and checked.

A template of another tool may know no pictures, or put them elsewhere: the model would then see tokens in an order that it
was not trained on, without an error. So the turn is refused unless its picture is where Qwen2-VL's own template puts it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

from megaflux.common.errors import UserError, one_line

Mode = Literal["image", "image_text", "text"]
QUESTION = "Describe this image."  # the released code's turn without a prompt
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
REMEDY = "use the chat template (chat_template.json) of Qwen/Qwen2-VL-7B-Instruct"
_CAPTION = "\N{WHITE SQUARE}caption\N{WHITE SQUARE}"  # stands in for a caption when the chat template is rendered


class CaptionTokens:
    """Tokens of captions, all of them plain text."""

    def __init__(self, tokenizer: Any):
        """tokenizer: a fast tokenizer of transformers."""
        self._plain = _without_added_tokens(tokenizer)

    def ids(self, caption: str) -> list[int]:
        """The tokens of a caption; [] if it is blank."""
        return self._plain.encode(clean(caption), add_special_tokens=False).ids

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the tokens depend on."""
        return hashlib.sha256(self._plain.to_str().encode()).hexdigest()[:16]


class ChatTurns:
    """Tokens of what surrounds captions and pictures, and of captions."""

    def __init__(self, processor: Any, image_token_id: int, where: str):
        """processor: a Qwen2VLProcessor, whose type does not tell its tokenizer. where: what errors name."""
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token_id, self.where = image_token_id, where
        self._surroundings: dict[Mode, tuple[list[int], list[int], list[int]]] = {}
        self._captions = CaptionTokens(self.tokenizer)

    def surroundings(self, mode: Mode) -> tuple[list[int], list[int], list[int]]:
        """Tokens before the caption, between caption and image tokens, and after them; in mode image before the image
        tokens, none, and after them. UserError, naming the folder, for a template that puts them elsewhere or fails."""
        if mode not in self._surroundings:
            before, between, after = (self._ids(text) for text in self._render(mode))
            self._surroundings[mode] = before, between, after
        return self._surroundings[mode]

    def caption(self, caption: str) -> list[int]:
        """Tokens of a caption, all of it plain text: `<|im_end|>` in it is letters and signs, not the end of the turn."""
        return self._captions.ids(caption)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, mode: Mode) -> tuple[str, str, str]:
        words, image = {"type": "text", "text": _CAPTION}, {"type": "image"}
        content = {"image": [image, {"type": "text", "text": QUESTION}], "image_text": [words, image], "text": [words]}
        try:
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content[mode]}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template's own code raises
            raise self._invalid(mode, f"fails ({one_line(error, 160)})") from error
        before, found, rest = text.partition(_CAPTION) if mode != "image" else ("", "", text)
        if mode != "image" and (not found or _CAPTION in rest):
            raise self._invalid(mode, "does not give the caption once")
        if re.search(r"""['"]type['"]\s*:""", text):  # {{ message.content }} or tojson, of a template for strings
            raise self._invalid(mode, "writes out the list of a message's parts")
        if mode == "text":
            return before, "", rest
        token = self._image_token()
        if text.count(token) != 1 or VISION_START + token + VISION_END not in text:
            raise self._invalid(mode, f"does not put one {token} between {VISION_START} and {VISION_END}")
        if token in before:
            raise self._invalid(mode, "puts the image before the caption, which cannot see it then")
        between, _, after = rest.partition(token)
        if mode == "image_text":
            return before, between, after
        if QUESTION not in after:
            raise self._invalid(mode, "does not put the question behind the image")
        return between, "", after

    def _image_token(self) -> str:
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if token is None or len(self._ids(f"{VISION_START}{token}{VISION_END}")) != 3:
            raise UserError(
                f"{self.where}: config.json's image_token_id {self.image_token_id}, {VISION_START} or {VISION_END} is not "
                "a token of its tokenizer; give config.json and the tokenizer's files of one Qwen2-VL"
            )
        return token

    def _invalid(self, mode: Mode, fault: str) -> UserError:
        return UserError(f"{self.where}: its chat template {fault} in a turn of mode {mode}; {REMEDY}")


def clean(caption: str) -> str:
    """A caption without what merges with the newline before it: white space at its ends and in a row, and NUL."""
    return " ".join(caption.encode("utf-8", "replace").decode().replace("\0", " ").split())


def _without_added_tokens(tokenizer: Any) -> Any:
    """A tokenizers.Tokenizer like that of a fast tokenizer, except that it knows no added tokens, special or not.

    The option split_special_tokens leaves those that are not special, and each library version reads it elsewhere."""
    from tokenizers import Tokenizer

    own = tokenizer.backend_tokenizer
    plain = Tokenizer(own.model)
    plain.normalizer, plain.pre_tokenizer = own.normalizer, own.pre_tokenizer
    return plain
