"""Streaming and tiling of the VAE: equal to one pass over the clip, in memory that its length does not change."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae import streaming
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, compiled, load_vae

DEMO_VAE = pathlib.Path(__file__).parents[3] / "experiments/assets/demo_vae.safetensors"

CONFIGS = {
    "wan2.1": VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=3, temporal_downsample=(True, True)),
    "patched, linear": VAEConfig(
        dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=4, temporal_downsample=(True, True), patch_size=2,
        linear_path=True, latent_mean=(0.1, 0.2, 0.3, 0.4), latent_std=(1.0, 2.0, 0.5, 1.0),
    ),
    "one halving of frames": VAEConfig(
        dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=3, temporal_downsample=(False, True)
    ),
}  # fmt: skip


def build(name: str, attention: float = 0.3) -> VAE:
    """A VAE whose zero-initialised parts are not zero, so that everything takes part."""
    vae = VAE(CONFIGS[name], rngs=nnx.Rngs(0))
    for half in (vae.encoder, vae.decoder):
        for i, kernel in enumerate((half.middle[1].proj.kernel, half.head.kernel)):
            kernel.set_value(jax.random.normal(jax.random.key(i), kernel.shape) * (attention, 0.1)[i])
    return vae


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def relative(ours, expected) -> float:
    return float(np.linalg.norm(np.asarray(ours) - expected) / np.linalg.norm(expected))


# Latent frames of the chunks: 1, 5 and 17 pixel frames; one at a time, unequal ones, a long first one.
@pytest.mark.parametrize(
    ("name", "chunkings"),
    [
        ("wan2.1", [(1,)]),
        pytest.param("wan2.1", [(1, 1)], marks=pytest.mark.slow),
        ("wan2.1", [(1, 1, 1, 1, 1), (1, 2, 2), (3, 2)]),
        pytest.param("patched, linear", [(1, 2, 2)], marks=pytest.mark.slow),
        ("one halving of frames", [(1, 2, 2)]),
    ],
)
def test_chunks_give_what_the_whole_clip_gives(name, chunkings):
    vae, latents = build(name), sum(chunkings[0])
    config = vae.config
    t, s = config.temporal_stride, config.spatial_stride
    video, z = noise((2, 1 + t * (latents - 1), 2 * s, 3 * s, 3)), 2 * noise((2, latents, 2, 3, config.z_dim), 1)
    encode, decode = compiled(vae)
    encoded, decoded = np.asarray(encode(video)), np.asarray(decode(z))
    for sizes in chunkings:
        ends = np.cumsum(sizes)
        frames = [0, *(1 + t * (ends - 1))]
        parts = list(streaming.encode_stream(vae, [video[:, a:b] for a, b in itertools.pairwise(frames)]))
        assert [part.shape[1] for part in parts] == list(sizes)
        assert relative(np.concatenate(parts, 1), encoded) < 5e-6
        parts = list(streaming.decode_stream(vae, [z[:, a:b] for a, b in itertools.pairwise([0, *ends])]))
        assert relative(np.concatenate(parts, 1), decoded) < 5e-6


@pytest.mark.slow
def test_a_clip_is_cut_padded_and_joined_without_a_trace():
    vae = build("wan2.1")
    encode, decode = compiled(vae)
    video, z = noise((1, 25, 8, 8, 3)), 2 * noise((1, 7, 2, 2, 3))
    for latents in (3, None):  # 3 do not divide 7 latent frames; None takes the clip whole
        assert relative(streaming.encode_clip(vae, video, latents=latents), encode(video)) < 5e-6
        assert relative(streaming.decode_clip(vae, z, latents=latents), decode(z)) < 5e-6


def test_a_long_clip_compiles_for_two_chunks_and_no_more():
    vae = build("wan2.1")
    before = streaming._step._cache_size()
    for latents in (6, 9, 14):
        streaming.decode_clip(vae, noise((1, latents, 1, 1, 3)), latents=4)
    assert streaming._step._cache_size() == before + 2


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_memory_is_that_of_a_chunk_however_long_the_clip(method):
    """The cache has the same shapes after 1 and after 9 frames, and a steady chunk takes a fraction of a long clip."""
    vae = build("wan2.1")
    graph, state = nnx.split(vae)
    first, later, whole = (
        ((1, 1, 32, 32, 3), (1, 4, 32, 32, 3), (1, 65, 32, 32, 3))
        if method == "encode"
        else ((1, 1, 8, 8, 3), (1, 1, 8, 8, 3), (1, 17, 8, 8, 3))
    )
    past, shapes = None, []
    for shape in (first, later, later):
        struct = jax.ShapeDtypeStruct(shape, jnp.float32)
        _, past = jax.eval_shape(lambda s, x, p: streaming._step(graph, method, s, x, p), state, struct, past)
        shapes.append([leaf.shape for leaf in past])
    assert shapes[0] == shapes[1] == shapes[2]
    memory = streaming._step.lower(graph, method, state, struct, past).compile().memory_analysis()
    steady = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    clip = streaming._step.lower(graph, method, state, jax.ShapeDtypeStruct(whole, jnp.float32), None).compile()
    assert steady * 4 < clip.memory_analysis().temp_size_in_bytes


def test_a_frame_of_one_tile_is_not_touched():
    vae = build("wan2.1")
    z = noise((1, 3, 4, 6, 3))
    whole = streaming.decode_clip(vae, z, latents=2)
    np.testing.assert_array_equal(streaming.decode_clip(vae, z, latents=2, tiling=streaming.Tiling(24, 8)), whole)


def test_tiles_equal_the_whole_frame_away_from_seams_and_differ_little_at_them():
    """Without attention what is 24 columns inside a tile does not depend on its border; the rest does a little."""
    vae = build("wan2.1", attention=0.0)
    z = noise((1, 2, 4, 72, 3))
    whole = streaming.decode_clip(vae, z)
    tiled = streaming.decode_clip(vae, z, tiling=streaming.Tiling(4 * 48, 4 * 24))
    # Tiles begin at latent columns 0 and 24 and are 48 wide: the first is alone up to 24, the second from 48.
    error = np.abs(tiled - whole).max(axis=(0, 1, 2, 4)).reshape(72, 4).max(1)
    np.testing.assert_allclose(error[:24], 0, atol=5e-5)
    np.testing.assert_allclose(error[48:], 0, atol=5e-5)
    assert 0 < relative(tiled, whole) < 0.05  # measured 0.034, of noise through random weights


def test_tiles_stream_as_whole_frames_do():
    vae, z, tiling = build("wan2.1"), noise((1, 3, 24, 16, 3)), streaming.Tiling(48, 24)
    tiled = streaming.decode_clip(vae, z, tiling=tiling)
    assert relative(streaming.decode_clip(vae, z, latents=1, tiling=tiling), tiled) < 5e-6


def test_tiles_of_a_trained_vae_differ_little():
    """The shipped VAE, attention and all, on a picture with soft and hard edges."""
    vae = load_vae(DEMO_VAE)
    y, x = np.mgrid[:160, :128] / 32
    disc = ((x - 2) ** 2 + (y - 2.5) ** 2 < 2)[..., None] * np.array([0.8, -0.4, 0.2])
    picture = 0.4 * np.stack([np.sin(x), np.cos(y), np.sin(x + 2 * y)], -1) + disc
    video, tiling = np.clip(picture, -1, 1).astype(np.float32)[None, None], streaming.Tiling(96, 48)
    z = streaming.encode_clip(vae, video)
    z_error = relative(streaming.encode_clip(vae, video, tiling=tiling), z)
    whole = streaming.decode_clip(vae, z)
    error = relative(streaming.decode_clip(vae, z, tiling=tiling), whole)
    assert 0 < z_error < 0.02 and 0 < error < 0.02  # measured 0.003 and 0.006


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(10, 10, 4), (11, 10, 4), (64, 16, 4), (65, 16, 8), (7, 10, 0)]
)
def test_tiles_cover_a_side_and_their_weights_add_up(length, size, overlap):
    starts = streaming.tile_starts(length, size, overlap)
    size = min(size, length)
    assert starts[0] == 0 and starts[-1] + size == length
    assert all(0 < b - a <= size - overlap for a, b in itertools.pairwise(starts))
    total = np.zeros(length)
    for start, ramp in zip(starts, streaming._ramps(starts, size, length), strict=True):
        assert (ramp > 0).all()
        total[start : start + size] += ramp
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_tiles_by_their_side_share_a_quarter():
    assert streaming.Tiling.of_side(0, 8) is None
    assert streaming.Tiling.of_side(512, 8) == streaming.Tiling(512, 128)
    assert streaming.Tiling.of_side(40, 8) == streaming.Tiling(40, 8)
    for side in (12, 24):
        with pytest.raises(UserError, match=f"--vae_tile={side}: must be a multiple of 8, at least 32"):
            streaming.Tiling.of_side(side, 8)


def test_wrong_chunks_and_tiles_are_refused():
    vae = build("wan2.1")
    with pytest.raises(UserError, match="a chunk of 3 frames: after the first chunk the VAE needs a multiple of 4"):
        list(streaming.encode_stream(vae, [noise((1, 1, 8, 8, 3)), noise((1, 3, 8, 8, 3))]))
    with pytest.raises(UserError, match="both must be multiples of 4"):
        streaming.decode_clip(vae, noise((1, 1, 2, 2, 3)), tiling=streaming.Tiling(30, 8))
