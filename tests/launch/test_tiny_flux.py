"""The script behind `model.init: tiny`: what it writes is what it trained."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import tiny_flux_lessons as lessons
from launch import train_tiny_flux as script
from launch.tiny_vlm_pictures import Pictures
from megaflux.common.errors import UserError
from megaflux.models.pretrained import load_models


@pytest.fixture(scope="module")
def models():
    return load_models(script.configuration())


NAMES = ("cat", "red-apple", "ship", "tree", "sun")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    keys = ["demo 1F408", "demo 2B05", *(f"grid {style}/{name}" for style in ("a", "b") for name in NAMES)]
    captions = ["cat", "left arrow", *(name.replace("-", " ") for name in NAMES * 2)]
    images = np.random.default_rng(0).integers(0, 256, (len(keys), 64, 64, 3), dtype=np.uint8)
    return Pictures(images, captions, keys)


def test_conditions_of_other_lengths_are_padded_without_a_change(models):
    trunk = models.trunk
    references = [torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8) for _ in range(3)]
    words = ["cat", "red apple on a very long table"]
    alone = [trunk.encode_references([[references[i], references[i + 1]]], [words[i]], "image_text") for i in (0, 1)]
    both = lessons.alike(alone)
    with torch.no_grad():
        for i, one in enumerate(alone):
            own = models.trainable.encode_condition(one)
            padded = both.rows([i])
            assert padded.select_mask is not None
            got = models.trainable.encode_condition(replace(padded, hidden_states=padded.hidden_states.float()))
            assert int(padded.select_mask.sum()) == own.shape[1]
            # The trunk's output is kept in bf16.
            torch.testing.assert_close(got[:, : own.shape[1]], own, rtol=0.05, atol=0.05)


def test_references_of_a_cell_are_others_by_the_same_hand(models, pictures, monkeypatch):
    seen = []
    real = models.trunk.encode_references

    def encode_references(references, captions, mode, limits):
        seen.extend(zip(references, captions, strict=True))
        return real(references, captions, mode, limits=limits)

    monkeypatch.setattr(models.trunk, "encode_references", encode_references)
    pairs = lessons.pairs_of(models, pictures.captions, pictures.keys, pictures, 0)
    assert pairs is not None and len(seen) == len(pairs.targets) == 10 * lessons.DRAWS
    images = [torch.from_numpy(image).permute(2, 0, 1) for image in pictures.images]
    for target, (references, caption) in zip(pairs.targets, seen, strict=True):
        shown = {next(i for i, image in enumerate(images) if torch.equal(image, one)) for one in references}
        assert caption == pictures.captions[target] and target not in shown and len(shown) == lessons.REFERENCES
        assert {pictures.keys[i].split("/")[0] for i in shown} == {pictures.keys[target].split("/")[0]}


def test_each_kind_of_lesson_has_its_share_and_a_picture_is_mirrored_with_its_target(models, pictures):
    examples = lessons.encode(models, pictures, 0)
    drawn = [lessons.drawn_lesson(examples, i / 1000) for i in range(1000)]
    words, shown, pairs = (
        sum(one is each for one in drawn) for each in (examples.words, examples.pictures, examples.pairs)
    )
    assert (shown, pairs, words) == (120, 600, 280)
    alone = replace(examples, pairs=None)
    assert lessons.drawn_lesson(alone, 0.5) is alone.words
    plain = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    mirrored = plain.flip(-1)
    mirrored[1] = plain[1]  # an arrow to the left
    chosen = [4, 1, 0, 4]
    mirror = torch.tensor([True, True, False, False])
    x, condition = lessons.batch_of(examples, examples.pictures, chosen, mirror)
    pixels = torch.where(mirror[:, None, None, None], mirrored[chosen], plain[chosen])
    expected = lessons.latent_ops.pack(lessons.latent_ops.encode(models.vae, pixels))
    torch.testing.assert_close(x, expected, rtol=0.05, atol=0.05)
    own = models.trunk.encode(pixels).hidden_states
    torch.testing.assert_close(condition.hidden_states.float(), own, rtol=0.05, atol=0.05)
    assert not torch.allclose(own[0], own[3], atol=0.2)
    x, condition = lessons.batch_of(examples, examples.words, chosen, mirror)  # words stay
    torch.testing.assert_close(x, expected, rtol=0.05, atol=0.05)
    assert torch.equal(condition.hidden_states[0], condition.hidden_states[3])


def test_an_asset_of_other_models_is_refused_in_a_line(models, tmp_path):
    with pytest.raises(UserError, match="model.safetensors: is missing or is not"):
        script.read(models, tmp_path)
    weights = {name: p.detach().clone() for name, p in script.started(models).items()}
    weights.popitem()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: is missing or is not"):
        script.read(models, tmp_path)


def test_what_is_written_is_what_was_trained(models, pictures, tmp_path):
    """Qwen2-VL's final norm, which is not written, is not trained either."""
    args = Namespace(updates=3, save_every=3, lr=0.05, muon_lr=0.05, seed=0, eager=True, out=tmp_path)
    examples = lessons.encode(models, pictures, 0)
    script.train(models, examples, args)
    fresh = load_models(script.configuration())
    assert set(script.started(fresh)) == set(load_file(tmp_path / "model.safetensors"))
    script.read(fresh, tmp_path)
    trained = dict(models.trainable.named_parameters())
    drawn = load_models(script.configuration()).trainable.named_parameters()
    changed = {name for name, p in drawn if not torch.equal(p, trained[name])}
    for name, p in fresh.trainable.named_parameters():
        torch.testing.assert_close(p, trained[name], rtol=1e-2, atol=1e-3, msg=name)
    assert len(changed) > 100 and "vlm.norm.weight" not in changed
    own, other = (script.mean_loss(fresh, examples, examples.words, 0, away) for away in (0, 3))
    assert own > 0 and other > 0 and own != other
