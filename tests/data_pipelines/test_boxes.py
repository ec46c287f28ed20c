"""Boxes of face, mouth and arms, against distances worked out by hand."""

import numpy as np
import pytest

from data_pipelines import boxes
from data_pipelines import keypoints as kp
from omnihuman_jax import regions

FACE, MOUTH, LEFT, RIGHT = range(4)
# A face in a picture of 200 x 100 pixels, in pixels: brows at 30, chin at 60, mouth 12 wide.
PLACES = {
    "nose": (100, 44), "left_eye": (107, 35), "right_eye": (93, 35), "left_ear": (115, 38), "right_ear": (85, 38),
    "brow_left": (107, 30), "brow_right": (93, 30), "mouth_left": (106, 50), "mouth_right": (94, 50),
    "mouth_top": (100, 49), "mouth_bottom": (100, 52), "chin": (100, 60),
    "left_elbow": (140, 60), "left_wrist": (150, 90), "left_thumb_tip": (155, 95), "left_index_tip": (152, 98),
}  # fmt: skip


def points(**changes):
    """Keypoints (1,K,3) of `PLACES`; a change of None hides a point."""
    found = np.zeros((1, kp.NUM_KEYPOINTS, 3), np.float32)
    for name, place in (PLACES | changes).items():
        if place is not None:
            found[0, kp.INDEX[name]] = (place[0] / 200, place[1] / 100, 1)
    return found


def in_pixels(**changes):
    """The boxes (4,4) in pixels."""
    return boxes.from_keypoints(points(**changes), 2.0)[0] * [200, 100, 200, 100]


def test_the_boxes_are_those_that_batches_expect():
    assert boxes.NAMES == regions.BOXES == ("face", "mouth", "left_arm", "right_arm")
    found = boxes.from_keypoints(np.repeat(points(), 5, 0), 2.0)
    assert found.shape == (5, 4, 4) and found.dtype == np.float32


def test_paddings_are_the_same_in_pixels_in_both_directions():
    found = in_pixels()
    # 35 % of the width of the mouth; above the lip 30 %; half way from 52 to the chin.
    np.testing.assert_allclose(found[MOUTH], [94 - 4.2, 49 - 3.6, 106 + 4.2, 56], atol=1e-4)
    # 30 pixels from brows to chin: a margin of 45 % above, 8 % elsewhere.
    np.testing.assert_allclose(found[FACE], [85 - 2.4, 30 - 13.5, 115 + 2.4, 60 + 2.4], atol=1e-4)
    # 15 x 38 pixels with a fifth of the longer side around them, clipped below.
    np.testing.assert_allclose(found[LEFT], [140 - 7.6, 60 - 7.6, 155 + 7.6, 100], atol=1e-4)
    assert not found[RIGHT].any()


def test_an_open_mouth_has_a_larger_box_that_reaches_towards_the_lower_chin():
    shut, wide = (in_pixels(mouth_bottom=(100, y), chin=(100, y + 8)) for y in (52, 60))
    assert wide[MOUTH, 3] == pytest.approx(shut[MOUTH, 3] + 8, abs=1e-4)
    np.testing.assert_allclose(wide[MOUTH, :3], shut[MOUTH, :3], atol=1e-4)


@pytest.mark.parametrize("hidden", [*boxes.LIPS])
def test_a_mouth_without_one_of_its_points_is_unknown(hidden):
    found = in_pixels(**{hidden: None})
    assert not found[MOUTH].any() and found[LEFT].any()


@pytest.mark.parametrize("hidden", boxes.FACE_NEEDS)
def test_a_face_without_an_eye_or_lip_is_unknown_and_without_an_ear_it_is_not(hidden):
    assert not in_pixels(**{hidden: None})[FACE].any()
    found = in_pixels(left_ear=None)[FACE]
    np.testing.assert_allclose(found, [85 - 2.4, 30 - 13.5, 107 + 2.4, 60 + 2.4], atol=1e-4)


def test_a_chin_out_of_the_picture_leaves_boxes_of_about_the_same_size():
    whole, cut = in_pixels(), in_pixels(chin=None)
    assert cut[MOUTH, 3] == pytest.approx(52 + 0.45 * 12, abs=1e-4)
    assert abs(cut[FACE] - whole[FACE]).max() < 6 and cut[FACE, 3] > 60


def test_one_visible_point_of_an_arm_makes_a_small_box():
    found = in_pixels(left_wrist=None, left_thumb_tip=None, left_index_tip=None)
    np.testing.assert_allclose(found[LEFT], [136, 56, 144, 64], atol=1e-4)


def test_without_points_and_with_points_that_are_not_numbers_every_box_is_unknown():
    nothing = np.zeros((2, kp.NUM_KEYPOINTS, 3), np.float32)
    assert not boxes.from_keypoints(nothing, 1.0).any()
    broken = points()
    broken[:, :, 0] = np.nan
    assert not boxes.from_keypoints(broken, 1.0).any()
    assert boxes.from_keypoints(nothing[:0], 1.0).shape == (0, 4, 4)


def test_a_crop_moves_clips_and_forgets_boxes():
    whole = np.array([[0.2, 0.2, 0.6, 0.6], [0.3, 0.4, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2], [0.0] * 4], np.float32)
    found = boxes.crop(whole[None], 0.25, 0.25, 0.5, 0.5)[0]
    np.testing.assert_allclose(found[0], [0, 0, 0.7, 0.7], atol=1e-6)
    np.testing.assert_allclose(found[1], [0.1, 0.3, 0.5, 0.5], atol=1e-6)
    assert not found[2].any()  # outside
    assert not found[3].any()  # unknown before, though the crop does not begin at 0
    assert not boxes.crop(whole[None], -0.5, -0.5, 2.0, 2.0)[0, 3].any()
    with pytest.raises(ValueError, match="positive size"):
        boxes.crop(whole, 0, 0, 0, 1)
