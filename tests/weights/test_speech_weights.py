"""Importing speech encoders: both namings of the weight-normed convolution, heads left out, misfits named."""

import json

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from omnihuman_jax.models.speech.whisper import WhisperConfig
from omnihuman_jax.weights import wav2vec2, whisper
from omnihuman_jax.weights.modules import parameters
from omnihuman_jax.weights.write import Renamed, write_files

SETTINGS = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": [4, 4],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
CONFIG = Wav2Vec2Config(**SETTINGS)


@pytest.fixture(scope="module")
def model():
    return Wav2Vec2(CONFIG, rngs=nnx.Rngs(0))


def checkpoint(folder, model, settings=SETTINGS, **naming):
    renamed = Renamed(parameters(model), wav2vec2.entries(CONFIG, **naming))
    write_files(folder, renamed, "model", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "wav2vec2"}))
    return folder


@pytest.mark.parametrize(
    "naming", [{}, {"prefix": "wav2vec2."}, {"old_weight_norm": True}], ids=["plain", "prefixed", "old names"]
)
def test_every_naming_comes_back_bit_for_bit(model, tmp_path, naming):
    folder = checkpoint(tmp_path, model, **naming)
    extractor = {"do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    read = wav2vec2.load(folder)
    assert not read.config.do_normalize and read.config.conv_dim == CONFIG.conv_dim
    ours, got = parameters(model), parameters(read)
    assert ours.keys() == got.keys() and all(np.array_equal(ours[name], got[name]) for name in ours)


def test_heads_are_left_out_and_strangers_named(model, tmp_path):
    folder = checkpoint(tmp_path, model, prefix="wav2vec2.")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors |= {"lm_head.weight": np.zeros((3, 8), np.int8), "wav2vec2.masked_spec_embed": np.zeros(8, np.float32)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    wav2vec2.load(folder)
    tensors["classifier.weight"] = np.zeros((3, 8), np.float32)
    del tensors["wav2vec2.feature_projection.projection.bias"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        wav2vec2.load(folder)
    bias = "feature_projection.projection.bias"
    assert f"tensor wav2vec2.{bias} (here {bias}) is missing" in str(error.value)
    assert "tensor classifier.weight is not part of the model" in str(error.value)


def test_what_is_not_supported_is_said(model, tmp_path):
    with pytest.raises(UserError, match="add_adapter=True; adapters are not supported"):
        wav2vec2.load(checkpoint(tmp_path, model, SETTINGS | {"add_adapter": True}))
    with pytest.raises(UserError, match="hidden_act='relu'"):
        wav2vec2.load(checkpoint(tmp_path, model, SETTINGS | {"hidden_act": "relu"}))


def test_the_published_sizes_have_the_published_number_of_parameters():
    """Wav2Vec2Model without masked_spec_embed; the encoder of Whisper large-v3 and of tiny."""

    def count(entries) -> int:
        return sum(int(np.prod(entry.shape)) for entry in entries)

    base = Wav2Vec2Config()
    assert (len(wav2vec2.entries(base)), count(wav2vec2.entries(base))) == (210, 94_370_944)
    large = Wav2Vec2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    assert (len(wav2vec2.entries(large)), count(wav2vec2.entries(large))) == (421, 315_437_696)
    assert (len(whisper.entries(WhisperConfig())), count(whisper.entries(WhisperConfig()))) == (67, 8_208_384)
    v3 = WhisperConfig(128, 1280, 32, 20, 5120)
    assert count(whisper.entries(v3)) == 636_968_960
