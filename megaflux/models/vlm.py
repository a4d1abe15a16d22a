"""Qwen2-VL as the condition's encoder: a frozen trunk, then its last layers, which may train, and the frozen final
norm.

A chat turn is cut after the last token that the condition reads. Qwen's attention is causal: what would follow (the
question, the generation prompt) cannot change those tokens, so the cut is exact.

Several references of a sample are encoded each in a turn of its own, so that one beside another does not change its tokens. The
sample's condition is then the image tokens of all, in order, and its caption's tokens as the first turn has them.

Shapes: B batch, R turns of a sample (1, or the most references of one), S tokens of the cut chat turn, T tokens of the condition
(T <= R S), D Qwen's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from megaflux.common.transfer import to_device
from megaflux.models.chat_turn import ChatTurns, Mode
from megaflux.models.positions import causal_mask, length_mask, mrope_position_ids, patch_positions

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from transformers import Qwen2VLModel

GRIDS_KEPT = 256  # sizes of pictures


@dataclass(frozen=True)
class Condition:
    """Trunk output of a batch and what the last layers and FLUX need to read it."""

    hidden_states: Tensor
    """(B R, S, D): output of the frozen trunk; a sample's turns lie together."""
    position_ids: Tensor
    """(3, B R, S) int64: M-RoPE positions (time, row, column)."""
    select: Tensor
    """(B, T) int64: which of a sample's R S tokens are the condition, image tokens first, then the caption's."""
    attention_mask: Tensor | None = None
    """(B R, S) int64, 0 at the padding of a chat turn; None: no padding."""
    select_mask: Tensor | None = None
    """(B, T) bool, False at the padding of the condition; None: no padding."""
    cut_captions: int = 0
    """How many of the captions were longer than the trunk's `max_caption_tokens`."""
    turns: int = 1
    """R, turns of each sample."""
    log_weights: Tensor | None = None
    """(B, T) float32: added to the attention scores of each token, the logarithm of its reference's strength; None: all are 0."""

    def repeated(self, times: int) -> Condition:
        """Each sample's condition `times` times in a row."""
        samples = self.select.shape[0]
        return self.rows(torch.arange(samples).repeat_interleave(times).tolist())

    def rows(self, index: Sequence[int]) -> Condition:
        """The conditions of the samples `index`, in that order."""
        which = torch.tensor(index, dtype=torch.long, device=self.select.device)
        turns = (which[:, None] * self.turns + torch.arange(self.turns, device=which.device)).flatten()

        def taken(field: Tensor | None, at: Tensor) -> Tensor | None:
            return None if field is None else field[at]

        return Condition(
            self.hidden_states[turns.to(self.hidden_states.device)],
            self.position_ids[:, turns],
            self.select[which],
            taken(self.attention_mask, turns),
            taken(self.select_mask, which),
            turns=self.turns,
            log_weights=taken(self.log_weights, which),
        )

    def bias(self) -> Tensor | None:
        """(B, T) float64: what is added to the attention scores of each token, the logarithm of its weight, -inf at padding; None:
        all is 0."""
        if self.select_mask is None and self.log_weights is None:
            return None
        bias = (
            torch.zeros_like(self.select, dtype=torch.float64)
            if self.log_weights is None
            else self.log_weights.double()
        )
        return bias if self.select_mask is None else bias.masked_fill(~self.select_mask, float("-inf"))

    def to(self, device: torch.device) -> Condition:
        """The condition with its tensors on a device."""

        def moved(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.to(device)

        return replace(
            self,
            hidden_states=self.hidden_states.to(device),
            position_ids=self.position_ids.to(device),
            select=self.select.to(device),
            attention_mask=moved(self.attention_mask),
            select_mask=moved(self.select_mask),
            log_weights=moved(self.log_weights),
        )


class Layout(TypedDict):
    """The fields of a Condition of one turn a sample other than hidden_states."""

    position_ids: Tensor
    select: Tensor
    attention_mask: Tensor | None
    select_mask: Tensor | None


@dataclass(frozen=True)
class Turn:
    """One cut chat turn as tokens."""

    input_ids: list[int]
    select: list[int]
    """Places of the condition's tokens in input_ids, image tokens first."""
    grid: tuple[int, int] | None
    """Rows and columns of image tokens; None: no image."""
    image_start: int = 0
    """Place of the first image token."""
    cut: bool = False
    """Whether the caption was longer than the trunk's `max_caption_tokens`."""

    @property
    def image_tokens(self) -> int:
        """How many of `select` are image tokens."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]


class Trunk:
    """The frozen part: pictures and captions -> Condition. Not a module: nothing in it is trained or saved."""

    def __init__(
        self,
        vlm: Qwen2VLModel,
        processor: Any,
        max_image_tokens: int = 512,
        max_caption_tokens: int = 256,
        min_image_tokens: int = 4,
    ):
        """vlm: without its last layers (`split_vlm`). processor: a Qwen2VLProcessor, whose type does not tell its tokenizer
        and image processor. min_image_tokens: a smaller picture is enlarged to about this many
        tokens (the released weights: 512)."""
        self._vlm: Qwen2VLModel | None = vlm
        self.config = vlm.config
        self._released: tuple[torch.device, torch.dtype] | None = None
        self._empty: Condition | None = None
        self.processor = processor
        self.max_caption_tokens = max_caption_tokens
        self.min_image_tokens, self.max_image_tokens = min_image_tokens, max_image_tokens
        self.merge = vlm.config.vision_config.spatial_merge_size
        self.cell = vlm.config.vision_config.patch_size * self.merge  # pixels per image token, each way
        self.chat = ChatTurns(processor, vlm.config.image_token_id, vlm.config.name_or_path or "Qwen2-VL")
        self.pad_token_id = self.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        # Not lru_cache: on a bound method it would hold the trunk, and so all of Qwen2-VL, in a reference cycle.
        self._grids: dict[tuple, tuple[int, int]] = {}

    @property
    def vlm(self) -> Qwen2VLModel:
        """Qwen2VLModel without its last layers. RuntimeError after `release`."""
        if self._vlm is None:
            raise RuntimeError(
                "Qwen2-VL's trunk was released, because its output is cached (data.cache holds trunk): its weights are gone, "
                "so it cannot encode; load the models anew"
            )
        return self._vlm

    @vlm.setter
    def vlm(self, vlm: Qwen2VLModel) -> None:
        self._vlm, self._released, self._empty = vlm, None, None

    @property
    def released(self) -> bool:
        """Whether `release` gave up the weights."""
        return self._vlm is None

    def release(self) -> None:
        """Give up the weights for good, on the device and on the host: `from_cache` needs none.

        `device`, `dtype`, `config` and the layout of tokens stay; all that needs weights raises RuntimeError."""
        if self._vlm is not None:
            self._released = self.device, self.dtype
            module: nn.Module = self._vlm  # whose `to` has a signature, unlike transformers' wrapper
            module.to("meta")  # other holders of the module hold no memory by it
            self._vlm = None

    @torch.no_grad()
    def encode(
        self,
        pixel_values: Tensor | None,
        captions: list[str] | None = None,
        mode: Mode = "image",
        limits: tuple[int, int] | None = None,
    ) -> Condition:
        """Run the trunk; the result is on its device and in its dtype.

        pixel_values: uint8 (B, 3, H, W), ignored in mode text; captions: B strings, ignored in mode image; limits: fewest
        and most image tokens, None: as the trunk was built."""
        pictures = None if mode == "text" else pixel_values
        batch = len(captions or ()) if pictures is None else pictures.shape[0]
        size = None if pictures is None else (pictures.shape[-2], pictures.shape[-1])
        turns = [
            self.turn(mode, size, captions[i] if captions and mode != "image" else "", limits) for i in range(batch)
        ]
        hidden_states, layout = self._run(turns, [] if pictures is None else [(range(batch), pictures)], limits)
        return Condition(hidden_states, **layout, cut_captions=sum(turn.cut for turn in turns))

    @torch.no_grad()
    def encode_references(
        self,
        references: Sequence[Sequence[Tensor]],
        captions: Sequence[str] | None = None,
        mode: Mode = "image",
        strengths: Sequence[Sequence[float]] | None = None,
        limits: tuple[int, int] | None = None,
        at_once: int | None = None,
    ) -> Condition:
        """Run the trunk on each reference in a turn of its own, as generation does.

        references: of each of B samples one or more pictures uint8 (3, H, W), of any sizes. captions: B strings, ignored in mode
        image. mode: image or image_text. strengths: like references, factors on the attention of their tokens; None: all are 1.
        limits: as in `encode`. at_once: how many turns are computed together; None: all."""
        most = max(len(each) for each in references)
        # A sample with fewer repeats its first in turns that the condition does not read.
        pictures = [each[place] if place < len(each) else each[0] for each in references for place in range(most)]
        words = captions if captions and mode != "image" else [""] * len(references)
        turns = [
            self.turn(mode, (picture.shape[-2], picture.shape[-1]), words[i // most], limits)
            for i, picture in enumerate(pictures)
        ]
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault((picture.shape[-2], picture.shape[-1]), []).append(i)
        seen = [(index, torch.stack([pictures[i] for i in index])) for index in by_size.values()]
        hidden_states, layout = self._run(turns, seen, limits, at_once)
        one_each = Condition(hidden_states, **layout, cut_captions=sum(turn.cut for turn in turns[::most]))
        return joined(one_each, turns, [len(each) for each in references], strengths)

    def _run(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[tuple[Sequence[int], Tensor]],
        limits: tuple[int, int] | None,
        at_once: int | None = None,
    ) -> tuple[Tensor, Layout]:
        """(hidden states (turns, S, D), layout) of turns. pictures: (indices of turns, their pictures, uint8 (N, 3, H, W)), one pair
        for each size. at_once: turns that are computed together; None: all."""
        step = at_once or len(turns)
        input_ids, layout = self.collate(turns)
        # As in Qwen2VLModel.forward, without its waits for the GPU: it searches input_ids for the image tokens, and reads a
        # grid that lies on the GPU some 200 times.
        embeds = self.vlm.get_input_embeddings()(input_ids)
        for index, seen in pictures:
            grid = turns[index[0]].grid
            assert grid is not None  # a turn with a picture
            image_tokens = [tokens for part in seen.split(step) for tokens in self._see(part, grid, limits)]
            for i, tokens in zip(index, image_tokens, strict=True):
                start = turns[i].image_start
                embeds[i, start : start + len(tokens)] = tokens
        mask = layout["attention_mask"]
        parts = [
            self.vlm.language_model(
                inputs_embeds=embeds[start : start + step],
                position_ids=layout["position_ids"][:, start : start + step],
                attention_mask=causal_mask(None if mask is None else mask[start : start + step], embeds.dtype),
                use_cache=False,
                return_dict=True,
            ).last_hidden_state
            for start in range(0, len(turns), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts), layout

    def _see(self, pixel_values: Tensor, grid: tuple[int, int], limits: tuple[int, int] | None) -> Tensor:
        """Image tokens (B, rows x columns, D) of pictures uint8 (B, 3, H, W)."""
        patches = self.processor.image_processor(
            images=list(pixel_values), return_tensors="pt", **self._pixels(limits)
        )["pixel_values"]
        batch, (rows, columns) = len(pixel_values), (side * self.merge for side in grid)
        # transformers 5 computes with these positions, on the device; 4 makes its own of the grid and ignores them.
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

    def empty(self, batch: int) -> Condition:
        """The empty condition, `batch` times: mode text with the caption "", one token, the end of the turn. Computed when it is
        first asked for, which must be before `release`, and of one turn, so that its bits do not depend on the batch."""
        kept = self._empty
        if kept is None or (kept.hidden_states.device, kept.hidden_states.dtype) != (self.device, self.dtype):
            kept = self._empty = self.encode(None, [""], "text")
        return kept.repeated(batch)

    def caption_tokens(self, caption: str) -> int:
        """Tokens of a caption before it is cut to `max_caption_tokens`; 0: it is blank."""
        return len(self.chat.caption(caption))

    def turn(
        self, mode: Mode, size: tuple[int, int] | None = None, caption: str = "", limits: tuple[int, int] | None = None
    ) -> Turn:
        """The cut chat turn of one sample. size: (height, width) of its picture, px, which only mode text does without;
        limits: as in `encode`."""
        before, between, after = self.chat.surroundings(mode)
        words = self.chat.caption(caption) if mode != "image" else []
        cut = len(words) > self.max_caption_tokens
        words = words[: self.max_caption_tokens]
        if mode == "text" and not words:
            words = after[:1]  # an empty caption still needs one token: the end of the turn
        if mode == "text":
            return Turn(before + words, list(range(len(before), len(before) + len(words))), None, cut=cut)
        if size is None:
            raise ValueError(f"mode {mode}: a turn with an image needs the picture's size")
        rows, columns = self.grid(*size, limits)
        head = before + words + between
        start = len(head)
        image = range(start, start + rows * columns)
        select = [*image, *range(len(before), len(before) + len(words))]
        return Turn(head + [self.config.image_token_id] * len(image), select, (rows, columns), start, cut)

    def collate(self, turns: Sequence[Turn]) -> tuple[Tensor, Layout]:
        """Pad turns on the right: input_ids (B, S) and the layout of the Condition, on the device."""
        lengths, counts = [len(t.input_ids) for t in turns], [len(t.select) for t in turns]
        S, T = max(lengths), max(counts)
        input_ids = torch.full((len(turns), S), self.pad_token_id)
        position_ids = torch.ones(3, len(turns), S, dtype=torch.long)
        select = torch.zeros(len(turns), T, dtype=torch.long)
        for i, t in enumerate(turns):
            input_ids[i, : lengths[i]] = torch.tensor(t.input_ids)
            position_ids[:, i, : lengths[i]] = mrope_position_ids(lengths[i], t.image_start, t.grid)
            select[i, : counts[i]] = torch.tensor(t.select)
        attention_mask = length_mask(lengths).long() if min(lengths) < S else None
        select_mask = length_mask(counts) if min(counts) < T else None
        device = self.device
        layout: Layout = {
            "position_ids": to_device(position_ids, device),
            "select": to_device(select, device),
            "attention_mask": None if attention_mask is None else to_device(attention_mask, device),
            "select_mask": None if select_mask is None else to_device(select_mask, device),
        }
        return to_device(input_ids, device), layout

    @property
    def device(self) -> torch.device:
        """Where inputs go: the weights' device, or the one to which accelerate moves them; kept by `release`."""
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

    @property
    def limits(self) -> dict[str, int]:
        """Fewest and most pixels of a picture, as arguments of the image processor."""
        return self._pixels(None)

    def _pixels(self, limits: tuple[int, int] | None) -> dict[str, int]:
        least, most = limits or (self.min_image_tokens, self.max_image_tokens)
        return {"min_pixels": least * self.cell**2, "max_pixels": most * self.cell**2}

    def _measure_grid(self, height: int, width: int, limits: tuple[int, int] | None) -> tuple[int, int]:
        blank = torch.zeros(3, height, width, dtype=torch.uint8)
        out = self.processor.image_processor(images=[blank], return_tensors="pt", **self._pixels(limits))
        _, rows, columns = out["image_grid_thw"][0].tolist()
        return rows // self.merge, columns // self.merge


def joined(
    one_each: Condition, turns: Sequence[Turn], counts: Sequence[int], strengths: Sequence[Sequence[float]] | None
) -> Condition:
    """The turns of one sample after the other -> its condition: the image tokens of its first counts[b] turns, then the first
    turn's caption.

    one_each: a condition of each turn. strengths: of each sample's references; None: all are 1."""
    most, S = len(turns) // len(counts), one_each.hidden_states.shape[1]
    places: list[list[int]] = []
    weights: list[list[float]] = []
    for b, count in enumerate(counts):
        mine, tokens, factors = turns[b * most : (b + 1) * most], list[int](), list[float]()
        for r, turn in enumerate(mine[:count]):
            image = turn.select[: turn.image_tokens]
            tokens += [r * S + place for place in image]
            factors += [1.0 if strengths is None else strengths[b][r]] * len(image)
        words = mine[0].select[mine[0].image_tokens :]
        places.append(tokens + words)
        weights.append(factors + [1.0] * len(words))
    lengths, device = [len(row) for row in places], one_each.select.device
    T = max(lengths)
    select = torch.zeros(len(counts), T, dtype=torch.long)
    factor = torch.ones(len(counts), T)
    for b, (row, own) in enumerate(zip(places, weights, strict=True)):
        select[b, : len(row)], factor[b, : len(row)] = torch.tensor(row), torch.tensor(own)
    return replace(
        one_each,
        select=to_device(select, device),
        select_mask=to_device(length_mask(lengths), device) if min(lengths) < T else None,
        turns=most,
        log_weights=to_device(factor.log(), device) if bool((factor != 1).any()) else None,
    )
