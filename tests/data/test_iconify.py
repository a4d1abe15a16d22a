"""Icon sets as a source: what is drawn, what is held out, whose pictures are references."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tree
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.located import located
from megaflux.config.parse import build_config
from megaflux.config.presets import PRESETS
from megaflux.data.buckets import make_buckets
from megaflux.data.images import BadImage
from megaflux.data.prepare import main, parse_arguments
from megaflux.data.reference_size import COLUMN
from megaflux.data.references import unpack
from megaflux.data.storage.dataset import SPLITS, describe, read_dataset_info
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_reference
from megaflux.data.writing.build import prepare
from megaflux.data.writing.cells import held_out_cells, held_out_contents, held_out_of
from megaflux.data.writing.icon_sets import drawn, icon_of, open_renderer, read_set
from megaflux.data.writing.options import ICONIFY_DEFAULTS, Options
from megaflux.data.writing.sources import open_source, usual_options
from megaflux.data.writing.split import draw, is_held_out
from megaflux.training.prepare_data import prepare_data

pytest.importorskip("resvg_py")

BUCKETS = make_buckets(("1:1",), 32)
NAMES = [
    f"{adjective}-{noun}" for adjective in ("big", "old", "red", "wet", "shy") for noun in ("cat", "sun", "hat", "map")
]
RED, BLUE = (255, 0, 0), (0, 0, 255)
HALVES = '<path fill="red" d="M0 0h8v16H0z"/><path fill="blue" d="M8 0h8v16H8z"/>'  # left red, right blue, of 16 x 16


def write_set(folder: Path, prefix: str, icons: dict, beside: dict | None = None, **more) -> Path:
    """folder/prefix/icons.json, and info.json where `beside` is given."""
    (folder / prefix).mkdir(parents=True)
    file = folder / prefix / "icons.json"
    file.write_text(json.dumps({"prefix": prefix, "icons": icons, **more}))
    if beside is not None:
        (folder / prefix / "info.json").write_text(json.dumps(beside))
    return file


def square(number: int, colour: str) -> dict:
    return {"body": f'<path fill="{colour}" d="M{number % 5} {number // 5}h{4 + number % 3}v{3 + number % 7}h-2z"/>'}


def write_grid(folder: Path) -> Path:
    """Three sets of NAMES, each with a name of its own, hidden icons and aliases."""
    for number, (prefix, colour) in enumerate((("ink", "black"), ("oil", "#c40"), ("wax", "#06c"))):
        icons = {name: square(n, colour) for n, name in enumerate(NAMES)}
        icons |= {f"only-{prefix}": square(3, colour), "gone": {**square(1, colour), "hidden": True}}
        licence = {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://a.example/by"}
        info = {"name": f"Set {number}", "author": {"name": "Ann", "url": "https://a.example"}, "license": licence}
        write_set(folder, prefix, icons, info, aliases={"kitten": {"parent": NAMES[0]}})
    return folder


def options_of(**changed) -> Options:
    return Options(**{**ICONIFY_DEFAULTS, "longest_side": 32, "chunk": 16, **changed})


HELD = {"hold_out_cells": 0.3, "hold_out_contents": 0.25, "held_out": 0.0}


def samples(out: Path) -> dict[str, dict[str, dict]]:
    """split -> key -> sample."""
    info = read_dataset_info(out)
    return {
        split: {one["key"]: one for bucket, _ in info.filled(split) for one in read_split(out, split, bucket)}
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    return write_grid(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def prepared(grid, tmp_path_factory) -> Path:
    """The grid with references, cells and contents held out."""
    out = tmp_path_factory.mktemp("grid") / "out"
    options = options_of(contents="shared", pairs="same-style", pair_references=3, **HELD)
    prepare(f"iconify:{grid}", out, options, workers=1, progress=False)
    return out


# Which cells are held out


names = st.sets(st.text("abc-", min_size=1, max_size=3), min_size=1, max_size=12)
shares = st.floats(0, 0.95)


@settings(deadline=None, max_examples=60)
@given(names, st.sets(st.sampled_from("pqrst"), min_size=1), shares, shares)
def test_every_name_and_style_keeps_a_cell(names, styles, share, contents_share):
    held = held_out_cells(names, styles, share, contents_share)
    assert held == held_out_cells(sorted(names, reverse=True), sorted(styles), share, contents_share)
    whole = held_out_contents(names, contents_share)
    assert {name for name in names if all((name, style) in held for style in styles)} == whole
    for style in styles:
        assert whole == names or any((name, style) not in held for name in names)
    drawn = {(n, s) for n in names - whole for s in styles if is_held_out(f"cell {s}/{n}", share)}
    single = {cell for cell in held if cell[0] not in whole}
    assert single <= drawn
    for name, style in drawn - single:  # what stayed, stayed as the last of its row or column
        row = {(name, one) for one in styles}
        column = {(one, style) for one in names - whole}
        assert row <= drawn or column <= drawn


@settings(deadline=None, max_examples=60)
@given(st.sets(st.tuples(st.sampled_from("abcdef"), st.sampled_from("pqr")), min_size=1), shares, shares)
def test_a_grid_with_gaps_keeps_the_same_promise(cells, share, contents_share):
    held = held_out_of(list(cells), share, contents_share)
    trained = cells - held
    whole = held_out_contents({name for name, _ in cells}, contents_share)
    assert {name for name, _ in trained} == {name for name, _ in cells} - whole
    assert {style for _, style in trained} == {style for name, style in cells if name not in whole}


def test_shares_and_that_other_names_do_not_matter():
    names, styles = [f"name {n}" for n in range(1000)], ["a", "b", "c", "d", "e"]
    held = held_out_cells(names, styles, 0.1, 0.02)
    whole = held_out_contents(names, 0.02)
    assert 10 <= len(whole) <= 32 and 420 <= len(held) - 5 * len(whole) <= 560
    assert held_out_cells(names[:500], styles, 0.1, 0.02) == {cell for cell in held if cell[0] in names[:500]}
    assert held_out_cells(names, styles, 0, 0) == set() and held <= held_out_cells(names, styles, 0.2, 0.04)


def test_of_a_row_that_is_drawn_as_a_whole_the_largest_draw_stays():
    styles = ("p", "q", "r")
    for name in ("a", "b", "c", "d"):
        others = [f"more {n}" for n in range(20)]  # so that no style has its last cell here
        held = held_out_cells([name, *others], styles, 0.999, 0)
        assert {s for s in styles if (name, s) not in held} == {max(styles, key=lambda s: draw(f"cell {s}/{name}"))}


def test_cells_are_known_without_reading_pictures():
    """Other training leaves out the same cells: no torch, no Pillow."""
    code = "import sys, megaflux.data.writing.cells; sys.exit(bool({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_part_of_the_grid_holds_out_what_the_whole_does(grid, prepared, tmp_path):
    options = options_of(contents="shared", pairs="same-style", pair_references=3, most_contents=6, **HELD)
    prepare(f"iconify:{grid}", tmp_path / "part", options, workers=1, progress=False)
    part, whole = samples(tmp_path / "part"), samples(prepared)
    keys = set(part["train"]) | set(part["held_out"])
    assert len(keys) == 3 * 6 and len({key.split("/")[1] for key in keys}) == 6
    names = {key.split("/")[1] for key in keys}
    unseen = read_dataset_info(tmp_path / "part").settings["source"]["held_out_contents"]
    assert unseen == [n for n in read_dataset_info(prepared).settings["source"]["held_out_contents"] if n in names]
    for split in SPLITS:
        assert set(part[split]) == set(whole[split]) & keys
        for key, one in part[split].items():
            assert one["image"] == whole[split][key]["image"]
    again = options_of(contents="shared", pairs="same-style", pair_references=3, most_contents=99, **HELD)
    prepare(f"iconify:{grid}", tmp_path / "all", again, workers=1, progress=False)
    assert {split: set(one) for split, one in samples(tmp_path / "all").items()} == {
        s: set(o) for s, o in whole.items()
    }


# What is drawn


def colour_at(image, x, y):
    return image.getpixel((x, y))


@pytest.mark.parametrize(
    ("icon", "left", "right", "top", "bottom"),
    [
        ({}, RED, BLUE, None, None),
        ({"hFlip": True}, BLUE, RED, None, None),
        ({"vFlip": True}, RED, BLUE, None, None),
        ({"rotate": 1}, None, None, RED, BLUE),  # clockwise
        ({"rotate": 2}, BLUE, RED, None, None),
        ({"rotate": 3}, None, None, BLUE, RED),
        ({"rotate": 5}, None, None, RED, BLUE),
        ({"rotate": 1, "hFlip": True}, None, None, BLUE, RED),  # the flip comes first
        ({"left": 8, "width": 8, "height": 8}, BLUE, BLUE, BLUE, BLUE),
    ],
)
def test_flips_turns_and_view_boxes(tmp_path, icon, left, right, top, bottom):
    one = read_set(write_set(tmp_path, "set", {"a": {"body": HALVES, **icon}}))
    image = drawn(icon_of(one, "a"), (32, 32), open_renderer())
    assert image.mode == "RGB" and image.size == (32, 32)
    places = {(4, 16): left, (27, 16): right, (16, 4): top, (16, 27): bottom}
    assert all(wanted is None or colour_at(image, *at) == wanted for at, wanted in places.items())


def test_an_icon_keeps_its_shape_in_the_middle_of_white(tmp_path):
    body = '<path fill="red" d="M-99-99h999v999h-999z"/>'  # reaches out of every view box
    icons = {"wide": {"body": body, "width": 32, "height": 8}, "turned": {"body": body, "width": 32, "rotate": 1}}
    one = read_set(write_set(tmp_path, "set", icons, height=16))  # the set's own default
    for name, across, down in (("wide", 32, 8), ("turned", 16, 32)):
        pixels = np.asarray(drawn(icon_of(one, name), (32, 32), open_renderer()))
        rows, columns = np.nonzero((pixels == RED).all(2))
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (across, down)
        assert abs(rows.mean() - 15.5) < 0.6 and abs(columns.mean() - 15.5) < 0.6
        assert (pixels == 255).all(2).sum() == 32 * 32 - across * down


def test_the_default_box_and_currentcolor(tmp_path):
    one = read_set(write_set(tmp_path, "set", {"a": {"body": '<path fill="currentColor" d="M0 0h16v16H0z"/>'}}))
    assert drawn(icon_of(one, "a"), (32, 32), open_renderer()).getextrema() == ((0, 0),) * 3


def test_what_cannot_be_drawn_is_skipped_with_a_reason(tmp_path):
    bad = {
        "a": {"body": "<path"},
        "b": {"body": HALVES, "width": 0},
        "c": {"body": HALVES, "height": "tall"},
        "d": {"width": 3},
        "e": "text",
        "f": {"body": '<path fill="white" d="M0 0h16v16H0z"/>'},
        "g": {"body": "<g/>"},
    }
    write_set(tmp_path / "in", "set", {**bad, **{f"good-{n}": square(n, "red") for n in range(4)}})
    out = tmp_path / "out"
    options = options_of(pairs="same-style", pair_references=9, held_out=0)
    info = prepare(f"iconify:{tmp_path / 'in'}", out, options, max_bad=7, workers=1, progress=False)
    assert info.bad == {"damaged": 5, "empty": 2} and info.samples("train") == 4
    listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert [one["key"] for one in listed] == [f"set/{name}" for name in bad] and all(
        "\n" not in str(one) for one in listed
    )
    assert "height is 'tall'" in listed[2]["detail"] and "refused" in listed[0]["detail"]
    for key, sample in samples(out)["train"].items():  # references are those that can be drawn, all of them but itself
        assert {one.name for one in unpack(sample[COLUMN])} == {f"set/good-{n}" for n in range(4)} - {key}


# The dataset


def test_the_grid_in_dataset_json_and_its_samples(prepared, grid):
    info, there = read_dataset_info(prepared), samples(prepared)
    whole = held_out_contents(NAMES, 0.25)
    cells = held_out_cells(NAMES, ("ink", "oil", "wax"), 0.3, 0.25)
    assert whole and len(cells) > 3 * len(whole)
    assert set(there["held_out"]) == {f"{style}/{name}" for name, style in cells}
    assert set(there["train"]) | set(there["held_out"]) == {f"{s}/{n}" for n in NAMES for s in ("ink", "oil", "wax")}
    source = info.settings["source"]
    assert (source["kind"], source["styles"], source["names"]) == ("iconify", ["ink", "oil", "wax"], len(NAMES))
    assert source["held_out_contents"] == sorted(whole) and source["held_out_cells"] == len(cells) - 3 * len(whole)
    assert f"grid: {len(NAMES)} names in 3 sets (ink, oil, wax)" in describe(info)
    assert f"held out: {source['held_out_cells']} cells (name, set), {len(whole)} names in all sets" in describe(info)
    for split in there.values():
        assert all(one["caption"] == key.rpartition("/")[2].replace("-", " ") for key, one in split.items())
    credit = "Set 0 by Ann, https://a.example. License: CC BY 4.0 (CC-BY-4.0), https://a.example/by"
    assert info.attribution == "; ".join(credit.replace("Set 0", f"Set {n}") for n in range(3))


def test_references_are_other_trained_names_in_the_same_style(prepared):
    there = samples(prepared)
    pictures = {key: from_reference(one["image"]) for key, one in there["train"].items()}
    several = set()
    for key, sample in itertools.chain(*(split.items() for split in there.values())):
        references = unpack(sample[COLUMN])
        names = [one.name for one in references]
        assert len(names) == len(set(names)) == 3 and key not in names
        for one in references:
            assert one.name in there["train"] and one.name not in there["held_out"]
            assert one.name.rpartition("/")[0] == key.rpartition("/")[0]
            assert bool(
                (from_reference(one.data) == pictures[one.name]).all()
            )  # the very picture, and of full strength
        assert {one.strength for one in references} == {1.0}
        several.add(tuple(names))
    assert len(several) > 0.9 * len(NAMES) * 3  # drawn for each picture anew


def test_the_same_bytes_from_any_number_of_processes(prepared, grid, tmp_path, monkeypatch):
    monkeypatch.setattr("megaflux.data.writing.iconify.MEMO_BYTES", 400)  # forgets nearly every reference
    options = options_of(contents="shared", pairs="same-style", pair_references=3, **HELD)
    prepare(f"iconify:{grid}", tmp_path / "out", options, workers=2, progress=False)
    assert tree(tmp_path / "out") == tree(prepared)


@pytest.mark.parametrize("paired", [False, True])
def test_held_out_draws_names_where_no_cells_are_asked_for(grid, tmp_path, paired):
    options = options_of(held_out=0.3, pairs="same-style" if paired else None)
    info = prepare(f"iconify:{grid}", tmp_path / "out", options, workers=1, progress=False)
    there = samples(tmp_path / "out")
    names = {split: {key.rpartition("/")[2] for key in keys} for split, keys in there.items()}
    assert names["held_out"] == {n for n in names["train"] | names["held_out"] if is_held_out(n, 0.3)} != set()
    assert not names["held_out"] & names["train"]
    assert info.settings["source"]["held_out_contents"] == sorted(names["held_out"])
    assert info.samples("train") + info.samples("held_out") == 3 * (len(NAMES) + 1)  # each set's own name too
    assert info.has_references == paired
    if paired:
        used = {one.name for keys in there.values() for sample in keys.values() for one in unpack(sample[COLUMN])}
        assert used <= set(there["train"])


@pytest.mark.parametrize("pairs", [None, "same-style"])
def test_a_single_set_holds_out_enough_but_no_reference(tmp_path, pairs):
    write_set(tmp_path / "in", "set", {f"a-{n}": square(n % 25, f"#{n:03}") for n in range(110)})
    options = options_of(longest_side=16, held_out=0.02, pairs=pairs, chunk=200)
    info = prepare(f"iconify:{tmp_path / 'in'}", tmp_path / "out", options, workers=1, progress=False)
    there = samples(tmp_path / "out")
    if pairs is None:  # as from every source: at least 8, of 100 pictures
        assert info.samples("held_out") == 8
    else:  # a picture that is moved to the held-out ones would be a reference already
        assert set(there["held_out"]) == {f"set/a-{n}" for n in range(110) if is_held_out(f"set/a-{n}", 0.02)} != set()
        used = {one.name for split in there.values() for sample in split.values() for one in unpack(sample[COLUMN])}
        assert used <= set(there["train"])


def test_a_run_prepares_its_icons(grid, tmp_path):
    values = PRESETS["tiny"]()
    data = {
        "path": str(tmp_path / "data"),
        "source": f"iconify:{grid}",
        "longest_side": 32,
        "aspect_ratios": ["1:1", "2:1"],
    }
    prepare_data(build_config(values | {"data": values["data"] | data}), World(0, 1))
    info = read_dataset_info(tmp_path / "data")
    assert info.counts["train"]["1:1"] > 50 and info.samples("held_out") > 0 and info.settings["encoding"] == "png"


# Where sets are, and what is refused


def listed(source: str, **options) -> list[str]:
    opened, _ = open_source(source, BUCKETS, options_of(**options))
    items = opened.list_items()
    assert items == opened.list_items()
    return [item.key for item in items]


def test_ways_to_name_the_same_sets(grid, tmp_path, monkeypatch):
    everything = listed(f"iconify:{grid}")
    assert len(everything) == 3 * (len(NAMES) + 1) and not {"ink/gone", "ink/kitten"} & set(everything)
    each = [str(grid / name) for name in ("wax", "ink", "oil")]
    assert listed(f"iconify:{','.join(each)}") == everything  # whatever their order
    assert listed(f"iconify:{grid}/ink/icons.json, {grid}/ink,{grid}/oil,{grid}/wax") == everything
    assert listed(str(grid)) == everything and listed(str(grid), kind="iconify") == everything
    assert listed(str(grid / "ink" / "icons.json")) == listed(f"iconify:{grid}", sets=("ink",))
    monkeypatch.setenv("HOME", str(grid.parent))
    assert listed(f"iconify:~/{grid.name}") == everything
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "@iconify-json").symlink_to(grid)
    (tmp_path / "a,b").symlink_to(grid)
    monkeypatch.chdir(tmp_path)
    assert listed("iconify") == everything and listed("iconify:a,b") == everything
    assert len(listed(f"iconify:{grid}", contents="shared")) == 3 * len(NAMES)


def test_a_plain_folder_is_one_of_icons_only_if_nothing_else_is_read(grid, tmp_path):
    (tmp_path / "sets").mkdir()
    for name in ("ink", "oil"):
        (tmp_path / "sets" / name).symlink_to(grid / name)
    folder = str(tmp_path / "sets")
    assert usual_options(folder) == usual_options("iconify") == usual_options("iconify:x") == ICONIFY_DEFAULTS
    (tmp_path / "sets" / "a.png").write_bytes(b"")
    assert usual_options(folder) == {} and usual_options(folder, "iconify") == ICONIFY_DEFAULTS
    assert listed(folder) == ["a.png"] and len(listed(folder, kind="iconify")) == 2 * (len(NAMES) + 1)


def test_the_command_line(grid):
    given = parse_arguments([f"iconify:{grid}", "out", "--sets", "ink, wax", "--hold-out-cells", "0.1"]).options
    assert given == Options(**ICONIFY_DEFAULTS | {"sets": ("ink", "wax"), "hold_out_cells": 0.1, "held_out": 0.0})
    assert parse_arguments(["iconify", "out"]).options == Options(**ICONIFY_DEFAULTS)
    with pytest.raises(UserError, match="--held-out: not with --hold-out-cells"):
        parse_arguments(["iconify", "out", "--held-out", "0.1", "--hold-out-contents", "0.1"])


def test_a_run_keeps_where_its_icons_are(grid, monkeypatch):
    monkeypatch.chdir(grid.parent)

    def kept(source: str) -> str | None:
        values = PRESETS["tiny"]()
        return located(build_config(values | {"data": values["data"] | {"source": source}})).data.source

    assert kept(f"iconify:{grid.name}") == f"iconify:{grid}"
    assert kept(f"iconify:{grid.name}/ink,{grid.name}/wax") == f"iconify:{grid}/ink,{grid}/wax"
    assert kept("iconify") == "iconify" and kept("iconify:nowhere") == "iconify:nowhere"
    with pytest.raises(UserError, match="data.source: '~nobodyhere': there is no user"):
        kept("iconify:~nobodyhere")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("iconify", {}, r"node_modules/@iconify-json: no such file or folder; npm install @iconify-json/noto"),
        ("iconify:", {}, "no path; give iconify:DIR"),
        ("iconify:nowhere", {}, "nowhere: no such file or folder; give iconify:DIR"),
        ("iconify:empty", {}, "empty: no icons.json and no folder with one"),
        ("iconify:~nobodyhere/x", {}, "there is no user 'nobodyhere'"),
        ("iconify:sets", {"sets": ("ink", "tar")}, "--sets tar: not there; there are ink, oil, wax"),
        ("iconify:sets", {"pairs": "same-style", "references": "none"}, "--pairs same-style writes references"),
        ("iconify:sets/ink", {"hold_out_cells": 0.1}, "--hold-out-cells: of the one set ink"),
        ("iconify:sets", {"hold_out_contents": 0.999}, "icons to train on.*lower the share"),
        ("iconify:other,sets", {"contents": "shared"}, "--contents shared: no name is in all of ink, oil, other, wax"),
        ("iconify:copy,sets", {}, "the set ink, as copy/ink/icons.json is too"),
        ("iconify:broken/a", {}, "broken/a/icons.json: cannot be read as JSON"),
        ("iconify:broken/b", {}, "broken/b/icons.json: not a JSON object"),
        ("iconify:broken/c", {}, "broken/c/icons.json: not an icon set"),
        ("iconify:broken/d", {}, "'x/y' is not a name"),
        ("iconify:broken/g", {}, "ud800' is not a name"),
        ("iconify:broken/e", {}, "the set e has no icons"),
        ("iconify:broken/f", {}, "info.json: cannot be read as JSON"),
        ("pictures", {"pairs": "same-style", "hold_out_cells": 0.1}, "--pairs, --hold-out-cells: of icon sets only"),
        ("pictures", {"kind": "iconify"}, "pictures: no icons.json"),
        ("openmoji", {"sets": ("ink",)}, "--sets: of icon sets only"),
    ],
)
def test_refusals_are_one_line(grid, tmp_path, monkeypatch, source, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").symlink_to(grid)
    write_set(tmp_path / "copy", "ink", {"a": square(0, "red")})
    write_set(tmp_path, "other", {"unlike": square(0, "red")})
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    write_set(tmp_path / "broken", "d", {"x/y": square(0, "red")})
    write_set(tmp_path / "broken", "g", {"\ud800": square(0, "red")})
    write_set(tmp_path / "broken", "e", {"a": {"body": HALVES, "hidden": True}})
    write_set(tmp_path / "broken", "f", {"a": square(0, "red")})
    (tmp_path / "broken" / "f" / "info.json").write_text("{")
    for name, text in (("a", '{"prefix": "a", "icons": {'), ("b", "[1]"), ("c", '{"prefix": "c", "icons": []}')):
        (tmp_path / "broken" / name).mkdir()
        (tmp_path / "broken" / name / "icons.json").write_text(text)
    with pytest.raises(UserError, match=words) as refused:
        listed(source, **options)
    assert "\n" not in str(refused.value)


def test_without_its_renderer(grid, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        UserError, match=r"iconify needs a package that is missing \(resvg_py\): pip install 'megaflux\[demo\]'"
    ):
        listed(f"iconify:{grid}")


def test_what_the_command_prints_of_sets(tmp_path, capsys):
    icons = {f"a-{n}": square(n, "red") for n in range(12)}
    write_set(
        tmp_path / "in", "bare", icons | {"b": {"body": HALVES, "hidden": True}}, aliases={"c": {"parent": "a-1"}}
    )
    info = {"name": "Old Set", "author": "Bob", "license": "MIT"}  # as old files have it, within icons.json
    write_set(tmp_path / "in", "old", icons, info=info)
    assert main([f"iconify:{tmp_path / 'in'}", str(tmp_path / "out"), "--longest-side", "32", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "24 items in iconify:" in printed and "read as iconify" in printed
    assert "bare: 12 icons; left aside: 1 hidden, 1 aliases; states no licence" in printed
    assert "old: 12 icons; left aside: 0 hidden, 0 aliases\n" in printed and "12 names are in all 2 sets" in printed
    attribution = read_dataset_info(tmp_path / "out").attribution
    assert attribution == "bare. License: not stated; Old Set by Bob. License: MIT"


def test_a_description_that_was_edited_by_hand_is_one_line(prepared, tmp_path):
    content = json.loads((prepared / "dataset.json").read_text())
    for field, value in (("styles", "ink"), ("held_out_contents", [1]), ("names", "many"), ("held_out_cells", -1)):
        changed = content["settings"] | {"source": content["settings"]["source"] | {field: value}}
        (tmp_path / "dataset.json").write_text(json.dumps(content | {"settings": changed}))
        with pytest.raises(UserError, match="not a dataset description"):
            read_dataset_info(tmp_path)


@pytest.mark.skipif("GRID_SETS" not in os.environ, reason="GRID_SETS names no folder of the five emoji sets")
def test_the_five_emoji_sets_share_1034_names():
    sets = ("emojione", "fluent-emoji-flat", "noto", "openmoji", "twemoji")
    opened, _ = open_source(
        f"iconify:{os.environ['GRID_SETS']}", BUCKETS, options_of(sets=sets, contents="shared", **HELD)
    )
    items = opened.list_items()
    assert len(items) == 5 * 1034
    assert not any(isinstance(loaded, BadImage) for loaded in opened.read(items[::50]))
