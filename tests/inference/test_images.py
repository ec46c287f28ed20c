"""Output sizes and how pictures and keypoints are fitted to them."""

import numpy as np
import pytest

from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import images
from omnihuman_jax.pixels import to_model, to_pixels

SIZES = [(96, 96), (128, 80), (80, 112)]


def test_sizes_that_do_not_divide_name_the_nearest_that_do():
    images.check_size(96, 80, 16)
    with pytest.raises(UserError, match="--height=96 --width=80 or --height=112 --width=80"):
        images.check_size(100, 80, 16)
    with pytest.raises(UserError, match="--height=16 --width=96"):
        images.check_size(0, 96, 16)
    with pytest.raises(UserError, match="nearest"):
        images.check_size(-16, 96, 16)


@pytest.mark.parametrize(
    ("image", "expected"), [((500, 480), (96, 96)), ((1920, 1080), (128, 80)), ((720, 1280), (80, 112))]
)
def test_default_size_is_the_trained_one_nearest_in_aspect_ratio(image, expected):
    assert images.complete_size(None, None, image, SIZES, 16) == expected


def test_one_side_given_lets_the_other_follow_the_picture():
    assert images.complete_size(160, None, (300, 200), SIZES, 16) == (160, 112)
    assert images.complete_size(None, 64, (300, 200), SIZES, 16) == (96, 64)
    with pytest.raises(UserError, match="not divisible"):
        images.complete_size(90, None, (300, 200), SIZES, 16)


def test_the_largest_of_equally_near_sizes_is_taken():
    assert images.nearest_size(10, 10, [(64, 64), (96, 96), (32, 32)]) == (96, 96)


@pytest.mark.parametrize("shape", [(50, 200), (200, 50), (37, 41), (96, 80), (1, 1)])
def test_cover_fills_the_output_without_borders(shape):
    image = np.full((*shape, 3), 200, np.uint8)
    fitted = images.cover(image, 96, 80)
    assert fitted.shape == (96, 80, 3) and np.all(fitted == 200)


def test_cover_keeps_the_aspect_ratio_and_the_centre():
    image = np.zeros((100, 300, 3), np.uint8)
    image[40:60, 140:160] = 255  # a square in the middle
    rows, columns = np.where(images.cover(image, 200, 200)[..., 0] > 127)
    assert np.ptp(rows) == pytest.approx(39, abs=2) and np.ptp(columns) == pytest.approx(39, abs=2)
    assert rows.mean() == pytest.approx(99.5, abs=1) and columns.mean() == pytest.approx(99.5, abs=1)


def test_keypoints_move_with_the_pixels():
    image = np.zeros((120, 300, 3), np.uint8)
    image[30:34, 170:174] = 255
    point = np.array([[172 / 300, 32 / 120, 0.9], [0.01, 0.5, 0.9], [0, 0, 0]], np.float32)
    moved = images.cover_points(point, (120, 300), 160, 160)
    rows, columns = np.where(images.cover(image, 160, 160)[..., 0] > 100)
    assert moved[0, :2] * 160 == pytest.approx([columns.mean() + 0.5, rows.mean() + 0.5], abs=1.0)
    assert moved[0, 2] == pytest.approx(0.9)
    assert not moved[1:].any()  # cropped away, and not found in the first place


def test_pixels_survive_the_models_range():
    pixels = np.arange(256, dtype=np.uint8)
    values = to_model(pixels)
    assert values.min() == -1.0 and values.max() == 1.0
    np.testing.assert_array_equal(to_pixels(values), pixels)
    np.testing.assert_array_equal(to_pixels(np.array([-3.0, 3.0])), [0, 255])
