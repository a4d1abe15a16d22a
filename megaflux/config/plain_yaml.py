"""YAML 1.2's plain scalars on top of PyYAML: what a configuration file says is what its author meant.

Why not PyYAML alone: it reads YAML 1.1, in which the aspect ratio 16:9 is the number 969 (base 60), the learning rate 1e-5
is text, and `no` is false. The loader here follows YAML 1.2.2, section 10.3.2, and refuses what a configuration does not
need: duplicate keys, keys that are not words, tags (!!python/object would run code) and aliases (a few lines of them expand
without end). What `dump` writes reads back equal, here and with PyYAML's own loader.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 64  # levels of nesting
MAX_DIGITS = 40  # of a whole number: no field needs more than 16, and Python refuses to print more than 4300

_SCALARS: tuple[tuple[str, str, str], ...] = (  # (tag, pattern, first characters)
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


def load(text: str) -> Any:
    """The document as dicts, lists and scalars; None for an empty one. Raises yaml.YAMLError for invalid text."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def dump(values: Any) -> str:
    """Text that `load` reads back equal; keys in the order given."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # of this class alone: none of YAML 1.1's
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"alias *{event.anchor}, write out what it stands for"
        elif getattr(event, "tag", None) is not None:
            problem = f"tag {event.tag.removeprefix('tag:yaml.org,2002:')!r}, leave it out"
        elif isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            problem = "half a surrogate pair, so not valid UTF-8; take it out"
        elif self.depth == MAX_DEPTH:
            problem = "nested too deeply"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                what = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                problem = f"key {what} must be a word, as every key"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            problem = f"a number of {len(node.value)} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


class _Dumper(yaml.SafeDumper):
    """Keeps YAML 1.1's resolvers beside 1.2's, so that text which either would read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # Unquoted, PyYAML writes some line breaks, above all in keys, in a way that it reads back as others
    style = '"' if re.search("[\0-\x1f\x7f-\xa0\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _characters = ["" if c == "\0" else c for c in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _characters)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_list(data))
