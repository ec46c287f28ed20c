"""Which blocks of an attention matrix are computed, and how they are cut: shared by the forward and backward kernels.

Tokens attend within a segment (see `models.dit.attention`). A block of queries and keys is skipped where no pair of
them shares a segment, needs no mask where all of them share one, and is masked otherwise, which happens at borders.
"""

import dataclasses

import jax
import jax.numpy as jnp

SKIP, WHOLE, MASKED = 0, 1, 2
LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Queries and keys of a block, multiples of 128.

    Attributes:
      forward: (queries, keys) of the forward kernel.
      backward: the same of the backward kernel.
    """

    forward: tuple[int, int] = (1024, 1024)
    backward: tuple[int, int] = (1024, 512)


# By generation (`jax.Device.device_kind`), from the compiler's static schedules: bundles a 512 x 512
# tile are 1,113 forward and 2,594 backward on v5p, 541 and 1,289 on v6e, where larger blocks pay for the loop.
SIZES = {"TPU v6 lite": BlockSizes(backward=(2048, 512)), "TPU7x": BlockSizes(backward=(2048, 512))}


def block_sizes() -> BlockSizes:
    """Block sizes for the devices of the mesh in context (`jax.set_mesh`), or for this process's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return SIZES.get(device.device_kind, BlockSizes())


def fit(size: int, tokens: int) -> int:
    """The block size, or less where fewer tokens are there: the tokens rounded up to a multiple of 128."""
    return min(size, -(-tokens // LANES) * LANES)


def pad_tokens(x: jax.Array, multiple: int) -> jax.Array:
    """Appends zeros along axis 1 of x (B, N, ...) until N is a multiple; segment ids become 0, absent."""
    extra = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x


def block_kinds(q_segment: jax.Array, kv_segment: jax.Array, queries: int, keys: int) -> jax.Array:
    """SKIP, WHOLE or MASKED of every block, int32 (B, Nq / queries, Nk / keys).

    Args:
      q_segment: (B, Nq) int32, 0 = absent; Nq a multiple of `queries`.
      kv_segment: (B, Nk) int32, likewise.
    """

    def bounds(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        cut = ids.reshape(ids.shape[0], -1, size)
        present = jnp.where(cut > 0, cut, jnp.iinfo(jnp.int32).max)
        return cut.min(-1), present.min(-1), cut.max(-1)

    q_min, q_least, q_max = (x[:, :, None] for x in bounds(q_segment, queries))
    k_min, k_least, k_max = (x[:, None, :] for x in bounds(kv_segment, keys))
    apart = (q_max < k_least) | (k_max < q_least) | (q_max == 0) | (k_max == 0)
    one = (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
    return jnp.where(apart, SKIP, jnp.where(one, WHOLE, MASKED)).astype(jnp.int32)
