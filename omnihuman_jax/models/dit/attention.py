"""Attention within segments: XLA anywhere; on TPU our own kernels (`kernels.flash`) or JAX's splash kernel.

All take q (B, Nq, heads, D), k and v (B, Nk, heads, D), and segment ids q_segment (B, Nq), kv_segment (B, Nk) int32.
A query sees the keys of its own segment. Segment 0 means absent: the output and the gradients of such a query are 0.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from omnihuman_jax.errors import UserError
from omnihuman_jax.kernels.flash import flash_attention
from omnihuman_jax.sharding.rules import ACTIVATIONS, constrain, num_shards, usable

LANES = 128
BLOCK = 512
HIDDEN = -1e30  # logit of a key in another segment; finite, so that no row becomes NaN


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    *,
    implementation: str,
    sequence: str = "ulysses",
) -> jax.Array:
    """Segment-masked softmax(q k^T / sqrt(D)) v, (B, Nq, heads, D) in the dtype of q.

    Args:
      q, k, v, q_segment, kv_segment: see the module.
      implementation: "xla", "splash" or "flash".
      sequence: what the mesh's sequence axis divides. "ulysses": heads; queries, keys and values are resharded from
        tokens to heads. "all_gather": queries; keys and values are gathered. "replicated": queries; keys and values
        are few (audio, text) and on every device already.

    Raises:
      UserError: a kernel with a number of heads that the mesh does not divide.
    """
    if implementation == "xla":
        return _xla(q, k, v, q_segment, kv_segment, sequence)
    return _kernel(implementation, q, k, v, q_segment, kv_segment, sequence)


def mesh_axis(name: str) -> int:
    """Devices along a mesh axis of the mesh in context (`jax.set_mesh`); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh is None or mesh.empty else mesh.shape.get(name, 1)


def _xla(q, k, v, q_segment, kv_segment, sequence):
    """Attention in (B, heads, N, D), divided at the end: on CPU 40 % faster than `jax.nn.dot_product_attention`."""
    tokens, heads = (None, "heads") if sequence == "ulysses" else ("tokens", "local_heads")
    q = constrain(q, "batch", tokens, heads, None)
    k, v = (constrain(x, "batch", None, heads, None) for x in (k, v))
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    visible = (q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment[:, :, None] > 0)
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    # Without this, XLA shards the mask and the gradient of the logits differently, and moves them.
    logits = constrain(jnp.where(visible[:, None], logits, HIDDEN), "batch", heads, tokens, None)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    # A row that sees nothing has equal weights on all keys here; its output must be 0.
    out = jnp.where(top > HIDDEN, out, 0).astype(q.dtype)
    return constrain(out.transpose(0, 2, 1, 3), "batch", tokens, heads, None)


def _kernel(name, q, k, v, q_segment, kv_segment, sequence):
    """A Pallas kernel, on every device the part that the mesh gives it."""
    run = {"splash": splash_local, "flash": flash_attention}[name]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return run(q, k, v, q_segment, kv_segment)
    heads = ACTIVATIONS["heads" if sequence == "ulysses" else "local_heads"]
    if q.shape[2] % num_shards(heads, mesh):
        names = ("sequence", "tensor") if sequence == "ulysses" else ("tensor",)
        raise UserError(
            f"attention={name}: {q.shape[2]} heads are not divisible by mesh {' x '.join(names)} = "
            f"{num_shards(heads, mesh)}; change {', '.join(f'mesh.{name}' for name in names)} or model.num_heads"
        )
    batch = usable(ACTIVATIONS["batch"], q.shape[0], mesh)
    tokens = [usable(ACTIVATIONS["tokens"], x.shape[1], mesh) for x in (q, k)]
    q_tokens = None if sequence == "ulysses" else tokens[0]
    kv_tokens = tokens[1] if sequence == "all_gather" else None

    def local(q, k, v, q_segment, kv_segment):
        if kv_tokens:
            # Gathered here so that their gradients are reduce-scattered; those of whole arguments are all-reduced.
            k, v = (jax.lax.all_gather(x, kv_tokens, axis=1, tiled=True) for x in (k, v))
        return run(q, k, v, q_segment, kv_segment)

    q_spec, q_ids = PartitionSpec(batch, q_tokens, heads), PartitionSpec(batch, q_tokens)
    kv_spec, kv_ids = PartitionSpec(batch, kv_tokens, heads), PartitionSpec(batch, None)
    sharded = jax.shard_map(
        local, in_specs=(q_spec, kv_spec, kv_spec, q_ids, kv_ids), out_specs=q_spec, check_vma=False
    )
    return sharded(q, k, v, q_segment, kv_segment)


def splash_local(q, k, v, q_segment, kv_segment, *, interpret: bool = False) -> jax.Array:
    """Splash attention on the arrays of one device, padded to blocks; `interpret` runs it slowly without a TPU."""
    nq, heads, head_dim = q.shape[1:]
    nk = k.shape[1]
    block_q, block_kv = (min(BLOCK, -(-n // LANES) * LANES) for n in (nq, nk))
    pad_q, pad_kv = -nq % block_q, -nk % block_kv

    def prepare(x, extra):
        return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, -head_dim % LANES))).transpose(0, 2, 1, 3)

    kernel = _splash_kernel(heads, nq + pad_q, nk + pad_kv, block_q, block_kv, interpret)
    ids = splash_kernel.SegmentIds(jnp.pad(q_segment, ((0, 0), (0, pad_q))), jnp.pad(kv_segment, ((0, 0), (0, pad_kv))))
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(prepare(scaled, pad_q), prepare(k, pad_kv), prepare(v, pad_kv), ids)
    out = out.transpose(0, 2, 1, 3)[:, :nq, :, :head_dim]
    return jnp.where((q_segment > 0)[:, :, None, None], out, 0)


def _splash_kernel(heads: int, nq: int, nk: int, block_q: int, block_kv: int, interpret: bool) -> Callable:
    queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_q)
    keys = dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block_kv)
    blocks = splash_kernel.BlockSizes(**queries, **keys)
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((nq, nk)) for _ in range(heads)])
    make = partial(splash_kernel.make_splash_mha, head_shards=1, q_seq_shards=1)
    return make(mask, block_sizes=blocks, interpret=interpret)
