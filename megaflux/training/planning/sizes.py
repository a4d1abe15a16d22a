"""What a run's memory, FLOPs and speed are computed from: its configuration, its ranks, and the shapes of its networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megaflux.config.schema import Config
from megaflux.data.buckets import Bucket, make_buckets
from megaflux.models.pretrained import meta_models
from megaflux.models.tokens import Tokens
from megaflux.training.ds_config import batch_sizes, uses_kernels, weight_bytes
from megaflux.training.planning.costs import token_counts


@dataclass(frozen=True, eq=False)
class Sizes:
    """A run without its weights."""

    config: Config
    ds_config: dict[str, Any]
    """DeepSpeed's configuration."""
    ranks: int
    module: Any
    """Qwen2VLFlux on the meta device (`meta_models`), whose libraries' types a type checker does not see."""
    trunk: Any
    """Qwen2VLModel without the last layers that are in `module`, on the meta device."""
    uneven: Sequence[bool] | None = None
    """Of each FLUX block, whether it also keeps its q, k, v product (`flux.uneven_norms`); None: none does."""

    @classmethod
    def of(cls, config: Config, ds_config: dict[str, Any], ranks: int, uneven: Sequence[bool] | None = None) -> Sizes:
        """With the networks built from the configuration. UserError where a local folder that it names is damaged."""
        return cls(config.for_world(ranks), ds_config, ranks, *meta_models(config), uneven)

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        """Every bucket of the configuration."""
        return make_buckets(self.config.data.aspect_ratios, self.config.data.longest_side)

    @property
    def blocks(self) -> int:
        """Number of FLUX blocks."""
        transformer = self.module.transformer
        return len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)

    @property
    def fused(self) -> bool:
        """Whether FLUX runs on megaflux_kernels."""
        return uses_kernels(self.config, self.ds_config)

    @property
    def width(self) -> int:
        """Bytes per value of weights and activations."""
        return weight_bytes(self.ds_config)

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch of one rank."""
        return batch_sizes(self.config.for_world(self.ranks)).micro

    @property
    def drawn(self) -> int:
        """Images of one bucket that a rank draws at a time."""
        return batch_sizes(self.config.for_world(self.ranks)).drawn

    def cut_into(self, micro_batch_size: int) -> Sizes:
        """The same run with another micro-batch."""
        return replace(self, config=self.config.with_batches(self.drawn, micro_batch_size))

    def cached(self, kinds: tuple[str, ...]) -> Sizes:
        """The same run with another data.cache."""
        data = self.config.data.model_copy(update={"cache": kinds})
        return replace(self, config=self.config.model_copy(update={"data": data}))

    def longest_tokens(self, bucket: Bucket) -> Tokens:
        """Sequence lengths of a bucket with the most references and the longest caption that the configuration allows."""
        tokens = token_counts(self.config, bucket, self.config.data.references.turns)
        caption = self.config.model.caption_max_tokens if self.config.data.condition.image_text else 0
        return replace(tokens, condition=tokens.condition + caption, turn=tokens.turn + caption)
