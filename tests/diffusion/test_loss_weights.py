"""Loss weights against their formula, in float64 and one sample at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax.diffusion import flow
from omnihuman_jax.diffusion.loss_weights import choose_only, region_weights

SHAPE = (3, 4, 5)


def formula(regions, shares, only):
    """Weights (T, H, W) of one sample with regions (T, H, W, R); `only`: the region that alone counts, or None."""
    cells = np.prod(SHAPE)
    masses = regions.reshape(-1, regions.shape[-1]).sum(0)
    if only is not None and masses[only]:
        return cells * regions[..., only] / masses[only]
    weights = np.ones(SHAPE)
    for r, share in enumerate(shares):
        if masses[r]:
            weights += share * (cells * regions[..., r] / masses[r] - 1)
    return weights


def test_weights_are_the_formula_and_their_mean_is_one():
    rng = np.random.default_rng(0)
    regions = rng.random((6, *SHAPE, 3)) < 0.2
    regions[2, ..., 1] = False  # unknown
    regions[5] = False
    shares, only = np.array([0.1, 0.5, 0.25]), [None, 1, 1, 0, None, 2]
    chosen = np.array([[r == k for r in range(3)] for k in only])
    found = np.asarray(region_weights(jnp.asarray(regions), jnp.asarray(shares, jnp.float32), jnp.asarray(chosen)))
    expected = np.stack([formula(*row) for row in zip(regions, [shares] * 6, only, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found.mean((1, 2, 3)), 1, rtol=1e-5)
    np.testing.assert_array_equal(found[5], 1)  # exactly


def test_the_loss_of_a_region_with_half_of_it_is_the_mean_of_both_losses():
    rng = np.random.default_rng(1)
    regions = rng.random((2, *SHAPE, 1)) < 0.2
    pred, target = rng.standard_normal((2, 2, *SHAPE, 4)).astype(np.float32)
    weights = region_weights(jnp.asarray(regions), jnp.array([0.5]), jnp.zeros((2, 1), bool))
    error = (pred.astype(np.float64) - target) ** 2
    expected = [0.5 * e.mean() + 0.5 * e[m[..., 0]].mean() for e, m in zip(error, regions, strict=True)]
    np.testing.assert_allclose(flow.flow_loss(pred, target, weights), expected, rtol=1e-5)


def test_rows_in_which_one_region_counts_come_with_their_shares():
    rows = np.asarray(choose_only(jax.random.key(0), 20_000, jnp.array([0.1, 0.0, 0.5])))
    assert rows.sum(1).max() == 1
    np.testing.assert_allclose(rows.mean(0), [0.1, 0, 0.5], atol=0.01)
    assert not np.asarray(choose_only(jax.random.key(0), 100, jnp.zeros(3))).any()
