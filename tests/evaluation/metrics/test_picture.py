"""Metrics of the picture itself: grids of squares."""

import numpy as np
import pytest

from omnihuman_jax.evaluation.metrics import borders


def test_the_border_ratio_of_squares_and_of_a_ramp():
    rng = np.random.default_rng(0)
    flat = np.kron(rng.integers(0, 256, (3, 6, 5, 3)), np.ones((1, 8, 8, 1)))
    ramp = np.broadcast_to(np.arange(48.0)[None, :, None, None] + np.arange(40.0)[None, None, :, None], (3, 48, 40, 3))
    assert np.isnan(borders.border_ratio(flat[:, :8, :8]))  # without any difference
    assert borders.border_ratio(ramp) == pytest.approx(1)
    # Ramps of slope 1 within squares that jump by 3: at a border the step is 1 + 2.
    jumps = ramp + 2 * (np.arange(48) // 8)[None, :, None, None] + 2 * (np.arange(40) // 8)[None, None, :, None]
    assert borders.border_ratio(jumps) == pytest.approx(3)
    assert borders.border_ratio(flat + rng.random(flat.shape)) > 50
