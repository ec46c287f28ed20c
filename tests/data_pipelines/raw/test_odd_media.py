"""What cameras, phones and editors write: every picture and sound is where and as a player has it."""

import fractions

import av
import numpy as np
import pytest
from av.stream import Disposition

from data_pipelines.raw import media
from data_pipelines.raw.deinterlace import deinterlaced
from omnihuman_jax.errors import UserError


def picture_stream(file, size=(32, 48), rate=25, codec="libx264", options=None):
    stream = file.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    return stream


def write_pictures(path, frames, rate=25, change=None, edit=None, **stream_options):
    """Writes (F,H,W,3) frames; `change(stream)` before coding, `edit(packets)` before writing."""
    with av.open(str(path), "w") as file:
        stream = picture_stream(file, frames.shape[1:3], rate, **stream_options)
        if change:
            change(stream)
        packets = []
        for image in frames:
            packets += stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
        packets += stream.encode()
        if edit:
            edit(packets)
        file.mux(packets)


def ramp(count, size=(32, 48)):
    return np.broadcast_to((20 + 3 * np.arange(count)).astype(np.uint8)[:, None, None, None], (count, *size, 3)).copy()


def numbers(frames):
    return np.rint((frames.mean((1, 2, 3)) - 20) / 3).astype(int)


def write_sounds(path, tracks, codec, rate, keep=lambda time: True, marks=(), layout="mono"):
    """Writes tracks (C,N) float, without the packets at the times that `keep` refuses."""
    with av.open(str(path), "w") as file:
        streams = [file.add_stream(codec, rate=rate, layout=layout) for _ in tracks]
        for stream, mark in zip(streams, marks, strict=False):
            stream.disposition = mark
        packets = []
        for stream, wave in zip(streams, tracks, strict=True):
            form = stream.codec_context.format.name
            for first in range(0, wave.shape[1], 960):
                part = wave[:, first : first + 960]
                if form.startswith("s16"):
                    part = np.rint(part * 32767).astype(np.int16)
                elif form.startswith("s32"):
                    part = np.rint(part * 2147483520.0).astype(np.int32)
                if not form.endswith("p"):
                    part = part.T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format=form, layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, first, fractions.Fraction(1, rate)
                packets += stream.encode(frame)
            packets += stream.encode()
        for packet in packets:
            if packet.pts is None or keep(float(packet.pts * packet.time_base)):
                file.mux(packet)


def click_times(wave):
    loud = np.flatnonzero(np.abs(wave) > 0.25) / media.AUDIO_RATE
    return loud[np.flatnonzero(np.diff(loud, prepend=-1) > 0.1)]


def tone(seconds, rate, hertz=300.0, height=0.4):
    return (height * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate))[None].astype(np.float32)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mp4", "aac"), ("a.webm", "libopus")])
def test_missing_packets_leave_a_gap_and_later_sound_stays_in_its_place(tmp_path, name, codec):
    wave = np.zeros((1, 3 * 48000), np.float32)
    for time in np.arange(0.25, 3, 0.5):
        first = round(time * 48000)
        wave[0, first : first + 480] = 0.8 * np.sin(np.arange(480) * 0.2)
    write_sounds(tmp_path / name, [wave], codec, 48000, keep=lambda time: not 1.0 <= time < 1.6)
    heard = media.read_sound(tmp_path / name, end=3.0)
    np.testing.assert_allclose(click_times(heard.wave), [0.25, 0.75, 1.75, 2.25, 2.75], atol=0.01)
    gap = slice(round(1.06 * 16000), round(1.56 * 16000))
    assert not heard.present[gap].any() and not heard.wave[gap].any()
    assert heard.present[:15000].mean() > 0.99 and heard.present[26000:46000].all()


def test_the_last_picture_is_shown_for_its_own_duration(tmp_path):
    def last_longer(packets):
        last = max(packets, key=lambda packet: packet.pts)
        last.duration = round(2 / last.time_base)

    write_pictures(tmp_path / "a.mp4", ramp(30), rate=30, edit=last_longer, options={"bf": "0"})
    read = numbers(media.read_video(tmp_path / "a.mp4"))
    assert len(read) == 74 and set(read[25:]) == {29}
    np.testing.assert_allclose(read[:24] / 30, np.arange(24) / 25, atol=0.5 / 30 + 1e-6)


def test_one_picture_a_second(tmp_path):
    write_pictures(tmp_path / "a.mp4", ramp(2), rate=1)
    read = numbers(media.read_video(tmp_path / "a.mp4"))
    assert len(read) == 50 and set(read[:12]) == {0} and set(read[25:]) == {1}


def test_a_picture_before_a_gap_is_held_until_the_next(tmp_path):
    def later(packets):
        for packet in packets:
            if packet.pts * packet.time_base >= fractions.Fraction(10, 25):
                packet.pts += round(2 / packet.time_base)
                packet.dts += round(2 / packet.time_base)

    write_pictures(tmp_path / "a.mkv", ramp(60), edit=later, options={"bf": "0"})
    read = numbers(media.read_video(tmp_path / "a.mkv"))
    assert len(read) == 110 and set(read[9:58]) == {9}
    np.testing.assert_array_equal(read[60:], np.arange(10, 60))


@pytest.mark.parametrize(("aspect", "shape"), [((4, 3), (96, 213)), ((2, 3), (144, 160)), ((1, 1), (96, 160))])
def test_pixels_become_square_as_in_a_player(tmp_path, aspect, shape):
    frames = np.zeros((5, 96, 160, 3), np.uint8)
    frames[:, 24:72, 40:120] = 200

    def change(stream):
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(*aspect)

    write_pictures(tmp_path / "a.mp4", frames, change=change)
    read = media.read_video(tmp_path / "a.mp4")
    assert read.shape == (5, *shape, 3)
    rows, columns = np.where(read[2, ..., 0] > 100)
    assert np.ptp(rows) == pytest.approx(shape[0] / 2, abs=2) and np.ptp(columns) == pytest.approx(shape[1] / 2, abs=2)


def test_absurd_pixels_are_refused_in_one_line(tmp_path):
    def change(stream):
        stream.codec_context.sample_aspect_ratio = fractions.Fraction(1, 20)

    write_pictures(tmp_path / "a.mp4", ramp(5), change=change)
    with pytest.raises(UserError, match="a.mp4: its pixels are 0.05 times"):
        media.read_video(tmp_path / "a.mp4")


ONE = 65536
MATRICES = {
    "as stored": ((ONE, 0, 0, ONE), lambda x: x),
    "clockwise": ((0, ONE, -ONE, 0), lambda x: np.rot90(x, -1)),
    "counterclockwise": ((0, -ONE, ONE, 0), np.rot90),
    "half turn": ((-ONE, 0, 0, -ONE), lambda x: np.rot90(x, 2)),
    "mirror": ((-ONE, 0, 0, ONE), np.fliplr),
    "upside down": ((ONE, 0, 0, -ONE), np.flipud),
    "transposed": ((0, ONE, ONE, 0), lambda x: x.swapaxes(0, 1)),
    "other diagonal": ((0, -ONE, -ONE, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_whole_display_matrix_is_applied(tmp_path, name):
    (a, b, c, d), expected = MATRICES[name]
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, :24] = 200, 130, 60
    change = lambda stream: stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])  # noqa: E731
    write_pictures(tmp_path / "a.mp4", np.stack([picture] * 3), change=change)
    np.testing.assert_allclose(media.read_video(tmp_path / "a.mp4")[1].astype(int), expected(picture), atol=12)


@pytest.mark.parametrize(
    ("transfer", "signals", "shown"),
    [
        (16, [0.11, 0.373, 0.573, 0.745], [13, 73, 157, 232]),  # PQ of 0.4, 24, 188 and 940 cd/m2
        (18, [0.0, 0.5, 0.75, 1.0], [0, 99, 159, 235]),  # HLG of 0, 51, 203 and 1000 cd/m2
    ],
)
def test_hdr_is_tone_mapped(tmp_path, transfer, signals, shown):
    plane = np.full((64, 64), 64, np.uint16)
    for column, signal in enumerate(signals):
        plane[:, 16 * column : 16 * column + 16] = round(64 + 876 * signal)
    raw = np.concatenate([plane.ravel(), np.full(64 * 32, 512, np.uint16)])
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p10le"
        coder = stream.codec_context
        coder.color_trc, coder.color_primaries, coder.colorspace, coder.color_range = transfer, 9, 9, 1
        frame = av.VideoFrame(64, 64, "yuv420p10le")
        sides = [(64, 64), (32, 32), (32, 32)]
        for surface, part, (rows, columns) in zip(frame.planes, np.split(raw, [4096, 5120]), sides, strict=True):
            padded = np.zeros((rows, surface.line_size // 2), np.uint16)
            padded[:, :columns] = part.reshape(rows, columns)
            surface.update(padded.tobytes())
        frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, 9, 1
        for number in range(3):
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    read = media.read_video(tmp_path / "a.mkv")[1].astype(int)
    np.testing.assert_allclose(read[32, 8::16].mean(-1), shown, atol=6)
    assert np.ptp(read[32, 8::16], axis=-1).max() <= 2  # grey stays grey


def test_a_moving_bar_in_interlaced_video_is_in_one_place(tmp_path):
    frames = np.full((10, 64, 160, 3), 30, np.uint8)
    for number, frame in enumerate(frames):
        for field in range(2):  # the even rows are half a frame later, as the coder assumes
            left = 8 + 12 * number + 6 * field
            frame[1 - field :: 2, left : left + 6] = 220
    path = tmp_path / "a.mkv"
    write_pictures(path, frames, options={"x264-params": "tff=1", "crf": "4"})
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).interlaced_frame
    read = media.read_video(path)
    assert len(read) == 10
    for number in range(2, 8):
        bright = read[number, 8:56, :, 0] > 125
        left = bright.argmax(1)
        assert bright.any(1).all() and np.ptp(left) <= 1
        assert left[0] == pytest.approx(8 + 12 * number, abs=1)


def test_progressive_frames_are_not_filtered():
    frames = [(number, av.VideoFrame(32, 32, "yuv420p")) for number in range(3)]
    assert [(item, id(frame)) for item, frame in deinterlaced(iter(frames), None)] == [(i, id(f)) for i, f in frames]


def test_cover_art_is_no_video(tmp_path):
    cover = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 250, np.uint8), format="rgb24")
    for name, has_picture in (("a.mp4", True), ("b.mp4", False)):
        with av.open(str(tmp_path / name), "w") as file:
            art = picture_stream(file, (64, 64), codec="mjpeg")
            art.pix_fmt, art.disposition = "yuvj420p", Disposition.attached_pic
            moving = picture_stream(file) if has_picture else None
            sound = file.add_stream("aac", rate=16000, layout="mono")
            packets = [*art.encode(cover), *art.encode()]
            for image in ramp(20) if has_picture else ():
                packets += moving.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
            packets += moving.encode() if has_picture else []
            frame = av.AudioFrame.from_ndarray(tone(0.064, 16000), format="fltp", layout="mono")
            frame.sample_rate = 16000
            file.mux([*packets, *sound.encode(frame), *sound.encode()])
    np.testing.assert_array_equal(numbers(media.read_video(tmp_path / "a.mp4")), np.arange(20))
    assert media.has_video(tmp_path / "a.mp4") and not media.has_video(tmp_path / "b.mp4")
    with pytest.raises(UserError, match="no video stream"):
        media.read_video(tmp_path / "b.mp4")


def test_the_default_sound_track_is_heard(tmp_path):
    tracks = [np.zeros((1, 48000), np.float32), tone(1, 48000)]
    write_sounds(tmp_path / "a.mkv", tracks, "pcm_s16le", 48000, marks=(Disposition(0), Disposition.default))
    assert np.abs(media.read_audio(tmp_path / "a.mkv")).max() == pytest.approx(0.4, rel=0.05)
    assert media.audio_tracks(tmp_path / "a.mkv") == 2


def rms(wave):
    return float(np.sqrt(np.mean(np.square(wave[1000:15000]))))


def test_speech_survives_the_downmix(tmp_path):
    one, nothing = tone(1, 48000), np.zeros((1, 48000), np.float32)
    cases = {
        "opposite": ([one, -one], "stereo"),
        "left": ([one, nothing], "stereo"),
        "both": ([one, one], "stereo"),
        "centre": ([nothing, nothing, one, nothing, nothing, nothing], "5.1"),
        "bass": ([nothing, nothing, nothing, one, nothing, nothing], "5.1"),
    }
    levels = {}
    for name, (channels, layout) in cases.items():
        path = tmp_path / f"{name}.mkv"
        write_sounds(path, [np.concatenate(channels)], "pcm_s16le", 48000, layout=layout)
        levels[name] = rms(media.read_audio(path)) / rms(one[0, ::3])
    expected = {"opposite": 1, "left": 0.5, "both": 1, "centre": 1, "bass": 0}
    assert levels == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("second", [(44100, "mono"), (48000, "stereo")])
def test_an_mp3_that_changes_its_form_is_read_through(tmp_path, second):
    data = b""
    for number, (rate, layout) in enumerate([(44100, "stereo"), second]):
        wave = tone(1, rate, hertz=300 * (number + 1)).repeat(2 if layout == "stereo" else 1, 0)
        write_sounds(tmp_path / f"{number}.mp3", [wave], "libmp3lame", rate, layout=layout)
        part = (tmp_path / f"{number}.mp3").read_bytes()
        data += part[part.index(b"\xff\xfb") :] if number else part
    (tmp_path / "both.mp3").write_bytes(data)
    wave = media.read_audio(tmp_path / "both.mp3")
    assert wave.size / 16000 == pytest.approx(2.05, abs=0.12)
    for span, hertz in ((wave[3200:12800], 300), (wave[20800:30400], 600)):
        assert np.abs(np.fft.rfft(span)).argmax() / 0.6 == pytest.approx(hertz, abs=4)
        assert np.abs(span).max() == pytest.approx(0.4, rel=0.15)
