"""The evaluation tells obeyed from disobeyed conditions, and the report says what it found, whatever it found."""

import html.parser
import json
import re

import numpy as np
import pytest
from flax import nnx

from data_pipelines import schema
from data_pipelines.keypoints import KEYPOINTS
from data_pipelines.raw import media
from experiments.evaluate import rendered
from experiments.report import page, write
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation import probe as probe_lib
from omnihuman_jax.evaluation.metrics import mouth
from omnihuman_jax.inference.sampling import Settings
from omnihuman_jax.models.vae.vae import VAE
from tests.data_pipelines.fake_dataset import fake_meta, fake_record
from tests.inference import tiny

FRAMES, CLIPS = 21, 4


def paint(mouth: np.ndarray, shift: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Frames (F,32,32,3) that show mouth opening as the brightness of the upper half, x shift and colour below."""
    frames = np.zeros((len(mouth), 32, 32, 3), np.uint8)
    frames[:, :16] = (255 * mouth).astype(np.uint8)[:, None, None, None]
    frames[:, 16:, :, 0] = (255 * shift).astype(np.uint8)[:, None, None]
    frames[:, 16:, :, 1:] = colour
    return frames


class PaintedProbe(probe_lib.Probe):
    """Reads painted frames exactly, so that what remains is the evaluation's own arithmetic."""

    def __init__(self):
        config = probe_lib.ProbeConfig(KEYPOINTS, ("g", "b"), (0.0, 0.0), (50.0, 50.0), widths=(8, 8, 8, 8))
        super().__init__(config, probe_lib.ProbeNetwork(config, rngs=nnx.Rngs(0)))

    def read(self, frames: np.ndarray) -> probe_lib.Reading:
        values = frames.astype(np.float32)
        points = np.full((len(frames), len(KEYPOINTS), 3), 0.5, np.float32)
        points[:, :, 0] = values[:, 24, 16, 0, None] / 255
        points[:, KEYPOINTS.index("chin"), 1] = 0.9  # a face of 12 pixels
        points[:, :, 2] = 1
        return probe_lib.Reading(points, values[:, 8, 16, 0] / 255, values[:, 24, 16, 1:], 20.0)


def heldout_dataset(directory) -> schema.Dataset:
    rng = np.random.default_rng(0)
    meta = fake_meta()
    with schema.DatasetWriter(directory / "data", meta) as writer:
        for i in range(CLIPS):
            record = fake_record(rng, meta, f"synthetic/{i}", source="synthetic", split="heldout")
            frames = record["frames"]
            mouth = 0.5 + 0.4 * np.sin(np.arange(frames) * (0.4 + 0.3 * i))
            shift = np.linspace(0.2 + 0.15 * i, 0.3 + 0.15 * i, frames)
            colour = rng.integers(40, 220, 2)
            record |= {"mouth": mouth, "attributes": colour, "speaker": f"p{i}", "sentence": f"s{i}"}
            # What drives is written where the fake generator can find it again.
            record["audio"] = np.repeat(mouth[:, None], meta.audio_dim, 1)
            record["keypoints"] = PaintedProbe().read(paint(mouth, shift, colour)).keypoints
            record["references"] = np.broadcast_to(
                np.resize(colour / 255, meta.latent_channels), record["references"].shape
            )
            path = directory / f"{i}.mp4"
            sound = np.zeros(16_000, np.float32)
            media.write_mp4(path, paint(mouth, shift, colour), audio=sound, crf=0)
            writer.add(record, path)
    return schema.Dataset.open(directory / "data")


def obedient(clips, frames):
    """Does all that it is asked."""
    videos = []
    for clip in clips:
        shift = np.full(frames, 0.5) if clip.keypoints is None else clip.keypoints[:frames, 0, 0]
        videos.append(paint(clip.audio[:frames, 0].astype(float), shift, np.rint(255 * clip.reference[0, 0, :2])))
    return np.stack(videos)


def deaf(clips, frames):
    """Makes the same whatever it is asked."""
    t = np.arange(frames)
    return np.stack([paint(0.5 + 0.3 * np.sin(t), np.full(frames, 0.5), np.array([90, 90])) for _ in clips])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> schema.Dataset:
    return heldout_dataset(tmp_path_factory.mktemp("heldout"))


@pytest.fixture(scope="module")
def vae() -> VAE:
    return tiny.vae()


def evaluate(generate, dataset, vae, **changes):
    arguments = {"clips": CLIPS, "frames": FRAMES, "seed": 0} | changes
    return rendered.evaluate_rendered(generate, dataset, vae, PaintedProbe(), **arguments)


@pytest.fixture(scope="module")
def good(dataset, vae):
    return evaluate(obedient, dataset, vae)


def test_obeyed_conditions_show_as_a_gap_between_right_and_wrong(good):
    measured = good.result["measures"]
    assert set(measured) == {"mouth", "pose", "colour", "identity"}
    assert measured["mouth"]["rows"]["right"]["mean"] > 0.99
    assert measured["mouth"]["rows"]["real"]["mean"] > 0.98
    assert abs(measured["mouth"]["rows"]["wrong"]["mean"]) < 0.6
    assert measured["pose"]["rows"]["right"]["mean"] < 0.5  # half a percent: rounding to bytes
    assert measured["pose"]["rows"]["wrong"]["mean"] > 5
    assert measured["identity"]["rows"]["right"]["mean"] < 0.05 < measured["identity"]["rows"]["wrong"]["mean"]
    for name in measured:
        assert measured[name]["gap"]["low"] > 0, name


def test_a_generator_that_ignores_its_conditions_shows_no_gap(dataset, vae):
    for measure in evaluate(deaf, dataset, vae).result["measures"].values():
        assert measure["gap"]["mean"] == pytest.approx(0, abs=1e-9)
        assert "no measurable effect" in page.verdict(measure["gap"])


def test_each_clip_is_compared_with_another_sentence_and_person(dataset, vae):
    asked = []

    def spy(clips, frames):
        asked.append(clips)
        return obedient(clips, frames)

    evaluate(spy, dataset, vae)
    right, audio, reference, pose, other_pose = asked
    for i in range(CLIPS):
        assert not np.array_equal(audio[i].audio, right[i].audio)
        assert np.array_equal(audio[i].reference, right[i].reference)
        assert not np.array_equal(reference[i].reference, right[i].reference)
        assert np.array_equal(reference[i].audio, right[i].audio)
        assert right[i].seed == audio[i].seed == reference[i].seed  # only the condition differs, not the noise
        assert not np.array_equal(other_pose[i].keypoints, pose[i].keypoints)
        assert right[i].keypoints is None


def test_evaluation_is_a_function_of_its_seed(dataset, vae, good):
    assert evaluate(obedient, dataset, vae).result == good.result


def test_clips_without_mouth_movement_are_left_out_and_a_still_generated_mouth_counts_as_zero():
    truth = 0.5 + 0.4 * np.sin(np.arange(21))
    assert np.isnan(mouth.correlation(truth, np.full(21, 0.1)))
    assert mouth.correlation(np.full(21, 0.1), truth) == 0


def test_too_few_clips_are_a_note_and_not_a_number(dataset, vae):
    found = evaluate(obedient, dataset, vae, frames=25 + 4)  # longer than any clip
    assert not found.result["measures"] and len(found.result["notes"]) == 2


def run_directory(path):
    """A run directory with the files that the report reads."""
    path.mkdir()
    ratios = {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0}
    stages = {name: {"steps": 20, "ratios": ratios} for name in ("stage1", "stage2")}
    model = {"num_dual_blocks": 1, "num_single_blocks": 2, "hidden_size": 32}
    (path / "config.json").write_text(json.dumps({"stages": stages, "model": model}))
    lines = [
        {
            "step": step,
            "stage": "stage1" if step <= 20 else "stage2",
            "loss": 1.0 / step,
            "loss_by_condition": {"text": 1.0, "audio": 0.5},
            "active_ratio": {"text": 0.85, "reference": 0.7, "audio": 0.4, "pose": 0.0},
            "scheduled_ratio": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0},
            "step_seconds": 0.5,
        }
        for step in (*range(1, 31), *range(26, 41))  # steps 26-30 twice, as after a crash
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Links(html.parser.HTMLParser):
    """Collects src and href, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_its_links_are_relative_and_exist(tmp_path, dataset, good):
    run = run_directory(tmp_path / "run")
    elsewhere = tmp_path / "made.mp4"
    media.write_mp4(elsewhere, np.zeros((5, 32, 32, 3), np.uint8))
    video = write.Video(elsewhere, "A <title>", "driven by audio & pose")
    path = write.write_report(
        run,
        dataset,
        evaluation=good,
        videos=[video],
        phases={"training": 61.0},
        missing=["pkg 1.0"],
        device="a machine",
    )
    text = path.read_text()
    page = Links()
    page.feed(text)
    assert page.open == []
    assert "media/made.mp4" in page.links and "report.json" in page.links
    for link in page.links:
        assert (run / link).is_file(), link
    assert "A &lt;title&gt;" in text and "pkg 1.0" in text and "synthetic" in text and "prox" in text
    assert not re.search(r"\b(FID|FVD|Sync-C)\b", text)
    assert str(tmp_path) not in text
    for strip in run.glob("media/evaluation_*.mp4"):
        assert media.has_audio(strip)


def test_report_json_holds_the_numbers(tmp_path, dataset, good):
    run = run_directory(tmp_path / "run")
    write.write_report(run, dataset, evaluation=good, device="a machine")
    data = json.loads((run / "report.json").read_text())
    assert data["evaluation"]["measures"]["mouth"]["rows"]["right"]["n"] == CLIPS
    stage = data["training"]["stages"]["stage2"]
    assert stage["target"]["audio"] == 0.5 and stage["after guidance dropout"]["audio"] == 0.4
    assert stage["last_loss"] == pytest.approx(np.mean([1 / 40, 1 / 39]))
    assert data["data"]["groups"][0]["clips"] == CLIPS


def test_report_without_evaluation_says_so(tmp_path, dataset):
    run = run_directory(tmp_path / "run")
    text = write.write_report(run, dataset, evaluation=None, device="a machine").read_text()
    assert "Not measured in this run" in text


def test_a_run_without_metrics_is_one_line(tmp_path, dataset):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write.write_report(tmp_path, dataset, evaluation=None)


def test_clips_do_not_depend_on_how_they_are_batched():
    model = tiny.network().config
    rng = np.random.default_rng(0)
    clips = [
        rendered.Conditions(
            reference=rng.standard_normal((4, 4, 4)),
            text=rng.standard_normal((3, model.text_dim)),
            audio=rng.standard_normal((frames, model.audio_dim)),
            keypoints=None,
            seed=i,
        )
        for i, frames in enumerate((9, 13, 5))  # tracks of unequal length
    ]
    settings = Settings(window=3, steps=2)
    made = [
        rendered.ModelGenerator(tiny.network(), tiny.params(), tiny.vae(), settings, batch)(clips, 9)
        for batch in (2, 3)
    ]
    assert made[0].shape == (3, 9, 32, 32, 3) and made[0].dtype == np.uint8
    # Rounding to bytes may fall either way.
    assert np.abs(made[0].astype(int) - made[1].astype(int)).max() <= 1
