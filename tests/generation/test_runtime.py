"""Offload, fp8 and torch.compile make the same pictures, by the real libraries and with the CPU as the device."""

import numpy as np
import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.generation import runtime
from megaflux.runs import load_pipeline
from tests.conftest import picture
from tests.generation.test_modes import controlnet_folder, given, hole  # noqa: F401  (fixtures)


def fresh(run_folder, kernels=True):
    return load_pipeline(run_folder, dtype=torch.float32, device="cpu", kernels=kernels)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offload_changes_no_pixel(run_folder, controlnet_folder, kind):  # noqa: F811
    pipeline = fresh(run_folder, kernels=kind == "model").load_controlnet(str(controlnet_folder))
    guided = {"prompt": "a fox", "true_cfg_scale": 2.0, "negative_prompt": "at night"}
    calls = [given("variation") | guided, given("inpaint"), given("controlnet-inpaint") | {"true_cfg_scale": 3.0}]
    want = [pipeline(**call, seed=3).images[0].tobytes() for call in calls]
    {"model": pipeline.enable_model_cpu_offload, "sequential": pipeline.enable_sequential_cpu_offload}[kind]("cpu")
    for _ in range(2):  # offloading again and again
        assert [pipeline(**call, seed=3).images[0].tobytes() for call in calls] == want
    weight = pipeline.models.trainable.transformer.x_embedder.weight
    assert weight.device.type == (
        "cpu" if kind == "model" else "meta"
    )  # sequential: accelerate holds the weights until the layer runs
    if kind == "sequential":
        assert not pipeline.models.trainable.fused


def test_fp8_takes_the_blocks_linears_and_little_else(run_folder):
    pipeline = fresh(run_folder, kernels=False)
    transformer = pipeline.models.trainable.transformer
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    plain = pipeline(picture(64, 64), num_inference_steps=3).images[0]
    taken = runtime.quantize_fp8(transformer)
    quantized = {
        name
        for name, m in transformer.named_modules()
        if isinstance(m, torch.nn.Linear) and type(m.weight.data) is not torch.Tensor
    }
    assert (
        len(quantized) == taken == 12 + 5
    )  # a double block: q, k, v, out twice and two MLPs; a single one: q, k, v, MLP, out
    for kept in (
        "x_embedder",
        "context_embedder",
        "proj_out",
        "norm_out.linear",
        "transformer_blocks.0.norm1.linear",
        "single_transformer_blocks.0.norm.linear",
        "time_text_embed.text_embedder.linear_1",
    ):
        assert kept not in quantized and torch.equal(transformer.get_submodule(kept).weight, before[f"{kept}.weight"])
    weight = transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.qdata.dtype == torch.float8_e4m3fn
    relative = (
        weight.dequantize() - before["transformer_blocks.0.attn.to_q.weight"]
    ).abs().max() / weight.dequantize().abs().max()
    assert 0 < relative < 2**-4
    made = pipeline(picture(64, 64), num_inference_steps=3).images[0]
    difference = np.abs(np.array(made).astype(int) - np.array(plain)).mean()
    assert made.tobytes() != plain.tobytes() and difference < 3
    with pytest.raises(ValueError, match="turn kernels off"):
        pipeline.models.trainable.configure(True)


def test_fp8_without_torchao_says_what_to_install(run_folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="needs torchao; pip install"):
        runtime.quantize_fp8(fresh(run_folder, False).models.trainable.transformer)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False])
def test_compiled_blocks_make_the_same_picture(run_folder, kernels):
    pipeline = fresh(run_folder, kernels)
    plain = np.array(pipeline(picture(64, 64), num_inference_steps=3).images[0]).astype(int)
    runtime.compile_blocks(pipeline.models.trainable.transformer)
    compiled = np.array(pipeline(picture(64, 64), num_inference_steps=3).images[0])
    assert np.abs(plain - compiled).max() <= 1
