"""Which parameters of a FLUX block the component sets name (`components` of a stage). A leaf: imports no torch.

Names are diffusers' (FluxTransformerBlock, FluxSingleTransformerBlock), relative to the block: attn.to_q.weight.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

Kind = Literal["double", "single", "context_embedder"]


def _with_bias(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
NAMES: dict[Kind, tuple[str, ...]] = {
    "double": (
        *_with_bias(("norm1.linear", "norm1_context.linear", *_QKV, "attn.to_out.0")),
        *_with_bias(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")),
        *(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),
        *_with_bias(("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")),
    ),
    "single": (
        *_with_bias(("norm.linear", *_QKV, "proj_mlp", "proj_out")),
        *(f"attn.norm_{name}.weight" for name in ("q", "k")),
    ),
    "context_embedder": ("context_embedder.weight", "context_embedder.bias"),
}
"""Every parameter of a block of each kind; and context_embedder, of which FLUX has one."""

_EVERYTHING = {"double": r".+", "single": r".+", "context_embedder": r".+"}
_NORM = r"(.+\.)?norm\w*\..+"
SETS: dict[str, dict[str, str]] = {
    # the released code's list, narrower than whole blocks
    "attention": {
        "double": r"(attn\.(to_q|to_k|to_v|to_out\.0)|norm1\.linear|norm1_context\.linear)\.(weight|bias)",
        "single": r"(attn\.(to_q|to_k|to_v)|norm\.linear)\.(weight|bias)",
        "context_embedder": r".+",
    },
    "block": _EVERYTHING,
    "model": _EVERYTHING,
    "image_branch": {
        "double": r"(attn\.(to_[qkv]|to_out\.0|norm_[qk])|norm1\.linear|ff\.net\.\d(\.proj)?)\.(weight|bias)"
    },
    "norms": {"double": _NORM, "single": _NORM},
}
"""Set -> kind of block -> the names that it holds; a kind that is not there has none."""


@cache
def holds(components: str | tuple[str, ...], kind: Kind, name: str) -> bool:
    """Whether a stage's `components` name a parameter of a listed block, or of context_embedder. name: relative to the block."""
    if isinstance(components, str):
        pattern = SETS[components].get(kind)
        return pattern is not None and re.fullmatch(pattern, name) is not None
    return any(_matches(entry, name) for entry in components)


def _matches(entry: str, name: str) -> bool:
    """Whether an entry of a list is a parameter's name, a module's that holds it (attn.to_q), or an expression for either."""
    return re.fullmatch(rf"(?:{entry})(\..+)?", name) is not None


def list_problem(components: str | tuple[str, ...], kinds: Sequence[Kind]) -> str | None:
    """What is wrong with a list of names for blocks of these kinds, one line; None: nothing, or it is a set.

    Every entry must name a parameter, and no parameter may be named by two entries."""
    if isinstance(components, str):
        return None
    names = dict.fromkeys(name for kind in (*kinds, "context_embedder") for name in NAMES[kind])
    for entry in components:
        if not any(_matches(entry, name) for name in names):
            elsewhere = [kind for kind in ("double", "single") if any(_matches(entry, name) for name in NAMES[kind])]
            alike = difflib.get_close_matches(entry.lower(), SETS, n=1) if re.fullmatch(r"[A-Za-z_-]+", entry) else []
            why = f"did you mean the set {alike[0]}?" if alike else "names are as attn.to_q or ff.net.2.weight"
            if elsewhere:
                why = f"the stage lists no {elsewhere[0]} block"
            return f"{entry!r} matches no parameter of the stage's blocks ({why})"
    for name in names:
        twice = [entry for entry in components if _matches(entry, name)]
        if len(twice) > 1:
            return f"{name} is named twice, by {twice[0]!r} and by {twice[1]!r}; name it once"
    return None
