"""`python -m megaflux.bench step` and `activations`: rows by name, exact first, resumable, without training's libraries."""

import argparse
import gc
import json

import pytest
import torch
import torch.nn.functional as F

from megaflux.bench import activations, numerics, step
from megaflux.bench.__main__ import main
from megaflux.bench.activations import trainable_flux
from megaflux.bench.arms import Arms, random_flux, random_inputs
from megaflux.bench.live_memory import GRANULE, LiveMemory
from megaflux.bench.sizes import Sizes, published
from megaflux.config.presets import PUBLISHED_STAGES
from megaflux_kernels.bench.machine import attention_backend
from megaflux_kernels.bench.report import Parser
from tests.bench.runs import QUICK, SMALL, TRAFFIC, WITHOUT, bench, metrics, read, start

ON_GPU = torch.cuda.is_available()
ARMS = ["diffusers-eager", "diffusers-eager-full", "ours-none", "ours-mlp", "ours-full"]
SHAPES = [f"{grid}+5 b1 1+2x2x32 attention float32" for grid in ("3x4", "2x3")]
FP32 = ["--dtype", "float32"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "step.json"
    done = bench("step", *SMALL, *QUICK, *FP32, "--arms", ",".join(ARMS), "--json", str(file))
    assert done.returncode == 0, done.stderr
    return file, done.stdout


def test_every_arm_and_shape_has_its_rows(report):
    file, said = report
    content = read(file)
    assert content["attention_backend"] in ("flash", "cudnn", "efficient", "math")
    found = metrics(content, "step")
    for shape in SHAPES:
        assert {"gemm_ms", "attention_ms"} <= set(found["limit", shape])
        limit = sum(found["limit", shape].values())
        for arm in ARMS:
            row = found[arm, shape]
            assert {"step_ms", "step_ms_p10", "step_ms_p90", "fraction_of_limit", "saved_bytes"} <= set(row)
            assert ("peak_bytes" in row) == ON_GPU
            assert row["step_ms_p10"] <= row["step_ms"] <= row["step_ms_p90"]
            assert row["fraction_of_limit"] == pytest.approx(limit / row["step_ms"])
        saved = {arm: found[arm, shape]["saved_bytes"] for arm in ARMS}
        assert saved["ours-full"] < saved["ours-mlp"] < saved["ours-none"] < saved["diffusers-eager"]
    assert "ours-mlp" in said and "numerics gate" in said and "x diffusers-eager-full" in said
    assert {row["samples"] for row in content["rows"] if row["metric"] == "step_ms"} == {2}


def test_what_is_measured_is_not_measured_again(report, tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    content = json.loads(report[0].read_text())
    kept = [row for row in content["rows"] if not (row["arm"] == "ours-mlp" and row["shape"] == SHAPES[1])]
    file.write_text(json.dumps(content | {"rows": kept}))
    monkeypatch.setattr(step, "facts", lambda *_: {k: v for k, v in content.items() if k != "rows"})
    command = ["step", *SMALL, *QUICK, *FP32, "--arms", ",".join(ARMS), "--json", str(file), "--resume"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{SHAPES[0]}: 5 of 5 arms" in said and f"{SHAPES[1]}: 4 of 5 arms" in said
    again = metrics(json.loads(file.read_text()), "step")
    before = metrics(content, "step")
    assert set(again) == set(before)
    assert all(again[name] == before[name] for name in before if name[0] not in ("limit", "ours-mlp"))
    monkeypatch.setattr(step, "measure", None)  # nothing is left to measure
    assert main(command) == 0


def test_arms_take_turns_there_and_back(monkeypatch):
    order, found = [], {}

    def sample(arms, name, given, timing, measured):
        order.append(name)
        measured.times += [1.0] * timing.samples

    monkeypatch.setattr(step, "_sample_arm", sample)
    done = lambda name, measured: found.update({name: len(measured.times)})  # noqa: E731
    assert not step.take_turns(None, ["a", "b"], {}, {}, step.Timing(CPU, 8, 1), done)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert found == {"a": 8, "b": 8}


def test_an_arm_leaves_no_memory_behind():
    """Bytes alive after each arm's turn: on an H200 the peaks grew by what the arms before had saved."""
    sizes = Sizes(1, 2, 2, 32, 16, 5, 1, "attention", (1, 2))
    config = sizes.flux_config()
    arms = Arms(random_flux(config, torch.float32, CPU))
    activations.freeze(arms.transformer, trainable_flux(config, sizes.train_blocks, sizes.components))
    given = random_inputs(arms.transformer, 1, (3, 4), 5, CPU)
    arms.set("ours-none")  # lays the frozen projections side by side, once
    left, saved = {}, []
    with LiveMemory() as memory:
        for turn in range(2):
            for arm in ARMS if turn == 0 else ARMS[::-1]:
                measured = step.Measured()
                step._sample_arm(arms, arm, given, step.Timing(CPU, 2, 1), measured)
                gc.collect()
                left[arm, turn] = memory.live
                saved.append(measured.extra["saved_bytes"])
    table = 2 * 4 * 17 * 32  # bytes of the fused path's cosines and sines of 17 tokens
    assert max(left.values()) <= table + 2 * GRANULE
    assert min(saved) > 4 * table
    assert all(left[arm, 0] == left[arm, 1] for arm in ARMS)


def test_cudnn_that_is_wrong_at_a_length_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(SystemExit) as stopped:
        main(["step", "--text", "4", "--grids", "24x32", "--arms", "diffusers-eager", "--attention", "cudnn"])
    said = capsys.readouterr().err
    wrong = "--attention cudnn: attention of cuDNN 9.10.2 is wrong at 772 tokens, which 128 does not divide"
    assert stopped.value.code == 2 and said.startswith(f"error: {wrong}") and said.count("\n") == 1


def test_the_backend_is_asked_for_at_the_lengths_and_heads_of_the_step(monkeypatch):
    """What torch chooses depends on them."""
    attention, seen = F.scaled_dot_product_attention, []

    def noted(q, k, v):
        seen.append({tuple(x.shape) for x in (q, k, v)})
        return attention(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    args = argparse.Namespace(attention="auto", grids=[(3, 4), (24, 32)])
    chosen = Sizes(1, 1, 3, 32, 16, 4, 1, "attention", (0,))
    one = step.backends(Parser(), args, chosen, torch.float32, CPU)
    assert seen == [{(1, 3, 16, 32)}, {(1, 3, 772, 32)}]
    assert one == attention_backend(CPU, torch.float32, 3, 32, 16)
    monkeypatch.setattr(step, "attention_backend", lambda *sizes: "cudnn" if sizes[-1] > 600 else "flash")
    assert step.backends(Parser(), args, chosen, torch.float32, CPU) == "flash, cudnn"


def test_a_wrong_gradient_stops_the_bench(monkeypatch, capsys, tmp_path):
    plain = numerics.results

    def wrong(transformer, arm, given):
        found = plain(transformer, arm, given)
        if arm == "ours-none":
            found["condition"] = found["condition"] * 1.01
        return found

    monkeypatch.setattr(numerics, "results", wrong)
    file = tmp_path / "r.json"
    assert main(["step", *SMALL, *QUICK, "--arms", "ours-none", "--json", str(file)]) == 1
    assert "error: numerics gate" in (said := capsys.readouterr().err) and "worst condition" in said
    assert not file.exists()


def test_stage_one_of_the_published_depth_is_the_published_list():
    assert published(19, 38) == tuple(PUBLISHED_STAGES["stage1"])
    assert published(2, 4) == (1, 5) and published(1, 0) == (0,)


def test_activations_are_counted(tmp_path, capsys):
    file = tmp_path / "a.json"
    command = ["activations", *SMALL, "--json", str(file)]
    assert main(command) == 0
    found = metrics(read(file), "activations")
    shape = "3x4+5 b1 1+2x2x32 block bfloat16"
    assert found["diffusers-eager", shape]["fraction_of_diffusers-eager"] == 1
    assert found["ours-mlp", shape]["saved_bytes"] < found["ours-none", shape]["saved_bytes"]
    assert found["ours-none", shape]["recompute_fraction"] == pytest.approx(0, abs=1e-3)
    assert 0 < found["ours-mlp", shape]["recompute_fraction"] < found["ours-full", shape]["recompute_fraction"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train"], "invalid choice: 'train'"),
        (["step", "--arms", "ours"], "unknown arm 'ours'; use some of diffusers-eager,"),
        (["step", "--samples", "0"], "--samples: must be a whole number above 0, got '0'"),
        (["step", "--json", "no/such/r.json"], "folder no/such cannot be written"),
        (["step", "--grids", "64"], "want HxW in image tokens, as 64x64, got '64'"),
        (["step", "--head-dim", "20"], "--head-dim 20: use a multiple of 16"),
        (["step", "--double", "1", "--single", "1", "--train-blocks", "2"], "--train-blocks 2: there are 2 blocks"),
        (["step", "--sample", "3"], "unrecognized arguments: --sample"),
        (["activations", "--arms", "diffusers-compile"], "unknown arm 'diffusers-compile'"),
        (["loader", "--data", "no/such"], "--data no/such: no such folder"),
        (["infer", "--checkpoint", "no/such"], "--checkpoint no/such: no such folder"),
    ],
)
def test_bad_options_are_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


BLOCKED = (
    WITHOUT
    + """
import json, runpy
hide()
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as left:
        assert not left.code, argv
    assert not missing & {name.partition(".")[0] for name in sys.modules}, argv
"""
)


def test_benches_need_none_of_trainings_libraries():
    benches = [
        ["megaflux.bench", "step", *SMALL[:-1], "2x3", *QUICK, "--arms", "diffusers-eager,ours-mlp"],
        ["megaflux.bench", "activations", *SMALL[:-1], "2x3"],
        ["megaflux.bench", "traffic", *TRAFFIC, "--trains", "attention"],
        ["megaflux_kernels.bench", "--op", "modulate", "--samples", "1", "--no-compile", "--image", "16"],
    ]
    done = start("-c", BLOCKED, json.dumps(benches))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_compiled_arms(tmp_path):
    file = tmp_path / "r.json"
    arms = "diffusers-compile,diffusers-compile-full,diffusers-eager"
    done = bench("step", *SMALL, *QUICK, *FP32, "--arms", arms, "--json", str(file), timeout=600)
    assert done.returncode == 0, done.stderr
    assert {(arm, shape) for arm in arms.split(",") for shape in SHAPES} <= set(metrics(read(file), "step"))


def test_the_gates_reference_is_of_the_same_picture():
    """Were an input no number of bfloat16, the float32 reference would have another one, and hide what it should show."""
    sizes = Sizes(2, 2, 2, 32, 64, 5, 1, "attention", (1, 3))
    errors = numerics.gate(sizes, (3, 4), torch.bfloat16, torch.device("cpu"), ["ours-none"])["ours-none"]
    assert max(error.eager for error in errors) < 0.1
