"""Attention within segments as two TPU kernels: a forward, and a backward in one pass.

Scores are kept transposed, keys by queries: maximum and sum of a query run over sublanes, and its statistics are one
row that nothing has to broadcast over lanes. They are in base 2, with log2(e) / sqrt(D) folded into q before the call.
The forward saves the output and the log2 of the sum of exponentials. The backward takes five products a block for all
three gradients, where two separate loops (FlashAttention-2, arXiv 2307.08691) take seven: dk and dv accumulate over the
queries in scratch, dq in the output block of a whole head, which stays in VMEM.

Two forms of the maximum that is subtracted before the exponential: "online", the running one, and "bound", the product
of norms |q| max |k|, which is known before the loop and saves a maximum and a rescale a block. By Cauchy and Schwarz no
score lies further from zero than the bound, so a bound below `SAFE_BOUND` leaves every weight in float32's range.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from omnihuman_jax.kernels.blocks import LANES, MASKED, SKIP, BlockSizes, block_kinds, block_sizes, fit, pad_tokens

HIDDEN = -1e30  # score of a key in another segment; finite, so that no row gives NaN
SAFE_BOUND = 50.0  # |score| in base 2 below which exp2(score - bound) >= 2**-100
VMEM_BYTES = 100 * 2**20
_F32 = {"preferred_element_type": jnp.float32}


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over axis contract[0] of a and contract[1] of b, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), **_F32)


def _scores(k, q, kv_ids, q_ids, masked: bool) -> jax.Array:
    """Scores (keys, queries) of a block; if `masked`, those of pairs in different segments are hidden."""
    scores = _dot(k[0, 0], q[0, 0], (1, 1))
    if not masked:
        return scores
    queries, keys = q_ids[0], kv_ids[0][:, :1]
    return jnp.where((queries == keys) & (queries > 0), scores, HIDDEN)


def _each_kind(kind: jax.Array, compute) -> None:
    """Runs compute(masked) for a block that is not skipped."""
    pl.when((kind != SKIP) & (kind != MASKED))(lambda: compute(False))
    pl.when(kind == MASKED)(lambda: compute(True))


def _forward_kernel(kinds, q, k, v, q_ids, kv_ids, bound, out, lse, top, total, acc, *, online: bool):
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, HIDDEN, jnp.float32) if online else bound[0, 0]
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def compute(masked: bool) -> None:
        scores = _scores(k, q, kv_ids, q_ids, masked)
        if online:
            before = top[...]
            top[...] = jnp.maximum(before, scores.max(0, keepdims=True))
            fall = jnp.exp2(before - top[...])
            total[...] *= fall
            acc[...] *= fall
        weights = jnp.exp2(scores - top[...])
        if masked and online:  # a query that has seen no key yet: its maximum is HIDDEN too
            weights = jnp.where(scores > HIDDEN, weights, 0.0)
        total[...] += weights.sum(0, keepdims=True)
        acc[...] += _dot(v[0, 0], weights.astype(v.dtype), (0, 0))

    _each_kind(kinds[b, i, j], compute)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        seen = total[...] > 0
        safe = jnp.where(seen, total[...], 1.0)
        out[0, 0] = (acc[...] / safe).T.astype(out.dtype)
        lse[0, 0] = jnp.where(seen, top[...] + jnp.log2(safe), -HIDDEN)  # exp2(score - lse) is 0 for a row without keys


def _backward_kernel(kinds, q, k, v, do, q_ids, kv_ids, lse, delta, dq, dk, dv, dk_acc, dv_acc, *, queries: int):
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when((j == 0) & (i == 0))
    def _():
        dq[...] = jnp.zeros(dq.shape, jnp.float32)

    @pl.when(i == 0)
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def compute(masked: bool) -> None:
        scores = _scores(k, q, kv_ids, q_ids, masked)
        weights = jnp.exp2(scores - lse[0, 0])
        dv_acc[...] += _dot(weights.astype(do.dtype), do[0, 0], (1, 0))
        dscores = (weights * (_dot(v[0, 0], do[0, 0], (1, 1)) - delta[0, 0])).astype(q.dtype)
        dk_acc[...] += _dot(dscores, q[0, 0], (1, 0))
        span = pl.ds(pl.multiple_of(i * queries, queries), queries)
        dq[0, 0, :, span] += _dot(k[0, 0], dscores, (0, 0))

    _each_kind(kinds[b, i, j], compute)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[0, 0] = (dk_acc[...] * math.log(2)).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)


def _call(kernel, grid, in_specs, out_specs, out_shape, scratch, semantics, interpret):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )


def _ids(q_segment: jax.Array, kv_segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Segment ids as the kernels read them: a row (B, 1, Nq), and a column repeated over the lanes (B, Nk, 128)."""
    return q_segment[:, None], jnp.broadcast_to(kv_segment[..., None], (*kv_segment.shape, LANES))


def _forward(q, k, v, q_segment, kv_segment, sizes: BlockSizes, online: bool, interpret: bool):
    """Output (B, heads, Nq, D) and lse (B, heads, 1, Nq) float32, of scaled q and k, v (B, heads, N, D)."""
    b, heads, nq, d = q.shape
    nk = k.shape[2]
    bq, bk = fit(sizes.forward[0], nq), fit(sizes.forward[1], nk)
    kinds = block_kinds(q_segment, kv_segment, bq, bk)
    largest = jnp.sqrt(jnp.square(k.astype(jnp.float32)).sum(-1).max(-1))[..., None, None]
    bound = jnp.sqrt(jnp.square(q.astype(jnp.float32)).sum(-1))[:, :, None] * largest

    def at(*order):  # block index maps of the grid (batch, head, queries, keys)
        return lambda b, h, i, j, _: tuple({"b": b, "h": h, "i": i, "j": j, "0": 0}[name] for name in order)

    return _call(
        functools.partial(_forward_kernel, online=online),
        (b, heads, nq // bq, nk // bk),
        [
            pl.BlockSpec((1, 1, bq, d), at("b", "h", "i", "0")),
            pl.BlockSpec((1, 1, bk, d), at("b", "h", "j", "0")),
            pl.BlockSpec((1, 1, bk, d), at("b", "h", "j", "0")),
            pl.BlockSpec((1, 1, bq), at("b", "0", "i")),
            pl.BlockSpec((1, bk, LANES), at("b", "j", "0")),
            pl.BlockSpec((1, 1, 1, bq), at("b", "h", "0", "i")),
        ],
        [pl.BlockSpec((1, 1, bq, d), at("b", "h", "i", "0")), pl.BlockSpec((1, 1, 1, bq), at("b", "h", "0", "i"))],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, heads, 1, nq), jnp.float32)],
        [pltpu.VMEM((1, bq), jnp.float32), pltpu.VMEM((1, bq), jnp.float32), pltpu.VMEM((d, bq), jnp.float32)],
        ("parallel", "parallel", "parallel", "arbitrary"),
        interpret,
    )(kinds, q, k, v, *_ids(q_segment, kv_segment), bound)


def _backward(q, k, v, out, lse, do, q_segment, kv_segment, sizes: BlockSizes, interpret: bool):
    """(dq float32, dk, dv), each (B, heads, N, D); dq of the scaled q, in units of natural scores."""
    b, heads, nq, d = q.shape
    nk = k.shape[2]
    bq, bk = fit(sizes.backward[0], nq), fit(sizes.backward[1], nk)
    kinds = block_kinds(q_segment, kv_segment, bq, bk)
    delta = (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)[:, :, None]

    def at(*order):  # block index maps of the grid (batch, head, keys, queries)
        return lambda b, h, j, i, _: tuple({"b": b, "h": h, "i": i, "j": j, "0": 0}[name] for name in order)

    row, column = at("b", "h", "i", "0"), at("b", "h", "j", "0")
    dq, dk, dv = _call(
        functools.partial(_backward_kernel, queries=bq),
        (b, heads, nk // bk, nq // bq),
        [
            pl.BlockSpec((1, 1, bq, d), row),
            pl.BlockSpec((1, 1, bk, d), column),
            pl.BlockSpec((1, 1, bk, d), column),
            pl.BlockSpec((1, 1, bq, d), row),
            pl.BlockSpec((1, 1, bq), at("b", "0", "i")),
            pl.BlockSpec((1, bk, LANES), at("b", "j", "0")),
            pl.BlockSpec((1, 1, 1, bq), at("b", "h", "0", "i")),
            pl.BlockSpec((1, 1, 1, bq), at("b", "h", "0", "i")),
        ],
        [
            pl.BlockSpec((1, 1, d, nq), at("b", "h", "0", "0")),
            pl.BlockSpec((1, 1, bk, d), column),
            pl.BlockSpec((1, 1, bk, d), column),
        ],
        [
            jax.ShapeDtypeStruct((b, heads, d, nq), jnp.float32),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        [pltpu.VMEM((bk, d), jnp.float32), pltpu.VMEM((bk, d), jnp.float32)],
        ("parallel", "parallel", "arbitrary", "arbitrary"),
        interpret,
    )(kinds, q, k, v, do, *_ids(q_segment, kv_segment), lse, delta)
    return dq.swapaxes(2, 3), dk, dv


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, q_segment, kv_segment, sizes, maximum, interpret):
    return _attend_forward(q, k, v, q_segment, kv_segment, sizes, maximum, interpret)[0]


def _attend_forward(q, k, v, q_segment, kv_segment, sizes, maximum, interpret):
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    run = functools.partial(_forward, scaled, k, v, q_segment, kv_segment, sizes, interpret=interpret)
    if maximum == "auto":
        norms = (jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1).max()) for x in (scaled, k))
        out, lse = jax.lax.cond(math.prod(norms) < SAFE_BOUND, lambda: run(online=False), lambda: run(online=True))
    else:
        out, lse = run(online=maximum == "online")
    # Under the names that remat policies keep ("attention"), the backward pass does not run the forward kernel again.
    out, lse = (checkpoint_name(x, "attention") for x in (out, lse))
    return out, (scaled, k, v, q_segment, kv_segment, out, lse)


def _attend_backward(sizes, maximum, interpret, saved, do):
    scaled, k, v, q_segment, kv_segment, out, lse = saved
    dq, dk, dv = _backward(scaled, k, v, out, lse, do, q_segment, kv_segment, sizes, interpret)
    return (dq / math.sqrt(scaled.shape[-1])).astype(scaled.dtype), dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    *,
    sizes: BlockSizes | None = None,
    maximum: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Segment-masked softmax(q k^T / sqrt(D)) v on the arrays of one device.

    Args:
      q: (B, Nq, heads, D); any Nq, padded to blocks here.
      k, v: (B, Nk, heads, D).
      q_segment, kv_segment: (B, Nq), (B, Nk) int32; a query sees the keys of its segment, segment 0 nothing.
      sizes: of the blocks; None: by the device (`blocks.block_sizes`).
      maximum: "online", "bound", or "auto": the bound where it is safe, decided from the norms at run time.
      interpret: runs without a TPU (slowly).

    Returns:
      (B, Nq, heads, D) in the dtype of q; exactly 0, forward and backward, for a query that sees no key.
    """
    sizes, nq = sizes or block_sizes(), q.shape[1]
    blocks_q = math.lcm(fit(sizes.forward[0], nq), fit(sizes.backward[0], nq))
    blocks_k = math.lcm(fit(sizes.forward[1], k.shape[1]), fit(sizes.backward[1], k.shape[1]))
    q, q_segment = pad_tokens(q, blocks_q), pad_tokens(q_segment, blocks_q)
    k, v, kv_segment = (pad_tokens(x, blocks_k) for x in (k, v, kv_segment))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _attend(q, k, v, q_segment, kv_segment, sizes, maximum, interpret).swapaxes(1, 2)[:, :nq]
