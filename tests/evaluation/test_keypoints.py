"""Keypoint error against a case worked out by hand."""

import numpy as np
import pytest

from omnihuman_jax.evaluation import keypoints


def test_keypoint_error_is_percent_of_the_diagonal_over_visible_points():
    truth = np.zeros((2, 3, 3))
    truth[..., :2], truth[..., 2] = 0.5, 1
    truth[:, 2, 2] = 0  # hidden: its error does not count
    predicted = truth.copy()
    predicted[:, 0, 0] += 0.1  # 8 of 80 pixels
    predicted[:, 1, 1] += 0.1  # 12.8 of 128 pixels
    predicted[:, 2] += 10
    expected = 100 * (8 + 12.8) / 2 / np.hypot(128, 80)
    assert keypoints.keypoint_error(predicted, truth, (128, 80)) == pytest.approx(expected)
    truth[..., 2] = 0
    assert np.isnan(keypoints.keypoint_error(predicted, truth, (128, 80)))
