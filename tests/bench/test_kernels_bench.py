"""`python -m megaflux_kernels.bench`: every op, exact first."""

import json

import pytest
import torch

from megaflux_kernels import OPS
from megaflux_kernels.bench import __main__ as ops
from megaflux_kernels.bench import cases, trials
from tests.bench.runs import metrics, read

QUICK = ["--samples", "2", "--image", "32", "--dtype", "float32"]


def test_every_op_has_rows(tmp_path):
    file = tmp_path / "ops.json"
    assert ops.main([*QUICK, "--no-compile", "--json", str(file)]) == 0
    content = read(file)
    assert {row["bench"] for row in content["rows"]} == set(OPS)
    for op in OPS:
        found = metrics(content, op)
        assert {"ours", "eager"} <= {arm for arm, _ in found}
        rate = "tflop_per_s" if op in ("rmsnorm_linear", "biased_attention") else "gb_per_s"
        for values in found.values():
            assert set(values) == {
                "forward_ms",
                "forward_backward_ms",
                rate,
                f"forward_{rate}",
                "fraction_of_limit",
                "forward_fraction_of_limit",
            }
    assert "sdpa-mask" in {arm for arm, _ in metrics(content, "biased_attention")}


def test_one_op_goes_on(tmp_path, monkeypatch, capsys):
    file = tmp_path / "ops.json"
    command = [*QUICK, "--op", "modulate", "--no-compile", "--json", str(file), "--resume"]
    assert ops.main(command) == 0
    first = json.loads(file.read_text())
    monkeypatch.setattr(trials, "times", None)
    monkeypatch.setattr(ops, "facts", lambda *_: {k: v for k, v in first.items() if k != "rows"})
    assert ops.main(command) == 0
    assert json.loads(file.read_text()) == first


def test_an_inexact_op_gets_no_row(tmp_path, monkeypatch, capsys):
    made = cases.CASES["gelu_concat"]

    def wrong(ours, *others):
        return made(lambda a, x: ours(a, x) * 1.001, *others)

    monkeypatch.setitem(cases.CASES, "gelu_concat", wrong)
    file = tmp_path / "ops.json"
    assert ops.main([*QUICK, "--op", "gelu_concat", "--no-compile", "--json", str(file)]) == 1
    assert "error: gelu_concat" in (said := capsys.readouterr().err) and "result 0 is off by" in said
    assert not file.exists()


def test_an_op_that_stops_in_its_gate_is_refused_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    made = cases.CASES["modulate"]

    def stops(ours, *others):
        def raises(*inputs):
            raise ValueError("a kernel failed\nin C++")

        return made(raises, *others)

    def no_memory(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setitem(cases.CASES, "modulate", stops)
    monkeypatch.setitem(cases.CASES, "gelu_concat", no_memory)
    monkeypatch.setattr(ops, "OPS", ("modulate", "gelu_concat", "gate_residual"))
    file = tmp_path / "ops.json"
    assert ops.main([*QUICK, "--no-compile", "--json", str(file)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "error: modulate 1x96x512 float32: stopped at the gate: a kernel failed; not timed",
        "error: gelu_concat float32: none left; not timed",
    ]
    assert {row["bench"] for row in read(file)["rows"]} == {"gate_residual"}


def test_our_arm_that_cannot_be_timed_fails_the_bench(monkeypatch, capsys):
    times = trials.times

    def fails(case, run, *others):
        if run is case.ours:
            raise RuntimeError("a kernel failed")
        return times(case, run, *others)

    monkeypatch.setattr(trials, "times", fails)
    assert ops.main([*QUICK, "--op", "modulate", "--no-compile"]) == 1
    said = capsys.readouterr().out
    assert "ours: a kernel failed; no row" in said and "eager: 0." in said


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--op", "conv"], "invalid choice: 'conv'"),
        (["--samples", "-1"], "whole number above 0"),
        (["--json", "no/such/r.json"], "folder no/such cannot be written"),
    ],
)
def test_bad_options_are_one_line_and_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        ops.main(argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and words in said.err


@pytest.mark.slow
def test_compiled_reference(tmp_path):
    file = tmp_path / "ops.json"
    assert ops.main([*QUICK, "--op", "gate_residual", "--json", str(file)]) == 0
    assert "compile" in {arm for arm, _ in metrics(read(file), "gate_residual")}


def test_inputs_that_need_no_gradient_get_none():
    case = cases.make("modulate", cases.SMALL, torch.float32, torch.device("cpu"))[0]
    assert [x.requires_grad for x in trials.leaves(case.inputs, case.timed)] == [True, False, False]
