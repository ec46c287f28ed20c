import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax.models.dit import rope
from tests.models.dit.reference import rotate
from tests.models.dit.tiny import tiny_config

AXES, THETA = (4, 6, 6), 256.0


def apply(x, positions):
    """Rotates x (B, N, heads, D) in pairs, the order of parameters and files."""
    turn = rope.rotation(jnp.asarray(positions), AXES, THETA)
    turned = np.asarray(rope.apply(rope.halves(jnp.asarray(x), sum(AXES)), turn))
    return np.stack(np.split(turned, 2, -1), -1).reshape(turned.shape)


def random(seed=0, tokens=5):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, tokens, 3, sum(AXES))).astype(np.float32)
    return x, rng.integers(-3, 30, (2, tokens, 3)).astype(np.float32)


def test_agrees_with_complex_float64_rotation():
    x, positions = random()
    for i in range(2):
        expected = rotate(x[i].astype(np.float64), positions[i].astype(np.float64), AXES, THETA)
        np.testing.assert_allclose(apply(x, positions)[i], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_halves_is_an_exact_permutation_within_each_head(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2 * 6)), dtype)
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    np.testing.assert_array_equal(rope.halves(x, 6), x[:, np.array(order)])
    gradient = jax.grad(lambda x: (rope.halves(x, 6) * jnp.arange(12.0, dtype=dtype)).sum())(x)
    np.testing.assert_array_equal(gradient[0], np.argsort(order))


def test_products_depend_on_relative_positions_only():
    q, positions = random(1)
    k, other = random(2)
    shift = np.array([5, -2, 11], np.float32)

    def products(offset):
        return np.einsum("bqhd,bkhd->bhqk", apply(q, positions + offset), apply(k, other + offset))

    np.testing.assert_allclose(products(0), products(shift), atol=2e-4)


def test_each_axis_turns_only_its_own_dimensions():
    x, _ = random()
    for axis, (start, size) in enumerate(zip((0, 4, 10), AXES, strict=True)):
        moved = np.zeros((2, 5, 3), np.float32)
        moved[..., axis] = 3
        same = np.isclose(apply(x, moved), x).all((0, 1, 2))
        assert not same[start : start + size].any()
        assert same[:start].all() and same[start + size :].all()


def test_the_angle_is_float32_whatever_the_input():
    x, positions = random()
    far = positions + 1000
    exact = apply(x.astype(jnp.bfloat16).astype(np.float32), far)
    np.testing.assert_array_equal(apply(x.astype(jnp.bfloat16), far), exact)
    assert exact.dtype == np.float32


def test_joined_rotations_broadcast_over_the_batch():
    one = rope.rotation(jnp.zeros((1, 2, 3)), AXES, THETA)
    both = rope.rotation(jnp.ones((2, 3, 3)), AXES, THETA)
    joined = rope.concatenate(both, one)
    assert joined.cos.shape == (2, 5, sum(AXES))
    np.testing.assert_array_equal(joined.cos[:, 3:], 1)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
def test_derived_axes_are_even_and_fill_the_head(head_dim):

    axes = tiny_config(hidden_size=2 * head_dim).rope_axes
    assert sum(axes) == head_dim and not any(n % 2 for n in axes)
    assert head_dim != 128 or axes == (16, 56, 56)
