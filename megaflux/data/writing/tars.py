"""WebDataset archives: .tar files, whose members with the same base name are one sample."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from megaflux.data.images import BadImage
from megaflux.data.writing import captions, pairing, recognise
from megaflux.data.writing.items import Item, LeftAside, Loaded, Reference, folded, printable
from megaflux.data.writing.options import NONE, Options

LINKS = 8  # of which one may lead to the next


@dataclass(frozen=True, slots=True)
class _Member:
    """An image or caption in an archive. offset, size: of its bytes. problem: a reason of images.REASONS, or None."""

    name: str
    offset: int
    size: int
    problem: str | None = None

    @property
    def base(self) -> str:
        """The name up to the first dot: WebDataset's name of a sample."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name without its suffix: up to the last dot."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + (file.rpartition(".")[0] or file)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()


@dataclass
class _Group:
    """The members with one base name, each list in the archive's order."""

    images: list[_Member] = field(default_factory=list)
    captions: list[_Member] = field(default_factory=list)


class TarFiles:
    """WebDataset archives. key: archive path, ":", base name, which ends at the first dot.

    Where that gives several images one base name, an image is a sample of its own, named up to its last dot, if it has a
    caption of its own or no image has just the base name ("22.05.png" and "22.06.png"); else it is skipped as another
    image of the same sample ("a.seg.png" beside "a.jpg"). "a.ref0.jpg", "a.ref1.png" are the references of "a.jpg", in the order of
    the numbers, and images like others where there is no "a" of any suffix. The listing records the position of each member's bytes, so
    that reading is a seek; links within an archive are followed.
    """

    kind = "tar files"
    attribution = None
    settings: dict[str, Any] = {}

    def __init__(self, root: Path, names: Sequence[str], options: Options) -> None:
        self.root = root
        self.names = names
        self.reader = options.caption_reader
        self.with_references = options.references != NONE
        self.aside = LeftAside()
        self._sharing = 0  # images that are samples of their own, without a caption of their own
        self._referring = self._references = 0  # images with references, and these

    @property
    def has_references(self) -> bool:
        """After `list_items`: whether any image has references."""
        return self._references > 0

    def list_items(self) -> list[Item]:
        """One item per image member and per caption without an image; those that cannot be used have a `problem`."""
        self.aside, self._sharing, self._referring, self._references = LeftAside(), 0, 0, 0
        items = [item for name in self.names for item in self._list_archive(name)]
        if self._sharing:
            self.aside.others.append(
                f"{self._sharing} images share their name up to the first dot, and its caption, with others; each is used"
            )
        if self._references:
            self.aside.others.append(f"{self._referring} images have {self._references} references (.ref0, .ref1, ...)")
        return items

    def remarks(self) -> list[str]:
        """What `list_items` left aside."""
        return self.aside.lines()

    def together(self, item: Item) -> object:
        """Reading an item is a seek, whatever was read before."""
        return item.key

    def _list_archive(self, name: str) -> Iterator[Item]:
        path = self.root / name
        length = path.stat().st_size
        damaged = length == 0
        members: list[tarfile.TarInfo] = []
        try:
            with tarfile.open(path, "r:") as archive:
                for info in archive:
                    members.append(info)
        except (tarfile.TarError, OSError, EOFError, ValueError):
            damaged = True
        damaged |= any(info.isreg() and info.offset_data + info.size > length for info in members)
        groups, repeated = self._groups(path, members, length)
        prefix = printable(name)
        for base, group in groups.items():
            yield from self._samples(name, prefix, base, group)
        for member_name in repeated:
            yield Item(f"{prefix}:{printable(member_name)} (again)", prefix, (), 0, "duplicate_key")
        if damaged:  # members after the damage cannot be counted: one entry represents them
            yield Item(f"{prefix}:(rest of the archive)", prefix, (), length, "damaged")

    def _groups(
        self, path: Path, members: Sequence[tarfile.TarInfo], length: int
    ) -> tuple[dict[str, _Group], list[str]]:
        """(base name -> images and captions, names that appear again)."""
        files = {posixpath.normpath(info.name): info for info in members}
        groups: dict[str, _Group] = {}
        seen: set[str] = set()
        repeated = []
        for info in members:
            if not (info.isreg() or info.islnk() or info.issym()):
                continue
            file = info.name.rpartition("/")[2]
            is_caption = file.lower().endswith(captions.SUFFIXES)
            if file.startswith(".") or not (is_caption or recognise.has_image_suffix(file) or "." not in file):
                if file.lower().endswith(recognise.CAPTION_LIKE) and not file.startswith("."):
                    self.aside.caption_like.append(printable(f"{path.name}:{info.name}"))
                else:
                    self.aside.add(info.name)
                continue
            target = _resolved(info, files)
            problem = None
            if target is None or target.issparse():
                problem = "unreadable"
            elif target.offset_data + target.size > length:
                problem = "damaged"
            if "." not in file and not (target and problem is None and _is_image(path, target)):
                self.aside.add(info.name)
                continue
            member = _Member(info.name, target.offset_data if target else 0, target.size if target else 0, problem)
            unique = member.base + info.name[len(member.base) :].lower()
            if unique in seen:
                repeated.append(info.name)
                continue
            seen.add(unique)
            group = groups.setdefault(folded(member.base), _Group())
            (group.captions if is_caption else group.images).append(member)
        return groups, repeated

    def _samples(self, name: str, prefix: str, base: str, group: _Group) -> Iterator[Item]:
        """The items of the members with one base name."""
        if not group.images:
            key = f"{prefix}:{printable(base)}"
            yield Item(key, key, (), sum(caption.size for caption in group.captions), "missing_image")
            return
        references = _references_of(group) if self.with_references else {}
        if references:
            group, unused = _without(group, references)
            self.aside.caption_like += [f"{prefix}:{printable(caption.name)}" for caption in unused]
        by_stem: dict[str, list[_Member]] = {}
        for caption in group.captions:
            by_stem.setdefault(folded(caption.stem), []).append(caption)
        own = {image.name: _captions_of(by_stem, image) for image in group.images}
        owned = {caption.name for found in own.values() for caption in found}
        shared = _in_order([caption for caption in group.captions if caption.name not in owned])
        main = next((image for image in group.images if folded(image.stem) == base), None)
        if main is None and len(group.images) == 1:
            main = group.images[0]
        if len(group.images) > 1 or owned:  # else `a.meta.json` is the only image's
            self.aside.caption_like += [f"{prefix}:{printable(c.name)}" for c in shared if folded(c.stem) != base]
            shared = [caption for caption in shared if folded(caption.stem) == base]
        total = sum(member.size for member in (*group.images, *group.captions))
        for image in group.images:
            found = own[image.name] or shared
            split_key = key = f"{prefix}:{printable(base if image is main else image.stem)}"
            problem = image.problem
            if main is None and not own[image.name]:
                split_key = f"{prefix}:{printable(base)}"  # views of one thing stay together
                self._sharing += 1
            elif image is not main and main is not None and (not own[image.name] or image.stem == main.stem):
                key, found, problem = f"{prefix}:{printable(image.name)}", [], "extra_image"
            size = total if len(group.images) == 1 else image.size + sum(caption.size for caption in found[:1])
            members = references.get(folded(image.stem), []) if problem is None else []
            size += sum(member.size for member in members)
            self._referring += bool(members)
            self._references += len(members)
            where = (
                name,
                (image.offset, image.size),
                tuple((c.offset, c.size, c.suffix) for c in found),
                tuple(members),
            )
            yield Item(key, split_key, where, size, problem)

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The members' bytes and captions."""
        opened: str | None = None
        file: BinaryIO | None = None
        try:
            for item in items:
                name, image, told, members = item.where
                if file is None or name != opened:
                    if file:
                        file.close()
                    opened, file = name, open(self.root / name, "rb")  # noqa: SIM115  kept over items
                texts = ((_bytes_at(file, offset, size), suffix) for offset, size, suffix in told)
                reader = replace(self.reader, edits=bool(members))
                caption = captions.first(reader.of_file(data, suffix) for data, suffix in texts)
                yield Loaded(
                    _bytes_at(file, *image), caption, tuple(_read_reference(file, member) for member in members)
                )
        finally:
            if file:
                file.close()


def _references_of(group: _Group) -> dict[str, list[_Member]]:
    """Stem of an image -> its references in the order of their numbers."""
    named = [(image, pairing.reference_of(image.stem)) for image in group.images]
    targets = {folded(image.stem) for image, found in named if found is None}
    numbered: dict[str, list[tuple[int, str, _Member]]] = {}
    for image, found in named:
        if found is not None and folded(found[0]) in targets:
            numbered.setdefault(folded(found[0]), []).append((found[1], image.name, image))
    return {stem: [member for _, _, member in sorted(of, key=lambda one: one[:2])] for stem, of in numbered.items()}


def _without(group: _Group, references: Mapping[str, Sequence[_Member]]) -> tuple[_Group, list[_Member]]:
    """(the group without these images and their captions, those captions)."""
    names = {member.name for members in references.values() for member in members}
    stems = {
        folded(stem) for members in references.values() for member in members for stem in (member.stem, member.name)
    }
    kept = _Group([image for image in group.images if image.name not in names])
    unused: list[_Member] = []
    for caption in group.captions:
        (unused if folded(caption.stem) in stems else kept.captions).append(caption)
    return kept, unused


def _read_reference(file: BinaryIO, member: _Member) -> Reference:
    data = BadImage(member.problem) if member.problem else _bytes_at(file, member.offset, member.size)
    return Reference(data, printable(member.name))


def _captions_of(by_stem: Mapping[str, Sequence[_Member]], image: _Member) -> list[_Member]:
    """The captions that have an image's whole name, or that up to its last dot, the first one to be read first."""
    stems = dict.fromkeys((folded(image.stem), folded(image.name)))
    return _in_order([caption for stem in stems for caption in by_stem.get(stem, ())])


def _in_order(found: Sequence[_Member]) -> list[_Member]:
    """These captions without those that cannot be read, in the order of captions.SUFFIXES."""
    return sorted((c for c in found if not c.problem), key=lambda caption: captions.SUFFIXES.index(caption.suffix))


def _resolved(info: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member with the bytes of a file or link; None for a link to what is not in the archive, or to itself."""
    found: tarfile.TarInfo | None = info
    for _ in range(LINKS):
        if found is None or found.isreg():
            return found
        folder = "" if found.islnk() else posixpath.dirname(found.name)
        target = posixpath.normpath(posixpath.join(folder, found.linkname))
        found = members.get(target) if found.islnk() or found.issym() else None
    return None


def _is_image(path: Path, info: tarfile.TarInfo) -> bool:
    with open(path, "rb") as file:
        return recognise.starts_like_image(_bytes_at(file, info.offset_data, min(info.size, 32)))


def _bytes_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
