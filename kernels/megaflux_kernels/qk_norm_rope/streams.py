"""What qk_norm_rope reads and keeps. Named tuples: torch.compile and pytrees see through them. Shapes as in the package."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megaflux_kernels.dispatch import rows


class Stream(NamedTuple):
    """Packed q, k and v of one stream, image or text, with the weights of their RMSNorms."""

    qkv: Tensor
    """(B, tokens, 3 H D), [q | k | v]; any strides but the last, which is 1 (a slice of a wider product)."""
    norm_q: Tensor
    """(D,)."""
    norm_k: Tensor
    """(D,)."""

    def rows(self) -> Stream:
        """The same with unit stride in every last dimension; a tensor is copied only where it has another."""
        return Stream(rows(self.qkv), rows(self.norm_q), rows(self.norm_k))


class Saved(NamedTuple):
    """What the backward pass reads beside the gradients."""

    q: Tensor
    """(B, S, H, D), as `forward` returned it; so are k and rstd."""
    k: Tensor
    rstd: Tensor
    """(2, B, S, H): 1 / rms of q and of k."""
    norm_q: Tensor
    norm_k: Tensor
    cos: Tensor
    sin: Tensor
    txt_norm_q: Tensor | None = None
    """The text stream's norm weights; None without text."""
    txt_norm_k: Tensor | None = None
    qkv: Tensor | None = None
    """The input of `forward`, kept where the norm weights are not `invertible`; None: it is recovered from q and k."""
    txt_qkv: Tensor | None = None
    text_tokens: int = 0
    """T."""

    def rows(self) -> Saved:
        """The same with unit stride in the last dimension of what came from the caller."""

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else rows(x)

        return self._replace(
            norm_q=rows(self.norm_q),
            norm_k=rows(self.norm_k),
            txt_norm_q=optional(self.txt_norm_q),
            txt_norm_k=optional(self.txt_norm_k),
            qkv=optional(self.qkv),
            txt_qkv=optional(self.txt_qkv),
        )
