"""Decodes a sound track to mono, every piece of it at its own time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

# Time stamps are rounded to milliseconds in some containers; a smaller step than this is no gap.
TOLERANCE = 0.03  # seconds
# Speech is in the centre of surround sound, which a plain mean of six channels makes 15.6 dB too low.
_WEIGHTS = {"FC": 1.0, "FL": 0.5, "FR": 0.5, "FLC": 0.5, "FRC": 0.5, "LFE": 0.0, "LFE2": 0.0}
_SURROUND = 0.35
_CANCELLED = 0.01  # share of the channels' energy in their mean below which they are in opposite phase


class Sound(NamedTuple):
    """Mono sound from the start of the file.

    Attributes:
      wave: (N,) float32; zero where the file has no sound.
      present: (N,) bool, where it has.
    """

    wave: np.ndarray
    present: np.ndarray


class _Run:
    """Frames that follow each other without a gap and have one format."""

    def __init__(self, frame: av.AudioFrame, start: float, rate: int):
        self.start, self._form, self._rate = start, _form(frame), frame.sample_rate
        self._names = _channels(frame.layout)
        self._resampler = av.AudioResampler(format="fltp", rate=rate)
        self._count, self._chunks = 0, []

    @property
    def end(self) -> float:
        return self.start + self._count / self._rate

    def continues(self, frame: av.AudioFrame, time: float | None) -> bool:
        return _form(frame) == self._form and (time is None or abs(time - self.end) <= TOLERANCE)

    def add(self, frame: av.AudioFrame) -> None:
        self._count += frame.samples
        frame.pts = None  # within a run, only the number of samples counts
        self._chunks += [part.to_ndarray() for part in self._resampler.resample(frame)]

    def wave(self) -> np.ndarray:
        """(N,) float32."""
        self._chunks += [part.to_ndarray() for part in self._resampler.resample(None)]
        if not self._chunks:
            return np.zeros(0, np.float32)
        channels, self._chunks = np.concatenate(self._chunks, axis=1), []
        return _mono(channels, self._names)


def _form(frame: av.AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name


def _channels(layout: av.AudioLayout) -> list[str]:
    """Names of the channels; those of the usual layout where the file tells only their number."""
    names = [channel.name for channel in layout.channels]
    if "NONE" in names:
        try:
            return [channel.name for channel in av.AudioLayout(f"{len(names)}c").channels]
        except ValueError:  # no usual layout has so many
            return []
    return names


def _mono(channels: np.ndarray, names: list[str]) -> np.ndarray:
    """Mixes channels (C,N) to (N,)."""
    if len(channels) > 2 and names:
        weights = np.array([_WEIGHTS.get(name, _SURROUND) for name in names], np.float32)
        return weights @ channels
    # FFmpeg's own float downmix makes stereo 3 dB louder.
    mixed = channels.mean(0)
    if len(channels) == 2 and np.square(mixed).mean() < _CANCELLED * np.square(channels).mean():
        return channels[0]
    return mixed


def decode(container: av.container.InputContainer, stream: av.AudioStream, origin: float, rate: int) -> Sound:
    """The track at `rate` Hz from the time `origin` (seconds) of the file's clock on; no samples if it is empty."""
    pieces = [(round(run.start * rate), run.wave()) for run in _runs(container, stream, origin, rate)]
    length = max((first + len(wave) for first, wave in pieces), default=0)
    sound = Sound(np.zeros(max(length, 0), np.float32), np.zeros(max(length, 0), bool))
    for first, wave in pieces:
        wave, first = wave[max(-first, 0) :], max(first, 0)
        sound.wave[first : first + len(wave)] = wave
        sound.present[first : first + len(wave)] = True
    return sound


def _runs(container, stream, origin: float, rate: int) -> Iterator[_Run]:
    run = None
    for frame in container.decode(stream):
        time = None if frame.time is None else frame.time - origin
        if run is None or not run.continues(frame, time):
            if run is not None:
                yield run
            if time is None:
                time = run.end if run is not None else -origin
            run = _Run(frame, time, rate)
        run.add(frame)
    if run is not None:
        yield run
