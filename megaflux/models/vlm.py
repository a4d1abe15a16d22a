"""Qwen2-VL as the condition's encoder: a frozen trunk, then one trainable last layer and the frozen final norm.

A chat turn is cut after the last token that the condition reads. Qwen's attention is causal, so what would follow
(the question, the generation prompt) cannot change those tokens, and cutting it is exact.

Shapes: B batch, S tokens of the cut chat turn, T tokens of the condition (T <= S), D Qwen's width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megaflux.common.transfer import to_device

Mode = Literal["image", "image_text", "text"]
QUESTION = "Describe this image."  # the released code's turn without a prompt
GRIDS_KEPT = 256  # sizes of pictures
_CAPTION = "\N{WHITE SQUARE}caption\N{WHITE SQUARE}"  # stands in for a caption when the chat template is rendered


@dataclass(frozen=True)
class Condition:
    """Trunk output of a batch and what the last layer and FLUX need to read it."""

    hidden_states: Tensor
    """(B, S, D): output of the frozen trunk."""
    position_ids: Tensor
    """(3, B, S) int64: M-RoPE positions (time, row, column)."""
    select: Tensor
    """(B, T) int64: which of the S tokens are the condition, image tokens first, then the caption's."""
    attention_mask: Tensor | None = None
    """(B, S) int64, 0 at the padding of a chat turn; None: no padding."""
    select_mask: Tensor | None = None
    """(B, T) bool, False at the padding of the condition; None: no padding."""

    def rolled(self, shift: int = 1) -> Condition:
        """The same conditions, each given to the next sample: a shuffled reference."""
        dims = {"position_ids": 1}
        rolled = {k: None if v is None else v.roll(shift, dims.get(k, 0)) for k, v in vars(self).items()}
        return Condition(**rolled)

    def repeated(self, times: int) -> Condition:
        """Each sample's condition `times` times in a row."""
        dims = {"position_ids": 1}
        return Condition(
            **{k: None if v is None else v.repeat_interleave(times, dims.get(k, 0)) for k, v in vars(self).items()}
        )


@dataclass(frozen=True)
class Turn:
    """One cut chat turn as tokens."""

    input_ids: list[int]
    select: list[int]
    grid: tuple[int, int] | None
    """Rows and columns of image tokens; None: no image."""
    image_start: int = 0


def split_vlm(vlm) -> tuple[nn.Module, nn.Module]:
    """Cut a Qwen2VLModel into (trunk, tail): all layers but the last, without final norm; the last layer and the norm.

    Both keep transformers' own classes and forward: the trunk is the given model with its last layer taken off, the
    tail a Qwen2VLTextModel of one layer without token embeddings. The tail starts with shared rotary buffers.
    """
    text = vlm.language_model
    config = copy.deepcopy(text.config)
    config.num_hidden_layers = 1
    config.layer_types = [text.config.layer_types[-1]]
    with torch.device("meta"):
        tail = type(text)(config)
    tail.embed_tokens = None
    tail.layers = nn.ModuleList([text.layers[-1]])
    tail.layers[0].self_attn.layer_idx = 0
    tail.norm = text.norm
    tail.rotary_emb = copy.deepcopy(text.rotary_emb)
    text.layers = text.layers[:-1]
    text.norm = nn.Identity()
    vlm.requires_grad_(False).eval()
    return vlm, tail


def join_vlm(trunk_model: nn.Module, tail: nn.Module) -> nn.Module:
    """The inverse of `split_vlm`: the tail's layer and norm back in the trunk, which is returned whole.

    Uses up both parts: the trunk would now give another output, so nothing that holds it may encode any more.
    """
    text = trunk_model.language_model
    layer = tail.layers[0]
    layer.self_attn.layer_idx = len(text.layers)
    text.layers.append(layer)
    defer_norm(tail, False)
    text.norm = tail.norm
    return trunk_model


def defer_norm(tail: nn.Module, defer: bool) -> None:
    """Leave the final norm to whoever reads the tail's output (the connector's kernel does it on the way), or have
    the tail apply it again. The norm keeps its place and its weight."""
    if defer:
        tail.norm.forward = _unchanged
    else:
        vars(tail.norm).pop("forward", None)


def _unchanged(hidden_states: Tensor) -> Tensor:
    return hidden_states


def mrope_position_ids(length: int, image_start: int, grid: tuple[int, int] | None) -> Tensor:
    """Positions of one turn with at most one image: (3, length) int64.

    Text counts up on all three axes; image tokens share one time step and count rows and columns from it; the text
    after them goes on from the largest position used (Qwen2-VL, 2409.12191, section 2.1).
    """
    positions = torch.arange(length).expand(3, length).clone()
    if grid is not None:
        rows, columns = grid
        end = image_start + rows * columns
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[0, image_start:end] = image_start
        positions[1, image_start:end] = image_start + row.flatten()
        positions[2, image_start:end] = image_start + column.flatten()
        positions[:, end:] = torch.arange(length - end) + image_start + max(rows, columns)
    return positions


def patch_positions(rows: int, columns: int, merge: int) -> Tensor:
    """(rows x columns, 2) int64: row and column of each of an image's patches in the order of Qwen2-VL's ViT, which puts
    the merge x merge patches of one image token next to each other."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    blocks = (side.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2) for side in (row, column))
    return torch.stack([block.flatten() for block in blocks], dim=-1)


def causal_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What Qwen's decoder adds to its scores for turns padded on the right: (B, 1, S, S) of 0 and -inf; None: no padding.

    attention_mask: (B, S), 0 at the padding. transformers would make the same mask of it, but asks the GPU first whether
    there is any padding, and waits for the answer.
    """
    if attention_mask is None:
        return None
    S = attention_mask.shape[1]
    visible = attention_mask.new_ones(S, S, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


class Trunk:
    """The frozen part: pictures and captions -> Condition. Not a module: nothing of it trains or is saved."""

    def __init__(
        self, vlm, processor, max_image_tokens: int = 512, max_caption_tokens: int = 256, min_image_tokens: int = 4
    ):
        """min_image_tokens: a smaller picture is enlarged to about as many (the released weights: 512)."""
        self._vlm, self.config = vlm, vlm.config
        self._released: tuple[torch.device, torch.dtype] | None = None
        self.processor = processor
        self.max_caption_tokens = max_caption_tokens
        self.min_image_tokens, self.max_image_tokens = min_image_tokens, max_image_tokens
        self.merge = vlm.config.vision_config.spatial_merge_size
        self.cell = vlm.config.vision_config.patch_size * self.merge  # pixels per image token, each way
        self.image_token = processor.tokenizer.convert_ids_to_tokens(vlm.config.image_token_id)
        self.pad_token_id = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        # Not lru_cache: around a bound method it holds the trunk, and so all of Qwen2-VL, in a cycle.
        self._grids: dict[tuple, tuple[int, int]] = {}
        self._templates: dict[Mode, tuple[str, str, str]] = {}

    @property
    def vlm(self):
        """Qwen2VLModel without its last layer. RuntimeError after `release`."""
        if self._vlm is None:
            raise RuntimeError(
                "Qwen2-VL's trunk was released, because its output is cached (data.cache holds trunk): its weights are gone, "
                "so it cannot encode; load the models anew"
            )
        return self._vlm

    @vlm.setter
    def vlm(self, vlm) -> None:
        self._vlm, self._released = vlm, None

    @property
    def released(self) -> bool:
        """Whether the weights are gone."""
        return self._vlm is None

    def release(self) -> None:
        """Give up the weights for good, on the device and on the host: `from_cache` needs none.

        `device`, `dtype`, `config` and what lays out tokens stay; all that needs weights raises RuntimeError."""
        if not self.released:
            self._released = self.device, self.dtype
            self._vlm.to("meta")  # whoever else still holds the module holds no memory by it
            self._vlm = None

    @torch.no_grad()
    def encode(
        self,
        pixel_values: Tensor | None,
        captions: list[str] | None = None,
        mode: Mode = "image",
        limits: tuple[int, int] | None = None,
    ) -> Condition:
        """Run the trunk. pixel_values: uint8 (B, 3, H, W), not read in mode text; captions: B strings, not read in
        mode image; limits: fewest and most image tokens, None: as the trunk was built. The result is on the trunk's
        device and in its dtype."""
        batch = len(captions) if pixel_values is None or mode == "text" else pixel_values.shape[0]
        size = None if mode == "text" else tuple(pixel_values.shape[-2:])
        turns = [
            self.turn(mode, size, captions[i] if captions and mode != "image" else "", limits) for i in range(batch)
        ]
        input_ids, layout = self.collate(turns)
        # The parts of Qwen2VLModel, called as its forward calls them but for what waits for the GPU there: it looks the
        # image tokens' places up in input_ids, and reads a grid that lies on the GPU some 200 times.
        embeds = self.vlm.get_input_embeddings()(input_ids)
        if mode != "text":
            for row, turn, tokens in zip(embeds, turns, self._see(pixel_values, turns[0].grid, limits), strict=True):
                row[turn.image_start : turn.image_start + len(tokens)] = tokens
        hidden_states = self.vlm.language_model(
            inputs_embeds=embeds,
            position_ids=layout["position_ids"],
            attention_mask=causal_mask(layout["attention_mask"], embeds.dtype),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return Condition(hidden_states, **layout)

    def _see(self, pixel_values: Tensor, grid: tuple[int, int], limits: tuple[int, int] | None) -> Tensor:
        """Image tokens (B, rows x columns, D) of pictures uint8 (B, 3, H, W)."""
        patches = self.processor.image_processor(
            images=list(pixel_values), return_tensors="pt", **self._pixels(limits)
        )["pixel_values"]
        batch, (rows, columns) = len(pixel_values), (side * self.merge for side in grid)
        # transformers 5 computes with the positions, on the device; 4 makes its own of the grid and passes these over.
        positions = to_device(patch_positions(rows, columns, self.merge).repeat(batch, 1), self.device)
        tokens = self.vlm.visual(
            patches.to(self.device, self.dtype),
            grid_thw=torch.tensor([[1, rows, columns]] * batch),
            position_ids=positions,
        )
        tokens = getattr(tokens, "pooler_output", tokens)  # transformers 5; 4 gives the tensor
        return tokens.unflatten(0, (batch, -1))

    def from_cache(self, hidden_states: Tensor, height: int, width: int) -> Condition:
        """A Condition of mode image around trunk output (B, S, D) computed before, for pictures of height x width px."""
        _, layout = self.collate([self.turn("image", (height, width))] * hidden_states.shape[0])
        return Condition(hidden_states.to(self.device), **layout)

    def caption_tokens(self, caption: str) -> int:
        """How many tokens a caption has before it is cut to `max_caption_tokens`; 0: it says nothing."""
        return len(self._ids(self._clean(caption)))

    def turn(
        self, mode: Mode, size: tuple[int, int] | None = None, caption: str = "", limits: tuple[int, int] | None = None
    ) -> Turn:
        """The cut chat turn of one sample; size: (height, width) of its picture, px; limits: as in `encode`."""
        before, between, after = (self._ids(text) for text in self._template(mode))
        words = self._ids(self._clean(caption))[: self.max_caption_tokens] if mode != "image" else []
        if mode == "text" and not words:
            words = after[:1]  # an empty caption still needs one token: the end of the turn
        if mode == "text":
            return Turn(before + words, list(range(len(before), len(before) + len(words))), None)
        rows, columns = self.grid(*size, limits)
        head = before + words + between
        start = len(head)
        image = range(start, start + rows * columns)
        select = [*image, *range(len(before), len(before) + len(words))]
        return Turn(head + [self.config.image_token_id] * len(image), select, (rows, columns), start)

    def collate(self, turns: list[Turn]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Pad turns on the right: input_ids (B, S) and the fields of Condition but hidden_states, on the device."""
        lengths, counts = [len(t.input_ids) for t in turns], [len(t.select) for t in turns]
        S, T = max(lengths), max(counts)
        input_ids = torch.full((len(turns), S), self.pad_token_id)
        position_ids = torch.ones(3, len(turns), S, dtype=torch.long)
        select = torch.zeros(len(turns), T, dtype=torch.long)
        for i, t in enumerate(turns):
            input_ids[i, : lengths[i]] = torch.tensor(t.input_ids)
            position_ids[:, i, : lengths[i]] = mrope_position_ids(lengths[i], t.image_start, t.grid)
            select[i, : counts[i]] = torch.tensor(t.select)
        attention_mask = _length_mask(lengths).long() if min(lengths) < S else None
        select_mask = _length_mask(counts) if min(counts) < T else None
        layout = {
            "position_ids": position_ids,
            "select": select,
            "attention_mask": attention_mask,
            "select_mask": select_mask,
        }
        device = self.device
        moved = {name: None if value is None else to_device(value, device) for name, value in layout.items()}
        return to_device(input_ids, device), moved

    @property
    def device(self) -> torch.device:
        """Where inputs go: the weights' device, or the one that accelerate brings them to; also when they are released."""
        if self._released is not None:
            return self._released[0]
        hooks = (getattr(module, "_hf_hook", None) for module in self.vlm.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        found = next((device for device in devices if device is not None), None)
        return self.vlm.device if found is None else torch.device(found)

    @property
    def dtype(self) -> torch.dtype:
        return self.vlm.dtype if self._released is None else self._released[1]

    def grid(self, height: int, width: int, limits: tuple[int, int] | None = None) -> tuple[int, int]:
        """(rows, columns) of image tokens of a picture of height x width px; limits: as in `encode`."""
        key = height, width, limits
        if key not in self._grids:
            if len(self._grids) >= GRIDS_KEPT:
                self._grids.pop(next(iter(self._grids)))
            self._grids[key] = self._measure_grid(height, width, limits)
        return self._grids[key]

    def _template(self, mode: Mode) -> tuple[str, str, str]:
        if mode not in self._templates:
            self._templates[mode] = self._render_template(mode)
        return self._templates[mode]

    def _render_template(self, mode: Mode) -> tuple[str, str, str]:
        """Chat text before the caption, between caption and image tokens, and after them."""
        words, image = {"type": "text", "text": _CAPTION}, {"type": "image"}
        content = {"image": [image, {"type": "text", "text": QUESTION}], "image_text": [words, image], "text": [words]}
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content[mode]}], tokenize=False, add_generation_prompt=True
        )
        before, _, rest = text.partition(_CAPTION) if mode != "image" else ("", "", text)
        if mode == "text":
            return before, "", rest
        between, _, after = rest.partition(self.image_token)
        return (before, between, after) if mode == "image_text" else (between, "", after)

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _clean(self, caption: str) -> str:
        # A caption must not forge the turn's structure, nor melt into the newline before it.
        for token in self.processor.tokenizer.all_special_tokens:
            caption = caption.replace(token, " ")
        return " ".join(caption.encode("utf-8", "replace").decode().replace("\0", " ").split())

    @property
    def limits(self) -> dict[str, int]:
        """Fewest and most pixels of a picture, in the image processor's words."""
        return self._pixels(None)

    def _pixels(self, limits: tuple[int, int] | None) -> dict[str, int]:
        least, most = limits or (self.min_image_tokens, self.max_image_tokens)
        return {"min_pixels": least * self.cell**2, "max_pixels": most * self.cell**2}

    def _measure_grid(self, height: int, width: int, limits: tuple[int, int] | None) -> tuple[int, int]:
        blank = torch.zeros(3, height, width, dtype=torch.uint8)
        out = self.processor.image_processor(images=[blank], return_tensors="pt", **self._pixels(limits))
        _, rows, columns = out["image_grid_thw"][0].tolist()
        return rows // self.merge, columns // self.merge


def _length_mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
