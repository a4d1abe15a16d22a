"""What the steps of gpu-first make of what they measure, and the document that is made of it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaflux.bench.first import blocks, compiled, continued, kernel_tests, loop, ops, results, steps
from megaflux.bench.first.facts import FINISHED, Fact, Facts, Recorder
from megaflux.bench.first.predicted import PREDICTED
from megaflux.bench.first.settings import Setting
from megaflux.training.checkpoint import manifest
from megaflux_kernels.bench import cases, trials


def values(facts: Facts, step: str) -> dict:
    return {row.fact: row.error or row.value for row in facts.latest().values() if row.step == step}


def test_token_counts_are_those_of_training():
    from megaflux.config.parse import build_config
    from megaflux.config.presets import dev
    from megaflux.training.planning.costs import token_counts

    config = build_config(dev())
    pictures = Setting(False, Path()).pictures()
    assert {tokens.condition for _, tokens in pictures} == {484, 480, 476, 512}
    assert pictures[0][1].image == 4096
    assert all(tokens == token_counts(config, bucket) for bucket, tokens in pictures)


# --- what steps make of what they measure ---------------------------------------------------------------------------


def recorder_of(tmp_path, step: str, **facts: float) -> Recorder:
    kept = Facts(tmp_path / "facts.jsonl")
    for name, value in facts.items():
        kept.add(Fact("blocks", name.replace("_", "-"), value, "ms"))
    return Recorder(kept, step, True)


def test_ratios_are_of_the_slower_over_the_faster(tmp_path):
    recorder = recorder_of(tmp_path, "blocks", ours_none=100.0, ours_mlp=110.0, diffusers_eager=150.0)
    recorder.add("limit: matrix products", 50.0)
    recorder.add("limit: attention", 30.0)
    blocks.compare(recorder)
    known = values(recorder.facts, "blocks")
    assert known["diffusers-eager over ours-none"] == 1.5 and "diffusers-eager-full over ours-mlp" not in known
    assert known["limit: matrix products and attention"] == 80.0 and known["share of the limit, ours-none"] == 0.8


def test_compiled_arms_are_held_against_ours_of_another_step(tmp_path):
    recorder = recorder_of(tmp_path, "compiled", ours_none=100.0)
    recorder.add("diffusers-compile", 120.0)
    blocks.compare(recorder, compiled.RATIOS)
    assert values(recorder.facts, "compiled") == {"diffusers-compile": 120.0, "diffusers-compile over ours-none": 1.2}


def test_the_backward_share_is_of_the_backward_alone(tmp_path, monkeypatch):
    case = cases.Case("modulate", "1x2x3", lambda: None, lambda: None, [], (), (), bytes=(10, 22))
    monkeypatch.setattr(trials, "times", lambda *_: (1.0, 3.0))
    recorder = recorder_of(tmp_path, "ops")
    ops.measure(recorder, SimpleNamespace(device=torch.device("cuda"), samples=1), "modulate joint", case, (20.0, 1.0))
    known = values(recorder.facts, "ops")
    assert (known["modulate joint: forward"], known["modulate joint: with backward"]) == (1000.0, 3000.0)
    assert known["modulate joint: share forward"] == 0.5 and known["modulate joint: share backward"] == 12 / 2 / 20


def test_attention_with_a_bias_is_held_against_attention_without(tmp_path):
    recorder = recorder_of(tmp_path, "ops")
    for arm, forward, both in (("", 2.0, 8.0), (", attention without a bias", 1.0, 4.0)):
        recorder.add(f"biased_attention joint{arm}: forward", forward, "us")
        recorder.add(f"biased_attention joint{arm}: with backward", both, "us")
    ops.compare(recorder)
    known = values(recorder.facts, "ops")
    name = "biased_attention joint over attention without a bias"
    assert known[f"{name}: forward"] == 0.5 and known[f"{name}: backward"] == 0.5


def test_memory_around_a_stage_change_is_told_from_that_of_later_engines():
    names = ("before an engine is built", "after an engine is built", "before it is closed", "after it is closed")
    noted = [(name, float(number)) for number, name in enumerate(names * 2)]
    assert list(loop.memory(noted).values()) == [0.0, 1.0, 2.0, 3.0, 5.0]


def test_a_continuation_begins_at_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    for update in (loop.SAVED, loop.LAST):
        (manifest.folder(run) / manifest.name_of(update)).mkdir(parents=True)
    (run / "events.jsonl").write_text("{}")
    continued.fork(run, tmp_path / "other")
    assert list(manifest.listed(tmp_path / "other")) == [loop.SAVED]
    (tmp_path / "other" / "events.jsonl").write_text("changed")
    assert (run / "events.jsonl").read_text() == "{}"  # a copy, so that runs do not write into each other
    shutil.rmtree(manifest.folder(run) / manifest.name_of(loop.SAVED))
    with pytest.raises(RuntimeError, match="holds no checkpoint after update 4"):
        continued.fork(run, tmp_path / "other")


def test_a_failing_test_costs_itself_alone(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text(
        "import pytest, time\ndef test_a(): pass\ndef test_b(): assert 1 == 2, 'so it is'\n"
        "@pytest.mark.skip\ndef test_c(): pass\ndef test_e(no_fixture): pass\ndef test_d(): time.sleep(60)\n"
    )
    monkeypatch.setattr(kernel_tests, "SUITES", {"kernels": [str(tmp_path / "test_x.py"), "-p", "no:xdist"]})
    monkeypatch.setattr(kernel_tests, "LIMITS", {"kernels": 8})
    monkeypatch.setattr(kernel_tests, "find_spec", lambda name: None)  # no xdist, no timeout
    recorder = recorder_of(tmp_path, "tests")
    kernel_tests.run(recorder, Setting(True, tmp_path))
    known = values(recorder.facts, "tests")
    assert (known["kernels: passed"], known["kernels: failed"], known["kernels: skipped"]) == (1, 2, 1)
    assert known["kernels: not all"] == "ended after 8 s" and known["kernels: failed 1"].startswith(
        "test_b: AssertionError"
    )


# --- the document ---------------------------------------------------------------------------------------------------


def test_the_section_takes_its_own_place_and_no_other(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    facts.add(Fact("session", "commit", "fedcba9876"))
    facts.add(Fact("blocks", "ours-none", error="out of memory"))  # found later, by another commit
    session = {
        "sizes": "FLUX.1-dev",
        "device": "GPU A",
        "libraries": "torch 2.11.0",
        "commit": "0123456789",
        "date": "2026-11-27",
    }
    for name, value in session.items():
        facts.add(Fact("session", name, value))
    for fact in (
        Fact("machine", "torch", "2.11.0"),
        Fact("machine", "copy, read and written", 4050.0, "GB/s", 3000.0),
        Fact("gate-modulate", "1x2x3: error / allowed", 0.5),
        Fact("gate-modulate", "1x9x3: error / allowed", 0.75),
        Fact("blocks", "ours-full", error="out of memory"),
        Fact("attention", "cudnn at S = 4580, backward", 416.9, "TFLOP/s", 499.0),  # a prediction of its day
        Fact("attention", "cudnn at S = 4580, backward", 416.9, "TFLOP/s", 499.0),  # by the prediction of its day
        Fact("memory", "batch 1, none: allocated", 15.91, "GB", 15.92),
        Fact("memory", "batch 1, none: retries", 0),
        Fact("blocks", FINISHED, 3.0, "s"),
    ):
        facts.add(fact)
    document = tmp_path / "doc.md"
    document.write_text("# Results\n\nby hand\n")
    assert results.main([str(tmp_path), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("# Results\n\nby hand\n")
    assert (
        "| copy, read and written | 4050 GB/s | 3000 GB/s |" in text
        and "2026-11-27, commit 0123456: machine, gates, blocks, attention, memory." in text
        and "commit fedcba9: blocks" in text
        and "399 TFLOP/s |" in text
        and "499" not in text
    )
    assert "torch 2.11.0; " in text and "| `modulate` | 0.75 | 2 |" in text  # the largest
    assert "| batch 1, none | 15.91 GB (predicted 15.92) |  | 0 |" in text  # one line, in columns
    assert "- blocks, ours-full: out of memory" in text and "| ours-full | failed |  |" in text
    assert "- blocks: ours-none (318)" in text and "- machine: copy" not in text  # what waits, what does not
    document.write_text(text + "\nafter\n")
    facts.add(Fact("blocks", "ours-none", 320.0, "ms", 318.0))
    results.main([str(tmp_path), "--document", str(document)])
    assert "fedcba9" not in document.read_text()  # nothing of it is left
    assert "| ours-none | 320 ms | 318 ms |" in document.read_text() and "ours-none (318)" not in document.read_text()
    assert document.read_text().count("## GPU A") == 1 and document.read_text().endswith("\nafter\n")


def test_small_sizes_are_no_results(tmp_path, capsys):
    facts = Facts(tmp_path / "facts.jsonl")
    for name, value in (("sizes", "small"), ("device", "CPU")):
        facts.add(Fact("session", name, value))
    before = results.DOCUMENT.read_text()
    with pytest.raises(SystemExit) as stopped:
        results.main([str(tmp_path)])
    assert stopped.value.code == 2 and "of small sizes" in capsys.readouterr().err
    assert results.DOCUMENT.read_text() == before


def test_results_of_nothing_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        results.main([str(tmp_path)])
    assert stopped.value.code == 2 and "no facts" in capsys.readouterr().err


def test_every_prediction_is_of_a_step():
    assert set(PREDICTED) <= set(steps.TABLE)


def test_tests_that_do_not_run_have_not_passed(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text("import pytest\n@pytest.mark.skip\ndef test_a(): pass\n")
    monkeypatch.setattr(kernel_tests, "SUITES", {"kernels": [str(tmp_path / "test_x.py"), "-p", "no:xdist"]})
    monkeypatch.setattr(kernel_tests, "find_spec", lambda name: None)
    recorder = recorder_of(tmp_path, "tests")
    kernel_tests.run(recorder, Setting(True, tmp_path))
    assert "no test ran" in values(recorder.facts, "tests")["kernels: passed"]


def test_a_gate_has_little_patience_with_an_exact_reference():
    x = torch.randn(1, 64, 64).bfloat16()
    off = cases.Case("modulate", "", lambda x: (x.float() * 1.004).bfloat16(), lambda x: x * 1, [x], (0,), (0,))
    rounded = cases.Case("modulate", "", lambda x: (x.float() * 1).bfloat16(), lambda x: x * 1, [x], (0,), (0,))
    assert max(error.of_allowed for error in trials.errors(off, torch.bfloat16)) > 1
    assert max(error.of_allowed for error in trials.errors(rounded, torch.bfloat16)) <= 1
