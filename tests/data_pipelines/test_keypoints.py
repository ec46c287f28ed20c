"""The keypoint order, mirroring and cropping."""

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


def test_mirroring_swaps_the_sides():
    mirrored = [kp.KEYPOINTS[k] for k in kp.FLIP]
    assert mirrored[kp.INDEX["left_wrist"]] == "right_wrist" and mirrored[kp.INDEX["brow_right"]] == "brow_left"
    assert mirrored[kp.INDEX["nose"]] == "nose"
    assert [kp.FLIP[k] for k in kp.FLIP] == list(range(kp.NUM_KEYPOINTS))


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
