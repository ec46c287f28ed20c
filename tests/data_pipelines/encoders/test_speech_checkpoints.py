"""Speech features from checkpoints in local directories: one row a frame, in time with the sound, named by content."""

import json

import numpy as np
import pytest
from flax import nnx

from data_pipelines.encoders import speech
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from omnihuman_jax.models.speech.whisper import WhisperConfig, WhisperEncoder
from omnihuman_jax.weights import wav2vec2, whisper
from omnihuman_jax.weights.modules import parameters
from omnihuman_jax.weights.write import Renamed, write_files

WAV2VEC2 = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directories `wav2vec2` and `whisper` with small random checkpoints in Hugging Face's naming."""
    root = tmp_path_factory.mktemp("speech")
    w = Wav2Vec2Config(**WAV2VEC2)
    h = WhisperConfig(**WHISPER)
    for name, model, entries, settings in (
        ("wav2vec2", Wav2Vec2(w, rngs=nnx.Rngs(0)), wav2vec2.entries(w), WAV2VEC2),
        ("whisper", WhisperEncoder(h, rngs=nnx.Rngs(0)), whisper.entries(h), WHISPER),
    ):
        (root / name).mkdir()
        write_files(root / name, Renamed(parameters(model), entries), "model", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(settings | {"model_type": name}))
    return root


def tone(frames: int, begin: int, end: int) -> np.ndarray:
    """Silence with a tone from frame `begin` to `end`."""
    t = np.arange(frames * speech.SAMPLES_PER_FRAME)
    inside = (t >= begin * speech.SAMPLES_PER_FRAME) & (t < end * speech.SAMPLES_PER_FRAME)
    return (1e-3 * np.sin(t * 0.1) + inside * np.sin(t * 0.3)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "width"), [("wav2vec2", 16), ("wav2vec2-all", 48), ("whisper", 16), ("whisper-all", 48)]
)
def test_a_row_a_frame_of_unit_variance(folder, kind, width):
    encoder = speech.load(f"{kind}:{folder / kind.removesuffix('-all')}")
    features = encoder.encode(tone(20, 5, 10), 20)
    assert features.shape == (20, width) and encoder.dim == width and features.dtype == np.float32
    assert np.isfinite(features).all() and 0.2 < features.std() < 2


def test_wav2vec2_rows_are_in_time_with_the_sound(folder):
    """The convolutions alone (a random network's later layers mix everything): the tone's rows stand out."""
    model = wav2vec2.load(folder / "wav2vec2")
    config, wave = model.config, tone(40, 10, 20)
    spare = config.field - config.hop
    padded = np.pad(wave, (spare // 2, spare - spare // 2))
    x = np.asarray(model.feature_extractor(padded[None]))[0].reshape(40, 2, -1).mean(1)
    change = np.abs(x - x[30]).mean(-1)
    assert set(np.argsort(change)[-8:]) <= set(range(10, 20))
    assert change @ np.arange(40) / change.sum() == pytest.approx(14.5, abs=0.3)  # the tone's middle


def test_the_name_carries_the_digest_and_other_weights_are_refused(folder):
    name = speech.load(f"whisper:{folder / 'whisper'}").name
    assert speech.load(name).name == name and "#" in name
    with pytest.raises(UserError, match="the directory's weights have digest"):
        speech.load(name[:-1] + ("0" if name[-1] != "0" else "1"))


def test_what_cannot_be_is_refused(folder):
    with pytest.raises(UserError, match="did you mean 'wav2vec2'"):
        speech.load("wav2vec:models")
    with pytest.raises(UserError, match="no such directory"):
        speech.load("wav2vec2:nowhere")
    with pytest.raises(UserError, match="model_type is 'wav2vec2', not 'whisper'"):
        speech.load(f"whisper:{folder / 'wav2vec2'}")
