"""The flow path and its loss against float64 NumPy, compiled and not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax.diffusion import flow

SHAPE = (3, 4, 2, 2, 5)
both = chex.variants(with_jit=True, without_jit=True)


def sample():
    rng = np.random.default_rng(0)
    return rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.uniform(size=SHAPE[0])


class FlowTest(chex.TestCase):
    @both
    def test_interpolation_is_the_straight_line_with_noise_at_one(self):
        (x0, eps, t), interpolate = sample(), self.variant(flow.interpolate)
        column = t[:, None, None, None, None]
        np.testing.assert_allclose(interpolate(x0, eps, t), (1 - column) * x0 + column * eps, atol=1e-6)
        np.testing.assert_allclose(interpolate(x0, eps, np.zeros(3)), x0, atol=1e-6)
        np.testing.assert_allclose(interpolate(x0, eps, np.ones(3)), eps, atol=1e-6)
        np.testing.assert_allclose(interpolate(x0, eps, 0.25), 0.75 * x0 + 0.25 * eps, atol=1e-6)

    @both
    def test_velocity_is_the_time_derivative_of_the_path(self):
        x0, eps, t = (jnp.asarray(a, jnp.float32) for a in sample())
        path = self.variant(lambda time: flow.interpolate(x0, eps, time))
        _, slope = jax.jvp(path, (t,), (jnp.ones_like(t),))
        np.testing.assert_allclose(flow.velocity(x0, eps), slope, atol=1e-5)

    @both
    def test_loss_is_the_mean_square_of_each_sample(self):
        pred, target, _ = sample()
        expected = ((pred - target) ** 2).reshape(3, -1).mean(axis=1)
        loss = self.variant(flow.flow_loss)(jnp.asarray(pred), jnp.asarray(target))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)

    @both
    def test_loss_weights_are_a_weighted_mean_and_an_empty_mask_gives_zero(self):
        pred, target, _ = sample()
        mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]], np.float32)
        per_frame = ((pred - target) ** 2).mean(axis=(2, 3, 4))
        expected = [per_frame[0, :2].mean(), 0.0, (per_frame[2] * mask[2]).sum() / mask[2].sum()]
        loss = self.variant(flow.flow_loss)(jnp.asarray(pred), jnp.asarray(target), mask)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_gradient_does_not_reach_masked_frames():
    pred, target, _ = (jnp.asarray(a, jnp.float32) for a in sample())
    mask = jnp.array([[0.0, 1, 1, 1]] * 3)
    gradient = jax.grad(lambda p: flow.flow_loss(p, target, mask).sum())(pred)
    assert not np.any(gradient[:, 0]) and np.all(gradient[:, 1:])


def test_loss_is_float32_for_bfloat16_predictions():
    pred, target, _ = sample()
    loss = flow.flow_loss(jnp.asarray(pred, jnp.bfloat16), jnp.asarray(target, jnp.float32))
    chex.assert_shape(loss, (3,))
    chex.assert_type(loss, jnp.float32)


def test_shapes_that_would_broadcast_silently_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        flow.flow_loss(jnp.zeros((3, 1)), jnp.zeros(3))
    with pytest.raises(AssertionError, match="shape"):
        flow.interpolate(jnp.zeros(SHAPE), jnp.zeros(SHAPE[:-1] + (1,)), 0.5)
