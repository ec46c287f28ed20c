"""Frames fall on the 25 fps grid by time stamp, sound stays in step with them, and bad files are named."""

import av
import numpy as np
import pytest

from data_pipelines.raw import media
from omnihuman_jax.errors import UserError


def grey_ramp(count, size=(32, 48)):
    """Frames whose brightness tells their number."""
    values = (20 + 3 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, *size, 3)).copy()


def numbers(frames):
    return np.rint((frames.mean((1, 2, 3)) - 20) / 3).astype(int)


def test_frames_and_sound_round_trip(tmp_path):
    frames = grey_ramp(50)
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * 16000) / 16000)
    media.write_mp4(tmp_path / "a.mp4", frames, audio=wave)
    read = media.read_video(tmp_path / "a.mp4")
    assert read.shape == frames.shape and read.dtype == np.uint8
    np.testing.assert_array_equal(numbers(read), np.arange(50))
    sound = media.read_audio(tmp_path / "a.mp4", end=2.0)
    assert sound.shape == (32000,) and sound.dtype == np.float32
    middle = slice(4000, 28000)
    assert np.corrcoef(sound[middle], wave[middle])[0, 1] > 0.99  # also: not shifted by the coder's delay


def test_the_same_frames_give_the_same_file_wherever_they_lie_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96]
    disc = (x - 48 - 3 * np.arange(9)[:, None, None]) ** 2 + (y - 48) ** 2 < 400
    clip = np.clip(np.where(disc, 200, 60)[..., None] + rng.normal(0, 10, (9, 96, 96, 3)), 0, 255).astype(np.uint8)
    files, used = set(), []
    for _ in range(20):
        used = [rng.bytes(int(size)) for size in rng.integers(1000, 200_000, 30)]  # moves what is allocated next
        media.write_mp4(tmp_path / "a.mp4", clip.copy())
        files.add((tmp_path / "a.mp4").read_bytes())
    assert used and len(files) == 1


def test_file_plays_in_ordinary_players(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", grey_ramp(25), audio=np.zeros(100, np.float32))
    with av.open(str(tmp_path / "a.mp4")) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        assert video.codec_context.name == "h264" and video.codec_context.pix_fmt == "yuv420p"
        assert audio.codec_context.name == "aac" and file.duration / av.time_base == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rate", [12, 30, 50])
def test_any_source_rate_lands_on_the_nearest_frame(tmp_path, rate):
    count = 2 * rate if rate < 50 else 55
    media.write_mp4(tmp_path / "a.mp4", grey_ramp(count), fps=rate)
    read = numbers(media.read_video(tmp_path / "a.mp4"))
    times = np.arange(len(read)) / 25
    assert abs(len(read) - 25 * count / rate) <= 1
    assert np.abs(read[:-2] / rate - times[:-2]).max() <= 0.5 / rate + 1e-6


def test_a_span_is_read_without_the_rest(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", grey_ramp(58))
    np.testing.assert_array_equal(numbers(media.read_video(tmp_path / "a.mp4", start=1.2, end=1.6)), np.arange(30, 40))
    sound_start = np.zeros(58 * 640, np.float32)
    sound_start[30 * 640 : 30 * 640 + 320] = 0.8
    media.write_mp4(tmp_path / "b.mp4", grey_ramp(58), audio=sound_start)
    span = media.read_audio(tmp_path / "b.mp4", start=1.0, end=2.0)
    loud = np.flatnonzero(np.abs(span) > 0.3)
    assert span.shape == (16000,) and abs(loud[0] - 3200) < 64 and abs(loud[-1] - 3520) < 64


def test_sound_is_padded_to_the_wanted_span(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", grey_ramp(10), audio=np.full(6400, 0.3, np.float32))
    sound = media.read_audio(tmp_path / "a.mp4", end=3.0)
    assert sound.shape == (48000,) and not sound[16000:].any()


def write_wav(path, wave, rate):
    with av.open(str(path), "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=rate, layout="stereo")
        if wave.size:
            frame = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
            frame.sample_rate = rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def test_stereo_of_another_rate_becomes_mono_16_khz(tmp_path):
    tone = (8000 * np.sin(2 * np.pi * 300 * np.arange(44100) / 44100)).astype(np.int16)
    write_wav(tmp_path / "a.wav", tone, 44100)
    wave = media.read_audio(tmp_path / "a.wav")
    assert abs(wave.size - 16000) <= 32
    spectrum = np.abs(np.fft.rfft(wave[:16000]))
    assert spectrum.argmax() == 300 and np.abs(wave).max() == pytest.approx(8000 / 32768, rel=0.05)


def test_bad_files_are_named_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    media.write_mp4(tmp_path / "silent.mp4", grey_ramp(5))
    write_wav(tmp_path / "tone.wav", np.ones(1000, np.int16), 16000)
    write_wav(tmp_path / "empty.wav", np.zeros(0, np.int16), 16000)
    cases = [
        (media.read_video, "none.mp4", "no such file"),
        (media.read_video, "text.mp4", "cannot read"),
        (media.read_audio, "text.mp4", "cannot read"),
        (media.read_audio, "silent.mp4", "no audio stream"),
        (media.read_video, "tone.wav", "no video stream"),
        (media.read_audio, "empty.wav", "zero length|cannot read"),
        (media.read_video, "", "no such file"),
    ]
    for read, name, message in cases:
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert media.has_video(tmp_path / "silent.mp4") and not media.has_audio(tmp_path / "silent.mp4")


def test_writing_fails_in_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        media.write_mp4(tmp_path / "file" / "a.mp4", grey_ramp(5))
    with pytest.raises(ValueError, match="even"):
        media.write_mp4(tmp_path / "a.mp4", grey_ramp(5, (31, 48)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
