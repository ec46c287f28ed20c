"""Bad input to experiments.train: one line, exit status 2, nothing written. And what its defaults are."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from data_pipelines import schema
from data_pipelines.input_pipeline.pipeline import InputPipeline
from experiments import train
from experiments.common import cli
from experiments.configs import base, demo
from omnihuman_jax.errors import UserError
from omnihuman_jax.training import config_ranges
from omnihuman_jax.training.stages import curriculum
from tests.data_pipelines.fake_dataset import fake_meta, write_fake_dataset
from tests.training.tiny import tiny_config

PRESET = "experiments/configs/demo.py"


def run(*flags):
    return subprocess.run([sys.executable, "-m", "experiments.train", *flags], capture_output=True, text=True)


def test_a_missing_data_directory_is_one_line_and_status_2(tmp_path):
    workdir = tmp_path / "run"
    done = run(f"--config={PRESET}", f"--workdir={workdir}", f"--config.data.dir={tmp_path}/nothing")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(errors) == 1 and "does not exist" in errors[0]
    assert not workdir.exists()


def test_a_misspelt_override_is_one_line_and_status_2(tmp_path):
    done = run(f"--config={PRESET}", f"--workdir={tmp_path}/run", "--config.stages.stage3.ratio.audio=0.1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "did you mean 'stages.stage3.ratios'" in done.stderr


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'demo'"):
        cli.load_preset("experiments/configs/dmo.py")


def test_a_presets_argument_is_the_recipe():
    assert cli.load_preset(f"{PRESET}:v2").stages.stage3.ratios.pose == 0.5


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("global_batchsize", "did you mean 'global_batch_size'"),
        ("model.hiden_size", "did you mean 'model.hidden_size'"),
        ("seed.x", "seed has no keys below it"),
    ],
)
def test_unknown_keys_name_the_nearest(key, message):
    with pytest.raises(UserError, match=message):
        cli.check_key(demo.get_config(), key)


def test_features_of_another_width_than_the_models_are_refused(tmp_path):
    dataset = write_fake_dataset(tmp_path / "data")
    with pytest.raises(UserError, match=r"model.latent_channels=16, but the data set .* has 4"):
        schema.check_sizes(dataset, demo.get_config().model)


def test_ratios_that_the_clips_cannot_give_are_refused_before_training(tmp_path):
    dataset = write_fake_dataset(tmp_path / "data", 3, shapes=((7, 4, 4), (7, 6, 4), (7, 4, 6)), pose_share=0)
    config = tiny_config(tmp_path / "data")
    index = [entry | {"audio": False} for entry in dataset.index]
    dataset.index[:] = index
    with pytest.raises(UserError, match=r"stages.stage2.ratios.audio=0.5: the clips at hand reach at most 0"):
        InputPipeline.from_config(config, curriculum(config), dataset)


def test_samples_show_whole_clips_even_if_only_crops_are_held_out(tmp_path):
    dataset = write_fake_dataset(tmp_path / "data", 6, audio_share=1.0, heldout=3)
    config, held = tiny_config(tmp_path / "data"), [e for e in dataset.index if e["split"] == "heldout"]

    def shown():
        return {record["id"] for record in train.SampleVideos(config, dataset, None, tmp_path)._records}

    assert shown() <= {entry["id"] for entry in held}
    for entry in held:
        entry["view"] = "face"
    found = shown()
    assert found and not found & {entry["id"] for entry in held}


def test_compiled_programs_are_kept_by_default(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    cli.setup_platform(base.get_config())
    assert updates["jax_compilation_cache_dir"] == str(Path("cache/jax").absolute())


def test_compute_is_bfloat16_on_float32_parameters_by_default():
    model = base.get_config().model
    assert (model.dtype, model.param_dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(("key", "value"), [("keep", 0), ("keep", -1), ("every", 0), ("keep_every", -2)])
def test_intervals_that_mean_nothing_are_refused(key, value):
    config = demo.get_config()
    config.checkpoint[key] = value
    with pytest.raises(UserError, match=f"checkpoint.{key}={value}: must be"):
        config_ranges.check(config)


def test_a_number_out_of_its_range_is_one_line_and_status_2(tmp_path):
    flags = ("--config.optimizer.eps=nan", f"--config.data.dir={tmp_path}")
    done = run(f"--config={PRESET}", f"--workdir={tmp_path}/run", *flags)
    assert done.returncode == 2
    assert done.stderr == "error: optimizer.eps=nan: must be a finite number above 0\n"
    assert not (tmp_path / "run").exists()


def test_a_stage_that_has_begun_no_longer_needs_what_it_started_from(tmp_path):
    config = demo.get_config()
    config.stages.stage1.init_from = str(tmp_path / "gone")
    with pytest.raises(UserError, match="gone"):
        train.check_start(config, curriculum(config), tmp_path)
    (tmp_path / "checkpoints" / "100" / "meta").mkdir(parents=True)
    train.check_start(config, curriculum(config), tmp_path)


def test_another_network_or_other_features_than_those_of_the_base_are_told(tmp_path):
    config = demo.get_config()
    config.model.audio_dim = 160
    with pytest.raises(UserError, match=r"model.audio_dim=384 there, 160 here.*stages.stage1.init_from \(empty"):
        train.check_start(config, curriculum(config), tmp_path)
    config.model.audio_dim = 384
    (start,) = train.check_start(config, curriculum(config), tmp_path).values()
    meta = fake_meta()
    assert train.other_features(start, meta)[0] == "latents of another VAE"
    same = dataclasses.replace(meta, vae_sha256=start.dataset.vae_sha256, encoders=dict(start.dataset.encoders))
    assert train.other_features(start, same) == []
    other = dataclasses.replace(same, encoders={"text": "states", "audio": "whisper-tiny.en"})
    assert train.other_features(start, other) == ["text features of minilm-l6-v2, not states"]


def test_what_a_named_stage_is_to_load_is_looked_at_before_training(tmp_path):
    config = demo.get_config()
    config.stages.stage3.init_from = str(tmp_path / "gone")
    with pytest.raises(UserError, match="would not be loaded"):
        train.check_start(config, curriculum(config), tmp_path)
    with pytest.raises(UserError, match="gone: no such checkpoint"):
        train.check_start(config, curriculum(config), tmp_path, ["stage3"])
    (tmp_path / "checkpoints" / "1" / "meta").mkdir(parents=True)
    with pytest.raises(UserError, match="gone: no such checkpoint"):
        train.check_start(config, curriculum(config), tmp_path, ["stage3"])
    train.check_start(config, curriculum(config), tmp_path)
