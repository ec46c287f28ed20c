"""Lip-sync proxy: mouth opening against speech energy.

This is a correlation of two curves, not the SyncNet confidence (Sync-C), and weaker. On the three speaking real clips,
6 to 9 s long, it gave 0.39 to 0.76 with their own sound and -0.1 to 0.47 with the sound of another: it removes most
dubbed clips, not all, and longer clips are judged better.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import butter, sosfiltfilt

from data_pipelines import keypoints as kp
from data_pipelines.raw.media import AUDIO_RATE
from omnihuman_jax.frames import FPS

LAGS = 25  # frames to either side
MIN_SEEN = 0.9  # share of frames in which the mouth must be seen
_SAMPLES = AUDIO_RATE // FPS
_BAND = (150, 3500)  # Hz
_SMOOTH, _TREND = 2.0, 8.0  # frames, standard deviations: syllables are kept, phrases and posture are not


def mouth_opening(keypoints: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Opening (F,) of the lips in eye distances; None if the mouth is seen in fewer than nine of ten frames.

    Args:
      keypoints: (F,K,3) in fractions of a picture of width x height pixels.
    """
    points = keypoints[..., :2] * [width, height]
    top, bottom, left, right = (points[:, kp.INDEX[n]] for n in ("mouth_top", "mouth_bottom", "left_eye", "right_eye"))
    needed = [kp.INDEX[name] for name in ("mouth_top", "mouth_bottom", "left_eye", "right_eye")]
    eyes = np.linalg.norm(left - right, axis=1)
    seen = (keypoints[:, needed, 2] > 0).all(1) & (eyes > 1)
    if seen.mean() < MIN_SEEN:
        return None
    opening = np.linalg.norm(bottom - top, axis=1) / np.maximum(eyes, 1)
    return np.interp(np.arange(len(seen)), np.flatnonzero(seen), opening[seen])


@functools.cache
def _filter() -> np.ndarray:
    return butter(3, _BAND, "bandpass", fs=AUDIO_RATE, output="sos")


def speech_energy(wave: np.ndarray, num_frames: int) -> np.ndarray:
    """(num_frames,) square root of the level in the band of speech, over 80 ms around each frame's middle."""
    count = num_frames * _SAMPLES
    wave = np.pad(np.asarray(wave[:count], np.float64), (0, max(count - len(wave), 0)))
    power = np.pad(sosfiltfilt(_filter(), wave) ** 2, _SAMPLES // 2).cumsum()
    power = np.concatenate([[0.0], power])
    starts = np.arange(num_frames) * _SAMPLES
    return np.maximum((power[starts + 2 * _SAMPLES] - power[starts]) / (2 * _SAMPLES), 0) ** 0.25


def _prepared(x: np.ndarray) -> np.ndarray:
    return gaussian_filter1d(x, _SMOOTH) - gaussian_filter1d(x, _TREND)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    power = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / power) if power > 1e-9 else 0.0


def curve(opening: np.ndarray, energy: np.ndarray) -> list[float]:
    """Correlation at lags -25 .. 25 frames; at a positive lag the sound is compared that much later."""
    mouth, sound = _prepared(np.log(opening + 0.02)), _prepared(energy)
    count = len(mouth)
    if count <= 2 * LAGS:
        return []
    found = []
    for lag in range(-LAGS, LAGS + 1):
        a, b = mouth[max(0, -lag) : count - max(0, lag)], sound[max(0, lag) : count - max(0, -lag)]
        found.append(round(_correlation(a, b), 4))
    return found


def best(found: list[float], centre: int, reach: int) -> tuple[float, int]:
    """The highest correlation of a curve, and its lag in frames, among lags centre - reach .. centre + reach."""
    lags = [lag for lag in range(centre - reach, centre + reach + 1) if abs(lag) <= LAGS]
    lag = max(lags, key=lambda lag: found[lag + LAGS])
    return found[lag + LAGS], lag
