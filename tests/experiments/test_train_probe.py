"""The probe's training examples are geometrically right, repeatable, and teach it something."""

import json
import subprocess
import sys

import chex
import numpy as np
import pytest
from flax import nnx

from data_pipelines.keypoints import INDEX, KEYPOINTS
from data_pipelines.raw import media
from experiments.train_probe import __main__, training
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation import probe as probe_lib

SIZE = (96, 80)
CONFIG = probe_lib.ProbeConfig(KEYPOINTS, ("a",), (0.0,), (1.0,), widths=(8, 8, 8, 8), canvas=48, crop=16)
FACE = {"left_eye": (50, 30), "right_eye": (30, 30), "chin": (40, 56), "mouth_left": (46, 46), "mouth_right": (34, 46)}
FACE |= {"mouth_top": (40, 44), "mouth_bottom": (40, 48)}


def face_clip(rng: np.random.Generator, frames: int = 6) -> training.Clip:
    """A bright block at every face point, red on the person's left; the mouth's brightness is its opening."""
    images = np.full((frames, *SIZE, 3), 20, np.uint8)
    keypoints = np.zeros((frames, len(KEYPOINTS), 3), np.float32)
    mouth = rng.random(frames).astype(np.float32)
    for f in range(frames):
        shift = rng.integers(-6, 7, 2)
        for name, place in FACE.items():
            x, y = np.array(place) + shift
            keypoints[f, INDEX[name]] = (x / SIZE[1], y / SIZE[0], 1)
            colour = (255, 60, 60) if name.startswith("left") else (255, 255, 255)
            images[f, y - 2 : y + 2, x - 2 : x + 2] = np.array(colour) * (mouth[f] if "mouth" in name else 1)
    return training.Clip(images, keypoints, mouth, np.zeros(1, np.float32), ("a",))


def test_points_follow_the_picture_through_warps_and_mirroring(monkeypatch):
    monkeypatch.setattr(training, "degrade", lambda frame, rng: frame)
    rng = np.random.default_rng(0)
    clip, found = face_clip(rng), []
    for _ in range(60):
        example = training.sample([clip], CONFIG, rng)
        x, y = example["points"][INDEX["left_eye"]] * CONFIG.canvas
        if example["seen"][INDEX["left_eye"]] and 2 < x < 46 and 2 < y < 46:
            found.append(example["canvas"][int(y), int(x)].astype(int))
        assert not example["seen"][INDEX["left_knee"]]
    found = np.array(found)
    assert len(found) > 40
    # The person's left eye is drawn in red; after mirroring, red marks the other side, which is then named right.
    red = found[:, 0] - found[:, 1] > 60
    assert (found[:, 0] > 120).mean() > 0.95 and 0.2 < red.mean() < 0.8


def test_the_mouth_crop_shows_the_mouth(monkeypatch):
    monkeypatch.setattr(training, "degrade", lambda frame, rng: frame)
    rng = np.random.default_rng(1)
    clip = face_clip(rng)
    pairs = []
    for _ in range(60):
        example = training.sample([clip], CONFIG, rng)
        assert example["mouth_usable"] == 1
        pairs.append((example["crop"][5:-5, 5:-5].max() / 255, example["mouth"]))
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.95


def test_batches_are_a_function_of_seed_and_step():
    clips = [face_clip(np.random.default_rng(i)) for i in range(3)]
    first, again, other = (training.batches(clips, CONFIG, 4, seed) for seed in (0, 0, 1))
    for _ in range(3):
        a, b, c = next(first), next(again), next(other)
        chex.assert_trees_all_equal(a, b)
        assert not np.array_equal(a["canvas"], c["canvas"])


def test_a_mistake_in_the_thread_reaches_the_trainer():
    with pytest.raises(ValueError):
        next(training.batches([], CONFIG, 4, 0))


@pytest.mark.slow
def test_training_lowers_every_part_of_the_loss():
    clips = [face_clip(np.random.default_rng(i)) for i in range(8)]
    batch = next(training.batches(clips, CONFIG, 16, seed=1))
    fresh = probe_lib.ProbeNetwork(CONFIG, rngs=nnx.Rngs(0))
    trained = training.train(CONFIG, clips, steps=60, batch=16, seed=0, rate=1e-2)
    _, before = training.loss(fresh, batch)
    _, after = training.loss(trained, batch)
    for name in before:
        assert after[name] < 0.75 * before[name], name


def test_accuracy_of_a_perfect_probe_is_perfect():
    clips = [face_clip(np.random.default_rng(i), frames=12) for i in range(3)]

    class Perfect(probe_lib.Probe):
        def read(self, frames):
            clip = next(c for c in clips if c.frames is frames)
            return probe_lib.Reading(clip.keypoints, clip.mouth, np.zeros((len(frames), 1)), 20.0)

    accuracy = training.accuracy_on(Perfect(CONFIG, probe_lib.ProbeNetwork(CONFIG, rngs=nnx.Rngs(0))), clips)
    assert accuracy["mouth_clips"] == 3
    assert (accuracy["mouth_correlation"], accuracy["visibility_accuracy"]) == (1, 1)
    assert accuracy["keypoint_error_percent"] == accuracy["mouth_error"] == 0
    assert accuracy["attribute_r2"] == {"a": 0}  # does not vary over these clips


def test_a_directory_without_rendered_clips_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json"):
        __main__.read_manifest(tmp_path)
    with pytest.raises(UserError, match="no heldout clips"):
        __main__.read_clips(tmp_path, {"clips": []}, "heldout")


def write_clips(folder, **splits: training.Clip) -> None:
    """Clips by split, as data_pipelines.synthetic writes them."""
    (folder / "annotations").mkdir()
    entries = []
    for split, clip in splits.items():
        media.write_mp4(folder / "clips" / f"{split}.mp4", clip.frames)
        np.savez(
            folder / "annotations" / f"{split}.npz",
            truth_keypoints=clip.keypoints,
            mouth=clip.mouth,
            attributes=clip.attributes,
            attribute_names=np.array(["a"]),
        )
        entries.append({"file": f"clips/{split}.mp4", "annotations": f"annotations/{split}.npz", "split": split})
    (folder / "manifest.json").write_text(json.dumps({"clips": entries}))


def test_clips_are_read_with_their_exact_keypoints(tmp_path):
    clip = face_clip(np.random.default_rng(0))
    write_clips(tmp_path, train=clip)
    (read,) = __main__.read_clips(tmp_path, __main__.read_manifest(tmp_path), "train")
    np.testing.assert_array_equal(read.keypoints, clip.keypoints)
    assert read.frames.shape == clip.frames.shape and read.attribute_names == ("a",)


@pytest.mark.slow
def test_the_command_writes_a_probe_with_its_accuracy(tmp_path):
    rng = np.random.default_rng(0)
    write_clips(tmp_path, train=face_clip(rng), heldout=face_clip(rng, frames=12))
    output = tmp_path / "probe.safetensors"
    words = ["experiments.train_probe", f"--data={tmp_path}", f"--output={output}", "--steps=1", "--batch=2"]
    subprocess.run([sys.executable, "-m", *words], check=True, timeout=280)
    assert probe_lib.load_probe(output).header["accuracy"]["rendered"]["clips"] == 1
