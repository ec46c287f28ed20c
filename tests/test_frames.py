"""docs/frames.md: one frame is changed, and exactly the latent frames of the table change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnihuman_jax.frames import latent_frames, pixel_frames, window_frames
from omnihuman_jax.models.dit.audio import AudioAdapter
from omnihuman_jax.models.dit.pose import PoseGuider
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, compiled
from tests.models.dit.tiny import tiny_config

T, CONTEXT = 6, 2
FRAMES = 1 + 4 * (T - 1)
# (first latent frame, latent frames): a whole clip, and windows within it.
WINDOWS = [(0, T), (2, 3), (3, 3)]


def changed(before, after) -> list[int]:
    """Latent frames (axis 1) that differ."""
    difference = np.abs(np.asarray(before) - np.asarray(after))
    return np.flatnonzero(difference.reshape(*difference.shape[:2], -1).max((0, 2)) > 1e-6).tolist()


def heard(k: int) -> set[int]:
    """The table's line for audio, written out anew."""
    return {
        min(max(f, 0), FRAMES - 1)
        for f in (4 * k - 5, 4 * k - 4, 4 * k - 3, 4 * k - 2, 4 * k - 1, *range(4 * k, 4 * k + 3))
    }


def posed(k: int) -> set[int]:
    """The table's line for pose."""
    return {max(f, 0) for f in (4 * k - 3, 4 * k - 2, 4 * k - 1, 4 * k)}


def test_the_written_out_lines_are_those_of_the_document():
    assert heard(0) == {0, 1, 2} and heard(1) == {0, 1, 2, 3, 4, 5, 6} and heard(2) == set(range(3, 11))
    assert posed(0) == {0} and posed(1) == {1, 2, 3, 4} and posed(2) == {5, 6, 7, 8}
    for f in range(FRAMES):
        assert [k for k in range(T) if f in posed(k)] == [math.ceil(f / 4)]
        if f < FRAMES - 1:
            assert [k for k in range(T) if f in heard(k)] == list(
                range(max(0, math.ceil((f - 2) / 4)), min(T - 1, (f + 5) // 4) + 1)
            )


@pytest.mark.parametrize(("start", "length"), WINDOWS)
def test_an_audio_feature_reaches_the_tokens_of_the_tables_latent_frames(start, length):
    config = tiny_config(audio_context=CONTEXT)
    graph, state = nnx.split(AudioAdapter(config, rngs=nnx.Rngs(0)))
    indices = window_frames(start, length, FRAMES, CONTEXT)

    @jax.jit
    def tokens(features):
        out = nnx.merge(graph, state)(features[indices][None], jnp.ones(1, bool)).value
        return out.reshape(1, length, config.audio_tokens, -1)

    features = np.random.default_rng(0).normal(size=(FRAMES, config.audio_dim)).astype(np.float32)
    before = tokens(features)
    for f in range(FRAMES):
        after = features.copy()
        after[f] += 1
        assert changed(before, tokens(after)) == [k - start for k in range(start, start + length) if f in heard(k)], f


@pytest.mark.parametrize(("start", "length"), WINDOWS)
def test_a_pose_frame_reaches_the_channels_of_its_latent_frame_only(start, length):
    config = tiny_config()
    guider = PoseGuider(config, rngs=nnx.Rngs(0))
    guider.out.kernel.set_value(jax.random.normal(jax.random.key(0), guider.out.kernel.shape))
    graph, state = nnx.split(guider)
    indices = window_frames(start, length, FRAMES)
    channels = jax.jit(lambda p: nnx.merge(graph, state)(p[indices][None], jnp.ones(1, bool), 4, 4))
    points = np.random.default_rng(0).uniform(0.2, 0.8, (FRAMES, config.num_keypoints, 3)).astype(np.float32)
    before = channels(points)
    for f in range(FRAMES):
        after = points.copy()
        after[f, :, :2] = 1 - after[f, :, :2]
        assert changed(before, channels(after)) == [k - start for k in range(start, start + length) if f in posed(k)], f


def test_a_pixel_frame_first_changes_the_latent_frame_that_stands_for_it():
    config = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=3, temporal_downsample=(True, True))
    encode, _ = compiled(VAE(config, rngs=nnx.Rngs(0)))
    video = np.random.default_rng(0).uniform(-1, 1, (1, FRAMES, 8, 8, 3)).astype(np.float32)
    before = encode(video)
    for f in range(FRAMES):
        after = video.copy()
        after[:, f] *= -1
        assert changed(before, encode(after))[0] == math.ceil(f / 4), f


def test_a_latent_frame_decodes_to_its_pixel_frames_and_changes_none_before():
    config = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=3, temporal_downsample=(True, True))
    _, decode = compiled(VAE(config, rngs=nnx.Rngs(0)))
    z = np.random.default_rng(0).normal(size=(1, T, 2, 2, 3)).astype(np.float32)
    before = decode(z)
    for k in range(T):
        after = z.copy()
        after[:, k] += 1
        assert changed(before, decode(after))[0] == max(0, 4 * k - 3), k


def covered(latent):
    """Pixel frames of an absolute latent frame, from the definition."""
    return [0] if latent == 0 else list(range(4 * latent - 3, 4 * latent + 1))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (21, 6), (22, 7), (49, 13)])
def test_latent_frames_cover_the_clip_and_no_more(frames, latents):
    assert latent_frames(frames) == latents
    assert pixel_frames(latents) >= frames > pixel_frames(latents) - 4
    assert sorted({f for k in range(latents) for f in covered(k)})[-1] >= frames - 1


@pytest.mark.parametrize("start", [0, 6, 12])
def test_windows_read_exactly_the_frames_their_latents_cover(start):
    indices = window_frames(start, 6, 1000)
    assert indices.shape == (4 * 6,)
    expected = [f for k in range(start, start + 6) for f in (covered(k) if k else [0, 0, 0, 0])]
    assert indices.tolist() == expected


def test_audio_windows_add_context_on_both_sides_and_clamp_into_the_clip():
    indices = window_frames(6, 6, 45, context=2)
    assert indices.shape == (4 * 6 + 2 * 2,)
    assert indices[:3].tolist() == [19, 20, 21]  # 4 * 6 - 3 - 2
    np.testing.assert_array_equal(indices[-2:], [44, 44])  # 4 * 11 + 2 = 46 is past the end
    assert window_frames(0, 6, 45, context=2)[:6].tolist() == [0] * 6
