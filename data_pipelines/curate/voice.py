"""Voice activity by Silero VAD v6 (MIT), one probability per video frame."""

from __future__ import annotations

import functools
import pathlib

import numpy as np

from data_pipelines.raw import fetch
from data_pipelines.raw.media import AUDIO_RATE
from omnihuman_jax.frames import FPS

NAME = "silero-vad-v6"
PACKAGE = fetch.Package(
    "pypi", "faster-whisper", "1.2.1", "79a66ad50688c0b794dd501dc340a736992a6342f7f95e5811be60b5224a26a7"
)
MODEL = "faster_whisper/assets/silero_vad_v6.onnx"
MODEL_SHA256 = "4cbf549b8326f60f80f2536d9eefeb450a9abe83365a098031c89719f1be17d2"
CHUNK, CONTEXT, STATE = 512, 64, 128  # samples of a step, samples of the step before that it also sees, state width
LOUDNESS = 0.05  # root mean square to which recordings are brought, because the model hears faint speech less often


def fetch_model(cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """Path of the ONNX file; PackageUnavailableError if it cannot be fetched."""
    return fetch.fetch_member(PACKAGE, MODEL, MODEL_SHA256, cache)


@functools.cache
def _session(path: pathlib.Path):
    import onnxruntime  # slow to import, and not needed unless something is scored

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def activity(wave: np.ndarray, num_frames: int, model: pathlib.Path) -> np.ndarray:
    """Probability of speech (num_frames,) float32 at 25 fps in mono sound (N,) at 16 kHz.

    The sound is padded with silence or cut to the length of the frames; its loudness is evened out over the whole
    recording.
    """
    count = round(num_frames * AUDIO_RATE / FPS)
    wave = np.pad(np.asarray(wave[:count], np.float32), (0, max(count - len(wave), 0)))
    level = np.sqrt(np.mean(wave**2))
    if level > 0:
        wave = np.clip(wave * (LOUDNESS / level), -1, 1)
    steps = np.pad(wave, (0, -count % CHUNK)).reshape(-1, CHUNK)
    before = np.vstack([np.zeros((1, CONTEXT), np.float32), steps[:-1, -CONTEXT:]])
    state = np.zeros((1, 1, STATE), np.float32)
    inputs = {"input": np.hstack([before, steps]), "h": state, "c": state}
    found = _session(model).run(None, inputs)[0].reshape(-1)
    middles = (np.arange(num_frames) + 0.5) * AUDIO_RATE / FPS
    return np.interp(middles, (np.arange(len(found)) + 0.5) * CHUNK, found).astype(np.float32)
