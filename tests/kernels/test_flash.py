"""The attention kernels, interpreted, against the definition in float64 and its gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax.kernels.blocks import MASKED, SKIP, WHOLE, BlockSizes, block_kinds
from omnihuman_jax.kernels.flash import flash_attention

SMALL = BlockSizes(forward=(128, 256), backward=(256, 128))


def definition(q, k, v, q_segment, kv_segment):
    """float64 NumPy: softmax over the keys of the query's segment, 0 without any."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    seen = ((q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment[:, :, None] > 0))[:, None]
    top = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
    weights = np.where(seen, np.exp(np.where(seen, scores - top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights / np.where(total > 0, total, 1), v)


def reference(q, k, v, q_segment, kv_segment):
    """The same in JAX float32, for its gradients."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    seen = ((q_segment[:, :, None] == kv_segment[:, None, :]) & (q_segment[:, :, None] > 0))[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), -1)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, weights, 0), v, precision="highest")


def segments(form, nq, nk):
    """(q, kv) segment ids of two samples."""
    if form == "one":
        return np.ones((2, nq), np.int32), np.ones((2, nk), np.int32)
    if form == "padded":  # absent tokens in the middle and at the end, another number in each sample
        q, kv = np.ones((2, nq), np.int32), np.ones((2, nk), np.int32)
        q[0, 3:40], q[1, -20:], kv[0, 5:150], kv[1, -70:] = 0, 0, 0, 0
        return q, kv
    if form == "packed":  # several samples in a row, of unequal lengths
        return tuple(
            np.stack([np.sort(np.arange(n) * (5 + b) // n) + 1 for b in range(2)]).astype(np.int32) for n in (nq, nk)
        )
    rng = np.random.default_rng(0)  # any ids in any order, some queries without keys
    return rng.integers(0, 4, (2, nq)).astype(np.int32), rng.integers(0, 3, (2, nk)).astype(np.int32)


def arrays(nq, nk, d, dtype=np.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.standard_normal((2, n, 2, d)), dtype) for n in (nq, nk, nk))


@pytest.mark.parametrize(("nq", "nk", "d"), [(256, 512, 128), (300, 413, 64), (90, 130, 128)])
@pytest.mark.parametrize("form", ["one", "padded", "packed", "any"])
@pytest.mark.parametrize("maximum", ["online", "bound"])
def test_output_and_gradients_are_those_of_the_definition(nq, nk, d, form, maximum):
    q, k, v = arrays(nq, nk, d)
    ids = segments(form, nq, nk)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    run = lambda *x: flash_attention(*x, *ids, sizes=SMALL, maximum=maximum, interpret=True)  # noqa: E731
    np.testing.assert_allclose(run(q, k, v), definition(q, k, v, *ids), atol=2e-6)
    got = jax.grad(lambda *x: (run(*x) * weight).sum(), (0, 1, 2))(q, k, v)
    wanted = jax.grad(lambda *x: (reference(*x, *ids) * weight).sum(), (0, 1, 2))(q, k, v)
    for name, a, b in zip("qkv", got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_a_query_without_keys_gives_exactly_zero_both_ways():
    q, k, v = arrays(128, 128, 64)
    ids = np.ones((2, 128), np.int32), np.ones((2, 128), np.int32)
    ids[0][0, 7], ids[0][1, 9] = 0, 5
    run = lambda q: flash_attention(q, k, v, *ids, sizes=SMALL, interpret=True)  # noqa: E731
    out, grad = run(q), jax.grad(lambda q: run(q).sum())(q)
    for x in (out, grad):
        assert not np.asarray(x)[0, 7].any() and not np.asarray(x)[1, 9].any()
        assert np.isfinite(x).all()


@pytest.mark.parametrize("scale", [1.0, 6.0, 40.0])
def test_large_scores_take_the_running_maximum(scale):
    """Scores up to some thousands: the bound alone would underflow."""
    q, k, v = arrays(128, 256, 64, scale=scale)
    v = v / scale
    ids = segments("padded", 128, 256)
    out = flash_attention(q, k, v, *ids, sizes=SMALL, interpret=True)
    np.testing.assert_allclose(out, definition(q, k, v, *ids), atol=2e-6 * scale**2)  # as the scores grow


def test_bfloat16_is_close():
    q, k, v = arrays(256, 256, 128, jnp.bfloat16)
    ids = segments("padded", 256, 256)
    out = flash_attention(q, k, v, *ids, sizes=SMALL, interpret=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), definition(q, k, v, *ids), atol=2e-2)


def test_block_kinds_are_those_of_their_pairs():
    rng = np.random.default_rng(0)
    q = np.sort(rng.integers(0, 4, (3, 128)), axis=1).astype(np.int32)
    k = np.sort(rng.integers(0, 5, (3, 320)), axis=1)[:, ::-1].astype(np.int32)
    kinds = np.asarray(block_kinds(jnp.asarray(q), jnp.asarray(k), 8, 16))
    for b, i, j in itertools.product(range(3), range(16), range(20)):
        rows, columns = q[b, 8 * i : 8 * i + 8], k[b, 16 * j : 16 * j + 16]
        seen = (rows[:, None] == columns[None]) & (rows[:, None] > 0)
        if kinds[b, i, j] == SKIP:
            assert not seen.any()
        elif kinds[b, i, j] == WHOLE:
            assert seen.all()
        else:
            assert kinds[b, i, j] == MASKED
    assert set(kinds.ravel()) == {SKIP, WHOLE, MASKED}
