"""Metrics of the picture itself: grids of squares, and a mouth at rest."""

import types

import numpy as np
import pytest

from omnihuman_jax.evaluation.metrics import borders, silence


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


def clip(mouth, audio=4, face=30.0):
    record = {"audio": np.zeros((audio, 2)), "mouth": np.array(mouth)}
    track = lambda field: record[field][:3]  # noqa: E731
    return types.SimpleNamespace(record=record, track=track, reading=types.SimpleNamespace(face=face))


def test_a_silent_clip_has_sound_and_a_closed_mouth():
    assert silence.METRIC.eligibility.test(clip([0.0, 0.05, 0.1, 0.9]))  # what comes later does not count
    assert not silence.METRIC.eligibility.test(clip([0.0, 0.3, 0.1]))
    assert not silence.METRIC.eligibility.test(clip([0.0, 0.0, 0.0], audio=0))
    assert not silence.METRIC.eligibility.test(clip([0.0, 0.0, 0.0], face=10.0))
    sample = types.SimpleNamespace(clip=clip([0.0, 0.1, 0.0]), reading=types.SimpleNamespace(mouth=np.array([0.3] * 3)))
    assert silence.measure(sample) == pytest.approx((0.3 + 0.2 + 0.3) / 3)
