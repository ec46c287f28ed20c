"""A CTranslate2 model.bin is read byte by byte: a small one written here, and broken ones."""

import struct

import numpy as np
import pytest
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.whisper import WhisperConfig, WhisperEncoder
from omnihuman_jax.weights import whisper
from omnihuman_jax.weights.modules import parameters
from omnihuman_jax.weights.write import Renamed

CONFIG = WhisperConfig(
    num_mel_bins=5,
    d_model=8,
    encoder_layers=1,
    encoder_attention_heads=2,
    encoder_ffn_dim=12,
    max_source_positions=6,
)
LAYER = "encoder/layer_0/"
NAMES = {
    "conv1": "encoder/conv1",
    "conv2": "encoder/conv2",
    "layer_norm": "encoder/layer_norm",
    "layers.0.self_attn_layer_norm": LAYER + "self_attention/layer_norm",
    "layers.0.self_attn.out_proj": LAYER + "self_attention/linear_1",
    "layers.0.final_layer_norm": LAYER + "ffn/layer_norm",
    "layers.0.fc1": LAYER + "ffn/linear_0",
    "layers.0.fc2": LAYER + "ffn/linear_1",
}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def tensor(name: str, value: np.ndarray, dtype: int) -> bytes:
    head = text(name) + struct.pack("<B", value.ndim) + b"".join(struct.pack("<I", n) for n in value.shape)
    return head + struct.pack("<BI", dtype, value.nbytes) + value.tobytes()


def model_bin(encoder: WhisperEncoder) -> bytes:
    """The file as CTranslate2's converter lays it out, float32."""
    theirs = Renamed(parameters(encoder), whisper.entries(CONFIG, ""))
    tensors = {"encoder/position_encodings/encodings": theirs["embed_positions.weight"]}
    for ours, name in NAMES.items():
        norm = "norm" in ours
        tensors[f"{name}/{'gamma' if norm else 'weight'}"] = theirs[f"{ours}.weight"]
        tensors[f"{name}/{'beta' if norm else 'bias'}"] = theirs[f"{ours}.bias"]
    q, k, v = (f"layers.0.self_attn.{part}_proj" for part in "qkv")
    tensors[LAYER + "self_attention/linear_0/weight"] = np.concatenate([theirs[f"{n}.weight"] for n in (q, k, v)])
    zeros = np.zeros(CONFIG.d_model, np.float32)
    tensors[LAYER + "self_attention/linear_0/bias"] = np.concatenate([theirs[f"{q}.bias"], zeros, theirs[f"{v}.bias"]])
    body = tensor("encoder/num_heads", np.array(2, np.int16), 2)
    body += b"".join(tensor(name, np.ascontiguousarray(value), 0) for name, value in tensors.items())
    return struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors) + 1) + body


@pytest.fixture(scope="module")
def encoder():
    return WhisperEncoder(CONFIG, rngs=nnx.Rngs(0))


def test_the_encoder_comes_back_bit_for_bit(encoder, tmp_path):
    (tmp_path / "model.bin").write_bytes(model_bin(encoder))
    read = whisper.load_ctranslate2(tmp_path / "model.bin")
    assert read.config == CONFIG
    ours, got = parameters(encoder), parameters(read)
    assert ours.keys() == got.keys() and all(np.array_equal(ours[name], got[name]) for name in ours)


def test_broken_files_are_refused(encoder, tmp_path):
    data, path = model_bin(encoder), tmp_path / "model.bin"
    for content, message in (
        (data[:-3], "truncated: tensor encoder/layer_0/self_attention/linear_0/bias"),
        (b"\7" + data[1:], "not a CTranslate2 model.bin of version 6"),
        (data.replace(b"WhisperSpec", b"WhatperSpec"), "holds a WhatperSpec"),
        (
            data.replace(b"encoder/conv2/weight", b"encoder/conv2/wEight"),
            "conv2.weight (here conv2.kernel) is missing",
        ),
        (b"", "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            whisper.load_ctranslate2(path)
        assert message in str(error.value)
