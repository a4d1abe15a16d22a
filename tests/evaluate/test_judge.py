"""The judge learns a small grid, and says the same after it was written and read."""

from __future__ import annotations

import math

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.data.tensors import from_image
from megaflux.evaluate import augment, hands, hands_training, ink, judge_training
from megaflux.evaluate.judge import Judge
from megaflux.evaluate.samples import load
from tests.evaluate.conftest import STEPS


def test_it_tells_contents_and_styles_of_cells_that_it_never_saw(judge_file, grid_data):
    judge = Judge.load(judge_file)
    assert judge.facts["cells"] >= 5
    assert judge.facts["content"] >= 0.8 and judge.facts["style"] >= 0.8
    grid = load(str(grid_data), 64, None).grid
    whole = torch.cat(list(ink.inks([from_image(picture) for picture in grid.held_out.values()])))
    wanted = torch.tensor([judge.styles.index(cell.style) for cell in grid.held_out])
    with torch.no_grad():  # each reader by itself
        look = judge.network.hands.looks(hands.halved(whole)).argmax(dim=1)
        palette = judge.network.hands.palettes(ink.palette(whole)).argmax(dim=1)
    for read in (look, palette):
        assert (read == wanted).float().mean() >= 0.8


def test_the_same_lesson_gives_the_same_judge(grid_data, judge_file):
    held_out = load(str(grid_data), 64, None)
    lesson = judge_training.of_grid(held_out.grid)
    done = []
    again = judge_training.train(lesson, {}, STEPS, on_step=lambda: done.append(1))
    assert len(done) == judge_training.updates(STEPS, styles=True)
    before = Judge.load(judge_file)
    pictures = [sample.target for sample in held_out.samples]
    for a, b in zip(again.features(pictures), before.features(pictures), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(again.prototypes, before.prototypes) and torch.equal(again.hubs, before.hubs)


def test_size_and_place_of_the_ink_do_not_count():
    small = torch.full((3, 96, 128), 255, dtype=torch.uint8)
    small[:, 20:40, 70:90] = 0
    large = torch.full((3, 128, 128), 255, dtype=torch.uint8)
    large[:, 10:90, 20:100] = 0
    (whole,) = ink.inks([small, large])
    centred = ink.centred(whole)
    assert (centred[0] - centred[1]).abs().mean() < 0.06


def test_latents_are_disturbed_but_not_beyond_recognition():
    latents = torch.randn(64, 8, 16, 12, generator=torch.Generator().manual_seed(1))
    latents = torch.nn.functional.avg_pool2d(latents, 3, 1, 1) * 3  # neighbours are alike, as in a VAE's
    first, again = (augment.disturbed(latents, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == latents.shape
    error = (first - latents).square().mean(dim=(1, 2, 3)) / latents.square().mean(dim=(1, 2, 3))
    assert 0 < error.min() < 0.1 and 0.3 < error.max() < 1.5


def test_styles_are_told_through_the_vae_and_from_disturbed_latents(grid_data):
    grid = load(str(grid_data), 64, None).grid

    def round_trip(pictures, change):
        return pictures if change is None else (255 - change(pictures.float())).clamp(0, 255).byte()

    lesson, plain = judge_training.of_grid(grid, round_trip), judge_training.of_grid(grid)
    assert len(lesson.versions) == len(plain.versions) + 3
    *_, trip, one, other = lesson.versions
    torch.testing.assert_close(trip.palettes, plain.versions[0].palettes[trip.whose])
    torch.testing.assert_close(trip.small, plain.versions[0].small[trip.whose])
    assert torch.equal(trip.whose, one.whose)
    for a, b in ((one, trip), (one, other)):
        assert not torch.equal(a.palettes, b.palettes) and not torch.equal(a.small, b.small)


def test_a_blank_picture_has_features():
    (whole,) = ink.inks([torch.full((3, 64, 64), 255, dtype=torch.uint8)])
    centred = ink.centred(whole)
    for found in (centred, ink.palette(whole), ink.maps(centred), ink.descriptor(centred)):
        assert found.isfinite().all()


def test_words_are_those_that_captions_share():
    shares = judge_training.word_shares(["a red cat", "a cat", "a dog", "a cat!"])
    assert shares.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]  # a, cat
    assert judge_training.word_shares(["", ""]) is None


def test_another_file_is_one_line(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read as a judge"):
        Judge.load(tmp_path / "x")


@pytest.mark.parametrize("fast", [True, False])
def test_looks_are_learned_from_each_version_and_its_own_rows(fast):
    torch.manual_seed(0)
    style = torch.tensor([0, 1, 2] * 8)
    coloured = torch.zeros(24, 3, 64, 64)
    coloured[torch.arange(24), style] = 0.6  # each hand has its ink
    blank, palettes = torch.zeros(24, 3, 64, 64), torch.zeros(24, 1)
    order = torch.randperm(24)[:20]
    versions = [
        hands_training.Version(palettes, blank.half(), torch.arange(24)),
        hands_training.Version(palettes, None, torch.arange(24)),
        hands_training.Version(palettes[:20], coloured[order].half(), order),
    ]
    known, done = hands.Hands(3).train(), []
    hands_training.learn_looks(known, versions, style, 40, torch.device("cpu"), fast, lambda: done.append(1))
    with torch.no_grad():
        read = known.eval().looks(coloured).argmax(dim=1)
    assert torch.equal(read, style) and len(done) == 40


def test_looks_are_learned_mirrored_moved_and_tinted_a_little():
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 0, 0] = 1.0  # at the edge: what leaves the picture does not come in on the other side
    side = hands_training.SHIFT
    for seed in range(20):
        (varied,) = hands_training._varied(picture, torch.Generator().manual_seed(seed))
        paper = varied[:, 32, 32]
        assert paper.abs().max() <= hands_training.TINT
        ink_there = (varied - paper[:, None, None]).abs().amax(dim=0) > 0.5
        rows, columns = ink_there.nonzero().unbind(1)
        assert len(rows) <= 1 and (rows <= side).all() and ((columns <= side) | (columns >= 63 - side)).all()


@torch.no_grad()
def test_a_palette_however_sure_outweighs_the_look_by_so_much_at_most():
    known, whole = hands.Hands(3).eval(), torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    look = known.looks(hands.halved(whole)).log_softmax(dim=1)
    most = math.log(1 + 3 * (1 - hands.ASTRAY) / hands.ASTRAY)
    last = known.by_palette[-1]
    last.weight.zero_()
    for sure in (0.0, 50.0):  # of the second hand
        last.bias.copy_(torch.tensor([0.0, sure, 0.0]))
        scores = known(whole) - look
        torch.testing.assert_close(scores[:, 1] - scores[:, 0], torch.full((2,), most if sure else 0.0))
        torch.testing.assert_close(scores[:, 2], scores[:, 0])
