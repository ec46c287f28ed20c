"""The causal VAE: shapes, causality, its layers against float64 NumPy, Wan2.1's parameter list, files and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae import layers
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, compiled, encoder_sha256, load_vae, save_vae
from omnihuman_jax.weights import wan_vae

SMALL = VAEConfig(
    dim=4, num_res_blocks=1, z_dim=3, latent_mean=(0.1, -0.2, 0.3), latent_std=(0.5, 1.0, 2.0), dim_mult=(1, 2, 2, 2)
)


@pytest.fixture(scope="module")
def small():
    """A small VAE with non-zero attention output, and its compiled (encode, decode)."""
    vae = VAE(SMALL, rngs=nnx.Rngs(0))
    for middle in (vae.encoder.middle, vae.decoder.middle):
        kernel = middle[1].proj.kernel
        kernel.set_value(jax.random.normal(jax.random.key(5), kernel.shape) * 0.3)
    return vae, *compiled(vae)


def video(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, frames, 16, 24, 3)).astype(np.float32)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (9, 3)])
def test_four_frames_and_eight_pixels_become_one(small, frames, latent_frames):
    _, encode, decode = small
    latents = encode(video(frames))
    assert latents.shape == (1, latent_frames, 2, 3, 3)
    output = decode(latents)
    assert output.shape == (1, frames, 16, 24, 3)
    assert output.dtype == jnp.float32 and jnp.abs(output).max() <= 1


def test_encoding_does_not_look_ahead(small):
    _, encode, _ = small
    clip = video(9)
    later = clip.copy()
    later[:, 5:] = video(4, seed=1)
    before, after = encode(clip), encode(later)
    np.testing.assert_allclose(before[:, :2], after[:, :2], atol=1e-5)
    assert jnp.abs(before[:, 2] - after[:, 2]).max() > 1e-2


def test_the_first_frame_encodes_as_the_same_image_does(small):
    _, encode, _ = small
    np.testing.assert_allclose(encode(video(9))[:, :1], encode(video(9)[:, :1]), atol=1e-5)


def test_decoding_does_not_look_ahead(small):
    _, encode, decode = small
    latents = np.asarray(encode(video(9)))
    later = latents.copy()
    later[:, 2] += 1.0
    before, after = decode(latents), decode(later)
    np.testing.assert_allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert jnp.abs(before[:, 5:] - after[:, 5:]).max() > 1e-3
    np.testing.assert_allclose(decode(latents[:, :1]), before[:, :1], atol=1e-5)


def test_latents_are_normalised_by_the_statistics(small):
    vae, encode, _ = small
    mean = jax.jit(lambda v: vae.encode_moments(v)[0])(video(1))
    expected = (np.asarray(mean, np.float64) - SMALL.latent_mean) / SMALL.latent_std
    np.testing.assert_allclose(encode(video(1)), expected, rtol=1e-4, atol=1e-5)


def reference_conv(x, kernel, bias, rows, columns, stride):
    """Float64 loops: causal in time with zeros before the clip, zero padding `rows` and `columns`."""
    taps, kh, kw = kernel.shape[:3]
    x = np.pad(x.astype(np.float64), ((0, 0), (taps - 1, 0), rows, columns, (0, 0)))
    frames, height, width = x.shape[1] - taps + 1, (x.shape[2] - kh) // stride + 1, (x.shape[3] - kw) // stride + 1
    out = np.zeros((x.shape[0], frames, height, width, kernel.shape[-1]))
    for f in range(frames):
        for i in range(height):
            for j in range(width):
                patch = x[:, f : f + taps, i * stride : i * stride + kh, j * stride : j * stride + kw]
                out[:, f, i, j] = np.tensordot(patch, kernel.astype(np.float64), 4)
    return out + bias


@pytest.mark.parametrize("form", ["platform", "conv3d", "conv2d"])
@pytest.mark.parametrize(
    ("kernel_size", "padding", "stride"),
    [((3, 3, 3), ((1, 1), (1, 1)), 1), ((1, 3, 3), ((0, 1), (0, 1)), 2), ((3, 1, 1), ((0, 0), (0, 0)), 1)],
)
def test_causal_convolution_is_the_textbook_sum(monkeypatch, form, kernel_size, padding, stride):
    if form == "conv3d":  # what a TPU lowers
        monkeypatch.setattr(layers, "_conv2d_by_taps", layers._conv3d)
    if form == "conv2d":
        monkeypatch.setattr(layers, "_conv3d", layers._conv2d_by_taps)
        monkeypatch.setattr(layers, "_CPU_PIXELS", 300)  # three frames, then one
    layer = layers.CausalConv3d(2, 3, kernel_size, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.array([0.5, -1.0, 2.0]))
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8, 2)).astype(np.float32)
    expected = reference_conv(x, np.asarray(layer.kernel[...]), np.array([0.5, -1.0, 2.0]), *padding, stride)
    np.testing.assert_allclose(layer(jnp.asarray(x), spatial=padding, stride=stride), expected, rtol=1e-4, atol=1e-5)


def test_the_norm_scales_each_pixel_to_root_c():
    norm = layers.RMSNorm(5)
    gamma = np.array([1.0, 2.0, -1.0, 0.5, 0.0])
    norm.gamma.set_value(jnp.asarray(gamma, jnp.float32))
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(5) * gamma
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_a_black_pixel_has_a_finite_gradient_through_the_norm():
    norm = layers.RMSNorm(4)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))
    assert bool(jnp.isfinite(gradient).all())


def test_the_default_sizes_have_the_tensors_of_the_published_checkpoint():
    names = {entry.theirs: entry.shape for entry in wan_vae.entries(wan_vae.WAN21, "native")}
    assert len(names) == 194
    assert sum(int(np.prod(shape)) for shape in names.values()) == 126_892_531
    # A sample from the published list.
    published = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.3.residual.2.weight": (192, 96, 3, 3, 3),
        "encoder.downsamples.3.shortcut.bias": (192,),
        "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.middle.0.residual.6.weight": (384, 384, 3, 3, 3),
        "decoder.upsamples.4.shortcut.weight": (384, 192, 1, 1, 1),
        "decoder.upsamples.7.resample.1.weight": (192, 384, 3, 3),
        "decoder.upsamples.7.time_conv.bias": (768,),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.0.gamma": (96, 1, 1, 1),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    }
    assert {name: names.get(name) for name in published} == published


def test_a_saved_file_gives_the_same_latents_and_statistics(small, tmp_path):
    vae, encode, _ = small
    save_vae(tmp_path / "vae.safetensors", vae, notes={"steps": "7"})
    loaded = load_vae({"checkpoint": str(tmp_path / "vae.safetensors")})
    assert loaded.config == SMALL
    np.testing.assert_array_equal(compiled(loaded)[0](video(1)), encode(video(1)))
    assert [p.name for p in tmp_path.iterdir()] == ["vae.safetensors"]


def test_half_precision_storage_changes_latents_little(small, tmp_path):
    vae, encode, _ = small
    save_vae(tmp_path / "half.safetensors", vae, dtype="float16")
    np.testing.assert_allclose(
        compiled(load_vae(tmp_path / "half.safetensors"))[0](video(1)), encode(video(1)), atol=0.02
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"not safetensors", "not a readable safetensors"), ("bare", "no VAE config")],
)
def test_a_file_that_is_no_vae_is_refused(tmp_path, content, message):
    path = tmp_path / "file.safetensors"
    if content == "bare":
        safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_vae(path)


def test_a_file_with_a_tensor_missing_names_it(small, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_vae(path, small[0])
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "decoder.head.bias"}  # noqa: SIM118
        metadata = file.metadata()
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=r"decoder\.head\.bias is missing"):
        load_vae(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 5, 20, 16, 3), "multiples of 8; for example 16x16"), ((1, 4, 16, 16, 3), r"1 \+ a multiple of 4; use 1")],
)
def test_a_size_the_vae_does_not_divide_is_refused(small, shape, message):
    with pytest.raises(UserError, match=message):
        small[0].encode(jnp.zeros(shape))


def test_config_mistakes_name_the_setting():
    with pytest.raises(UserError, match="did you mean 'num_res_blocks'"):
        VAEConfig.from_dict({"num_res_block": 1})
    with pytest.raises(UserError, match="temporal_downsample has 3 values, but vae.dim_mult has 2 levels"):
        VAEConfig(dim_mult=(1, 2))
    with pytest.raises(UserError, match="latent_mean has 2 values"):
        VAEConfig(latent_mean=(0.0, 1.0))


def test_a_file_holds_no_values_that_are_not_finite(tmp_path, monkeypatch):
    config = VAEConfig(dim=4, dim_mult=(1,), num_res_blocks=1, temporal_downsample=())
    vae, path = VAE(config, rngs=nnx.Rngs(0)), tmp_path / "vae.safetensors"
    bias = vae.decoder.head.bias
    bias.set_value(jnp.full(bias.shape, 1e6))  # beyond float16
    with pytest.raises(UserError, match=r"decoder\.head\.bias holds NaN or infinity and is not written"):
        save_vae(path, vae, dtype="float16")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # as a program that does not check would have written it
        patch.setattr("omnihuman_jax.weights.write.np.isfinite", lambda x: np.ones(np.shape(x), bool))
        save_vae(path, vae, dtype="float16")
    with pytest.raises(UserError, match=r"vae\.safetensors: tensor decoder\.head\.bias holds NaN or infinity"):
        load_vae(path)


@pytest.mark.slow
def test_the_linear_path_starts_as_the_datas_principal_components():
    config = VAEConfig(dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, z_dim=6, temporal_downsample=(True, True))
    config = dataclasses.replace(config, patch_size=2, linear_path=True)
    vae = VAE(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    video = np.cumsum(rng.standard_normal((2, 9, 16, 24, 3)), axis=2).astype(np.float32) / 8
    blocks = np.asarray(vae.linear.blocks(video)).reshape(-1, 4 * 8 * 8 * 3)
    values = vae.linear.principal_components(blocks)
    latents = blocks @ values["encode_matrix"] + values["encode_bias"]
    for name, value in (values | vae.linear.least_squares(latents, blocks)).items():
        getattr(vae.linear, name)[...] = jnp.asarray(value)

    # Independent: singular value decomposition of blocks cut out by loops, in float64.
    def block(b, t, h, w):
        frames = [max(0, 4 * t - 3 + i) for i in range(4)]
        return video[b, frames][:, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].reshape(-1).astype(np.float64)

    places = [(b, t, h, w) for b in range(2) for t in range(3) for h in range(2) for w in range(3)]
    data = np.stack([block(*place) for place in places])
    mean = data.mean(0)
    _, _, axes = np.linalg.svd(data - mean, full_matrices=False)
    expected = mean + (data - mean) @ axes[:6].T @ axes[:6]

    z, _ = vae.encode_moments(jnp.asarray(video))
    output = np.asarray(vae.decode_raw(z))
    np.testing.assert_allclose(np.std(np.asarray(z).reshape(-1, 6), axis=0, ddof=1), 1, rtol=1e-3)
    for place, want in zip(places, expected, strict=True):
        b, t, h, w = place
        got = output[b, max(0, 4 * t - 3) : 4 * t + 1, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8].reshape(-1)
        np.testing.assert_allclose(got, want[-len(got) :], atol=2e-3)


def test_the_linear_way_back_reads_neighbours_with_the_least_squared_error():
    config = VAEConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, z_dim=2, temporal_downsample=(True,))
    config = dataclasses.replace(config, linear_path=True, linear_context=1)
    linear = VAE(config, rngs=nnx.Rngs(0)).linear
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    got = np.asarray(linear.neighbours(jnp.asarray(z)))
    for b, t, h, w in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 1, 2, 3)):
        rows, columns = np.clip(range(h - 1, h + 2), 0, 3), np.clip(range(w - 1, w + 2), 0, 4)
        np.testing.assert_array_equal(got[b, t, h, w], np.concatenate([z[b, t, i, j] for i in rows for j in columns]))

    blocks = rng.standard_normal((2 * 3 * 4 * 5, 2 * 2 * 2 * 3))
    x = got.reshape(len(blocks), -1)
    values = linear.least_squares(x, blocks)
    expected, *_ = np.linalg.lstsq(np.concatenate([x, np.ones((len(x), 1))], 1).astype(np.float64), blocks)
    np.testing.assert_allclose(values["decode_matrix"], expected[:-1], atol=1e-4)
    np.testing.assert_allclose(values["decode_bias"], expected[-1], atol=1e-4)
    for name, value in values.items():
        getattr(linear, name)[...] = jnp.asarray(value)
    video = np.asarray(linear.decode(jnp.asarray(z), first=False))
    blocks_back = np.asarray(linear.blocks(jnp.asarray(video), first=False)).reshape(len(blocks), -1)
    np.testing.assert_allclose(blocks_back, x @ expected[:-1] + expected[-1], atol=2e-3)


def test_the_digest_of_an_encoder_ignores_the_decoder(tmp_path):
    config = VAEConfig(dim=4, dim_mult=(1, 2), num_res_blocks=1, z_dim=2, temporal_downsample=(True,))
    vae = VAE(config, rngs=nnx.Rngs(0))
    save_vae(tmp_path / "a.safetensors", vae)
    vae.decoder.head.bias[...] += 1
    vae.conv2.bias[...] += 1
    save_vae(tmp_path / "b.safetensors", vae)
    vae.conv1.bias[...] += 1
    save_vae(tmp_path / "c.safetensors", vae)
    vae.config = dataclasses.replace(config, latent_std=(1.0, 2.0))
    save_vae(tmp_path / "d.safetensors", vae)
    a, b, c, d = (encoder_sha256(tmp_path / f"{name}.safetensors") for name in "abcd")
    assert a == b and len({a, c, d}) == 3
