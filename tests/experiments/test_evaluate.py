"""The evaluation tells a model that follows its conditions from one that does not; the command as a person runs it."""

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_pipelines import schema
from data_pipelines.encoders import speech
from experiments.evaluate import __main__ as command
from experiments.evaluate import checkpoint, rendered
from experiments.evaluate.checkpoint import Options
from experiments.report import page
from omnihuman_jax.checkpoints import export
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation import probe as probe_lib
from omnihuman_jax.evaluation.metrics import mouth, registry
from omnihuman_jax.evaluation.metrics.metric import REAL, TALKING, Generated, Metric, Row
from omnihuman_jax.inference.sampling import Settings
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.models.vae.vae import encoder_sha256, load_vae, save_vae
from tests.experiments import painted
from tests.inference import tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> schema.Dataset:
    return painted.heldout_dataset(tmp_path_factory.mktemp("heldout"))


@pytest.fixture(scope="module")
def good(dataset):
    return painted.evaluate(painted.obedient, dataset)


def test_obeyed_conditions_show_as_a_gap_between_right_and_wrong(good):
    measured = good.result["measures"]
    assert set(measured) == {"mouth", "pose", "colour", "identity", "borders"}  # no features of silence
    assert measured["mouth"]["rows"]["right"]["mean"] > 0.99
    assert measured["mouth"]["rows"]["real"]["mean"] > 0.98
    assert abs(measured["mouth"]["rows"]["wrong"]["mean"]) < 0.6
    assert measured["pose"]["rows"]["right"]["mean"] < 0.5  # half a percent: rounding to bytes
    assert measured["pose"]["rows"]["wrong"]["mean"] > 5
    assert measured["identity"]["rows"]["right"]["mean"] < 0.05 < measured["identity"]["rows"]["wrong"]["mean"]
    for name in ("mouth", "pose", "colour", "identity"):
        assert measured[name]["gap"]["low"] > 0, name


def test_a_generator_that_ignores_its_conditions_shows_no_gap(dataset):
    for name, measure in painted.evaluate(painted.deaf, dataset).result["measures"].items():
        if name == "borders":
            continue
        assert measure["gap"]["mean"] == pytest.approx(0, abs=1e-9)
        assert "no measurable effect" in page.verdict(measure["gap"])


def test_crops_to_the_face_are_not_evaluated(dataset):
    changed = schema.Dataset.open(dataset.directory)
    assert rendered.heldout_indices(changed, painted.FRAMES) == list(range(painted.CLIPS))
    changed.index[1]["view"] = "face"
    assert rendered.heldout_indices(changed, painted.FRAMES) == [0, 2, 3]


def test_each_clip_is_compared_with_another_sentence_and_person(dataset):
    asked = []

    def spy(clips, frames):
        asked.append(clips)
        return painted.obedient(clips, frames)

    painted.evaluate(spy, dataset)
    right, audio, reference, pose, other_pose = asked
    for i in range(painted.CLIPS):
        assert not np.array_equal(audio[i].given["audio"], right[i].given["audio"])
        assert np.array_equal(audio[i].given["reference"], right[i].given["reference"])
        assert not np.array_equal(reference[i].given["reference"], right[i].given["reference"])
        assert np.array_equal(reference[i].given["audio"], right[i].given["audio"])
        assert right[i].seed == audio[i].seed == reference[i].seed  # only the condition differs, not the noise
        assert not np.array_equal(other_pose[i].given["pose"], pose[i].given["pose"])
        assert "pose" not in right[i].given


def test_with_silence_an_obedient_mouth_closes_and_a_deaf_one_does_not(dataset):
    silence = np.zeros((painted.FRAMES, dataset.meta.sizes["audio_dim"]), np.float32)
    for generate, resting in ((painted.obedient, 0.0), (painted.deaf, 0.5)):
        found = painted.evaluate(generate, dataset, metrics=registry.select(["silence"]), silence=silence)
        rows = found.result["measures"]["silence"]["rows"]
        assert rows["right"]["mean"] == pytest.approx(resting, abs=0.05) and rows["right"]["n"] == painted.CLIPS
        assert rows["speech"]["mean"] > 0.4


def test_the_silence_of_an_evaluation_is_that_of_the_data_sets_encoder(dataset):
    found = checkpoint.encode_silence(dataset, 21)
    assert found.shape == (21, 160) and len(np.unique(found)) == 1  # log-mel at its floor
    wave = np.zeros(speech.RATE, np.float32)
    np.testing.assert_array_equal(found, speech.load("log-mel").encode(wave, 21))


def test_evaluation_is_a_function_of_its_seed(dataset, good):
    assert painted.evaluate(painted.obedient, dataset).result == good.result


def test_clips_without_mouth_movement_are_left_out_and_a_still_generated_mouth_counts_as_zero():
    truth = 0.5 + 0.4 * np.sin(np.arange(21))
    assert np.isnan(mouth.correlation(truth, np.full(21, 0.1)))
    assert mouth.correlation(np.full(21, 0.1), truth) == 0


def test_too_few_clips_are_a_note_and_not_a_number(dataset):
    found = painted.evaluate(painted.obedient, dataset, frames=25 + 4)  # longer than any clip
    assert not found.result["measures"] and len(found.result["notes"]) == 3  # the third: no speech encoder


def test_clips_do_not_depend_on_how_they_are_batched():
    model = tiny.network().config
    rng = np.random.default_rng(0)
    clips = [
        rendered.Conditions(
            {
                "reference": rng.standard_normal((4, 4, 4)),
                "text": rng.standard_normal((3, model.text_dim)),
                "audio": rng.standard_normal((frames, model.audio_dim)),
            },
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


def test_only_the_generations_that_the_metrics_need_are_made_and_each_once(dataset):
    asked = []

    def spy(clips, frames):
        asked.append(clips)
        return painted.obedient(clips, frames)

    both = painted.evaluate(spy, dataset, metrics=registry.select(["identity", "colour"]))
    assert list(both.result["measures"]) == ["colour", "identity"]  # in the order of the registry
    assert len(asked) == 2 and all("pose" not in clip.given for clips in asked for clip in clips)
    assert list(both.comparisons) == ["colour"]  # the strips of identity would be the same


def test_a_condition_that_no_clip_can_supply_is_refused():
    for wrong in ({"foreign": "keypoints", "differs_in": "id"}, {"foreign": "pose"}):
        with pytest.raises(ValueError, match="also and foreign are names of conditions"):
            Generated(**wrong)


def brightness(sample) -> float:
    return float(sample.frames.mean())


def test_a_metric_of_the_users_own_is_evaluated_and_shown(dataset, monkeypatch):
    metric = Metric(
        name="brightness",
        title="How <bright> is it?",
        explanation="The mean of all pixels.",
        unit="grey level",
        better="higher",
        eligibility=TALKING,
        rows=(Row("right", "own audio", Generated()), REAL),
        measure=brightness,
    )
    with monkeypatch.context() as patch:
        patch.setitem(registry.METRICS, "brightness", metric)
        found = painted.evaluate(painted.obedient, dataset, metrics=registry.select(["brightness"]))
        text = page.evaluation_section(found.result, {})
        assert "How &lt;bright&gt; is it" in text and page.obeyed(found.result) == ""  # it compares no condition
        assert list(painted.evaluate(painted.obedient, dataset).result["measures"])[-1] == "brightness"
    measured = json.loads(json.dumps(found.result))["measures"]["brightness"]
    assert measured["rows"]["real"]["mean"] == pytest.approx(
        np.mean([c.clip.frames for c in found.comparisons["brightness"]])
    )
    assert "gap" not in measured  # nothing is generated with a wrong condition
    assert "How &lt;bright&gt; is it?" in text and "own audio" in text and "The mean of all pixels." in text
    with pytest.raises(UserError, match="--metrics=brightness: unknown metric"):
        registry.select(["brightness"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny random checkpoint (exported), data that fit it, and a random probe."""
    folder = tmp_path_factory.mktemp("files")
    config = tiny.config(folder, audio_dim=6, text_dim=5)
    shapes = make_network(config).abstract_params
    params = jax.tree.map(lambda shape: np.full(shape.shape, 0.01, shape.dtype), shapes)
    export.save(folder / "checkpoint", config, params, {"step": 9, "stage": "stage3"}, ema=True)
    painted.heldout_dataset(
        folder, encoders={"text": "minilm-l6-v2", "audio": "log-mel"}, vae_sha256=encoder_sha256(config.vae.checkpoint)
    )
    probe_lib.save_probe(folder / "probe.safetensors", painted.PaintedProbe())
    return folder


@pytest.fixture
def run(files, tmp_path):
    """Runs the command in this process with the given flags over sensible ones; returns the output path."""

    def call(checkpoint="checkpoint", data="data", output=None, **options):
        options = {"probe": files / "probe.safetensors", "clips": 2, "frames": 5, "steps": 1} | options
        output = output or tmp_path / "out.json"
        return command.run(str(files / checkpoint), str(files / data), str(output), Options(**options), setup=False)

    return call


def test_the_command_writes_what_the_report_shows(run, tmp_path):
    result = json.loads(run(metrics=("pose",)).read_text())
    assert list(result["measures"]) == ["pose"] and result["measures"]["pose"]["rows"]["right"]["n"] == 2
    assert result["sampling"]["checkpoint of"] == "stage3, step 9 (EMA)" and result["frames"] == 5
    assert "right pose" in page.evaluation_section(result, {})
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 20}, "--frames=20: the VAE makes 1 \\+ 4n frames; try 17"),
        ({"frames": 401}, "fewer than 2 held-out rendered clips of at least 401 frames"),
        ({"metrics": ("mouht",)}, "--metrics=mouht: unknown metric .did you mean 'mouth'"),
        ({"probe": "none.safetensors"}, "probe none.safetensors does not exist"),
        ({"checkpoint": "none"}, "no such checkpoint directory"),
        ({"data": "none"}, "does not exist"),
        ({"output": "/no/such/directory/out.json"}, "make it first"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(checkpoint, "load_parameters", lambda *_: pytest.fail("the parameters were loaded"))
    with pytest.raises(UserError, match=message) as caught:
        run(**options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_data_prepared_for_another_model_are_refused(run, files, tmp_path):
    sha256 = encoder_sha256(files / "vae.safetensors")
    painted.heldout_dataset(tmp_path, vae_sha256=sha256)
    with pytest.raises(UserError, match="text made by random, the checkpoint was trained with minilm-l6-v2"):
        run(data=tmp_path / "data")


def test_another_vae_file_may_be_given_if_its_encoder_is_the_same(run, files, tmp_path):
    sha256 = encoder_sha256(files / "vae.safetensors")
    painted.heldout_dataset(tmp_path, vae_sha256=sha256)
    vae = load_vae(files / "vae.safetensors")
    vae.conv2.bias[...] += 1
    save_vae(tmp_path / "decoder.safetensors", vae)
    with pytest.raises(UserError, match="text made by random"):  # the check that follows the VAE's
        run(data=tmp_path / "data", vae=str(tmp_path / "decoder.safetensors"))
    vae.conv1.bias[...] += 1
    save_vae(tmp_path / "encoder.safetensors", vae)
    with pytest.raises(UserError, match="encoder.safetensors is not the VAE that made the latents"):
        run(data=tmp_path / "data", vae=str(tmp_path / "encoder.safetensors"))
    # A data set of before the digest was the encoder's alone.
    whole = hashlib.sha256((files / "vae.safetensors").read_bytes()).hexdigest()
    (tmp_path / "old").mkdir()
    painted.heldout_dataset(tmp_path / "old", vae_sha256=whole)
    with pytest.raises(UserError, match="text made by random"):
        run(data=tmp_path / "old" / "data")


def test_a_missing_flag_is_one_line_and_exit_status_2():
    words = [sys.executable, "-m", "experiments.evaluate", "--checkpoint=runs/none"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == "error: --data is missing; see --help\n"
