"""Weights of a seed: the same bits whatever instructions the CPU has, distributed as the modules ask for."""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megaflux.config.parse import build_config
from megaflux.config.presets import tiny
from megaflux.models import pretrained, scratch
from megaflux.models.connector import build_connector
from megaflux.models.draws import Draws, quantiles, seeded

CODE = """
import hashlib, sys
from megaflux.config.parse import build_config
from megaflux.models import scratch
from megaflux.models.connector import build_connector
from megaflux.models.parameters import weights_fingerprint
from megaflux.config.presets import tiny

model = build_config(tiny()).model
for way in ("portable", "torch"):
    modules = {
        "transformer": scratch.build_transformer(model.flux_config, 3, way),
        "vlm": scratch.build_vlm(model.vlm_config, 3, way)[0],
        "clip": scratch.build_clip(model.clip_config, 3, way)[0],
        "connector": build_connector(192, 160, 3, way),
    }
    for name, module in modules.items():
        digest = hashlib.sha256()
        for parameter in module.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        print(way, name, weights_fingerprint(module)[:16], digest.hexdigest()[:16])
"""
CPUINFO = Path("/proc/cpuinfo")
FLAGS = set(CPUINFO.read_text().split()) if CPUINFO.is_file() else set()


def numpys_optional() -> str:
    """numpy's own CPU features that can be turned off here."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


def on_other_instructions(names: list[str]) -> dict[str, list[str]]:
    """The lines that a process prints, by the instruction set that torch, numpy and the C library may use."""
    poor = {"NPY_DISABLE_CPU_FEATURES": numpys_optional(), "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"}
    sets = {"default": poor, "avx2": {}} | ({"avx512": {}} if "avx512f" in FLAGS else {})
    return {
        name: subprocess.run(
            [sys.executable, "-c", CODE],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            env=os.environ | {"ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"} | extra,
        ).stdout.splitlines()
        for name, extra in sets.items()
        if name in names
    }


@pytest.mark.skipif("avx2" not in FLAGS, reason="a CPU with one instruction set only")
@pytest.mark.parametrize(
    "names", [["default", "avx2"], pytest.param(["default", "avx2", "avx512"], marks=pytest.mark.slow)]
)
def test_weights_of_a_seed_are_the_same_on_every_instruction_set(names):
    drawn = on_other_instructions(names)
    portable = {name: lines[:4] for name, lines in drawn.items()}
    assert [line.split()[:2] for line in portable["default"]] == [
        ["portable", name] for name in ("transformer", "vlm", "clip", "connector")
    ]
    assert all(lines == portable["default"] for lines in portable.values()), drawn
    assert drawn["default"][4:] != drawn["avx2"][4:]  # torch's own draws, in whose place the portable ones are


def test_these_are_the_bits():
    """On every machine, of every kind, in every version: a run that goes on elsewhere draws them again."""
    drawn = np.concatenate([Draws(7, "a").normal(70_001, 0.5, 2.0), Draws(7, "a").uniform(70_001, -0.1, 0.2)])
    assert hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()[:16] == "7d48f0c205e48958"
    assert not np.array_equal(Draws(7, "a").normal(9), Draws(8, "a").normal(9))
    assert not np.array_equal(Draws(7, "a").normal(9), Draws(7, "b").normal(9))


def test_quantiles_are_those_of_the_normal_distribution():
    shares = (np.random.default_rng(0).integers(0, 2**32, 20_000) + 0.5) / 2**32
    shares[:4] = 0.5 / 2**32, 1 - 0.5 / 2**32, 0.075, 0.925
    theirs = np.array([statistics.NormalDist().inv_cdf(share) for share in shares])
    assert np.abs(quantiles(shares) - theirs).max() < 1e-14


def test_draws_are_distributed_as_asked():
    count = 2_000_000
    z = Draws(0, "z").normal(count).astype(np.float64)
    error = count**-0.5
    assert abs(z.mean()) < 4 * error and abs(z.std() - 1) < 4 * error * 0.5**0.5
    assert abs((z**3).mean()) < 4 * error * 15**0.5 and abs((z**4).mean() - 3) < 4 * error * 96**0.5
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 * error and 4.5 < np.abs(z).max() < 6.4
    edges = [statistics.NormalDist().inv_cdf(i / 64) for i in range(1, 64)]
    found = np.bincount(np.searchsorted(edges, z), minlength=64)
    assert ((found - count / 64) ** 2 / (count / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
    u = Draws(0, "u").uniform(count, -2.0, 1.0).astype(np.float64)
    assert u.min() >= -2 and u.max() < 1 and abs(u.mean() + 0.5) < 4 * error and abs(u.var() - 0.75) < 4 * error
    found = np.histogram(u, 64, (-2.0, 1.0))[0]
    assert ((found - count / 64) ** 2 / (count / 64)).sum() < 63 + 5 * (2 * 63) ** 0.5
    assert Draws(0, "n").normal(3, 5.0, 0.0).tolist() == [5.0] * 3 and Draws(0, "n").normal(0).size == 0


def test_modules_get_what_their_own_initialisation_asks_for():
    model = build_config(tiny()).model
    transformer = scratch.build_transformer(model.flux_config, 0).requires_grad_(False)
    vlm = scratch.build_vlm(model.vlm_config, 0)[0].requires_grad_(False)
    weight = transformer.transformer_blocks[0].attn.to_q.weight  # Xavier, uniform
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.all(transformer.proj_out.weight == 0)
    assert vlm.language_model.embed_tokens.weight.std() == pytest.approx(0.04, rel=0.02)
    assert vlm.language_model.layers[0].self_attn.q_proj.bias.std() == pytest.approx(3.0, rel=0.2)
    assert build_connector(192, 160, 0).weight.detach().std() == pytest.approx(192**-0.5, rel=0.02)


def test_the_global_random_state_stays_and_other_draws_are_refused():
    before = torch.get_rng_state()
    with seeded(1, "x"):
        first = nn.Linear(8, 8)
        half = torch.empty(5, 3, dtype=torch.bfloat16).normal_(std=2.0)
        part = torch.zeros(4, 6)
        part[:, ::2].uniform_(1.0, 2.0)
        assert torch.empty(3, device="meta").normal_().is_meta
        assert nn.init.trunc_normal_(torch.empty(99), std=2.0, a=-1.0, b=1.0).abs().max() <= 1
        for draw in (
            lambda: torch.randn(3),
            lambda: torch.rand(3),
            lambda: torch.randperm(3),
            lambda: nn.init.orthogonal_(torch.empty(3, 3)),
            lambda: torch.empty(3).exponential_(),
        ):
            with pytest.raises(RuntimeError, match="depends on the CPU"):
                draw()
    assert torch.equal(before, torch.get_rng_state())
    assert half.float().std() > 0.5 and torch.all(part[:, 1::2] == 0) and torch.all(part[:, ::2] >= 1)
    with seeded(1, "x"):
        assert torch.equal(nn.Linear(8, 8).weight, first.weight)


def test_a_configuration_names_the_way():
    values = tiny()
    made = {}
    for way in ("portable", "torch"):
        values["model"]["seeded"] = way
        made[way] = pretrained.load_models(build_config(values))
    assert build_config(tiny()).model.seeded == "portable"
    assert made["portable"].base == pretrained.load_models(build_config(tiny())).base != made["torch"].base
