"""`python -m megaflux.bench step` where something fails: it costs its own rows, and what the exit code says of it."""

import json

import pytest
import torch

from megaflux.bench import activations, numerics, step
from megaflux.bench.__main__ import main
from megaflux.bench.arms import Arms, random_flux
from megaflux.bench.sizes import Sizes
from tests.bench.runs import QUICK, SMALL, metrics, read

SHAPE = "2x3+5 b1 1+2x2x32 attention float32"
FP32 = ["--dtype", "float32"]
ONE_GRID = ["step", *SMALL[:-1], "2x3", *QUICK, *FP32]
CPU = torch.device("cpu")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


class Failing:
    """Arms of which "a" raises an error at its turn-th turn, and after a lost GPU all others do."""

    def __init__(self, error, turn, lost=False):
        self.error, self.turn, self.lost = error, turn, lost
        self.broken = False

    def set(self, arm):
        self.turn -= arm.startswith("a")
        if (arm.startswith("a") and self.turn == 0) or self.broken:
            self.broken = self.lost
            raise self.error

    def clear(self, given): ...

    def step(self, given): ...

    def saved_bytes(self, arm, given):
        return 1


@pytest.mark.parametrize(
    "names, error, line, code",
    [
        (["a", "b"], torch.OutOfMemoryError("none left"), "a: out of memory; no row", False),
        (["a-compile", "b"], RuntimeError("no gcc"), "a-compile: cannot be compiled here (no gcc); no row", False),
        (["a", "b"], RuntimeError("wrong strides"), "a: wrong strides; no row", True),
        (["a", "b"], ValueError("no such head"), "a: no such head; no row", True),  # as Triton's own errors
        (["a-compile", "b"], LOST, "a-compile: CUDA error: an illegal memory access was encountered; no row", True),
    ],
)
@pytest.mark.parametrize("turn", [1, 2])
def test_an_arm_that_fails_is_left_out_and_the_others_go_on(capsys, names, error, line, code, turn):
    found = {}
    done = lambda name, measured: found.update({name: (len(measured.times), measured.extra)})  # noqa: E731
    assert step.take_turns(Failing(error, turn), names, {}, {}, step.Timing(CPU, 4, 1), done) == code
    assert found == {"b": (4, {"saved_bytes": 1})}
    assert line in capsys.readouterr().out


def test_after_a_lost_gpu_each_arm_has_its_line_and_what_was_measured_stays(capsys):
    found = []
    arms = Failing(LOST, turn=2, lost=True)  # turns: a b c, then c b a
    assert step.take_turns(arms, ["b", "a", "c"], {}, {}, step.Timing(CPU, 4, 1), lambda *row: found.append(row[0]))
    assert found == ["c"]
    said = capsys.readouterr().out
    assert [f"  {arm}: CUDA error: an illegal memory access was encountered; no row" for arm in "ab"] == (
        said.splitlines()
    )


def test_a_part_of_the_limit_that_fails_costs_no_arm(capsys):
    found = []

    def broken():
        raise torch.OutOfMemoryError("none left")

    arms, parts = Failing(None, turn=0), {"gemm_ms": broken}
    assert not step.take_turns(arms, ["b"], {}, parts, step.Timing(CPU, 4, 1), lambda *row: found.append(row[0]))
    assert found == ["b"] and "gemm_ms: out of memory; no row" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["run_products", "run_attention"])
def test_half_a_limit_is_none_and_resuming_measures_it(tmp_path, monkeypatch, capsys, part):
    """The real bench: one part of the limit has no memory; the same command, with room for it, adds the fraction."""
    file, plain = tmp_path / "r.json", getattr(step.limits, part)

    def full(*_):
        raise NO_MEMORY

    command = [*ONE_GRID, "--arms", "diffusers-eager", "--json", str(file), "--resume"]
    monkeypatch.setattr(step.limits, part, full)
    assert main(command) == 0
    first = metrics(read(file), "step")
    assert len(first["limit", SHAPE]) == 1
    assert "step_ms" in first["diffusers-eager", SHAPE]
    assert "fraction_of_limit" not in first["diffusers-eager", SHAPE]
    monkeypatch.setattr(step.limits, part, plain)
    assert main(command) == 0
    again = metrics(read(file), "step")
    limit, arm = again["limit", SHAPE], again["diffusers-eager", SHAPE]
    assert arm["fraction_of_limit"] == pytest.approx((limit["gemm_ms"] + limit["attention_ms"]) / arm["step_ms"])
    capsys.readouterr()
    assert main(command) == 0
    assert "1 of 1 arms are in" in capsys.readouterr().out


def test_a_failing_arm_costs_its_rows_and_resuming_measures_only_those(tmp_path, monkeypatch, capsys):
    """The real bench: one arm breaks in its last turn; the same command, with it mended, adds what is missing."""
    file, calls = tmp_path / "r.json", []
    plain = Arms.step

    def breaks(self, given):
        if activations.is_fused(self.transformer):
            calls.append(1)
            if len(calls) == 5:  # a warm-up and two samples there, a warm-up, and the first sample back
                raise RuntimeError("a kernel failed")
        return plain(self, given)

    command = [
        "step",
        *SMALL[:-1],
        "2x3",
        "--samples",
        "4",
        "--warmup",
        "1",
        *FP32,
        "--json",
        str(file),
        "--resume",
        "--arms",
        "diffusers-eager,ours-mlp,diffusers-eager-full",
    ]
    monkeypatch.setattr(Arms, "step", breaks)
    monkeypatch.setattr(step, "past_gate", lambda *args: (list(args[-1]), False))
    assert main(command) == 1
    assert "ours-mlp: a kernel failed; no row" in capsys.readouterr().out
    first = metrics(read(file), "step")
    assert {arm for arm, _ in first} == {"limit", "diffusers-eager", "diffusers-eager-full"}
    assert all("fraction_of_limit" in row for (arm, _), row in first.items() if arm != "limit")
    monkeypatch.setattr(Arms, "step", plain)
    content = json.loads(file.read_text())
    monkeypatch.setattr(step, "facts", lambda *_: {k: v for k, v in content.items() if k != "rows"})
    assert main(command) == 0
    again = metrics(read(file), "step")
    assert {arm for arm, _ in again} == {"limit", "ours-mlp", "diffusers-eager", "diffusers-eager-full"}
    assert all(again[name] == row for name, row in first.items() if name[0] != "limit")


def test_rows_are_written_when_an_arm_has_all_its_samples(tmp_path, monkeypatch):
    """A bench killed in its last turn keeps the arms that had ended, and none of those half measured."""
    file, turns = tmp_path / "r.json", []
    plain = Arms.set

    def killed(self, arm):
        turns.append(arm)
        if len(turns) == 4:  # there: eager, full; back: full, and eager is killed
            raise KeyboardInterrupt
        plain(self, arm)

    monkeypatch.setattr(Arms, "set", killed)
    command = [
        "step",
        *SMALL[:-1],
        "2x3",
        "--samples",
        "4",
        "--warmup",
        "1",
        *FP32,
        "--json",
        str(file),
        "--arms",
        "diffusers-eager,diffusers-eager-full",
    ]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert {arm for arm, _ in metrics(read(file), "step")} == {"limit", "diffusers-eager-full"}


def test_an_arm_that_stops_in_the_gate_is_left_out(monkeypatch, capsys):
    plain = numerics.results

    def stops(transformer, arm, given):
        if arm == "ours-mlp":
            raise RuntimeError("a kernel failed\nin C++")
        return plain(transformer, arm, given)

    monkeypatch.setattr(numerics, "results", stops)
    arms = ["diffusers-eager", "ours-mlp", "ours-none"]
    chosen = Sizes(1, 2, 2, 32, 16, 5, 1, "attention", (1,))
    assert step.past_gate(chosen, (2, 3), torch.float32, CPU, arms) == (["diffusers-eager", "ours-none"], True)
    said = capsys.readouterr()
    assert said.err == "error: numerics gate: 48x32 ours-mlp: a kernel failed; no row\n"
    assert "48x32 ours-none: " in said.out


@pytest.mark.parametrize(
    "error, code, why",
    [
        (RuntimeError("a kernel failed"), 1, "a kernel failed"),
        (NO_MEMORY, 0, "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 0, "out of memory"),
    ],
)
def test_an_arm_lost_in_the_gate_is_a_failure_unless_it_had_no_memory(monkeypatch, capsys, tmp_path, error, code, why):
    plain, file = numerics.results, tmp_path / "r.json"

    def stops(transformer, arm, given):
        if arm == "ours-mlp":
            raise error
        return plain(transformer, arm, given)

    monkeypatch.setattr(numerics, "results", stops)
    assert main([*ONE_GRID, "--arms", "diffusers-eager,ours-mlp,ours-none", "--json", str(file)]) == code
    assert capsys.readouterr().err == f"{'error: ' * code}numerics gate: 48x32 ours-mlp: {why}; no row\n"
    assert {arm for arm, _ in metrics(read(file), "step")} == {"limit", "diffusers-eager", "ours-none"}


@pytest.mark.parametrize("error, code, why", [(NO_MEMORY, 0, "out of memory"), (RuntimeError("no"), 1, "no")])
@pytest.mark.parametrize("stopping", ["random_flux", "random_inputs"])
def test_a_flux_that_does_not_fit_is_a_line_for_each_arm(monkeypatch, capsys, stopping, error, code, why):
    def full(*_):
        raise error

    monkeypatch.setattr(step, stopping, full)
    monkeypatch.setattr(step, "is_compiled", lambda arm: True)  # what stops before an arm's turn is not its compilation
    assert main([*ONE_GRID, "--arms", "diffusers-eager,diffusers-eager-full"]) == code
    said = capsys.readouterr().out
    assert f"  diffusers-eager: {why}; no row\n  diffusers-eager-full: {why}; no row\n" in said


@pytest.mark.parametrize("error, failed, why", [(NO_MEMORY, False, "out of memory"), (RuntimeError("no"), True, "no")])
def test_an_optimizer_that_stops_counts_as_arms_do(monkeypatch, capsys, error, failed, why):
    """The optimizer is measured on GPUs alone; only its own call is changed, and nothing is made on the device."""

    def stops(*_):
        raise error

    monkeypatch.setattr(step, "random_flux", lambda config, dtype, device: random_flux(config, dtype, CPU))
    monkeypatch.setattr(step, "measure_shape", lambda *_: False)
    monkeypatch.setattr(step, "optimizer_row", stops)
    chosen, todo = Sizes(1, 2, 2, 32, 16, 5, 1, "attention", (1,)), [step.Todo((2, 3), "s", ["diffusers-eager"])]
    assert step.measure(None, chosen, todo, torch.float32, step.Timing(torch.device("cuda"), 2, 1)) == failed
    assert capsys.readouterr().out == f"  optimizer: {why}; no row\n"
