"""Canvas sizes are the published recipe's, and every image goes to the canvas of its shape."""

import pytest

from megaflux.common.errors import UserError
from megaflux.data.buckets import ASPECT_RATIOS, Bucket, make_buckets, nearest_bucket


@pytest.mark.parametrize(
    ("longest_side", "sizes"),
    [
        (1024, [(1024, 576), (1024, 512), (1024, 432), (1024, 1024), (512, 1024)]),
        (128, [(128, 80), (128, 64), (128, 48), (128, 128), (64, 128)]),
    ],
)
def test_the_five_ratios(longest_side, sizes):
    buckets = make_buckets(ASPECT_RATIOS, longest_side)
    assert [bucket.size for bucket in buckets] == sizes
    assert [bucket.name for bucket in buckets] == list(ASPECT_RATIOS)


def test_folders_are_names_without_colons():
    assert [bucket.folder for bucket in make_buckets(ASPECT_RATIOS, 1024)] == ["16x9", "2x1", "2.35x1", "1x1", "1x2"]
    assert [str(bucket) for bucket in make_buckets(("16:9", "1:2"), 1024)] == ["16:9 (1024x576)", "1:2 (512x1024)"]


def test_no_side_is_shorter_than_a_token():
    assert [bucket.size for bucket in make_buckets(("100:1", "1:100", "1:1"), 128)] == [
        (128, 16),
        (16, 128),
        (128, 128),
    ]
    assert [bucket.size for bucket in make_buckets(("1:1",), 16)] == [(16, 16)]


def test_two_ratios_of_one_size_are_refused_by_name():
    with pytest.raises(UserError, match=r"16:9 and 2:1 both become 64x32"):
        make_buckets(ASPECT_RATIOS, 64)


@pytest.mark.parametrize(
    "ratios",
    [("16x9",), ("0:1",), ("1:0",), ("-1:1",), ("1:1; rm",), ("9" * 5000 + ":1",), (), (1.5,), ((16, 9),), (None,)],
)
def test_ratios_that_make_no_sense(ratios):
    with pytest.raises(UserError):
        make_buckets(ratios, 128)


@pytest.mark.parametrize("longest_side", [0, -16, 100])
def test_longest_side_must_be_a_multiple(longest_side):
    with pytest.raises(UserError, match=str(longest_side)):
        make_buckets(("1:1",), longest_side)


def test_each_canvas_is_nearest_to_itself():
    buckets = make_buckets(ASPECT_RATIOS, 128)
    assert [nearest_bucket(*bucket.size, buckets) for bucket in buckets] == list(buckets)


@pytest.mark.parametrize(
    ("size", "name"),
    [((4000, 3000), "1:1"), ((3000, 4000), "1:1"), ((6000, 3376), "16:9"), ((1080, 1920), "1:2"), ((3, 1), "2.35:1")],
)
def test_nearest_by_log_aspect(size, name):
    assert nearest_bucket(*size, make_buckets(ASPECT_RATIOS, 1024)).name == name


def test_log_aspect_treats_wide_and_tall_alike():
    buckets = (Bucket("2:1", 128, 64), Bucket("1:2", 64, 128), Bucket("1:1", 128, 128))
    assert nearest_bucket(140, 100, buckets).name == nearest_bucket(100, 140, buckets).name == "1:1"
    assert nearest_bucket(145, 100, buckets).name == "2:1"
    assert nearest_bucket(100, 145, buckets).name == "1:2"


def test_a_tie_goes_to_the_bucket_listed_first():
    tall, wide = Bucket("1:2", 64, 128), Bucket("2:1", 128, 64)
    assert nearest_bucket(50, 50, (tall, wide)) is tall and nearest_bucket(50, 50, (wide, tall)) is wide
