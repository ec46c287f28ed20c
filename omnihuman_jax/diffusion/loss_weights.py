"""Weights of the loss over the cells of a sample: how much of it a region, such as the mouth, gets.

The mouth of a talking head is about a hundredth of the picture and of the loss. OmniHuman-1 describes no weights;
FantasyTalking counts only the lips in a share of its samples, StableAvatar only lips or face. Both forms are here:

  share  region r gets the share s_r of the sample's loss:    w = 1 - sum s_r + sum s_r n m_r / |m_r|
  only   in a share of the samples nothing else counts:       w = n m_r / |m_r|

with n cells, m_r the cells of the region and |m_r| their number. The mean of w over a sample is one, so weights never
change the size of its loss. A region that is unknown in a sample leaves its share to the whole picture.
"""

import jax
import jax.numpy as jnp


def choose_only(key: jax.Array, batch: int, only: jax.Array) -> jax.Array:
    """The rows in which one region alone counts, bool (B, R) with at most one True a row.

    `only` (R,) is the share of the rows for each region.
    """
    edges = jnp.concatenate([jnp.zeros(1), jnp.cumsum(only)])
    draw = jax.random.uniform(key, (batch, 1))
    return (draw >= edges[:-1]) & (draw < edges[1:])


def region_weights(regions: jax.Array, shares: jax.Array, only: jax.Array) -> jax.Array:
    """Weights (B, T, H, W) float32 with mean one over each sample.

    Args:
      regions: bool (B, T, H, W, R), the cells of each region.
      shares: (R,), the share of the loss that each region gets; they sum to at most 1.
      only: bool (B, R), the regions that alone count in a row, from `choose_only`.
    """
    cells = regions.astype(jnp.float32)
    count = jnp.sum(cells, axis=(1, 2, 3))  # (B, R)
    known = count > 0
    spread = cells * (cells[0, ..., 0].size / jnp.where(known, count, 1.0))[:, None, None, None]  # mean 1 where known
    given = jnp.where((only & known).any(-1, keepdims=True), only, shares) * known
    return 1.0 - jnp.sum(given, -1)[:, None, None, None] + jnp.einsum("bthwr,br->bthw", spread, given)
