"""Raw clips become records whose picture, sound, keypoints and truth belong to the same moments."""

import dataclasses
import errno
import os
import pathlib
import re
import subprocess
import sys

import av
import numpy as np
import pytest

from data_pipelines import boxes, schema
from data_pipelines import keypoints as kp
from data_pipelines.encoders import speech
from data_pipelines.prepare import features, pipeline
from data_pipelines.prepare.cut import Box, centre_box, choose_size, cuts, parse_sizes
from data_pipelines.prepare.latents import encode_clips, reference_frames
from data_pipelines.raw import manifest, media
from data_pipelines.schema import Dataset
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.vae import encoder_sha256

SIZES = ((32, 32), (48, 32), (32, 48))
SETTINGS = pipeline.Settings(SIZES, 9, "0" * 64)


class FakeText:
    name, dim = "letters", 3

    def encode(self, caption):
        return np.full((len(caption), 3), len(caption), np.float32)


class CountingEncoder:
    """Stands in for the VAE: a latent is the mean brightness of its pixels; remembers the shapes it was called with."""

    def __init__(self):
        self.shapes = []

    def __call__(self, video):
        self.shapes.append(video.shape)
        b, f, h, w, _ = video.shape
        frames = np.concatenate([video[:, :1].repeat(3, 1), video], 1).reshape(b, -1, 4, h // 8, 8, w // 8, 8, 3)
        return frames.mean((2, 4, 6, 7))[..., None].repeat(2, -1)


def brightness(start, count, size):
    """Frame i has brightness 2 (start + i)."""
    values = (2 * np.arange(start, start + count)).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, *size, 3)).copy()


def encoders(detect=None):
    return features.Encoders(FakeText(), speech.load(speech.LOG_MEL), detect)


def run(clips, output, detect=None, **kwargs):
    encode = CountingEncoder()
    options = {"latent_channels": 2, "extra": {"inputs_sha256": "d"}, "batch": 2} | kwargs
    summary = pipeline.run(clips, output, SETTINGS, encoders(detect), encode, **options)
    return summary, encode


def tone(frames):
    return (0.3 * np.sin(np.arange(frames * 640) * 0.3)).astype(np.float32)


@pytest.fixture
def talker(tmp_path):
    media.write_mp4(tmp_path / "in/talker.mp4", brightness(0, 20, (40, 40)), audio=tone(20))
    return manifest.RawClip("talker", tmp_path / "in/talker.mp4", "real", "hello", speaker="s", sentence="t")


def test_a_clip_is_cut_and_every_part_belongs_to_its_frames(tmp_path, talker):
    points = np.zeros((20, 28, 3), np.float32)
    points[:, :, 0] = np.arange(20)[:, None] / 40
    points[:, :, 1:] = 0.5
    np.savez(tmp_path / "notes.npz", keypoints=points, mouth=np.arange(20.0), attributes=np.ones(2))
    clip = dataclasses.replace(talker, annotations=tmp_path / "notes.npz")
    summary, _ = run([clip], tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert [entry["id"] for entry in data.index] == ["real/talker-0", "real/talker-1"]
    assert data.meta.encoders == {"audio": "log-mel", "text": "letters"} and data.extra["inputs_sha256"]
    whole = speech.load(speech.LOG_MEL).encode(media.read_audio(clip.path, end=18 / 25), 18)
    for number in range(2):
        record = data.read(number)
        first = 9 * number
        assert (record["frames"], record["height"], record["width"]) == (9, 32, 32)
        assert record["latents"].shape == (3, 4, 4, 2) and record["references"].shape == (4, 4, 4, 2)
        # Latent frame 0 is pixel frame 0; latent frame k is the mean of pixel frames 4k-3 .. 4k.
        expected = (2 * (first + np.array([0, 2.5, 6.5]))) / 127.5 - 1
        np.testing.assert_allclose(record["latents"].mean((1, 2, 3)), expected, atol=0.02)
        chosen = first + record["reference_frames"]
        np.testing.assert_allclose(record["references"].mean((1, 2, 3)), 2 * chosen / 127.5 - 1, atol=0.02)
        np.testing.assert_array_equal(record["mouth"], first + np.arange(9))
        np.testing.assert_allclose(record["keypoints"][:, 0, 0], (first + np.arange(9)) / 40, atol=1e-6)
        np.testing.assert_allclose(record["audio"], whole[first : first + 9], atol=2e-3)
        assert record["text"].shape == (5, 3) and record["speaker"] == "s" and record["sentence"] == "t"
        shown = media.read_video(data.clip_path(number))
        np.testing.assert_allclose(shown.mean((1, 2, 3)), 2 * (first + np.arange(9)), atol=2.5)
        assert media.read_audio(data.clip_path(number), end=9 / 25).std() > 0.1
    table = summary.table()
    assert "real" in table and "2 of 32x32" in table and not summary.rejected


def test_conditions_are_left_out_where_the_clip_lacks_them(tmp_path, talker):
    media.write_mp4(tmp_path / "in/silent.mp4", brightness(0, 9, (40, 40)))
    media.write_mp4(tmp_path / "in/zeros.mp4", brightness(0, 9, (40, 40)), audio=np.zeros(6000))
    silent = manifest.RawClip("silent", tmp_path / "in/silent.mp4", "real")
    seen = []

    def detect(frames):
        seen.append(frames.shape)
        return np.full((9, 28, 3), 0.5, np.float32)

    clips = [
        dataclasses.replace(talker, id="music", speech=False, pose=False, end=0.36),
        silent,
        dataclasses.replace(silent, id="zeros", path=tmp_path / "in/zeros.mp4"),
        dataclasses.replace(talker, id="both", end=0.36),
    ]
    run(clips, tmp_path / "out", detect)
    data = Dataset.open(tmp_path / "out")
    assert {entry["id"]: (entry["audio"], entry["pose"]) for entry in data.index} == {
        "real/music": (False, False),
        "real/silent": (False, True),
        "real/zeros": (False, True),
        "real/both": (True, True),
    }
    assert seen == [(9, 40, 40, 3)] * 3  # the detector sees the picture before it is made small


def test_a_clip_of_training_size_is_copied_not_coded_again(tmp_path):
    media.write_mp4(tmp_path / "in/a.mp4", brightness(5, 9, (32, 32)))
    run([manifest.RawClip("000001", tmp_path / "in/a.mp4", "synthetic")], tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert data.index[0]["id"] == "synthetic/000001"
    assert data.clip_path(0).read_bytes() == (tmp_path / "in/a.mp4").read_bytes()


@pytest.mark.parametrize("how", ["longer", "slower", "later"])
def test_a_part_of_a_file_or_another_rate_is_not_copied_whole(tmp_path, how):
    """Copied, the clip would show other frames than the record's latents."""
    frames = {"longer": 11, "slower": 9, "later": 11}[how]
    path = tmp_path / "in/a.mp4"
    media.write_mp4(path, brightness(5, frames, (32, 32)), fps=20 if how == "slower" else 25)
    run([manifest.RawClip("a", path, "synthetic", start=0.08 if how == "later" else 0.0)], tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    made = media.read_video(data.clip_path(0))
    assert len(made) == 9
    wanted = media.read_video(path, start=0.08 if how == "later" else 0.0)[:9]
    assert np.abs(made.astype(int) - wanted.astype(int)).mean() < 4


def test_manifest_crop_moves_keypoints_and_picks_the_size(tmp_path):
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    frames[:, :, 60:90] = 200
    media.write_mp4(tmp_path / "a.mp4", frames)
    points = np.full((9, 28, 3), 0.5, np.float32)
    points[:, 0] = (75 / 96, 32 / 64, 1)  # the middle of the crop
    np.savez(tmp_path / "a.npz", keypoints=points)
    clip = manifest.RawClip("a", tmp_path / "a.mp4", "x", annotations=tmp_path / "a.npz", crop=(54, 0, 42, 64))
    run([clip], tmp_path / "out")
    record = Dataset.open(tmp_path / "out").read(0)
    assert (record["height"], record["width"]) == (48, 32)
    np.testing.assert_allclose(record["keypoints"][:, 0], [[0.5, 0.5, 1]] * 9, atol=0.02)
    assert not record["keypoints"][:, 1].any()  # left of the crop


def person(frames=9, shift=0.0):
    """Keypoints (F,K,3) of a face and a left hand in the middle of the picture."""
    places = {
        "nose": (0.5, 0.5), "left_eye": (0.55, 0.4), "right_eye": (0.45, 0.4), "brow_left": (0.55, 0.36),
        "brow_right": (0.45, 0.36), "left_ear": (0.6, 0.45), "right_ear": (0.4, 0.45), "mouth_left": (0.54, 0.56),
        "mouth_right": (0.46, 0.56), "mouth_top": (0.5, 0.55), "mouth_bottom": (0.5, 0.58), "chin": (0.5, 0.65),
        "left_wrist": (0.8, 0.8), "left_index_tip": (0.85, 0.75),
    }  # fmt: skip
    found = np.zeros((frames, kp.NUM_KEYPOINTS, 3), np.float32)
    for name, (x, y) in places.items():
        found[:, kp.INDEX[name]] = (x + shift, y, 1)
    return found


def test_boxes_come_from_any_keypoints_there_are_and_also_without_pose(tmp_path, talker):
    np.savez(tmp_path / "given.npz", keypoints=person())
    np.savez(tmp_path / "truth.npz", truth_keypoints=person())
    np.savez(tmp_path / "both.npz", keypoints=person(), truth_keypoints=person(shift=0.2))
    talker = dataclasses.replace(talker, end=0.36)
    clips = [
        dataclasses.replace(talker, id="given", annotations=tmp_path / "given.npz"),
        dataclasses.replace(talker, id="no pose", annotations=tmp_path / "given.npz", pose=False),
        dataclasses.replace(talker, id="truth", annotations=tmp_path / "truth.npz", pose=False),
        dataclasses.replace(talker, id="both", annotations=tmp_path / "both.npz"),
        dataclasses.replace(talker, id="detected"),
        dataclasses.replace(talker, id="nothing", pose=False),
    ]
    seen = []

    def detect(frames):
        seen.append(len(frames))
        return person(shift=0.1)

    run(clips, tmp_path / "out", detect)
    data = Dataset.open(tmp_path / "out")
    records = {record["id"]: record for record in map(data.read, range(len(data)))}
    expected = boxes.from_keypoints(person(), 1.0)
    assert expected[:, :3].any((1, 2)).all() and not expected[:, 3].any()
    for name in ("given", "no pose", "truth", "both"):
        np.testing.assert_allclose(records[f"real/{name}"]["boxes"], expected, atol=1e-6)
    moved = boxes.from_keypoints(person(shift=0.1), 1.0)
    np.testing.assert_allclose(records["real/detected"]["boxes"], moved, atol=1e-6)
    assert records["real/nothing"]["boxes"].shape == (0, 4, 4)
    assert [entry["pose"] for entry in data.index] == [True, False, False, True, True, False]
    assert seen == [9]  # nothing is detected for boxes alone


def test_boxes_are_relative_to_the_crop_and_clipped_to_it(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", np.zeros((9, 64, 96, 3), np.uint8))
    np.savez(tmp_path / "a.npz", truth_keypoints=person())
    clip = manifest.RawClip(
        "a", tmp_path / "a.mp4", "x", annotations=tmp_path / "a.npz", crop=(24, 0, 48, 64), pose=False
    )
    run([clip], tmp_path / "out")
    record = Dataset.open(tmp_path / "out").read(0)
    assert (record["height"], record["width"]) == (48, 32)
    whole = boxes.from_keypoints(person(), 96 / 64) * [96, 64, 96, 64]
    box = centre_box(Box(24, 0, 48, 64), (48, 32))  # 43 x 64 pixels
    inside = (whole - [box.left, 0, box.left, 0]) / [box.width, 64, box.width, 64]
    np.testing.assert_allclose(record["boxes"][:, :2], inside[:, :2], atol=1e-5)
    # The arm is around x = 77..82 of 96; the crop ends at 69, and the padding reaches into it or not at all.
    assert inside[0, 2, 0] > 1 and not record["boxes"][:, 2].any()


def test_a_clip_with_too_few_annotated_rows_is_named_and_the_others_are_used(tmp_path, talker):
    np.savez(tmp_path / "short.npz", keypoints=person(frames=12), mouth=np.zeros(20))
    np.savez(tmp_path / "mouth.npz", mouth=np.zeros(7))
    clips = [talker] + [
        dataclasses.replace(talker, id=name, annotations=tmp_path / f"{name}.npz") for name in ("short", "mouth")
    ]
    summary, _ = run(clips, tmp_path / "out")
    assert len(Dataset.open(tmp_path / "out")) == 2
    assert "keypoints has 12 rows" in summary.table() and "mouth has 7 rows" in summary.table()


def scene(folder, *, height=120, width=160, scale=0.5, pose=True, name="talker", frames=18):
    """A clip of `person`, whose face moves right, in a picture with a gradient; `scale`: its size in the picture."""
    points = person(frames)
    seen = points[..., 2:] > 0
    points[..., :2] = np.where(seen, 0.4 + (points[..., :2] - 0.5) * [scale * height / width, scale], 0)
    points[..., 0] += np.where(seen[..., 0], np.linspace(0, 0.03, frames)[:, None], 0)
    picture = np.zeros((frames, height, width, 3), np.uint8)
    picture[..., 0] = np.arange(width)
    picture[..., 1] = np.arange(height)[:, None]
    media.write_mp4(folder / f"{name}.mp4", picture, audio=tone(frames), crf=4)
    notes = {"truth_keypoints": points, "mouth": np.arange(frames, dtype=np.float32), "attributes": np.ones(2)}
    np.savez(folder / f"{name}.npz", **notes, **({"keypoints": points} if pose else {}))
    return manifest.RawClip(
        name, folder / f"{name}.mp4", "synthetic", "hello", speaker="s", sentence="t", split="heldout",
        pose=pose, annotations=folder / f"{name}.npz",
    )  # fmt: skip


def run_with_faces(clips, output, sizes=((32, 32),), **kwargs):
    settings = dataclasses.replace(SETTINGS, face_crops=sizes)
    options = {"latent_channels": 2, "extra": {}, "batch": 2} | kwargs
    summary = pipeline.run(clips, output, settings, encoders(), CountingEncoder(), **options)
    data = Dataset.open(output)
    return summary, data, {record["id"]: record for record in map(data.read, range(len(data)))}


def test_a_face_crop_shares_everything_but_the_picture_and_places_in_it(tmp_path):
    summary, data, records = run_with_faces([scene(tmp_path), scene(tmp_path, name="b", pose=False)], tmp_path / "out")
    whole = {f"synthetic/{name}-{cut}" for name in ("talker", "b") for cut in (0, 1)}
    assert set(records) == whole | {f"{name}#face" for name in whole}
    assert {entry["id"]: entry["view"] for entry in data.index} == {
        name: "face" if name.endswith("#face") else "full" for name in records
    }
    moved = {"id", "view", "latents", "references", "keypoints", "boxes", "height", "width"}
    for name in whole:
        full, face = records[name], records[f"{name}#face"]
        for field in set(full) - moved:
            np.testing.assert_array_equal(face[field], full[field], err_msg=field)
        assert face["audio"].any() and (face["height"], face["width"]) == (32, 32)
        assert face["latents"].shape == (3, 4, 4, 2) and face["references"].shape == (4, 4, 4, 2)
        assert (len(face["keypoints"]) > 0) == name.startswith("synthetic/talker")
    # Clips and seconds are counted once.
    columns, counts = (line.split() for line in summary.table().splitlines())
    table = dict(zip(columns, counts, strict=False))
    assert (table["clips"], table["seconds"], table["faces"], table["audio"], table["pose"]) == (
        "4",
        "1.4",
        "4",
        "4",
        "2",
    )
    assert "4 of 32x32" in summary.table()


def test_keypoints_boxes_latents_and_clip_of_a_face_crop_show_the_same_place(tmp_path):
    """The picture's red says x and its green y in the source, so that the crop can be read from its frames."""
    clip = scene(tmp_path)
    settings = dataclasses.replace(SETTINGS, face_crops=((32, 32),))
    made = {piece.record["id"]: piece for piece in pipeline.prepare_clip(clip, settings, encoders(), np.ones((1, 3)))}
    face, full = made["synthetic/talker-0#face"], made["synthetic/talker-0"].record
    shown = media.read_video(clip.path)[4].astype(float)
    bias = [(shown[..., 0] - np.arange(160)).mean(), (shown[..., 1] - np.arange(120)[:, None]).mean(), 0]
    frame = face.frames[4] - np.array(bias)  # the codec darkens colours by about one level
    values = np.arange(4, 28) + 0.5  # the edges of a resized picture repeat pixels
    x_fit = np.polyfit(values, frame[4:-4, 4:-4, 0].mean(0), 1)
    y_fit = np.polyfit(values, frame[4:-4, 4:-4, 1].mean(1), 1)
    scale, corner = np.array([x_fit[0], y_fit[0]]), np.array([x_fit[1], y_fit[1]]) + 0.5  # source pixels
    nose = np.load(tmp_path / "talker.npz")["truth_keypoints"][4, kp.INDEX["nose"], :2] * [160, 120]
    found = face.record["keypoints"][4, kp.INDEX["nose"], :2]
    np.testing.assert_allclose(found * 32 * scale + corner, nose, atol=1)
    # The mouth's box is at the same place of the source in both. The whole cut is 107 of the 120 pixels high.
    cut = centre_box(Box(0, 0, 160, 120), (32, 48))
    wanted = full["boxes"][4, 1] * np.tile([cut.width, cut.height], 2) + np.tile([cut.left, cut.top], 2)
    found = face.record["boxes"][4, 1] * np.tile(32 * scale, 2) + np.tile(corner, 2)
    np.testing.assert_allclose(found, wanted, atol=1)
    # Latents, references and the mp4 are of these frames. The stand-in for the VAE averages 8 x 8 pixels.
    _, data, records = run_with_faces([clip], tmp_path / "out")
    record = records["synthetic/talker-0#face"]
    for latent, chosen in zip(record["references"], record["reference_frames"], strict=True):
        cells = face.frames[chosen].reshape(4, 8, 4, 8, 3).mean((1, 3, 4)) / 127.5 - 1
        np.testing.assert_allclose(latent[..., 0], cells, atol=1e-3)
    np.testing.assert_allclose(record["latents"][0, ..., 0], record["references"][0, ..., 0], atol=1e-3)
    i = next(i for i, entry in enumerate(data.index) if entry["id"] == "synthetic/talker-0#face")
    assert np.abs(media.read_video(data.clip_path(i)).astype(float) - face.frames).mean() < 4


def test_a_face_that_is_too_far_too_near_or_missing_has_no_crop(tmp_path):
    far, near = scene(tmp_path, scale=0.15, name="far"), scene(tmp_path, scale=2.8, name="near", width=120)
    nobody = dataclasses.replace(scene(tmp_path, name="nobody"), annotations=None, pose=False)
    summary, data, _ = run_with_faces([far, near, nobody], tmp_path / "out")
    assert [entry["view"] for entry in data.index] == ["full"] * 6
    assert dict(zip(*(line.split() for line in summary.table().splitlines()), strict=False))["faces"] == "0"


def test_face_crops_are_made_from_one_decoding_and_one_encoding_of_speech_and_are_the_same_each_time(
    tmp_path, monkeypatch
):
    clip, calls = scene(tmp_path), []

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), original(*a, **k))[1])

    counted(media, "iter_video")
    counted(media, "read_sound")
    one = run_with_faces([clip], tmp_path / "one")[2]
    assert calls == ["iter_video", "read_sound"]
    other = run_with_faces([clip], tmp_path / "other", workers=1, batch=3)[2]
    assert set(one) == set(other) and len(one) == 4
    for name, record in one.items():
        for field, value in record.items():
            np.testing.assert_array_equal(other[name][field], value)


def test_face_crops_change_the_digest_and_their_absence_does_not(tmp_path, talker):
    digests = [
        pipeline.inputs_digest([talker], dataclasses.replace(SETTINGS, face_crops=sizes), encoders(), "")
        for sizes in ((), ((32, 32),), ((48, 48),))
    ]
    assert len(set(digests)) == 3 and digests[0] == pipeline.inputs_digest([talker], SETTINGS, encoders(), "")


def test_bad_clips_are_named_and_the_others_are_used(tmp_path, talker):
    (tmp_path / "in/bad.mp4").write_text("no video")
    media.write_mp4(tmp_path / "in/short.mp4", brightness(0, 5, (32, 32)))
    clips = [
        manifest.RawClip("bad", tmp_path / "in/bad.mp4", "real"),
        talker,
        manifest.RawClip("short", tmp_path / "in/short.mp4", "real"),
    ]
    summary, _ = run(clips, tmp_path / "out")
    assert len(Dataset.open(tmp_path / "out")) == 2
    assert "rejected real/bad: cannot read" in summary.table() and "shorter than 9 frames" in summary.table()
    with pytest.raises(UserError, match="no clip could be used.*real/bad"):
        run(clips[:1], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_whatever_goes_wrong_in_a_clip_is_its_row_and_the_rest_goes_on(tmp_path, talker, monkeypatch):
    original = media.iter_video

    def broken(path, **kwargs):
        if path.name == "odd.mp4":
            raise ZeroDivisionError("a strange\nfile")
        return original(path, **kwargs)

    monkeypatch.setattr(media, "iter_video", broken)
    (tmp_path / "in/odd.mp4").write_text("x")
    np.savez(tmp_path / "nan.npz", mouth=np.full(20, np.nan))
    clips = [
        manifest.RawClip("odd", tmp_path / "in/odd.mp4", "real"),
        dataclasses.replace(talker, id="nan", annotations=tmp_path / "nan.npz"),
        manifest.RawClip("gone", tmp_path / "in/gone.mp4", "real"),
        dataclasses.replace(talker, id="marked", problem="the reason"),
        dataclasses.replace(talker, id="untold", caption="no states"),
        talker,
    ]
    encode = FakeText.encode

    def encoded(self, caption):
        if caption == "no states":
            raise UserError("no states of it")
        return encode(self, caption)

    monkeypatch.setattr(FakeText, "encode", encoded)
    assert pipeline.inputs_digest(clips, SETTINGS, encoders(), "")
    summary, _ = run(clips, tmp_path / "out")
    assert [entry["id"] for entry in Dataset.open(tmp_path / "out").index] == ["real/talker-0", "real/talker-1"]
    lines = summary.table().splitlines()
    assert lines[-1] == "clips rejected: 5"
    assert f"rejected real/odd: {tmp_path}/in/odd.mp4: ZeroDivisionError: a strange file" in lines
    for start in ("real/gone: cannot read", "real/marked: the reason", "real/untold: no states", "real/nan: "):
        assert any(line.startswith(f"rejected {start}") for line in lines)


def test_only_cuts_that_the_sound_reaches_have_audio(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 32, 32, "yuv420p"
        sound = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        for image in brightness(0, 36, (32, 32)):
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        wave = np.rint(32767 * tone(12)).astype(np.int16)  # a third of the picture: one cut, and a third of the next
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux([*video.encode(), *sound.encode(frame), *sound.encode()])
    summary, _ = run([manifest.RawClip("a", path, "real")], tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert [entry["audio"] for entry in data.index] == [True, False, False, False]
    assert data.read(0)["audio"].shape[0] == 9 and not data.read(1)["audio"].size
    assert [media.has_audio(data.clip_path(i)) for i in range(4)] == [True, False, False, False]


def test_several_sound_tracks_are_said(tmp_path, capsys):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        for height in (0.0, 0.5):
            sound = file.add_stream("pcm_s16le", rate=16000, layout="mono")
            sound.disposition = av.stream.Disposition.default if height else av.stream.Disposition(0)
        for number, stream in enumerate(file.streams.audio):
            wave = np.full((1, 8000), 16000 * number, np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate = 16000
            file.mux([*stream.encode(frame), *stream.encode()])
    heard = features.sound(manifest.RawClip("a", path, "real"), 9)
    assert heard.wave.mean() == pytest.approx(16000 / 32768, abs=0.01)
    assert capsys.readouterr().out == f"{path} has 2 sound tracks; the default one is used\n"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mouth": np.zeros(3)}, "mouth has 3 rows, but"),
        ({"keypoints": np.full((9, 28, 3), 0.5, np.float32) * [300, 300, 1]}, "fractions of the picture, not pixels"),
        ({"keypoints": np.full((9, 28, 3), 50.0)}, "confidences outside 0..1"),
        ({"keypoints": np.zeros((9, 5, 3))}, r"keypoints has shape \(9, 5, 3\), not"),
        ({"mouth": np.array(0.5)}, r"mouth has shape \(\), not"),
        ({"mouth": np.full(9, np.nan)}, "not finite numbers"),
        ({"attributes": np.array(["tall"])}, "not finite numbers"),
    ],
)
def test_bad_annotations_reject_their_clip_with_a_reason(tmp_path, talker, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    clips = [dataclasses.replace(talker, id="bad", annotations=tmp_path / "a.npz", end=0.36), talker]
    summary, _ = run(clips, tmp_path / "out")
    ((name, message),) = summary.rejected
    assert name == "real/bad" and re.search(reason, message) and str(tmp_path / "a.npz") in message
    assert [entry["id"] for entry in Dataset.open(tmp_path / "out").index] == ["real/talker-0", "real/talker-1"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, talker, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*No space left.*free some"):
        patch.setattr(schema.shutil, "copyfile", full)
        run([talker], tmp_path / "out")

    class FullWriter:
        def __init__(self, *_):
            pass

        def write(self, _):
            pass

        def close(self):
            raise RuntimeError("Failed to\nflush")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*Failed to flush") as caught:
        patch.setattr(schema, "ArrayRecordWriter", FullWriter)
        run([talker], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_vae_only_sees_full_batches_of_one_shape():
    items = [(np.full((9, *size, 3), i, np.uint8), i) for i, size in enumerate([(32, 32), (48, 32)] * 3)]
    encode = CountingEncoder()
    results = {item: (latents, refs) for item, latents, refs in encode_clips(items, encode, 2)}
    assert sorted(results) == list(range(6))
    assert {shape[0] for shape in encode.shapes if shape[1] > 1} == {2} and len(set(encode.shapes)) == 4
    for item, (latents, references) in results.items():
        np.testing.assert_allclose(latents, item / 127.5 - 1, atol=1e-3)
        np.testing.assert_allclose(references, item / 127.5 - 1, atol=1e-3)


@pytest.mark.parametrize(
    ("frames", "firsts"), [(8, []), (9, [0]), (15, [0]), (16, [0, 7]), (18, [0, 9]), (26, [0, 9, 17])]
)
def test_cuts_use_the_end_if_it_overlaps_little(tmp_path, frames, firsts):
    media.write_mp4(tmp_path / "a.mp4", brightness(0, frames, (32, 32)))
    pieces = list(cuts(manifest.RawClip("a", tmp_path / "a.mp4", "x"), SIZES, 9))
    assert [piece.first for piece in pieces] == firsts
    for piece in pieces:
        np.testing.assert_allclose(piece.resized().mean((1, 2, 3)), 2 * (piece.first + np.arange(9)), atol=2.5)


def test_size_and_crop_follow_the_aspect_ratio():
    sizes = [(96, 96), (128, 80), (80, 112)]
    assert choose_size(480, 640, sizes) == (80, 112)
    assert choose_size(288, 300, sizes) == (96, 96)
    assert choose_size(1920, 1080, sizes) == (128, 80)
    box = centre_box(Box(10, 0, 640, 480), (96, 96))
    assert box == Box(90, 0, 480, 480)
    box = centre_box(Box(0, 0, 640, 480), (80, 112))
    assert box.width / box.height == pytest.approx(1.4, rel=0.01) and box.width == 640


def test_references_are_spread_over_the_clip():
    np.testing.assert_array_equal(reference_frames(49), [0, 16, 32, 48])


@pytest.mark.parametrize("text", ["96", "96x", "96x90", "0x96", "a x b"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(UserError, match="--sizes"):
        parse_sizes(text)


def test_the_same_inputs_are_recognised(tmp_path, talker):
    parts = ([talker], SETTINGS, encoders(), "")
    digest = pipeline.inputs_digest(*parts)
    assert pipeline.finished(tmp_path / "out", digest) is None
    run([talker], tmp_path / "out", extra={"inputs_sha256": digest})
    assert len(pipeline.finished(tmp_path / "out", digest)) == 2
    other = dataclasses.replace(SETTINGS, clip_frames=13)
    changed = pipeline.inputs_digest([talker], other, *parts[2:])
    assert changed != digest
    assert pipeline.inputs_digest([dataclasses.replace(talker, caption="x")], *parts[1:]) != digest
    with pytest.raises(UserError, match="delete it"):
        pipeline.finished(tmp_path / "out", changed)


def command(*args):
    root = pathlib.Path(__file__).resolve().parents[3]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.prepare", *args],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_command_writes_a_data_set_and_knows_it_again(tmp_path, talker):
    from flax import nnx

    from omnihuman_jax.models.vae.vae import VAE, VAEConfig, save_vae

    save_vae(
        tmp_path / "vae.safetensors", VAE(VAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1), rngs=nnx.Rngs(0))
    )
    args = [
        f"--input={talker.path.parent}", f"--output={tmp_path}/out", f"--vae={tmp_path}/vae.safetensors",
        "--vae_batch=2", "--vae_tile=32", "--sizes=32x32", "--clip_frames=9", "--audio_encoder=log-mel", "--pose=none",
        "--curate=none",
    ]  # fmt: skip
    first = command(*args)
    if first.returncode == 2 and "cannot fetch" in first.stderr:
        pytest.skip(first.stderr.strip())
    assert first.returncode == 0, first.stderr
    assert "2 of 32x32" in first.stdout and "log-mel" in first.stdout
    data = Dataset.open(tmp_path / "out")
    assert data.read(0)["latents"].shape == (3, 4, 4, 16)
    assert data.meta.vae_sha256 == encoder_sha256(tmp_path / "vae.safetensors")
    second = command(*args)
    assert second.returncode == 0 and "up to date" in second.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input=none", "--output=o", f"--vae={__file__}"], "does not exist"),
        (["--input=x", "--output=o", f"--vae={__file__}", "--clip_frames=10"], "1 + 4n"),
        (["--input=x", "--output=o", f"--vae={__file__}", "--face_crops=50x48"], "--face_crops: 50x48 must be"),
        (["--input=x", "--output=o", f"--vae={__file__}", "--size=96x96"], "did you mean 'sizes'"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(args, message):
    result = command(*args)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
