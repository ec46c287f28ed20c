"""Time sampling, shift and the sampler's grid."""

import jax
import numpy as np
import pytest
import scipy.stats

from omnihuman_jax.diffusion import time
from omnihuman_jax.errors import UserError


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.3)])
def test_times_are_logit_normal(mean, std):
    t = np.asarray(time.sample_times(jax.random.key(3), 20_000, mean, std), np.float64)
    assert t.min() > 0 and t.max() < 1
    statistic = scipy.stats.kstest(scipy.special.logit(t), scipy.stats.norm(mean, std).cdf)
    assert statistic.pvalue > 0.01


def test_times_are_a_pure_function_of_the_key():
    first, again = (time.sample_times(jax.random.key(1), 8) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, time.sample_times(jax.random.key(2), 8))


def test_shift_matches_the_formula_and_keeps_the_ends():
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(time.shift(t, 5.0), 5 * t / (1 + 4 * t))
    np.testing.assert_allclose(time.shift(t, 1.0), t)
    np.testing.assert_allclose(time.shift(time.shift(t, 2.0), 3.0), time.shift(t, 6.0))


def video_tokens(height, width, frames):
    latent_frames = 1 + (frames - 1) // 4
    return (height // 16) * (width // 16) * latent_frames, latent_frames


@pytest.mark.parametrize(("size", "expected"), [((256, 256, 37), 1.0), ((720, 1280, 145), 5.0), ((256, 256, 1), 1.0)])
def test_shift_reaches_the_published_anchors(size, expected):
    tokens, latent_frames = video_tokens(*size)
    assert time.resolution_shift(tokens, is_image=latent_frames == 1) == pytest.approx(expected)


def test_image_shift_has_its_own_line():
    assert time.resolution_shift(64 * 64, is_image=True) == pytest.approx(3.2)


def test_shift_is_linear_between_the_anchors_and_clamped_outside():
    low, high = (video_tokens(*size)[0] for size in [(256, 256, 37), (720, 1280, 145)])
    assert time.resolution_shift((low + high) // 2) == pytest.approx(3.0, abs=1e-3)
    assert time.resolution_shift(100) == 1.0
    assert time.resolution_shift(10**89) == time.VIDEO_SHIFT.maximum


def test_config_overrides_the_shift():
    assert time.shift_from_config(7.0, 100) == 7.0
    assert time.shift_from_config(0, 100) == time.shift_from_config(None, 100) == 1.0
    assert time.shift_from_config(0.0, 133200) == pytest.approx(5.0)
    for bad in (-1.0, "much", True, float("nan")):
        with pytest.raises(UserError, match=r"diffusion\.shift"):
            time.shift_from_config(bad, 100)


def test_grid_falls_from_noise_to_data_and_crowds_at_noise_when_shifted():
    grid = time.time_grid(50, 3.0)
    assert grid.shape == (51,) and grid[0] == 1.0 and grid[-1] == 0.0
    assert np.all(np.diff(grid) < 0) and (grid > 0.5).sum() > (time.time_grid(50) > 0.5).sum()
    with pytest.raises(UserError, match="at least 1"):
        time.time_grid(0)


def test_the_strongest_active_condition_chooses_the_mean_of_the_times():
    active = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
    values = np.array([10, 20, 30, 40, 50], np.float32)
    np.testing.assert_array_equal(time.strongest(values, active), [30, 10, 50, 40])
    t = np.asarray(time.sample_times(jax.random.key(0), 4, time.strongest(values / 10, active), 0.5))
    normal = np.asarray(jax.random.normal(jax.random.key(0), (4,)), np.float64)
    np.testing.assert_allclose(t, 1 / (1 + np.exp(-(np.array([3, 1, 5, 4]) + 0.5 * normal))), rtol=1e-6)
