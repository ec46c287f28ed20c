import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax.errors import UserError
from omnihuman_jax.kernels.blocks import BlockSizes
from omnihuman_jax.kernels.flash import flash_attention
from omnihuman_jax.models.dit import attention
from omnihuman_jax.models.dit.attention import attend, splash_local
from omnihuman_jax.sharding.mesh import SEQUENCE_ATTENTION, make_mesh
from tests.models.dit import reference

HEADS, D = 2, 16


def random(batch=2, nq=7, nk=9, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, n, HEADS, D)).astype(np.float32) for n in (nq, nk, nk))
    return q, k, v, rng.integers(0, 3, (batch, nq)), rng.integers(0, 3, (batch, nk))


def expected(q, k, v, q_segment, kv_segment):
    see = (q_segment[:, :, None] == kv_segment[:, None]) & (q_segment[:, :, None] > 0)
    return np.stack([reference.attention(*(x[i].astype(np.float64) for x in (q, k, v)), see[i]) for i in range(len(q))])


xla = jax.jit(functools.partial(attend, implementation="xla"))
splash = jax.jit(functools.partial(splash_local, interpret=True))


@pytest.mark.parametrize("kernel", [xla, splash], ids=["xla", "splash"])
def test_agrees_with_float64_loops_under_segments(kernel):
    q, k, v, q_segment, kv_segment = random()
    kv_segment[:, :3] = 0, 1, 2  # every segment has a key
    out = kernel(q, k, v, q_segment, kv_segment)
    np.testing.assert_allclose(out, expected(q, k, v, q_segment, kv_segment), atol=1e-5)


def test_a_query_that_sees_nothing_is_zero_with_finite_gradients():
    q, k, v, q_segment, kv_segment = random()
    kv_segment[0] = 5
    q_segment[1] = 0

    def loss(q, k, v):
        return jnp.square(xla(q, k, v, q_segment, kv_segment)).sum()

    assert not np.asarray(xla(q, k, v, q_segment, kv_segment)).any()
    for gradient in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert not np.asarray(gradient).any()


def test_large_logits_stay_finite():
    q, k, v, q_segment, kv_segment = random()
    out = xla(200 * q, 200 * k, v, q_segment, kv_segment)
    np.testing.assert_allclose(out, expected(200 * q, 200 * k, v, q_segment, kv_segment), atol=1e-3)


def test_splash_and_xla_have_the_same_gradients():
    q, k, v, q_segment, _ = random(batch=1, nq=6, nk=6)

    def gradient(kernel):
        loss = lambda *x: jnp.square(kernel(*x, q_segment, q_segment) - 1).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for a, b in zip(gradient(xla), gradient(splash), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_keeps_a_float32_softmax():
    q, k, v, q_segment, kv_segment = random()
    out = xla(*(x.astype(jnp.bfloat16) for x in (q, k, v)), q_segment, kv_segment)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), expected(q, k, v, q_segment, kv_segment), atol=0.05)


def test_splash_refuses_heads_that_the_mesh_does_not_divide():
    q, k, v, q_segment, kv_segment = random()
    mesh = jax.make_mesh((1, 2, 4, 1), ("data", "fsdp", "sequence", "tensor"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 4)  # fmt: skip
    with jax.set_mesh(mesh), pytest.raises(UserError, match="2 heads are not divisible by mesh sequence x tensor = 4"):
        attend(q, k, v, q_segment, kv_segment, implementation="splash")


@pytest.mark.parametrize("kernel", ["splash", "flash"])
@pytest.mark.parametrize("sequence", SEQUENCE_ATTENTION)
def test_kernels_on_a_mesh_have_the_values_and_gradients_of_the_definition(monkeypatch, sequence, kernel):
    monkeypatch.setattr(attention, "splash_local", functools.partial(splash_local, interpret=True))
    small = BlockSizes((128, 128), (128, 128))
    monkeypatch.setattr(attention, "flash_attention", functools.partial(flash_attention, sizes=small, interpret=True))
    monkeypatch.setattr(attention, "BLOCK", 128)  # several blocks a device
    batch, n, heads = 2, 300, 4
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.standard_normal((batch, n, heads, D)).astype(np.float32) for _ in range(4))
    segment = rng.integers(0, 4, (batch, n))
    # Segments that lie on one token shard, on the border of two, and on all.
    segment[1] = np.sort(segment[1])
    segment[0, :20] = 7

    def value_and_gradients(**kwargs):
        def loss(q, k, v):
            out = attend(q, k, v, segment, segment, **kwargs)
            return (out * weight).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *grads

    reference = value_and_gradients(implementation="xla")
    np.testing.assert_allclose(reference[0], expected(q, k, v, segment, segment), atol=1e-5)
    with jax.set_mesh(make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})):
        found = value_and_gradients(implementation=kernel, sequence=sequence)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, reference, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name
        assert not a[segment == 0].any(), name


@pytest.mark.slow
def test_splash_attention_compiles_for_a_tpu_with_heads_over_sequence_and_tensor():
    pytest.importorskip("libtpu")
    code = """
        import jax, numpy as np, jax.numpy as jnp
        from flax import nnx
        from jax.experimental import topologies
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
        from omnihuman_jax.models.functional import Network
        from tests.models.dit.tiny import random_batch, tiny_config
        devices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices
        mesh = Mesh(np.array(devices).reshape(1, 2, 2, 2), ("data", "fsdp", "sequence", "tensor"),
                    axis_types=(AxisType.Auto,) * 4)
        config = tiny_config(hidden_size=64, num_heads=4, num_dual_blocks=1, num_single_blocks=1, dtype="bfloat16",
                             attention="splash", remat="attention")
        network = Network(config)
        everywhere = NamedSharding(mesh, P())
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        params, (x_t, t, batch) = jax.tree.map(shape, (network.abstract_params, random_batch(config)))
        def step(params, x_t, t, batch):
            return jax.grad(lambda p: jnp.square(network.apply(p, x_t, t, batch)).mean())(params)
        with jax.set_mesh(mesh):
            text = jax.jit(step).lower(params, x_t, t, batch).compile().as_text()
        assert "tpu_custom_call" in text and "all-to-all" in text
    """
    # Two processes may compile at once: nothing here touches a chip.
    settings = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, **settings, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True, timeout=280)
