"""The keypoint order, mirroring, cropping and the mouth measure."""

import numpy as np
import pytest

from data_pipelines import keypoints as kp


def sample(seed=0, frames=4):
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (frames, kp.NUM_KEYPOINTS, 3)).astype(np.float32)
    points[..., 2] = 1
    points[0, 3] = 0
    return points


def test_the_order_of_the_points_is_the_one_that_records_were_written_with():
    assert kp.NUM_KEYPOINTS == 28
    assert kp.KEYPOINTS[0] == "nose"
    assert kp.KEYPOINTS[9:11] == ("left_wrist", "right_wrist")
    assert kp.KEYPOINTS[21:] == (
        "mouth_left",
        "mouth_right",
        "mouth_top",
        "mouth_bottom",
        "chin",
        "brow_left",
        "brow_right",
    )


def test_limbs_name_known_points():
    assert {name for limb in kp.LIMBS for name in limb} <= set(kp.KEYPOINTS)


def test_flip_swaps_sides_and_mirrors_x():
    points = sample()
    flipped = kp.flip(points)
    left, right = kp.INDEX["left_wrist"], kp.INDEX["right_wrist"]
    np.testing.assert_allclose(flipped[:, left, 0], 1 - points[:, right, 0], rtol=1e-6)
    np.testing.assert_array_equal(flipped[:, left, 1:], points[:, right, 1:])
    brow = kp.INDEX["brow_left"]
    np.testing.assert_allclose(flipped[1:, brow, 0], 1 - points[1:, kp.INDEX["brow_right"], 0], rtol=1e-6)


def test_flip_twice_gives_the_points_back_and_keeps_missing_ones_at_zero():
    points = sample()
    np.testing.assert_allclose(kp.flip(kp.flip(points)), points, atol=1e-6)
    assert not kp.flip(points)[0, kp.FLIP[3]].any()


def test_points_outside_the_frame_or_not_finite_are_hidden():
    points = sample()
    points[0, 0, 0], points[0, 1, 1], points[0, 2, 0] = 1.01, -0.2, np.nan
    hidden = kp.hide_outside(points)
    assert not hidden[0, :4].any()
    np.testing.assert_array_equal(hidden[0, 4:], points[0, 4:])


def test_crop_moves_points_into_the_new_frame():
    points = np.zeros((1, kp.NUM_KEYPOINTS, 3), np.float32)
    points[0, 0] = [0.5, 0.25, 0.9]
    points[0, 1] = [0.1, 0.25, 0.9]
    cropped = kp.crop(points, left=0.25, top=0.0, width=0.5, height=0.5)
    np.testing.assert_allclose(cropped[0, 0], [0.5, 0.5, 0.9], rtol=1e-6)
    assert not cropped[0, 1].any()
    with pytest.raises(ValueError, match="positive size"):
        kp.crop(points, 0, 0, 0, 1)


def test_mouth_opening_is_height_over_width_and_zero_when_unseen():
    points = np.ones((2, kp.NUM_KEYPOINTS, 3), np.float32)
    for name, place in {
        "mouth_left": (0.6, 0.5),
        "mouth_right": (0.4, 0.5),
        "mouth_top": (0.5, 0.45),
        "mouth_bottom": (0.5, 0.55),
    }.items():
        points[:, kp.INDEX[name], :2] = place
    points[1, kp.INDEX["mouth_top"], 2] = 0
    np.testing.assert_allclose(kp.mouth_opening(points), [0.5, 0.0], atol=1e-6)


def test_pixels_follow_the_size_of_the_frame():
    np.testing.assert_allclose(kp.to_pixels(np.array([0.5, 0.25, 1.0]), height=80, width=112), [56, 20])
