"""Loss weights over the latent cells of a sample, for regions such as the mouth.

The mouth of a talking head is about a hundredth of the picture and of the loss. OmniHuman-1 describes no weights. In a
share of samples, FantasyTalking limits the loss to the lips, StableAvatar to lips or face. Two forms are supported:

  share  region r gets the share s_r of the sample loss:      w = 1 - sum s_r + sum s_r n m_r / |m_r|
  only   in a share of samples, only region r counts:         w = n m_r / |m_r|

with n cells, m_r the cells of the region and |m_r| their number. The mean of w over a sample is one, so weights do not
change the scale of its loss. If a region is unknown in a sample, its share goes to the whole picture.
"""

import jax
import jax.numpy as jnp


def choose_only(key: jax.Array, batch: int, only: jax.Array) -> jax.Array:
    """Rows in which only one region counts, bool (B, R) with at most one True per row.

    `only` (R,) is the share of rows for each region.
    """
    edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(only)])
    draw = jax.random.uniform(key, (batch, 1))
    return (draw >= edges[:-1]) & (draw < edges[1:])


def region_weights(regions: jax.Array, shares: jax.Array, only: jax.Array) -> jax.Array:
    """Weights (B, T, H, W) float32 with mean one over each sample.

    Args:
      regions: bool (B, T, H, W, R), the cells of each region.
      shares: (R,), the share of the loss that each region gets; they sum to at most 1.
      only: bool (B, R), the only region that counts in a row, from `choose_only`.
    """
    cells = regions.astype(jnp.float32)
    count = jnp.sum(cells, axis=(1, 2, 3))  # (B, R)
    known = count > 0
    spread = cells * (cells[0, ..., 0].size / jnp.where(known, count, 1.0))[:, None, None, None]  # mean 1 where known
    given = jnp.where((only & known).any(-1, keepdims=True), only, shares) * known
    return 1.0 - jnp.sum(given, -1)[:, None, None, None] + jnp.einsum("bthwr,br->bthw", spread, given)
