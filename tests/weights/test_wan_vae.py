"""Importing a VAE: what is refused, and that the message names the file and the tensor."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import VAE, VAEConfig
from omnihuman_jax.weights import wan_vae
from omnihuman_jax.weights.modules import parameters

SMALL = VAEConfig(
    dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    z_dim=2,
    temporal_downsample=(True,),
    latent_mean=(0.5, 1.0),
    latent_std=(2.0, 3.0),
)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae():
    return VAE(SMALL, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(vae, tmp_path):
    wan_vae.save(tmp_path, vae)
    return tmp_path


def change(folder, **changes) -> None:
    """Rewrites the file with tensors replaced, added or (None) left out; `__` in a keyword is a dot."""
    tensors = safetensors.numpy.load_file(folder / FILE)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, folder / FILE)


def refused(path, *parts) -> None:
    with pytest.raises(UserError) as error:
        wan_vae.load(path)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_what_was_written_is_read_back_bit_for_bit(vae, folder):
    loaded = wan_vae.load(folder)
    assert loaded.config == SMALL
    ours, read = parameters(vae), parameters(loaded)
    assert all(np.array_equal(ours[name], read[name]) for name in ours)


def test_half_precision_is_read_as_float32(vae, folder):
    tensors = safetensors.numpy.load_file(folder / FILE)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors.items()}, folder / FILE)
        read, ours = parameters(wan_vae.load(folder)), parameters(vae)
        for name, value in ours.items():
            np.testing.assert_array_equal(read[name], value.astype(dtype).astype(np.float32))


def test_misfits_are_all_listed_in_both_namings(folder):
    change(
        folder,
        decoder__conv_out__bias=None,
        decoder__extra__weight=np.zeros(3, np.float32),
        encoder__conv_in__bias=np.zeros(5, np.float32),
    )
    refused(
        folder,
        "tensor decoder.conv_out.bias (here decoder.head.bias) is missing",
        "tensor decoder.extra.weight is not part of the model",
        "tensor encoder.conv_in.bias (here encoder.conv1.bias) has shape (5,), should be (2,)",
        str(folder),
    )


def test_a_tensor_that_is_not_finite_is_named(folder):
    change(folder, decoder__conv_out__bias=np.array([1, np.nan, 0], np.float32))
    refused(folder, FILE, "decoder.conv_out.bias holds NaN")


def test_integers_are_refused(folder):
    change(folder, decoder__conv_out__bias=np.zeros(3, np.int8))
    refused(folder, FILE, "decoder.conv_out.bias is I8, not one of")


def test_a_truncated_file_names_the_first_tensor_it_lacks(folder):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-4])
    refused(folder, FILE, "truncated: tensor ")
    (folder / FILE).write_bytes(data[:20])
    refused(folder, FILE, "no whole safetensors header in 20 bytes")


def test_a_sharded_checkpoint_is_read_and_a_missing_shard_named(vae, folder):
    tensors = safetensors.numpy.load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in chosen}, folder / file)
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read, ours = parameters(wan_vae.load(folder)), parameters(vae)
    assert all(np.array_equal(ours[name], read[name]) for name in ours)
    (folder / "b.safetensors").unlink()
    refused(folder, "model.safetensors.index.json", f"lists tensor {names[1]} in b.safetensors, which is missing")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(b"\x80\x02.")
    for given in (path, tmp_path):
        refused(given, "Wan2.1_VAE.pth: is a pickle", "weights_only=True", "Wan2.1_VAE.safetensors")


def test_another_model_is_refused(folder, tmp_path):
    safetensors.numpy.save_file({"layer.weight": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "not a Wan VAE (its first tensor is layer.weight)")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"is_residual": True}))
    refused(folder / FILE, "Wan2.2's residual VAE")
    refused(tmp_path / "no.safetensors", "no such file")


def test_the_published_sizes_have_194_tensors_in_both_namings():
    for naming in ("native", "diffusers"):
        entries = wan_vae.entries(wan_vae.WAN21, naming)
        assert len({entry.theirs for entry in entries}) == 194


def test_a_linear_path_cannot_be_exported(tmp_path):
    config = VAEConfig(dim=2, dim_mult=(1, 2), num_res_blocks=1, z_dim=2, temporal_downsample=(True,), linear_path=True)
    with pytest.raises(UserError, match="vae.linear_path=true: diffusers has no such VAE"):
        wan_vae.save(tmp_path, VAE(config, rngs=nnx.Rngs(0)))
