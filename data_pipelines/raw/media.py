"""Decodes and encodes video and audio files: frames at 25 fps by time stamp, mono sound, H.264 + AAC mp4.

Times are seconds from the start of the file, for sound and picture alike: row i at 25 fps belongs to time i/25 s.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from data_pipelines.raw import display, sound, streams
from data_pipelines.raw.deinterlace import deinterlaced
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

AUDIO_RATE = 16_000
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


@contextlib.contextmanager
def _open(path: str | pathlib.Path) -> Iterator[av.container.InputContainer]:
    """Opens a file and turns FFmpeg's errors into UserErrors."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"cannot read {path}: no such file; check the path")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.FFmpegError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a video or sound file") from error


def has_audio(path: str | pathlib.Path) -> bool:
    """Whether the file has a sound stream. Raises UserError if it cannot be read."""
    return bool(audio_tracks(path))


def audio_tracks(path: str | pathlib.Path) -> int:
    """The number of the file's sound tracks. Raises UserError if it cannot be read."""
    with _open(path) as container:
        return len(container.streams.audio)


def has_video(path: str | pathlib.Path) -> bool:
    """Whether the file has a video stream other than cover art. Raises UserError if it cannot be read."""
    with _open(path) as container:
        return streams.picture(container) is not None


def is_exactly(path: str | pathlib.Path, frames: int) -> bool:
    """Whether the video's header gives this number of frames at 25 fps."""
    with _open(path) as container:
        stream = streams.picture(container)
        return stream is not None and stream.frames == frames and float(stream.average_rate or 0) == FPS


def _origin(container: av.container.InputContainer) -> float:
    """Start time of the file in seconds."""
    return (container.start_time or 0) / av.time_base


class _Moment(NamedTuple):
    """When a picture is shown, in seconds."""

    time: float
    duration: float


def _timed_frames(container, stream: av.VideoStream, start: float) -> Iterator[tuple[_Moment, av.VideoFrame]]:
    """Yields frames and their times, beginning at the key frame before `start`."""
    stream.thread_type = "AUTO"
    origin = _origin(container)
    if start > 0:
        # Seek a second earlier, because some containers seek past the key frame.
        container.seek(int((max(start - 1.0, 0.0) + origin) * av.time_base), backward=True)
    period = _period(stream)
    time = start - period
    for frame in container.decode(stream):
        time = time + period if frame.time is None else frame.time - origin
        yield _Moment(time, float(frame.duration * frame.time_base) if frame.duration > 0 else period), frame


def _period(stream: av.VideoStream) -> float:
    return 1 / float(stream.average_rate or stream.base_rate or FPS)


def _aspect(path: str | pathlib.Path, stream: av.VideoStream) -> float:
    """Width of a pixel divided by its height; UserError if it is absurd."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 0.1 <= aspect <= 10:
        raise UserError(f"{path}: its pixels are {aspect:g} times as wide as high; convert it to square ones")
    return aspect


def iter_video(path: str | pathlib.Path, *, start: float = 0.0, end: float | None = None) -> Iterator[np.ndarray]:
    """Yields (H,W,3) uint8 RGB frames, as a player shows them, for the times start, start + 1/25, ... before `end` (s).

    Each is the source frame nearest in time, so any constant or variable source rate becomes exactly 25 fps; a frame
    that lasts long is shown until half a usual frame before the next. The last one is shown for its own duration.
    Raises UserError if the file cannot be read, has no video stream, or no frame from `start` on.
    """
    with _open(path) as container:
        stream = streams.picture(container)
        if stream is None:
            raise UserError(f"{path} has no video stream; give a video file")
        wanted, previous, shown = 0, None, _Moment(0.0, 0.0)
        aspect, period = _aspect(path, stream), _period(stream)

        def pending(limit: float) -> bool:
            time = start + wanted / FPS
            return time < limit and (end is None or time < end - 0.01 / FPS)

        for moment, frame in deinterlaced(_timed_frames(container, stream, start), stream):
            # `previous` is the nearest frame for all times up to the midpoint between the two.
            change = max((shown.time + moment.time) / 2, moment.time - period / 2)
            while previous is not None and pending(change):
                yield display.displayed(previous, aspect)
                wanted += 1
            if end is not None and moment.time > end + period:
                break
            previous, shown = frame, moment
        # Less than half a picture more would be shown in the end.
        rest = shown.duration - min(0.1 * shown.duration, 0.5 / FPS)
        while previous is not None and pending(shown.time + rest):
            yield display.displayed(previous, aspect)
            wanted += 1
    if not wanted:
        raise UserError(f"{path} has no frame after {start:g} s; check the file and the start time")


def read_video(path: str | pathlib.Path, *, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """All frames of `iter_video` as (F,H,W,3) uint8."""
    return np.stack(list(iter_video(path, start=start, end=end)))


def read_audio(
    path: str | pathlib.Path, *, rate: int = AUDIO_RATE, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Mono sound (N,) float32 in [-1,1] at `rate` Hz from `start` to `end` (seconds; None: the end of the sound).

    It is of the default track. With `end` the result has exactly round((end-start)*rate) samples, padded with silence;
    gaps in the file are silence too. Raises UserError if the file cannot be read, has no audio stream, or its sound has
    zero length.
    """
    return read_sound(path, rate=rate, start=start, end=end).wave


def read_sound(
    path: str | pathlib.Path, *, rate: int = AUDIO_RATE, start: float = 0.0, end: float | None = None
) -> sound.Sound:
    """As `read_audio`, and where the file has sound at all."""
    with _open(path) as container:
        stream = streams.sound(container)
        if stream is None:
            raise UserError(f"{path} has no audio stream; give a file with sound")
        wave, present = sound.decode(container, stream, _origin(container), rate)
    if not wave.size:
        raise UserError(f"the sound of {path} has zero length; give a recording")
    wave, present = wave[round(start * rate) :], present[round(start * rate) :]
    if end is not None:
        count = round((end - start) * rate)
        wave, present = (np.pad(x[:count], (0, max(count - x.size, 0))) for x in (wave, present))
    return sound.Sound(np.clip(wave, -1.0, 1.0), present)


def write_mp4(
    path: str | pathlib.Path,
    frames: np.ndarray,
    *,
    fps: int = FPS,
    audio: np.ndarray | None = None,
    audio_rate: int = AUDIO_RATE,
    crf: int = 16,
) -> None:
    """Writes (F,H,W,3) uint8 frames, H and W even, and optional mono sound as H.264 (4:2:0) + AAC.

    Trims the sound, or pads it with silence, to the length of the video. The same input gives the same bytes. Writes
    atomically. Raises ValueError for other shapes, UserError if the file cannot be written.
    """
    path = pathlib.Path(path)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be (F,H,W,3) uint8, got {frames.shape} {frames.dtype}")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"H.264 in 4:2:0 needs an even size, got {frames.shape[1]}x{frames.shape[2]}")
    partial = path.with_name(f".{path.stem}.partial.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
            _write_streams(container, frames, fps, audio, audio_rate, crf)
        partial.replace(path)
    except OSError as error:  # FFmpeg's errors are OSErrors too
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable file") from error
    finally:
        if partial.exists():
            partial.unlink()


def _write_streams(container, frames, fps, audio, audio_rate, crf) -> None:
    # Without cpu-independent the same frames give one of several files, depending on where they lie in memory.
    options = {"crf": str(crf), "preset": "veryfast", "x264-params": "cpu-independent=1"}
    video = container.add_stream("libx264", rate=fps, options=options)
    video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
    track = None
    if audio is not None:
        track = container.add_stream("aac", rate=audio_rate, layout="mono")
        track.bit_rate = 96_000
        count = round(len(frames) / fps * audio_rate)
        audio = np.pad(np.asarray(audio, np.float32)[:count], (0, max(count - len(audio), 0)))
    for image in frames:
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
    container.mux(video.encode())
    if track is None:
        return
    for begin in range(0, len(audio), 1024):
        samples = np.clip(audio[begin : begin + 1024], -1.0, 1.0)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = audio_rate, begin
        container.mux(track.encode(frame))
    container.mux(track.encode())


def write_gif(path: str | pathlib.Path, frames: np.ndarray, fps: float = 25.0) -> None:
    """Writes uint8 frames (F, H, W, 3) as an endlessly looping GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
