"""One decoding gives all scores of a clip, of the part of the picture and of the moments that belong to it."""

import cv2
import numpy as np
import pytest

from data_pipelines.curate import manifest, people, score, voice
from data_pipelines.curate.scenes import Span
from data_pipelines.prepare.cut import Box
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError
from tests.data_pipelines.curate import drawn

SPAN = Span(25, 150)


@pytest.fixture(autouse=True)
def loud_is_speech(monkeypatch):
    def activity(wave, count, model):
        return (np.abs(wave[: count * 640]).reshape(count, 640).max(1) > 0.02).astype(np.float32)

    monkeypatch.setattr(voice, "activity", activity)


def scored(clip, span=SPAN, size=drawn.SIZE, detector=None):
    return score.score(clip, span, size, score.read_sound(clip, 150), score.Tools(detector, None))


def raw(folder, name="a", **options):
    drawn.write(folder, name, **options)
    notes = folder / f"{name}.npz"
    return RawClip(name, folder / f"{name}.mp4", "x", annotations=notes if notes.exists() else None)


def test_a_clip_has_every_score_of_its_own_moments(tmp_path):
    found = scored(raw(tmp_path, hands=True))
    values = found.result["scores"]
    assert (values["side"], values["people"], values["person_share"], values["hands_visibility"]) == (144, 1, 1, 1)
    assert found.result["framing"] == "half body" and found.result["notes"] == [] and found.result["frames"] == 125
    # Frames of open mouths, and at most the one before and the one after each, into which the sound fades.
    spoken = drawn.openings(150)[25:] > 0.05
    assert spoken.mean() <= values["speech_share"] <= (np.convolve(spoken, [1, 1, 1]) > 0)[1:-1].mean() + 0.05
    assert max(found.result["sync_curve"]) > 0.9
    assert values["mouth_motion"] == pytest.approx(0.03 / 0.08 * drawn.openings(150)[25:].std(), rel=0.05)
    np.testing.assert_allclose(found.arrays["keypoints"], np.load(tmp_path / "a.npz")["keypoints"][25:150], atol=1e-6)
    assert found.arrays["cells"].shape == (25, 16) and len(found.result["hashes"]) == 5
    strip = cv2.imdecode(np.frombuffer(found.thumbnail, np.uint8), cv2.IMREAD_COLOR)
    assert strip.shape == (96, 3 * 128, 3)
    shown = cv2.cvtColor(media.read_video(tmp_path / "a.mp4")[25 + 62], cv2.COLOR_RGB2GRAY)
    middle = cv2.cvtColor(strip[:, 128:256], cv2.COLOR_BGR2GRAY)  # the luma, as JPEG halves the colours' resolution
    assert np.abs(middle - cv2.resize(shown, (128, 96), interpolation=cv2.INTER_AREA).astype(float)).mean() < 6
    assert set(found.result["seconds"]) == {"decode", "picture", "people", "sound"}


def test_the_detector_sees_the_picture_without_bars_and_its_points_are_put_back(tmp_path):
    clip = raw(tmp_path, annotate=False)
    box, seen = Box(24, 16, 144, 96), []

    class Detector:
        def detect_people(self, frames, count, faces_every):
            seen.extend(frames)
            points = np.zeros((count, 28, 3), np.float32)
            points[:, :8] = (0.5, 0.25, 1)
            faces = np.array([[0.1, 0.1, 0.3, 0.3, 0.9], [0.6, 0.1, 0.3, 0.3, 0.9]], np.float32)
            return points, [faces] * (count // faces_every)

    found = scored(clip, Span(0, 50, box), detector=Detector())
    assert [frame.shape for frame in seen] == [(96, 144, 3)] * 50
    whole = media.read_video(clip.path)[10]
    np.testing.assert_array_equal(seen[10], whole[16:112, 24:168])
    assert found.result["scores"]["side"] == 96 and found.result["scores"]["people"] == 2
    assert found.result["notes"] == ["2 people in the picture"]
    np.testing.assert_allclose(found.arrays["keypoints"][0, 0], [(24 + 72) / 192, (16 + 24) / 144, 1], atol=1e-6)
    assert not found.arrays["keypoints"][0, 20].any()


def test_large_pictures_are_measured_at_480_and_their_size_is_told(tmp_path):
    clip = raw(tmp_path, annotate=False, size=(960, 1280), seconds=1)
    shapes = []

    class Detector:
        def detect_people(self, frames, count, faces_every):
            shapes.extend(frame.shape for frame in frames)
            return np.zeros((count, 28, 3), np.float32), []

    found = scored(clip, Span(0, 25), (960, 1280), Detector())
    assert set(shapes) == {(480, 640, 3)} and found.result["scores"]["side"] == 960
    assert "keypoints" not in found.arrays and found.result["framing"] == "nobody"


@pytest.mark.parametrize(
    ("how", "note"),
    [("none", "no sound"), ("zeros", "the sound is silence"), ("short", "the sound covers less than half of it")],
)
def test_missing_silent_and_short_sound_is_no_speech_and_said(tmp_path, how, note):
    clip = raw(tmp_path)
    frames = media.read_video(clip.path)
    if how == "short":
        import av

        with av.open(str(clip.path), "w", format="matroska") as file:
            video = file.add_stream("libx264", rate=25)
            video.height, video.width, video.pix_fmt = *drawn.SIZE, "yuv420p"
            sound = file.add_stream("pcm_s16le", rate=16000, layout="mono")
            for image in frames:
                file.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            part = av.AudioFrame.from_ndarray(np.full((1, 32000), 9000, np.int16), format="s16", layout="mono")
            part.sample_rate = 16000
            file.mux([*video.encode(), *sound.encode(part), *sound.encode()])
    else:
        media.write_mp4(clip.path, frames, audio=None if how == "none" else np.zeros(96000))
    found = scored(clip).result
    assert found["notes"] == [note] and found["scores"]["speech_share"] == 0 and found["sync_curve"] == []


def test_without_a_detector_people_are_not_measured(tmp_path):
    found = scored(raw(tmp_path, annotate=False)).result
    assert "people" not in found["scores"] and found["framing"] == "not measured"
    assert found["scores"]["mouth_motion"] is None and found["scores"]["speech_share"] > 0.3


def test_too_few_annotated_frames_are_an_error(tmp_path):
    clip = raw(tmp_path)
    np.savez(clip.annotations, keypoints=drawn.points(drawn.openings(100)))
    with pytest.raises(UserError, match="has 100 rows, fewer than"):
        scored(clip)


def test_scores_are_explained_or_shares_of_body_parts(tmp_path):
    from data_pipelines.curate import scores

    named = set(scored(raw(tmp_path)).result["scores"])
    assert named - {f"{part}_share" for part in people.PARTS} <= set(scores.TABLE)
    assert manifest.first_reason(["side 3 pixels, below 9"]) == "side"
