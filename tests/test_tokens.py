import chex
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax import tokens
from omnihuman_jax.errors import UserError


def latents(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 2, 1)])
def test_unpatchify_undoes_patchify(patch):
    x = latents(2, 4, 4, 6, 3)
    cut = tokens.patchify(jnp.asarray(x), patch)
    chex.assert_shape(cut, (2, x[0].size // (3 * np.prod(patch)), 3 * np.prod(patch)))
    np.testing.assert_array_equal(tokens.unpatchify(cut, (4, 4, 6), patch), x)


def test_a_token_holds_the_patch_at_its_position():
    x = latents(1, 3, 4, 6, 2)
    cut = np.asarray(tokens.patchify(jnp.asarray(x), (1, 2, 2)))[0]
    for value, (t, h, w) in zip(cut, tokens.grid_positions(range(3), 2, 3).astype(int), strict=True):
        np.testing.assert_array_equal(value, x[0, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].ravel())


def test_a_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(UserError, match="5 rows, not divisible by the patch size 2"):
        tokens.patchify(jnp.zeros((1, 1, 5, 4, 1)), (1, 2, 2))


def packed(slot=0):
    video, reference, motion = latents(2, 3, 4, 4, 2), latents(2, 4, 4, 2, seed=1), latents(2, 2, 4, 4, 2, seed=2)
    row = tokens.pack_visual(
        jnp.asarray(video),
        jnp.asarray(reference),
        jnp.asarray(motion),
        has_reference=jnp.array([True, False]),
        has_motion=jnp.array([False, True]),
        patch=(1, 2, 2),
        reference_time_slot=slot,
    )
    return row, video, reference, motion


@pytest.mark.parametrize("slot", [0, -1, 30])
def test_the_sequence_is_reference_then_motion_then_video(slot):
    row, video, reference, motion = packed(slot)
    chex.assert_shape(list(row), [(2, 24, 8), (1, 24, 3), (2, 24), (1, 24)])
    assert list(np.asarray(row.position)[0, ::4, 0]) == [slot, -2, -1, 0, 1, 2]
    np.testing.assert_array_equal(np.asarray(row.position)[0, :4, 1:], [[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(row.value[0, :4], tokens.patchify(jnp.asarray(reference[:, None]), (1, 2, 2))[0])
    np.testing.assert_array_equal(row.value[1, 4:12], tokens.patchify(jnp.asarray(motion), (1, 2, 2))[1])
    np.testing.assert_array_equal(row.value[:, 12:], tokens.patchify(jnp.asarray(video), (1, 2, 2)))
    np.testing.assert_array_equal(row.clean[0], [True] * 12 + [False] * 12)


def test_absent_parts_have_segment_zero_and_no_value():
    row, *_ = packed()
    np.testing.assert_array_equal(row.segment, [[1] * 4 + [0] * 8 + [1] * 12, [0] * 4 + [1] * 20])
    assert not np.asarray(row.value)[0, 4:12].any() and not np.asarray(row.value)[1, :4].any()


def test_padding_is_segment_zero():
    row, *_ = packed()
    longer = tokens.pad(row, 7)
    chex.assert_shape(list(longer), [(2, 28, 8), (1, 28, 3), (2, 28), (1, 28)])
    assert not np.asarray(longer.segment)[:, 24:].any()
    assert tokens.pad(row, 8) is row


def test_parts_of_another_size_are_refused_where_they_would_shift_the_tokens():
    video, motion, present = latents(2, 3, 4, 4, 2), latents(2, 2, 4, 4, 2), np.ones(2, bool)
    for reference in (latents(2, 4, 8, 2), latents(1, 4, 4, 2)):
        with pytest.raises(AssertionError, match="shape"):
            tokens.pack_visual(video, reference, motion, has_reference=present, has_motion=present, patch=(1, 2, 2))
