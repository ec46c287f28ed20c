"""experiments.train_vae on a few moving shapes: it learns, continues, writes a usable file, and refuses bad input."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from data_pipelines.input_pipeline.video_batches import VideoBatches
from data_pipelines.input_pipeline.video_windows import Bucket, VideoFolder
from data_pipelines.raw import media
from experiments import train_vae
from experiments.configs import demo_vae
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.perceptual import LPIPS
from omnihuman_jax.models.vae.vae import encoder_sha256, is_of_encoder, load_vae, save_vae
from omnihuman_jax.training.tasks import vae_losses, vae_step
from omnihuman_jax.training.tasks.vae import VAETask
from omnihuman_jax.training.tasks.vae_step import latent_noise
from omnihuman_jax.weights.modules import parameters
from tests.training import launch


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips of a disc that moves over a gradient."""
    directory = tmp_path_factory.mktemp("clips")
    rows, columns = np.mgrid[:48, :64]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        colour, start, speed = rng.uniform(0, 255, 3), rng.uniform(10, 38, 2), rng.uniform(-1, 1, 2)
        frames = np.zeros((20, 48, 64, 3))
        for t in range(20):
            inside = np.hypot(rows - start[0] - speed[0] * t, columns - start[1] - speed[1] * t) < 9
            frames[t] = np.where(inside[..., None], colour, (rows * 4)[..., None])
        media.write_mp4(directory / f"{seed}.mp4", frames.astype(np.uint8))
    return directory


def tiny_config(clips, steps: int):
    config = demo_vae.get_config()
    config.steps = steps
    # From scratch: the principal components would leave 30 steps little to learn.
    config.vae.update({"dim": 8, "z_dim": 4, "dim_mult": (1, 1, 1), "linear_path": False, "linear_context": 0})
    config.data.update({"dir": str(clips), "buckets": ((5, 16, 16, 8, 1.0),)})
    config.evaluation.update({"every": 1000, "frames": 5, "height": 16, "width": 16, "clips": 2})
    config.optimizer.update({"learning_rate": 5e-3, "warmup_steps": 5})
    config.checkpoint.every = 15
    config.log_every = 1
    config.output.update({"statistics_clips": 4, "spectrum": 0.0})
    return config


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    """A run of 30 steps."""
    workdir = tmp_path_factory.mktemp("run")
    train_vae.train(tiny_config(clips, 30), workdir)
    return workdir


@pytest.mark.slow
def test_a_linear_path_starts_the_run_at_the_principal_components(trained, clips, tmp_path):
    config = tiny_config(clips, 1)
    config.vae.linear_path = True
    train_vae.train(config, tmp_path / "run")
    assert metrics(tmp_path / "run")[0]["loss"] < 0.8 * metrics(trained)[0]["loss"]


def test_training_lowers_the_loss_and_reports_held_out_psnr(trained):
    lines = metrics(trained)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert lines[-1]["heldout_clips"] == 2 and lines[-1]["heldout_psnr"] > 8
    assert json.loads((trained / "config.json").read_text())["steps"] == 30


def test_the_written_file_has_the_statistics_of_its_latents(trained, clips):
    vae = load_vae(trained / "vae.safetensors")
    assert len(vae.config.latent_mean) == 4 and min(vae.config.latent_std) > 0
    folder = VideoFolder(clips)
    bucket = Bucket(5, 16, 16, 1)
    windows = np.concatenate([folder.batch([bucket], 1, i, min_scale=1.0) for i in range(4)])
    latents = np.asarray(jax.jit(vae.encode)(windows)).reshape(-1, 4)
    np.testing.assert_allclose(latents.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(latents.std(0), 1, atol=0.05)


def test_with_a_spectrum_channels_keep_variance_by_what_they_show(trained, clips):
    config = tiny_config(clips, 30)
    config.output.spectrum = 0.5
    task = VAETask(config, VideoBatches(config), trained / "unused.safetensors")
    vae = load_vae(trained / "vae.safetensors")
    _, scale = task.statistics(nnx.to_pure_dict(nnx.state(vae)))
    kept = np.array(vae.config.latent_std) / np.array(scale)  # deviation of each channel after normalisation
    np.testing.assert_allclose(np.mean(kept**2), 1, rtol=0.05)
    # Independent: a channel replaced by its mean in whole windows, one at a time.
    windows = [jnp.asarray(v) for v in VideoBatches(config).windows("train", 2, (5, 16, 16))]
    shown = np.zeros(4)
    for z in map(vae.encode, windows):
        shown += [np.square(np.asarray(vae.decode(z.at[..., k].set(0)) - vae.decode(z))).mean() for k in range(4)]
    expected = shown**0.25
    np.testing.assert_allclose(kept, expected / np.sqrt(np.mean(expected**2)), rtol=0.1)


def test_a_channel_that_shows_nothing_keeps_a_finite_scale(trained, clips):
    config = tiny_config(clips, 30)
    config.output.spectrum = 0.5
    task = VAETask(config, VideoBatches(config), trained / "unused.safetensors")
    vae = load_vae(trained / "vae.safetensors")
    vae.conv2.kernel[..., 1, :] = 0
    _, scale = task.statistics(nnx.to_pure_dict(nnx.state(vae)))
    assert np.isfinite(scale).all() and scale[1] > max(scale[0], scale[2], scale[3])


@pytest.mark.parametrize("unit", [None, (0.5, 2.0)])
def test_latent_noise_is_of_one_size_a_clip_in_units_of_each_channel(unit):
    mean = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3, 8, 8, 2)) * [1.0, 3.0])
    noise = np.asarray(latent_noise(jax.random.key(3), mean, unit, 0.5)) / (unit or np.asarray(mean).std((0, 1, 2, 3)))
    sizes = noise.std((1, 2, 3))  # (clip, channel)
    np.testing.assert_allclose(sizes[:, 0], sizes[:, 1], rtol=0.4)
    assert sizes.max() < 0.6 and sizes.min() < 0.1 and abs(sizes.mean() - 0.25) < 0.05


def test_a_decoder_is_trained_on_the_encoder_of_a_file(trained, clips, tmp_path):
    # In float32, as an imported VAE is; the run writes float16.
    source, vae = tmp_path / "source.safetensors", load_vae(trained / "vae.safetensors")
    vae.conv1.bias[...] += 1e-4
    save_vae(source, vae)
    config = tiny_config(clips, 3)
    config.encoder_from, config.seed = str(source), 7
    train_vae.train(config, tmp_path / "run")
    made = tmp_path / "run" / "vae.safetensors"
    before, after = (load_vae(path) for path in (source, made))
    assert encoder_sha256(made) == encoder_sha256(source)
    assert after.config.latent_std == before.config.latent_std
    old, new = parameters(before), parameters(after)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed and not any(is_of_encoder(name) for name in changed)
    assert all(is_of_encoder(name) or name in changed for name in old if name.endswith("kernel"))

    config.encoder_from = str(trained / "vae.safetensors")
    with pytest.raises(UserError, match="encoder_from=.*started with another encoder"):
        train_vae.train(config, tmp_path / "run")
    config.encoder_from = str(source)

    config.vae.z_dim = 5
    with pytest.raises(UserError, match=r"encoder_from=.*source\.safetensors: conv1\.bias is \(8,\), the config needs"):
        train_vae.train(config, tmp_path / "other")


def written(workdir):
    """What vae.safetensors says of itself, and the bytes of its tensors."""
    with safe_open(workdir / "vae.safetensors", framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def troubled(monkeypatch, trouble):
    """Batches that `trouble(step, batch)` looks at, and may replace, when the loop gets them."""
    right = VideoBatches.iterate

    def iterate(self, first_step, rows):
        for step, batch in enumerate(right(self, first_step, rows), start=first_step):
            changed = trouble(step, batch)
            yield batch if changed is None else changed

    monkeypatch.setattr(VideoBatches, "iterate", iterate)


def test_a_run_that_fails_continues_bit_for_bit_as_if_it_had_not(trained, clips, tmp_path, monkeypatch):
    def fail(step, _):
        if step == 18:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        troubled(patch, fail)
        with pytest.raises(KeyboardInterrupt):
            train_vae.train(tiny_config(clips, 30), tmp_path)
    train_vae.train(tiny_config(clips, 30), tmp_path)
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == [*range(1, 17), *range(16, 31)]  # the line of the step under way is not written
    assert losses(tmp_path) == losses(trained) and written(tmp_path) == written(trained)


def test_a_stop_signal_saves_and_the_run_continues_bit_for_bit(trained, clips, tmp_path, monkeypatch, capsys):
    def stop(step, _):
        if step == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        troubled(patch, stop)
        train_vae.train(tiny_config(clips, 30), tmp_path)
    assert "stopped by SIGTERM after step 17 of 30" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "17").is_dir() and not (tmp_path / "vae.safetensors").exists()
    train_vae.train(tiny_config(clips, 30), tmp_path)
    assert "after step 17 of 30, in reconstruction: parameters, optimizer" in capsys.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, 31))
    assert losses(tmp_path) == losses(trained) and written(tmp_path) == written(trained)


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(clips, tmp_path, monkeypatch, capsys):
    config = tiny_config(clips, 8)
    config.checkpoint.every = 2
    config.faults.max_bad_steps = 2
    troubled(monkeypatch, lambda step, batch: np.full_like(batch, np.nan) if step in (3, 6, 7) else None)
    with pytest.raises(
        UserError, match=r"step 7: loss nan.*records .*\.mp4.*2 steps in a row were not finite .*checkpoints/\d;"
    ):
        train_vae.train(config, tmp_path)
    said, log = capsys.readouterr().out, metrics(tmp_path)
    assert "step 3: loss nan" in said and "skipped (1 in a row, 1 since the start)" in said
    assert [line["skipped_steps"] for line in log] == [0, 0, 1, 1, 1, 2]
    assert [line["loss"] is None for line in log] == [False, False, True, False, False, True]


def train_in_two_processes(workdir, config, *arguments):
    """Runs the command in two processes of 8 simulated devices, on the config that a function of this file returns."""
    preset = workdir.with_suffix(".py")
    call = f"{config.__name__}({', '.join(map(repr, arguments))})"
    preset.write_text(
        f"from tests.experiments.test_train_vae import {config.__name__}\n\n\ndef get_config():\n    return {call}\n"
    )
    command = ["experiments.train_vae", f"--config={preset}", "--config.simulated_devices=8"]
    started = launch.start_command(command, workdir, processes=2)
    assert launch.wait(started) == [0, 0], launch.log(workdir)[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one(trained, clips, tmp_path):
    train_in_two_processes(tmp_path / "two", tiny_config, str(clips), 30)
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-3)
    assert load_vae(tmp_path / "two" / "vae.safetensors").config.z_dim == 4


def linear_config(clips):
    config = tiny_config(clips, 3)
    config.vae.update({"linear_path": True, "linear_context": 1})
    config.output.spectrum = 0.5
    return config


@pytest.mark.slow
def test_two_processes_fit_the_linear_path_and_the_statistics_as_one(clips, tmp_path):
    train_in_two_processes(tmp_path / "two", linear_config, str(clips))
    train_vae.train(linear_config(clips), tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    one, two = (load_vae(tmp_path / name / "vae.safetensors").config for name in ("one", "two"))
    assert two.latent_std == pytest.approx(one.latent_std, rel=0.02)


def test_a_finished_run_of_another_vae_is_refused(trained, clips):
    config = tiny_config(clips, 30)
    config.vae.dim = 16
    with pytest.raises(UserError, match="checkpoint of another VAE"):
        train_vae.train(config, trained)


def test_batches_depend_on_seed_and_step_alone(clips):
    buckets = [Bucket(5, 32, 32, 2, 0.5), Bucket(1, 48, 32, 3, 0.5)]
    one, other = VideoFolder(clips), VideoFolder(clips, cache_bytes=0)
    shapes = set()
    for step in range(6):
        batch = one.batch(buckets, 3, step, min_scale=0.5)
        np.testing.assert_array_equal(batch, other.batch(buckets, 3, step, min_scale=0.5))
        assert batch.dtype == np.float32 and np.abs(batch).max() <= 1
        shapes.add(batch.shape)
    assert shapes == {(2, 5, 32, 32, 3), (3, 1, 48, 32, 3)}


def test_long_files_are_read_by_seeking_to_the_same_frames(clips, monkeypatch):
    whole, parts = VideoFolder(clips), VideoFolder(clips)
    path = whole.splits["train"][0][0]
    expected = whole.read(path, 7, 5)
    monkeypatch.setattr("data_pipelines.input_pipeline.video_windows._WHOLE_CLIP_BYTES", 0)
    np.testing.assert_array_equal(parts.read(path, 7, 5), expected)
    assert len(parts.read(path, 18, 5)) == 5


def test_a_directory_s_own_list_says_what_is_held_out(clips, tmp_path):
    (tmp_path / "clips").mkdir()
    for path in clips.iterdir():
        (tmp_path / "clips" / path.name).write_bytes(path.read_bytes())
    rows = [{"file": "clips/2.mp4", "split": "heldout"}, {"file": "clips/0.mp4", "split": "train"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"clips": rows}))
    folder = VideoFolder(f"{tmp_path}, {clips}", heldout=0.0)
    assert [p.name for p in folder.splits["heldout"][0]] == ["2.mp4"]
    assert len(folder.splits["heldout"][1]) == 1 and folder.count("train") == 3 + 3


def test_large_frames_are_shrunk_for_the_cache(clips):
    folder = VideoFolder(clips, short_side=24)
    assert folder.read(folder.splits["train"][0][0], 0, 3).shape == (3, 24, 32, 3)


def test_the_edge_term_weighs_structure_that_pixels_hardly_see():
    target = jnp.zeros((1, 1, 16, 16, 3))
    flat, line = target + 1 / 16, target.at[:, :, 8].set(1.0)
    flat_terms, line_terms = (vae_losses.reconstruction_losses(target, x, 1) for x in (flat, line))
    assert float(flat_terms["l1"]) == pytest.approx(float(line_terms["l1"]))
    assert float(flat_terms["edge"]) == pytest.approx(0, abs=1e-6) and float(line_terms["edge"]) > 0.05


def test_kl_and_psnr_against_their_formulas():
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    expected = np.mean(0.5 * (mean**2 + np.exp(logvar) - 1 - logvar))
    assert float(vae_losses.kl_divergence(jnp.asarray(mean), jnp.asarray(logvar))) == pytest.approx(expected, rel=1e-5)
    video = jnp.zeros((1, 1, 4, 4, 3))
    assert float(vae_losses.psnr(video, video + 0.2)[0]) == pytest.approx(20.0, abs=1e-3)


@pytest.mark.slow
def test_the_adversarial_term_trains_both_networks(clips, tmp_path):
    config = tiny_config(clips, 6)
    config.adversarial.update({"weight": 0.1, "start_step": 3, "width": 8})
    train_vae.train(config, tmp_path)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert ["critic" in line for line in lines] == [False] * 3 + [True] * 3
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.buckets": ((4, 16, 16, 8, 1.0),)}, "4 frames"),
        ({"data.buckets": ((5, 20, 16, 8, 1.0),)}, "20x16 pixels"),
        ({"data.buckets": ((5, 16, 16, 3, 1.0),)}, "not divisible by the 8 devices"),
        ({"data.buckets": ((5, 16, 16, 8),)}, "is not"),
        ({"data.dir": "nowhere"}, "no such directory"),
        ({"data.exclude": r"[0-2]\.mp4"}, "at least 2 are needed"),
        ({"data.exclude": "["}, "not a regular expression"),
        ({"data.heldout": 1.0}, "all 4 videos are held out"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(clips, tmp_path, change, message):
    config = tiny_config(clips, 2)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        train_vae.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_broken_video_is_named(clips, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    folder = VideoFolder(tmp_path)
    with pytest.raises(UserError, match=r"[ab]\.mp4"):
        folder.batch([Bucket(1, 16, 16, 1)], 0, 0, min_scale=1.0)


def test_the_command_reports_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.train_vae", "--config=experiments/configs/demo_vae.py"]
    result = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        result.stderr.strip() == "error: data.dir is empty; set --config.data.dir=DIR to a directory with video files"
    )


@pytest.mark.slow
def test_lpips_joins_the_loss_where_its_weights_are_given(clips):
    config, video = tiny_config(clips, 1), np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
    state = nnx.state(LPIPS((2, 2, 2, 2, 2), rngs=nnx.Rngs(0)))
    assert float(vae_losses.perceptual_distance(state, video, video)) == 0
    assert float(vae_losses.perceptual_distance(state, video, -video)) > 0
    step, train_state = vae_step.make_train_step(config), jax.eval_shape(lambda: vae_step.create_state(config))
    assert "lpips" in jax.eval_shape(step, train_state, video, state)[1]
    assert "lpips" not in jax.eval_shape(step, train_state, video)[1]
