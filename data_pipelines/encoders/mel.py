"""Whisper's log-mel spectra in NumPy.

Agrees with `log_mel_spectrogram` of openai/whisper (Radford et al. 2022, section 2.2) for 80 channels (up to large-v2)
and 128 (large-v3): 25 ms periodic Hann windows every 10 ms, Slaney mel filters, log10 floored 8 below the maximum.
"""

import functools

import numpy as np

RATE = 16_000
HOP = 160
WINDOW = 400
CHANNELS = 80


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    hz = np.asarray(hz, np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1e-9) / 1000) / np.log(6.4))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) * (mel - 15) / 27))


@functools.cache
def filters(channels: int = CHANNELS) -> np.ndarray:
    """(channels, 201) float32 triangles of equal area over the FFT bins of 0-8 kHz."""
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    edges = _mel_to_hz(np.linspace(_hz_to_mel(0), _hz_to_mel(RATE / 2), channels + 2))
    widths = np.diff(edges)
    slopes = edges[:, None] - bins[None]
    rising, falling = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def power_mel(wave: np.ndarray, channels: int = CHANNELS) -> np.ndarray:
    """(channels, N // 160) mel power of mono 16 kHz sound (N,), N >= 400; column j is centred at j * 10 ms."""
    wave = np.pad(np.asarray(wave, np.float32), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP][:-1]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(frames * hann, axis=-1)) ** 2
    return filters(channels) @ spectrum.T.astype(np.float32)


def log_mel(wave: np.ndarray, channels: int = CHANNELS) -> np.ndarray:
    """(channels, N // 160) float32, the input of Whisper's encoder. See `power_mel`."""
    log = np.log10(np.maximum(power_mel(wave, channels), 1e-10))
    return ((np.maximum(log, log.max() - 8.0) + 4.0) / 4.0).astype(np.float32)
