"""Rendered clips: their truth agrees with their pixels and their sound, and the command behaves."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import keypoints as kp
from data_pipelines.raw import fetch, manifest, media
from data_pipelines.synthetic import appearance, clips, dataset, people, plan, render, speech
from omnihuman_jax.errors import UserError


@pytest.fixture(scope="module")
def close_up(body, engine):
    """A talking close-up of 49 frames."""
    first = next(i for i in range(100) if _is_talking_close_up(plan.plan(3, i, (96, 96))))
    return clips.make(body, engine, plan.plan(3, first, (96, 96)), 3, 49)


def _is_talking_close_up(clip):
    return clip.framing == "close-up" and clip.has_audio


@pytest.fixture(scope="module")
def data(tmp_path_factory, body, engine):
    """A finished data set of eight short clips, written by the command with two processes."""
    directory = tmp_path_factory.mktemp("synthetic") / "data"
    flags = [f"--output={directory}", "--clips=8", "--seed=5", "--workers=2", "--frames=9"]
    subprocess.run([sys.executable, "-m", "data_pipelines.synthetic", *flags], check=True)
    return directory


def entries(directory):
    return json.loads((directory / "manifest.json").read_text())["clips"]


def test_heldout_clips_share_no_speaker_and_no_sentence_with_training_clips():
    plans = [plan.plan(0, i) for i in range(400)]
    train, heldout = ([p for p in plans if p.split == split] for split in ("train", "heldout"))
    for name in ("speaker_id", "sentence_id", "sentence"):
        values = {getattr(p, name) for p in train} - {""}
        assert values and not values & {getattr(p, name) for p in heldout}
    assert 0.11 < len(heldout) / 400 < 0.15
    assert all(p.has_audio and p.has_pose for p in heldout)
    assert sum(p.split == "heldout" for p in plans[:8]) == 4


def test_a_third_of_training_clips_lacks_audio_or_pose_and_every_combination_occurs():
    train = [p for p in (plan.plan(0, i) for i in range(400)) if p.split == "train"]
    lacking = np.mean([not (p.has_audio and p.has_pose) for p in train])
    assert 0.3 < lacking < 0.4
    assert {(p.has_audio, p.has_pose) for p in train[:8]} == {(a, b) for a in (True, False) for b in (True, False)}
    assert any(p.speaks and not p.has_audio for p in train) and any(not p.speaks for p in train)


def test_faces_dominate_and_all_sizes_and_framings_occur():
    plans = [plan.plan(1, i) for i in range(3000)]
    for size in (*plan.SIZES, None):
        of_size = [p for p in plans if size in (None, (p.height, p.width))]
        assert 0.65 < np.mean([p.framing in ("close-up", "head and shoulders") for p in of_size]) < 0.8
    assert {p.framing for p in plans} == set(plan.FRAMINGS)
    assert {(p.height, p.width) for p in plans} == set(plan.SIZES)


def test_two_fifths_are_calm_and_a_tenth_of_the_speakers_pause_at_either_end():
    plans = [plan.plan(2, i) for i in range(3000)]
    assert 0.37 < np.mean([p.sway == plan.CALM for p in plans]) < 0.43 and {p.sway for p in plans} == {plan.CALM, 1.0}
    speakers = [p for p in plans if p.speaks]
    for pause in plan.PAUSES:
        assert 0.035 < np.mean([p.pause == pause for p in speakers]) < 0.065
    assert not any(p.pause for p in plans if not p.speaks)


@pytest.mark.parametrize("pause", plan.PAUSES)
def test_a_pause_is_silent_and_the_mouth_is_shut_in_it(body, engine, pause):
    wanted = (p for p in (plan.plan(3, i, (96, 96)) for i in range(2000)) if p.has_audio and p.pause == pause)
    for chosen in (next(wanted), next(wanted)):
        clip = clips.make(body, engine, dataclasses.replace(chosen, framing="close-up"), 3, 25)
        loud = np.abs(clip.audio.reshape(25, -1)).max(1) > 0.02
        silent = int(np.argmax(loud)) if pause == "begin" else int(np.argmax(loud[::-1]))
        assert 0.2 * 25 < silent < 0.75 * 25 and loud.any()
        # A frame or two at the border belong to the sound: lips move before and after it.
        rest = clip.mouth[: silent - 3] if pause == "begin" else clip.mouth[len(loud) - silent + 3 :]
        assert rest.max() < 0.1
        assert clip.mouth.max() > rest.max() + 0.1


def test_a_calm_person_moves_the_head_less_and_speaks_as_clearly(body, engine):
    chosen = next(p for p in (plan.plan(3, i, (96, 96)) for i in range(200)) if _is_talking_close_up(p))
    lively, calm = (clips.make(body, engine, dataclasses.replace(chosen, sway=s), 3, 25) for s in (1.0, plan.CALM))
    nose = [np.ptp(clip.keypoints[:, kp.INDEX["nose"], :2], axis=0) for clip in (lively, calm)]
    assert (nose[1] < 0.5 * nose[0]).all()
    np.testing.assert_allclose(calm.mouth, lively.mouth, atol=0.02)
    np.testing.assert_array_equal(calm.audio, lively.audio)


def test_a_clip_is_a_function_of_seed_and_index(body, engine):
    one, other = (clips.make(body, engine, plan.plan(5, 4), 5, 5) for _ in range(2))
    assert one.caption == other.caption
    for name in ("frames", "keypoints", "mouth", "attributes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.audio is None) == (other.audio is None)
    changed = clips.make(body, engine, plan.plan(6, 4), 6, 5)
    assert changed.frames.shape != one.frames.shape or (changed.frames != one.frames).any()


def test_the_number_of_workers_changes_nothing(data, tmp_path):
    dataset.generate(tmp_path / "one", 2, seed=5, workers=1, frames=9)
    for entry in entries(tmp_path / "one"):
        assert entry == next(e for e in entries(data) if e["id"] == entry["id"])
        one, two = (media.read_video(folder / entry["file"]) for folder in (tmp_path / "one", data))
        np.testing.assert_array_equal(one, two)
        assert (tmp_path / "one" / entry["annotations"]).read_bytes() == (data / entry["annotations"]).read_bytes()


def test_files_hold_what_the_manifest_says(data):
    for entry in entries(data):
        path = data / entry["file"]
        assert media.has_audio(path) == entry["has_audio"]
        assert media.read_video(path).shape == (9, entry["height"], entry["width"], 3)
        with np.load(data / entry["annotations"], allow_pickle=False) as arrays:
            assert ("keypoints" in arrays.files) == entry["has_pose"]
            assert arrays["truth_keypoints"].shape == (9, kp.NUM_KEYPOINTS, 3)
            assert arrays["mouth"].shape == (9,)
            assert arrays["mouth"].min() >= 0 and arrays["mouth"].max() <= 1
            assert tuple(arrays["attribute_names"]) == appearance.ATTRIBUTE_NAMES
            assert arrays["attributes"].shape == (len(appearance.ATTRIBUTE_NAMES),)
            assert np.isfinite(arrays["attributes"]).all()


def test_prepare_can_read_the_directory(data):
    found = manifest.read(data)
    assert [clip.id for clip in found] == [entry["id"] for entry in entries(data)]
    assert {clip.source for clip in found} == {"synthetic"}
    assert [clip.pose for clip in found] == [entry["has_pose"] for entry in entries(data)]


def test_keypoints_with_confidence_lie_in_the_frame_and_others_are_zero(data):
    for entry in entries(data):
        points = np.load(data / entry["annotations"], allow_pickle=False)["truth_keypoints"]
        seen = points[..., 2] > 0
        assert (points[seen][:, :2] >= 0).all() and (points[seen][:, :2] <= 1).all()
        assert not points[~seen].any()
        assert seen[:, kp.INDEX["nose"]].all()


def test_the_mouth_keypoints_open_with_the_true_mouth(close_up):
    assert close_up.mouth.max() > 0.3
    places = ("mouth_top", "mouth_bottom", "mouth_left", "mouth_right")
    top, bottom, left, right = (close_up.keypoints[:, kp.INDEX[name], :2] for name in places)
    opening = np.linalg.norm(bottom - top, axis=1) / np.linalg.norm(left - right, axis=1)
    assert np.corrcoef(opening, close_up.mouth)[0, 1] > 0.95


def test_the_mouth_is_large_enough_to_be_read_in_close_ups(close_up):
    points = 96 * close_up.keypoints[..., :2]
    width = np.linalg.norm(points[:, kp.INDEX["mouth_left"]] - points[:, kp.INDEX["mouth_right"]], axis=1)
    assert np.median(width) > 12


def test_the_rendered_mouth_darkens_as_it_opens(close_up):
    wide, shut = np.argmax(close_up.mouth), np.argmin(close_up.mouth)
    darkest = {}
    for frame in (wide, shut):
        points = 96 * close_up.keypoints[frame, :, :2]
        top, bottom = points[kp.INDEX["mouth_top"]], points[kp.INDEX["mouth_bottom"]]
        x, y = np.round((top + bottom) / 2 - 0.5).astype(int)
        darkest[frame] = close_up.frames[frame, y - 1 : y + 2, x - 1 : x + 2].mean()
    assert darkest[wide] < darkest[shut] - 15


def scene(body, seed=2, gender="female"):
    """A person without motion, and a camera on the face."""
    rng = np.random.default_rng(seed)
    look = dataclasses.replace(appearance.draw(rng), gender=gender, beard=0.0, glasses=False, hair_style="buzz")
    person = people.build(body, look, rng)
    nose = person.rest[person.landmarks["nose"]].mean(0)
    camera = render.Camera(96, 96, (float(nose[0]), float(nose[1])), 30.0, 40.0)
    light = render.Light(np.array([0.0, 0, 1]), 0.0, 1.0, np.ones(3))
    return person, camera, light


def test_keypoints_lie_where_the_pixels_are(body):
    person, camera, light = scene(body)
    lips = np.isclose(person.albedo, person.albedo[_quad_at(person, "mouth_top")]).all(1)
    person = dataclasses.replace(person, albedo=np.where(lips[:, None], [0, 1.0, 0], [0.3, 0.0, 0.3]))
    image = render.Painter(person, camera, light, np.zeros((192, 192, 3))).frame(person.rest)
    rows, columns = np.nonzero(image[..., 1] > 120)
    corners = [camera.project(person.rest[person.landmarks[f"mouth_{side}"]].mean(0)) for side in ("right", "left")]
    # Pixel i covers i..i+1; the corners of the lips are a little outside of the inner line that keypoints follow.
    assert abs(columns.min() - corners[0][0]) < 2.5
    assert abs(columns.max() + 1 - corners[1][0]) < 2.5
    assert rows.min() < corners[0][1] < rows.max() + 1


def _quad_at(person, landmark):
    return int(np.flatnonzero((person.quads == person.landmarks[landmark][0]).any(1))[0])


@pytest.mark.parametrize("seed", range(3))
def test_jaw_open_opens_the_lips_of_every_body(body, seed):
    person, _, _ = scene(body, seed, "male")
    jaw = np.linspace(0, 1, 5)
    gap = people.lip_gap(person, person.rest + people.unit_offsets(person, {"jawOpen": jaw}, 5))
    assert (np.diff(gap) > 0.02).all()


def test_nobody_speaks_and_mouths_stay_shut_without_a_speech_library(body, tmp_path, monkeypatch, capsys):
    def fail(cache):
        raise fetch.PackageUnavailableError("cannot fetch espeak")

    monkeypatch.setattr(speech, "find_engine", fail)
    dataset.generate(tmp_path / "silent", 2, seed=0, workers=1, frames=5)
    assert "going on without speech: cannot fetch espeak" in capsys.readouterr().out
    assert not any(entry["has_audio"] or entry["speaks"] for entry in entries(tmp_path / "silent"))
    mouth = np.load(tmp_path / "silent/annotations/000000.npz", allow_pickle=False)["mouth"]
    assert mouth.max() < 0.15


def test_the_same_command_again_says_so_and_another_is_refused(data, capsys):
    before = (data / "manifest.json").stat().st_mtime_ns
    assert not dataset.generate(data, 8, seed=5, workers=1, frames=9)
    assert "already holds" in capsys.readouterr().out
    with pytest.raises(UserError, match="not empty"):
        dataset.generate(data, 8, seed=6, workers=1, frames=9)
    assert (data / "manifest.json").stat().st_mtime_ns == before


def test_a_failure_leaves_nothing_behind(body, engine, tmp_path, monkeypatch):
    def fail(*arguments):
        raise UserError("a clip cannot be made")

    monkeypatch.setattr(clips, "make", fail)
    with pytest.raises(UserError, match="cannot be made"):
        dataset.generate(tmp_path / "out", 2, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "--clips"),
        ({"count": None}, "--clips: is not given"),
        ({"count": 4, "seed": -1}, "--seed"),
        ({"count": 4, "frames": 48}, "1 \\+ 4n frames"),
        ({"count": 4, "workers": 0}, "--workers"),
        ({"count": 4, "size": "97x96"}, "multiple of 16"),
        ({"count": 4, "size": "big"}, "not a size"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        dataset.generate(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_command_answers_a_bad_flag_with_one_line_and_status_2(tmp_path):
    call = [sys.executable, "-m", "data_pipelines.synthetic", f"--output={tmp_path / 'out'}", "--clip=3"]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines() == [result.stderr.strip()]
    assert "did you mean 'clips'" in result.stderr
