"""Speech features from a local wav2vec 2.0 or Whisper checkpoint, computed by this project's own networks.

A name is KIND:DIR, as "wav2vec2:models/wav2vec2-base-960h". A data set records KIND:DIR#DIGEST with the digest of the
weights; loading that name fails if the directory has other weights.

Kinds: "wav2vec2" and "whisper" use the output, "wav2vec2-all" and "whisper-all" all hidden states, concatenated. Each
row of a state is normalised to zero mean and unit variance, because layers differ in scale by orders of magnitude.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines.encoders import mel
from data_pipelines.raw.fetch import sha256_of
from omnihuman_jax.errors import UserError, nearest

KINDS = ("wav2vec2", "wav2vec2-all", "whisper", "whisper-all")
HOP = mel.RATE // 50  # samples a row at 50 Hz

Rows = Callable[[np.ndarray], np.ndarray]


def _standardised(states: list[np.ndarray]) -> np.ndarray:
    """[(N, C)] -> (N, len * C)."""
    rows = np.stack([np.asarray(state, np.float32) for state in states], axis=1)
    rows = rows - rows.mean(-1, keepdims=True)
    rows /= np.sqrt(np.square(rows).mean(-1, keepdims=True) + 1e-5)
    return rows.reshape(len(rows), -1)


def _compiled(model, every: bool) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The jitted model for one recording: all its hidden states (`every`) or only its output."""
    import jax
    from flax import nnx

    graph, state = nnx.split(model)

    @jax.jit
    def run(state, value):
        output, states = nnx.merge(graph, state)(value[None])
        return [x[0] for x in (states if every else [output])]

    return lambda value: run(state, value)


def _wav2vec2(directory: Path, every: bool) -> tuple[Rows, int]:
    from omnihuman_jax.models.speech.wav2vec2 import normalised
    from omnihuman_jax.weights import wav2vec2

    model = wav2vec2.load(directory)
    config, run = model.config, _compiled(model, every)
    if config.hop != HOP:
        raise UserError(f"{directory}: the model makes a row every {config.hop} samples; it must be every {HOP}")
    before = (config.field - HOP) // 2  # centres a row in its receptive field

    def rows(wave: np.ndarray) -> np.ndarray:
        wave = normalised(wave) if config.do_normalize else wave
        return _standardised(run(np.pad(wave, (before, config.field - HOP - before))))

    return rows, config.hidden_size * (config.num_hidden_layers + 1 if every else 1)


def _whisper(directory: Path, every: bool) -> tuple[Rows, int]:
    from omnihuman_jax.weights import whisper

    model = whisper.load(directory)
    config, run = model.config, _compiled(model, every)

    def rows(wave: np.ndarray) -> np.ndarray:
        return _standardised(run(mel.log_mel(wave, config.num_mel_bins)))

    return rows, config.d_model * (config.encoder_layers + 1 if every else 1)


def load(name: str) -> tuple[str, Rows, int]:
    """Loads the checkpoint called KIND:DIR[#DIGEST].

    Returns:
      The full name with the digest, a function from sound (N,) at 16 kHz, N a multiple of 320, to rows (N / 320, width)
      float32, and the width.

    Raises:
      UserError: an unknown kind, a missing directory, another digest, or a checkpoint that does not fit.
    """
    kind, _, place = name.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"speech encoder {name}: unknown kind {kind!r}{nearest(kind, KINDS)}; kinds: {', '.join(KINDS)}"
        )
    place, _, digest = place.partition("#")
    directory = Path(place)
    if not directory.is_dir():
        raise UserError(f"speech encoder {name}: no such directory; give {kind}:DIR with config.json and safetensors")
    files = sorted(directory.glob("*.safetensors"))
    found = hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()[:12]
    if digest and digest != found:
        raise UserError(
            f"speech encoder {name}: the directory's weights have digest {found}; restore the original ones"
        )
    make = _wav2vec2 if kind.startswith("wav2vec2") else _whisper
    rows, width = make(directory, kind.endswith("-all"))
    return f"{kind}:{place}#{found}", rows, width
