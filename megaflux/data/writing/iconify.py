"""Icon sets as a grid of contents and styles: each name in each set that has it, with references in the same style."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megaflux.common.errors import UserError
from megaflux.common.paths import ICONIFY
from megaflux.data.buckets import Bucket, nearest_bucket
from megaflux.data.images import BadImage, encode
from megaflux.data.writing.captions import Caption
from megaflux.data.writing.cells import Cell, held_out_contents, held_out_of
from megaflux.data.writing.icon_sets import IconSet, drawn, icon_of, open_renderer, read_set
from megaflux.data.writing.items import Item, Loaded, Reference
from megaflux.data.writing.options import NONE, SHARED, Options
from megaflux.data.writing.split import draw, is_held_out

MEMO_BYTES = 64 << 20  # of reference files kept by a process; each picture is a reference of several others


def words_of(name: str) -> str:
    """The caption of an icon: its name in words, "cat-face" -> "cat face"."""
    return " ".join(name.replace("-", " ").split())


class Iconify:
    """A source (see megaflux.data.writing.items.Source): the icons of one or several sets. key: "SET/NAME".

    With options.pairs, an icon's references are other names of its own set, drawn by hash of its key among those that are trained
    on, for held-out icons too: so no held-out picture is ever seen, and no reference is the target.
    """

    kind = ICONIFY

    def __init__(self, files: Sequence[Path], buckets: Sequence[Bucket], options: Options) -> None:
        """files: of the sets, as icon_sets.files_of finds them. Raises UserError for files that are not icon sets, and options
        that these sets cannot satisfy."""
        self._options = options
        self._buckets = tuple(buckets)
        self._render = open_renderer()
        self._sets = _chosen([read_set(file) for file in files], options.sets)
        if options.pairs and options.references == NONE:
            raise UserError(f"--pairs {options.pairs} writes references: not with --references {NONE}")
        if options.hold_out_cells and len(self._sets) < 2:
            raise UserError(
                f"--hold-out-cells: of the one set {next(iter(self._sets))} no cell can be held out whose name is seen in another; "
                "give two sets, or --hold-out-contents"
            )
        self._cells = self._all_cells()
        self._by_cells = bool(options.hold_out_cells or options.hold_out_contents)
        names = {name for name, _ in self._cells}
        if self._by_cells:
            self._whole = held_out_contents(names, options.hold_out_contents)
            self._held = held_out_of(self._cells, options.hold_out_cells, options.hold_out_contents)
        else:
            self._whole = {name for name in names if is_held_out(self._split_key(name), options.held_out)}
            self._held = {cell for cell in self._cells if cell[0] in self._whole}
        self._keep(options.most_contents)
        self._training = self._training_names()
        self._memo: dict[str, bytes | BadImage] = {}
        self._memo_bytes = 0

    def _all_cells(self) -> list[Cell]:
        """Every (name, set), in order of the sets and of their names."""
        shared = set.intersection(*(set(one.icons) for one in self._sets.values()))
        if self._options.contents == SHARED and not shared:
            raise UserError(
                f"--contents {SHARED}: no name is in all of {', '.join(self._sets)}; choose others by --sets"
            )
        wanted = shared if self._options.contents == SHARED else None
        return [
            (name, prefix)
            for prefix, one in self._sets.items()
            for name in sorted(one.icons)
            if wanted is None or name in wanted
        ]

    def _keep(self, most: int | None) -> None:
        """Leave only the cells of `most` names, the first by a draw by hash. The held-out ones among them are those of the whole grid, so
        that what leaves out the whole grid's has seen none of the smaller one's."""
        names = {name for name, _ in self._cells}
        if most is None or most >= len(names):
            return
        kept = set(sorted(names, key=lambda name: (draw(f"kept {name}"), name))[:most])
        self._cells = [cell for cell in self._cells if cell[0] in kept]
        self._held = {cell for cell in self._held if cell[0] in kept}
        self._whole &= kept

    def _training_names(self) -> dict[str, list[str]]:
        """Set -> its names that are trained on, sorted."""
        names: dict[str, list[str]] = {prefix: [] for prefix in self._sets}
        for name, prefix in self._cells:
            if (name, prefix) not in self._held:
                names[prefix].append(name)
        least = 2 if self._options.pairs else 1
        for prefix, there in names.items():
            if len(there) < least:
                raise UserError(
                    f"{prefix}: {len(there)} icons to train on, needed are {least}; "
                    "lower the share that is held out, or leave the set out by --sets"
                )
        return names

    @property
    def attribution(self) -> str:
        """Of all sets, by ";"."""
        return "; ".join(one.attribution for one in self._sets.values())

    @property
    def has_references(self) -> bool:
        """Whether the icons are paired."""
        return self._options.pairs is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The grid: its styles, how many names and held-out cells it has (those of held-out contents not counted), and the
        contents that are held out in all styles."""
        return {
            "styles": list(self._sets),
            "names": len({name for name, _ in self._cells}),
            "held_out_cells": sum(name not in self._whole for name, _ in self._held),
            "held_out_contents": sorted(self._whole),
        }

    def _split_key(self, name: str) -> str:
        """What --held-out draws by: the name, so that a thing is trained on in all sets or in none; of a single set the key."""
        return name if len(self._sets) > 1 else f"{next(iter(self._sets))}/{name}"

    def list_items(self) -> list[Item]:
        """Every icon, by set and name: one process draws most of a set, and so its references once. Where neither cells nor contents
        are held out, --held-out draws names, in all sets alike."""
        items = []
        decided = self._by_cells or self.has_references  # else held_out.top_up may add what is a reference already
        for name, prefix in self._cells:
            icon = self._sets[prefix].icons[name]
            body = icon.get("body") if isinstance(icon, dict) else None
            key = f"{prefix}/{name}"
            held = (name, prefix) in self._held if decided else None
            items.append(Item(key, self._split_key(name), (prefix, name), len(str(body)), held_out=held))
        return items

    def remarks(self) -> list[str]:
        """Each set, what was left aside of it, and what the sets share."""
        lines = []
        for prefix, one in self._sets.items():
            line = f"{prefix}: {len(one.icons)} icons; left aside: {one.hidden} hidden, {one.aliases} aliases"
            lines.append(line if one.has_licence else f"{line}; states no licence: find it before you publish anything")
        if len(self._sets) > 1:
            shared = set.intersection(*(set(one.icons) for one in self._sets.values()))
            lines.append(f"{len(shared)} names are in all {len(self._sets)} sets")
        return lines

    def together(self, item: Item) -> object:
        """Each icon is drawn alone."""
        return item.key

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """Draw each icon on the bucket nearest to its shape, with its name in words and its references."""
        for item in items:
            prefix, name = item.where
            try:
                image = self._draw(prefix, name)
            except BadImage as error:
                yield error
                continue
            references: tuple[Reference, ...] = ()
            if self.has_references:
                references = tuple(self._references(prefix, name))
                if item.key not in self._memo and not item.held_out:
                    self._kept(item.key, image)
            words = words_of(name)
            yield Loaded(image, Caption((words,) if words else ()), references)

    def _draw(self, prefix: str, name: str) -> Image.Image:
        icon = icon_of(self._sets[prefix], name)
        bucket = nearest_bucket(*icon.shape, self._buckets)
        return drawn(icon, bucket.size, self._render)

    def _references(self, prefix: str, name: str) -> Iterator[Reference]:
        """Other training icons of the set, each once, in the order of draws by hash; those that cannot be drawn are passed over.
        All of them, where there are fewer than options.pair_references."""
        pool = [other for other in self._training[prefix] if other != name]
        wanted = self._options.pair_references
        number = 0
        while pool and wanted:
            other = pool.pop(draw(f"reference {number} of {prefix}/{name}") % len(pool))
            number += 1
            file = self._file(prefix, other)
            if isinstance(file, bytes):
                wanted -= 1
                yield Reference(file, f"{prefix}/{other}")

    def _file(self, prefix: str, name: str) -> bytes | BadImage:
        """An icon as the file of a reference."""
        key = f"{prefix}/{name}"
        if key not in self._memo:
            try:
                return self._kept(key, self._draw(prefix, name))
            except BadImage as error:
                self._memo[key] = error
        return self._memo[key]

    def _kept(self, key: str, image: Image.Image) -> bytes:
        """The file of a picture, kept for the next item that has it as a reference."""
        file = encode(image, self._options.encoding, self._options.quality)
        if self._memo_bytes + len(file) > MEMO_BYTES:
            self._memo.clear()
            self._memo_bytes = 0
        self._memo[key] = file
        self._memo_bytes += len(file)
        return file


def _chosen(sets: Sequence[IconSet], wanted: Sequence[str]) -> dict[str, IconSet]:
    """Prefix -> set, sorted, of those that are wanted, or of all. Raises UserError for unknown ones, and two of one name."""
    found: dict[str, IconSet] = {}
    for one in sets:
        if one.prefix in found:
            raise UserError(f"{one.file}: the set {one.prefix}, as {found[one.prefix].file} is too; give one of them")
        found[one.prefix] = one
    if unknown := [name for name in wanted if name not in found]:
        raise UserError(f"--sets {','.join(unknown)}: not there; there are {', '.join(sorted(found))}")
    chosen = {prefix: found[prefix] for prefix in sorted(wanted or found)}
    if empty := [prefix for prefix, one in chosen.items() if not one.icons]:
        raise UserError(f"{chosen[empty[0]].file}: the set {empty[0]} has no icons that are not hidden; leave it out")
    return chosen
