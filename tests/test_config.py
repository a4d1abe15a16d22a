"""The three layers and their messages: one clear line for everything a person can get wrong."""

import random

import pytest
import yaml

from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.config import plain_yaml
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.parse import build_config, nearest
from megaflux.config.presets import PRESETS
from megaflux.config.schema import Config, field_paths


def parse(*argv: str) -> Config:
    parser = Parser()
    add_config_arguments(parser)
    return parse_config(parser, list(argv))[1]


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(*argv)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--optim.lr", "nan"], ["optim.lr", "greater than 0", "nan"]),
        (["--optim.lr", "inf"], ["optim.lr", "finite"]),
        (["--optim.lr", "-1e-5"], ["optim.lr", "greater than 0", "-1e-05"]),
        (["--optim.lr=-1"], ["optim.lr", "greater than 0"]),
        (["--optim.lr.vlmm", "1"], ["optim.lr.vlmm: unknown key, did you mean optim.lr.vlm?"]),
        (["--stages.0.lr.qwen", "1"], ["stages.0.lr.qwen: unknown key, did you mean stages.0.lr."]),
        (["--optim.lr.vlm", "none"], ["optim.lr.vlm"]),
        (["--optim.lr.conector", "1e-3"], ["optim.lr.conector: unknown key"]),
        (["--optim.lr.vlm", "0"], ["optim.lr.vlm: must be greater than 0, got 0"]),
        (["--optim.weight_decay.vlm", "x"], ["optim.weight_decay.vlm", "valid number", "'x'"]),
        (["--stages.0.lr", "{conector: 1}"], ["stages.0.lr.conector: unknown key"]),
        (["--stages.0.vlm_layers", "4"], ["stages.0.vlm_layers: 4, but Qwen2-VL has 3 layers; lower it"]),
        (["--model.vlm_layers", "0"], ["model.vlm_layers: 0, but a stage trains 1", "raise it"]),
        (["--stages.1.components", "[a, a]"], ["stages.1.components", "lists 'a' twice"]),
        (["--stages.1.components", "attn.("], ["stages.1.components", "neither a name nor a regular expression"]),
        (["--stages.1.blocks", "none", "--stages.1.connector=false", "--stages.1.vlm_layers=0"], ["trains nothing"]),
        (["--train.stage_ends", "[1, 2]"], ["train.stage_ends", "leave it out"]),
        (["--train.updates", "0"], ["train.updates", "at least 1, got 0"]),
        (["--train.updates", "abc"], ["train.updates", "valid integer", "'abc'"]),
        (["--train.updates", "1.5"], ["train.updates", "valid integer", "1.5"]),
        (["--train.updates", "true"], ["train.updates", "must be a number, got true"]),
        (["--train.updates", "2"], ["train.updates", "at least 7"]),
        (["--train.updats", "3"], ["--train.updats: unknown option, did you mean --train.updates?"]),
        (["--lr", "3"], ["--lr: unknown option, did you mean --optim.lr?"]),
        (["--data.cach", "x"], ["did you mean --data.cache?"]),
        (["word"], ["word: not expected here"]),
        (["--optim.lr"], ["--optim.lr", "needs a value"]),
        (["--optim.lr", "--train.updates", "9"], ["--optim.lr", "needs a value"]),
        (["--optim.lr", "1", "--optim.lr=2"], ["--optim.lr: given twice"]),
        (["--cache", "none", "--data.cache", "latents"], ["given twice"]),
        (["--stages.1.share", "1", "--stages.1.share", "2"], ["given twice"]),
        (["--stages.1.share"], ["needs a value"]),
        (["--stages.1.share", "-3"], ["stages.1.share", "greater than 0"]),
        (["--stages.1.shar", "3"], ["stages.1.shar: unknown key, did you mean stages.1.share?"]),
        (["--stages.9.share", "3"], ["--stages.9.share: '9' is not one of 0 to 3"]),
        (["--stages.1.blocks", "[0,0]"], ["stages.1", "block 0 twice"]),
        (["--stages.1.blocks", "[6]"], ["stages.1.blocks: 6 is out of range; blocks are 0 to 5"]),
        (["--stages.1.blocks", "[-1]"], ["stages.1.blocks.0", "at least 0"]),
        (["--stages.1.blocks", "some"], ["stages.1.blocks: must be a list or 'all' or 'none', got 'some'"]),
        (["--stages.1.blocks", "[]"], ["stages.1", "lists no blocks"]),
        (
            ["--stages.1.components", "3"],
            ["stages.1.components", "'attention', 'block', 'model', 'image_branch' or 'norms' or a list"],
        ),
        (["--stages.1.components", "(?i)ff"], ["stages.1.components", "'(?i)ff' is neither a name nor a regular"]),
        (["--stages", "[]"], ["stages: no stage"]),
        (["--stages", "3"], ["stages: must be a list"]),
        (["--stages", "[{"], ["--stages"]),
        (["--data.cache", "latnts"], ["data.cache.0", "'latents' or 'trunk'"]),
        (["--data.condition.text", "0.5"], ["data.condition", "add up to 1"]),
        (["--flow.shift", "big"], ["flow.shift: must be 'resolution' or 'none' or a valid number"]),
        (["--optim.betas", "[1, 2, 3]"], ["optim.betas: must have 2 values"]),
        (["--optim.warmup_fraction", "0.9", "--optim.plateau_fraction", "0.5"], ["optim", "over 1"]),
        (["--model.flux_config", "{num_layers: x}"], ["model.flux_config.num_layers", "whole number"]),
        (["--preset", "devv"], ["--preset devv: unknown preset, did you mean dev?"]),
        (["--config", "/none/run.yaml"], ["--config /none/run.yaml: No such file"]),
        (["--config", ""], ["--config"]),
        (["--train.updates", "9" * 5000], ["--train.updates 999", "a number of 5000 digits"]),
        (["--train.updates", "0x" + "f" * 6000], ["a number of 6002 digits"]),
        (["--train.updates", '"' + "9" * 400 + '"'], ["train.updates: must be at most 9007199254740992"]),
        (["--run.seed", str(10**30)], ["run.seed: must be at most"]),
        (["--train.updates", "!!bool x"], ["--train.updates !!bool x: tag 'bool', leave it out"]),
        (["--train.updates", "!!timestamp x"], ["tag 'timestamp'"]),
        (["--stages.1.share", "1e308"], ["stages.1.share: must be at most 1000000000000"]),
        (["--stages.1.share", "1e-320"], ["leaves a stage without updates; raise the smallest share"]),
        (["--stages." + "9" * 5000 + ".share", "1"], ["is not one of 0 to 3"]),
        (["--stages." + "9" * 5000 + ".share", "1", "--stages." + "9" * 5000 + ".share=1"], ["given twice"]),
        (["--stages", "[]", "--stages.0.share", "1"], ["'0' is not there, the list is empty"]),
        (["--run.dir", "a\0b"], ["run.dir: character 2 is NUL; take it out"]),
        (["--run.dir", "caf\udce9"], ["run.dir: character 4 is half a surrogate pair"]),
        (["--model.flux_config", r'{"a": "\ud800"}'], ["--model.flux_config", "half a surrogate pair"]),
        (["--" + "x" * 10_000, "1"], ["xxx...: unknown option"]),
        (["--preset", "x" * 10_000], ["xxx...: unknown preset"]),
        (["--config", "x" * 10_000], ["xxx...: File name too long"]),
    ],
)
def test_bad_command_line_is_one_line_naming_field_and_mend(argv, words):
    message = refused(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("- 1", "found a list"),
        ("words", "found a str"),
        ("a: !!python/object/apply:os.system ['true']", "line 1"),
        ("optim: !!python/name:os.system", "line 1"),
        ("optim:\n  lr: 1\n  lr: 2", "line 3: key 'lr' twice"),
        ("{", "line 1"),
        ("[" * 5000, "nested too deeply"),
        ("train:\n\tupdates: 3", "line 2"),
        (b"\xff\xfe\x00", "decode"),
        ("optim: 3", "optim: must be a section"),
        ("optim: {lr: }", "optim.lr"),
        ("optim: {leraning_rate: 1, lrr: 1}", "optim.lrr: unknown key, did you mean optim.lr?"),
        ("optm: {lr: 1}", "optm: unknown key, did you mean optim?"),
        ("stages: [3]", "stages.0: must be a section"),
        ("stages: [{name: a, share: 1, blocks: all, extra: 1}]", "stages.0.extra: unknown key"),
        ("stages: [{name: a, share: 1, blocks: all}, {name: a, share: 1, blocks: all}]", "same name"),
        ("preset: [x]", "unknown preset"),
        ("3: 4", "every key"),
        ("model: {vlm_config: {x: {1: 2}}}", "line 1: key '1' must be a word"),
        ("? [a]\n: b", "key a sequence must be a word"),
        ("model: {vlm_config: {x: " + "[" * 100 + "]" * 100 + "}}", "nested too deeply"),
        ("run: &r {dir: *r}", "line 1: alias *r, write out what it stands for"),
        ("a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(30)), "line 2: alias *a"),
        ("run: {dir: !!str 5}", "tag 'str', leave it out"),
        ("preset: 0x" + "f" * 6000, "a number of 6002 digits"),
        ("x" * 10_000, "found a str"),
        ('"two\\nlines": 1', "two lines: unknown key"),
    ],
)
def test_bad_file_is_one_line(yaml_file, text, words):
    assert words in refused("--config", yaml_file(text))


def test_python_tags_run_nothing(yaml_file, tmp_path):
    target = tmp_path / "made"
    refused("--config", yaml_file(f"run: !!python/object/apply:os.mkdir ['{target}']"))
    assert not target.exists()


def test_layers_preset_then_file_then_command_line(yaml_file):
    path = yaml_file("preset: dev\noptim: {lr: 3e-5, eps: 1e-7}\ntrain:\n")
    config = parse("--config", path, "--optim.lr=2e-5", "--stages.1.share", "2")
    assert (config.preset, config.optim.lr, config.optim.eps) == ("dev", 2e-5, 1e-7)
    assert config.optim.betas == (0.9, 0.95)
    assert [stage.share for stage in config.stages] == [1, 2, 1]
    assert config.train.updates == 100_000  # a section left empty changes nothing
    assert parse("--config", path, "--preset", "tiny").preset == "tiny"


def test_a_stages_whole_value_comes_before_its_parts():
    """Whichever is typed first, and as it is for `optim`."""
    parts, whole = ["--stages.1.lr.connector", "1e-3"], ["--stages.1.lr", "1e-4"]
    for given in (parts + whole, whole + parts):
        assert parse(*given).stages[1].lr.model_dump() == {"flux": 1e-4, "connector": 1e-3, "vlm": 1e-4}


def test_no_blocks_whatever_the_components():
    assert parse("--stages.0.blocks", "none").stages[0].components == "model"


def test_a_rate_for_one_part_leaves_the_others_theirs(yaml_file):
    """Over a number, in a file and on the command line; and a stage's over those."""
    given = parse("--preset", "dev", "--optim.lr.connector", "1e-3", "--optim.weight_decay.vlm", "0").optim
    assert given.lr.model_dump() == {"flux": 1e-5, "connector": 1e-3, "vlm": 1e-5}
    assert given.weight_decay.model_dump() == {"flux": 0.1, "connector": 0.1, "vlm": 0.0}
    text = "preset: dev\noptim: {lr: {vlm: 3e-6}}\nstages: [{name: a, share: 1, blocks: none, lr: {connector: 2e-3}}]\n"
    config = parse("--config", yaml_file(text), "--optim.lr.flux=2e-6", "--stages.0.components", "attn.to_q")
    assert config.optim.lr.model_dump() == {"flux": 2e-6, "connector": 1e-5, "vlm": 3e-6}
    assert [peak.lr for peak in config.optim.peaks(config.stages[0]).values()] == [2e-6, 2e-3, 3e-6]
    assert config.stages[0].components == ("attn.to_q",)
    some = parse("--preset", "dev", "--optim.lr", "{vlm: 2e-6}", "--stages.0.lr.flux", "none")
    assert some.optim.lr.model_dump() == {"flux": 1e-5, "connector": 1e-5, "vlm": 2e-6}
    assert some.optim.peaks(some.stages[0])["flux"].lr == 1e-5
    assert parse("--stages.0.components", "attn.to_q, ff.net.2").stages[0].components == ("attn.to_q", "ff.net.2")
    number = parse("--config", yaml_file(text), "--optim.lr", "1e-4").optim.lr
    assert number == 1e-4
    assert plain_yaml.load(config.to_yaml())["optim"]["lr"]["connector"] == 1e-5
    assert build_config(plain_yaml.load(config.to_yaml())) == config


@pytest.mark.parametrize(
    "text, want",
    [
        ("latents,trunk", ("latents", "trunk")),
        ("[trunk]", ("trunk",)),
        ("", ()),
        ("none", ()),
        ("[]", ()),
        ("latents, ", ("latents",)),
    ],
)
def test_lists_of_words(text, want):
    assert parse("--data.cache", text).data.cache == want
    assert parse(f"--cache={text}").data.cache == want


def test_text_is_read_as_the_field_needs_it():
    assert parse("--data.aspect_ratios", "1:1").data.aspect_ratios == ("1:1",)  # 61 in YAML 1.1
    assert parse("--data.aspect_ratios", "[16:9, 1:1]").data.aspect_ratios == ("16:9", "1:1")
    assert parse("--run.dir", "2024").run.dir == "2024"
    assert parse("--data.source", "none").data.source is None
    assert parse("--flow.shift", "none").flow.shift == "none"
    assert parse("--flow.shift", "3").flow.shift == 3.0
    assert parse("--flow.logit_mean", "-1e-1").flow.logit_mean == -0.1
    stages = parse("--stages", '[{"name": "a", "share": 1, "blocks": "all"}]').stages
    assert [stage.name for stage in stages] == ["a"]
    assert parse("--stages", "[{name: a, share: 1, blocks: [2]}]", "--stages.0.share", "5").stages[0].share == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_configuration_reads_back_equal(preset, yaml_file):
    config = build_config(PRESETS[preset]())
    assert parse("--config", yaml_file(config.to_yaml())) == config
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json")  # for other readers too


def test_infinities_and_strange_line_breaks_read_back(yaml_file):
    values = PRESETS["tiny"]()
    values["model"]["vlm_config"] |= {"top": float("inf"), "next line\x85": "\u2028 \ufeff", "two\nlines": "\r"}
    config = build_config(values)
    assert parse("--config", yaml_file(config.to_yaml())) == config


def test_yaml_round_trip_of_any_plain_values():
    generator = random.Random(0)
    words = [
        "16:9",
        "1e-5",
        "1e5",
        "null",
        "",
        "~",
        "true",
        "yes",
        "no",
        "0x1",
        ".nan",
        "a: b",
        "- x",
        "#",
        "010",
        "=",
        "2024-01-01",
        "é",
        "\n",
        "line\nline",
        " x ",
        "!!str",
        "&a",
        "*a",
        "1_000",
        "<<",
        "None",
        "\t",
        "'",
        '"',
    ]

    def draw(depth: int):
        kind = generator.randrange(8 if depth else 6)
        if kind == 6:
            return [draw(depth - 1) for _ in range(generator.randrange(4))]
        if kind == 7:
            return {generator.choice(words): draw(depth - 1) for _ in range(generator.randrange(4))}
        plain = [
            generator.choice(words),
            generator.uniform(-1, 1) * 10 ** generator.randrange(-30, 30),
            generator.randrange(-(10**20), 10**20),
            True,
            None,
            float("inf"),
        ]
        return plain[kind]

    for _ in range(300):
        value = {"top": draw(3)}
        assert plain_yaml.load(plain_yaml.dump(value)) == value


def test_stage_updates_add_up_for_any_shares():
    generator = random.Random(1)
    base = PRESETS["tiny"]()
    for _ in range(50):
        shares = [generator.uniform(0.1, 10) for _ in range(generator.randrange(1, 6))]
        stages = [{"name": str(i), "share": share, "blocks": "all"} for i, share in enumerate(shares)]
        config = build_config(base | {"stages": stages, "train": base["train"] | {"updates": 1000}})
        assert sum(config.stage_updates()) == 1000
        for updates, share in zip(config.stage_updates(), shares, strict=True):
            assert abs(updates - 1000 * share / sum(shares)) <= 1


def test_a_frozen_configuration():
    config = parse()
    with pytest.raises(ValueError):
        config.optim.lr = 1.0


def test_every_field_has_help_but_the_self_evident():
    silent = {path for path, text in field_paths().items() if not text}
    assert silent <= {
        "preset",
        "stages",
        "optim.betas",
        "optim.eps",
        "optim.weight_decay",
        "flow.logit_mean",
        "flow.logit_std",
    }


def test_nearest_gives_short_lists_whole():
    assert nearest("zzz", ["tiny", "dev"]) == "known: tiny, dev"
    assert nearest("devv", ["tiny", "dev"]) == "did you mean dev?"
