"""What comes from outside, at random: every parser answers with one line or with something that is right.

Examples are derived from the tests, so that a run is the same everywhere and every time. FUZZ=50 tries 50 times as many,
others each time.
"""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config import plain_yaml
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.parse import build_config
from megaflux.config.presets import tiny
from megaflux.config.schema import Config, field_paths
from megaflux.data.buckets import make_buckets
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info, write_dataset
from megaflux.data.storage.index import column_encodings, fingerprint, inspect_index, read_index
from megaflux.data.storage.shards import read_split, verify_dataset
from megaflux.data.storage.verdict import verify_shards
from megaflux.generation import outputs
from megaflux.generation.job import Input, Job, JobControl, JobReference, Runtime
from megaflux.generation.run import read_inputs
from megaflux.infer.replay import read_original
from megaflux.infer.request import to_request
from megaflux.models import shipped
from megaflux.training.planning.checks import find_notes, find_problems
from tests.derived import write_bucket

TIMES = int(os.environ.get("FUZZ", "1"))


def fuzz(examples: int):
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture(autouse=True)
def no_hang():
    def stop(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60 * TIMES)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused_or(read):
    """What `read` returns, or None where it raised a UserError, which must be one line of a length to read."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 5000, str(error)
        return None


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


STRANGE = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2**32,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "../x",
    "../../x",
    "/etc/passwd",
    "a/../../b",
    ".",
    "..",
    "a\0b",
    "\ud800",
    "caf\udce9",
    "x" * 300,
    "two\nlines",
    "\x1b[2J",
    "index.json",
    "C:\\x",
    "~",
    "pkl",
    "ndarray:",
    "ndarray:object",
    "ndarray:float32:0",
    "zstd:99",
    "1:1",
    "2:1",
    "NaN",
    "!!python/object:os.system",
    "*a",
    "9" * 5000,
    [],
    {},
    [[]],
    {"": {}},
    nested(60),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(STRANGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value):
    """(container, key) of everything in nested data."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@st.composite
def changed(draw, sound, least: int = 1):
    """Nested data with up to three places replaced, dropped or doubled."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(least, 3))):
        container, key = draw(st.sampled_from(list(places(value)) or [(None, None)]))
        act = draw(st.sampled_from(["replace", "replace", "drop", "double"]))
        if container is None:
            return draw(json_values)
        if act == "replace":
            container[key] = copy.deepcopy(draw(json_values))
        elif act == "drop":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[draw(st.sampled_from(["x", "", "two\nlines", "\ud800", "train", "version"]))] = container[key]
    return value


class File(bytes):
    """A file's content; a failed test shows the beginning."""

    def __repr__(self) -> str:
        return repr(bytes(self[:1000]))


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def files_like(sound) -> st.SearchStrategy[File]:
    """JSON files: any bytes, any JSON, a sound one cut, changed, with a key twice, or nested without end."""
    text = json.dumps(sound)
    return st.one_of(
        changed(sound).map(as_json),
        changed(sound).map(as_json),
        st.binary(max_size=200),
        json_values.map(as_json),
        st.integers(0, len(text)).map(lambda n: text[:n].encode()),
        st.tuples(
            st.sampled_from([i for i, c in enumerate(text) if c == "{"]),
            st.sampled_from(["samples", "version", "raw_data"]),
            json_values,
        ).map(lambda t: f'{text[: t[0] + 1]}"{t[1]}": {json.dumps(t[2])}, {text[t[0] + 1 :]}'.encode()),
        st.sampled_from(
            [
                b"[" * 100_000,
                b'{"a":' * 100_000,
                text.encode("utf-16"),
                text.encode() + b"\xff",
                b'{"version": ' + b"9" * 9999 + b"}",
            ]
        ),
    ).map(File)


# A dataset


BUCKETS = make_buckets(("1:1", "2:1"), 64)


def make_dataset(root: Path) -> Path:
    counts = {}
    for bucket in BUCKETS:
        samples = [{"key": str(n), "caption": "", "image": bytes(500 + n)} for n in range(6)]
        counts[bucket.name], columns = write_bucket(root, "train", bucket, samples, shard_size=2048)
    write_dataset(root, DatasetInfo(64, BUCKETS, {"train": counts}, columns))
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Two buckets of several shards, and the same again beside it: what `../` would find."""
    root = tmp_path_factory.mktemp("datasets")
    make_dataset(root / "x")
    return make_dataset(root / "dataset")


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The files that are opened, resolved."""
    found, real = [], io.open

    def noting(file, *args, **kwargs):
        if isinstance(file, str | Path):
            found.append(Path(file).resolve())
        return real(file, *args, **kwargs)

    monkeypatch.setattr("io.open", noting)
    monkeypatch.setattr("builtins.open", noting)
    return found


def sound_files() -> tuple[dict, dict]:
    """(index.json of a bucket, dataset.json)"""
    with tempfile.TemporaryDirectory() as folder:
        root = make_dataset(Path(folder) / "dataset")
        return json.loads((root / "train/1x1/index.json").read_text()), json.loads((root / "dataset.json").read_text())


INDEX, INFO = sound_files()


@fuzz(200)
@given(data=files_like(INDEX))
def test_an_index(dataset, opened, data):
    folder = dataset / "train" / "1x1"
    before = (folder / "index.json").read_bytes()
    opened.clear()
    try:
        (folder / "index.json").write_bytes(data)
        for check in (True, False):
            shards, problems = inspect_index(folder, check, expected_samples=6)
            assert not any("\n" in str(problem) for problem in problems)
            if not problems:
                assert sum(shard["samples"] for shard in shards) == 6
                assert column_encodings(shards) and len(fingerprint({"1:1": shards})) == 64
        refused_or(lambda: read_index(folder))
        info = refused_or(lambda: verify_dataset(dataset))
        assert info is None or info.samples("train") == 12
        samples = refused_or(lambda: list(read_split(dataset, "train", BUCKETS[0])))
        assert samples is None or all(isinstance(sample, dict) for sample in samples)
        assert not any("\n" in str(problem) for problem in verify_shards(dataset, ["train"], None, World(0, 1)))
        outside = [file for file in opened if not file.is_relative_to(dataset.resolve())]
        assert not outside
    finally:
        (folder / "index.json").write_bytes(before)


@fuzz(200)
@given(data=files_like(INFO))
def test_a_description_of_a_dataset(dataset, opened, data):
    before = (dataset / "dataset.json").read_bytes()
    opened.clear()
    config = build_config(tiny() | {"data": tiny()["data"] | {"path": str(dataset)}})
    try:
        (dataset / "dataset.json").write_bytes(data)
        info = refused_or(lambda: read_dataset_info(dataset))
        if info is not None:
            assert info.samples("train") >= 0 and info.samples("held_out") >= 0 and str(info.buckets)
        refused_or(lambda: verify_dataset(dataset))
        refused_or(lambda: verify_shards(dataset, ["train"], None, World(0, 1)))
        problems = find_problems(config, {"zero_optimization": {"stage": 2}}, 1)
        assert not any("\n" in str(problem) for problem in problems) and find_notes(config, 1) is not None
        ours = dataset.resolve(), shipped.ASSETS.resolve()
        assert not [file for file in opened if not any(file.is_relative_to(folder) for folder in ours)]
    finally:
        (dataset / "dataset.json").write_bytes(before)


# A configuration


DS_CONFIG = {"zero_optimization": {"stage": 2}}
yaml_texts = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(
            [
                "a",
                "optim",
                "lr",
                ": ",
                ":",
                " ",
                "  ",
                "\n",
                "- ",
                "[",
                "]",
                "{",
                "}",
                ", ",
                "&a ",
                "*a",
                "<<: ",
                "!!python/object/apply:os.system ['false']",
                "!!int x",
                "!!bool x",
                "!!timestamp x",
                "!!set ",
                "!!binary _",
                "!",
                "|\n",
                ">\n",
                "? ",
                "'",
                '"',
                "\\",
                "#",
                "%YAML 1.1\n",
                "---\n",
                "...",
                "0x1",
                "1e5",
                "1e999",
                "-1",
                "~",
                ".nan",
                ".inf",
                "\t",
                "\0",
                "\x1b",
                "\x85",
                "\ufeff",
                "\ud800",
                "é",
                "9" * 5000,
            ]
        ),
        max_size=14,
    ).map("".join),
    st.sampled_from(
        [
            "[" * 50_000,
            "{a: " * 50_000,
            "- " * 50_000,
            "x" * 100_000,
            "[" * 60 + "]" * 60,
            "a: &a [x, x]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)),
            "run: &r {dir: *r}",
            "model: {vlm_config: &v [*v]}",
        ]
    ),
)


def parse(*argv: str) -> Config | None:
    parser = Parser()
    add_config_arguments(parser)
    try:
        return refused_or(lambda: parse_config(parser, list(argv))[1])
    except SystemExit as leave:
        assert leave.code == 0  # --help
        return None


def is_usable(config: Config) -> None:
    """It reads back as it was written, and everything that looks at it before a run finds words for what is wrong."""
    text = config.to_yaml()
    text.encode()
    again = build_config(plain_yaml.load(text))
    assert again.to_yaml() == text and (again == config or ".nan" in text)
    assert sum(config.stage_updates()) == config.train.updates
    json.dumps(config.model_dump(mode="json"))
    find_notes(config, 1)
    for problem in find_problems(config, DS_CONFIG, 2):
        assert problem


@fuzz(150)
@given(text=yaml_texts | changed(tiny()).map(plain_yaml.dump) | changed(tiny()).map(plain_yaml.dump))
def test_a_configuration_file(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = parse("--config", str(file))
    if config is not None:
        is_usable(config)


FIELDS = [
    *field_paths(),
    "stages.0.share",
    "stages.1.blocks",
    "stages.1.blocks.0",
    "stages.x",
    "stages.",
    "stages.0",
    "stages.99.name",
    "stages." + "9" * 5000,
    "config",
    "preset",
    "cache",
    "optim",
    "nothing",
    "model.flux_config.num_layers",
]


@fuzz(200)
@given(
    st.lists(
        st.tuples(st.sampled_from(FIELDS), yaml_texts | st.sampled_from([str(s) for s in STRANGE if s != 10**400])),
        max_size=3,
    ),
    st.booleans(),
)
def test_a_command_line(given_, equals):
    words = [w for name, text in given_ for w in ([f"--{name}={text}"] if equals else [f"--{name}", text])]
    config = parse(*words)
    if config is not None:
        is_usable(config)


@fuzz(100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=12),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=10,
    )
)
def test_what_is_dumped_reads_back(value):
    assert plain_yaml.load(plain_yaml.dump({"top": value})) == {"top": value}


# The settings in a picture


SETTINGS = outputs.settings_of(
    Job(
        references=(JobReference(file="/a.png", sha256="0" * 64),),
        image=Input(file="/b.png"),
        mode="controlnet",
        seeds=(6, 7),
        controls=(JobControl(kind="canny"),),
        prompt="a fox",
        width=64,
        height=64,
    ),
    Runtime(checkpoint="/", controlnet={"": "/"}),
    {"run": "/", "weights_sha256": "0" * 64},
    {"versions": {"megaflux": "1"}, "maps": {"canny": "0" * 64}},
    7,
)


def picture(settings: str | None = None, key: str = "megaflux") -> bytes:
    """A PNG that holds a text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    if settings is not None:
        info.add_itxt(key, settings, zip=len(settings) > 10_000)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def flipped(change: tuple[list[tuple[int, int]], int]) -> bytes:
    data = bytearray(SOUND)
    for place, value in change[0]:
        data[place % len(data)] = value
    return bytes(data[: change[1]])


SOUND = picture(json.dumps(SETTINGS))
pictures = st.one_of(
    changed(SETTINGS).map(lambda value: picture(json.dumps(value))),
    changed(SETTINGS).map(lambda value: picture(json.dumps(value))),
    st.binary(max_size=100),
    st.binary(max_size=100).map(lambda data: SOUND[:8] + data),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(picture),
    json_values.map(lambda value: picture(json.dumps(value))),
    st.tuples(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4), st.integers(0, 3000)).map(
        flipped
    ),
    st.sampled_from(["[" * 200_000, "{}" + " " * 2_000_000]).map(picture),
).map(File)


@fuzz(200)
@given(pictures)
def test_settings_in_a_picture(tmp_path, data):
    file = tmp_path / "x.png"
    file.write_bytes(data)
    original = refused_or(lambda: read_original(str(file)))
    if original is not None:
        assert isinstance(original.settings["source"], dict) and original.job.seeds
        request = refused_or(lambda: to_request({}, original.base))
        if request is not None:
            json.dumps(outputs.settings_of(request.job, request.runtime, {}, {}))
            refused_or(lambda: read_inputs(request.job, original.embedded))
