"""A condition is added without touching a file of the project: `gaze.py` beside this one is all there is of it."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from data_pipelines.raw import manifest, media
from data_pipelines.schema import Dataset
from omnihuman_jax.models.vae.vae import VAE, VAEConfig, save_vae

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLUGIN = "--plugins=tests.extending.gaze"
FRAMES, CLIPS = 9, 8
RATIOS = {"text": 0.9, "reference": 0.7, "audio": 0.5, "gaze": 0.4, "pose": 0.25}


def command(*words, plugin=True):
    """`python -m words…` with the plug-in, in a process of its own: it changes the table of conditions."""
    words = [str(word) for word in words] + [PLUGIN] * plugin
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def succeed(*words, **options):
    done = command(*words, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def directions(clip: int) -> np.ndarray:
    angle = np.linspace(0, 1, FRAMES) + clip
    return np.stack([np.sin(angle), np.zeros(FRAMES), np.cos(angle)], -1).astype(np.float32)


def make_raw(folder: pathlib.Path) -> None:
    """Clips with speech and exact keypoints; the last two have no gaze."""
    rng, entries = np.random.default_rng(0), []
    for i in range(CLIPS):
        frames = rng.integers(0, 255, (FRAMES, 32, 32, 3), np.uint8)
        sound = 0.3 * np.sin(np.arange(FRAMES * 640) * 0.3).astype(np.float32)
        media.write_mp4(folder / f"{i}.mp4", frames, audio=sound)
        notes = {"keypoints": rng.uniform(0.2, 0.8, (FRAMES, 28, 3)).astype(np.float32)}
        np.savez(folder / f"{i}.npz", **notes, **({"gaze": directions(i)} if i < CLIPS - 2 else {}))
        entries.append({"id": str(i), "file": f"{i}.mp4", "caption": "someone", "annotations": f"{i}.npz"})
    manifest.write_manifest(folder, "made", entries)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Prepared data and two steps of stage 3 with gaze, by the commands; (folder, what preparing and training said)."""
    root = tmp_path_factory.mktemp("gaze")
    make_raw(root / "raw")
    vae = VAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, z_dim=4)
    save_vae(root / "vae.safetensors", VAE(vae, rngs=nnx.Rngs(0)))
    captions = {"0": np.ones((3, 5), np.float32)}
    save_file(captions, root / "text.safetensors", {"captions": json.dumps(["someone"])})
    prepared = succeed(
        "data_pipelines.prepare", f"--input={root / 'raw'}", f"--output={root / 'data'}", "--pose=none",
        f"--vae={root / 'vae.safetensors'}", f"--text_encoder=states:{root / 'text.safetensors'}",
        "--audio_encoder=log-mel", "--sizes=32x32", f"--clip_frames={FRAMES}",
    )  # fmt: skip
    audio_dim = Dataset.open(root / "data").meta.sizes["audio_dim"]
    said = succeed(
        "experiments.train", f"--config=tests/training/tiny_preset.py:{root / 'data'}", f"--workdir={root / 'run'}",
        f"--config.model.audio_dim={audio_dim}", f"--config.vae.checkpoint={root / 'vae.safetensors'}",
        "--config.stages.stage1.steps=0", "--config.stages.stage2.steps=0", "--config.stages.stage3.steps=2",
        *(f"--config.stages.stage3.ratios.{name}={ratio}" for name, ratio in RATIOS.items()),
    )  # fmt: skip
    return root, prepared, said


def test_records_hold_it_where_a_clip_has_it(trained):
    root, prepared, _ = trained
    columns, counts = (line.split() for line in prepared.splitlines() if line.startswith(("source", "made")))
    assert dict(zip(columns, counts, strict=False))["gaze"] == str(CLIPS - 2)
    data = Dataset.open(root / "data")
    assert [entry["gaze"] for entry in data.index] == [True] * (CLIPS - 2) + [False] * 2
    np.testing.assert_array_equal(data.read(1)["gaze"], directions(1))
    assert data.read(CLIPS - 1)["gaze"].shape == (0, 3)


def test_it_trains_at_its_own_ratio_and_is_logged_and_audited(trained):
    root, _, _ = trained
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(np.isfinite(line["loss"]) for line in lines)
    assert list(lines[-1]["active_ratio"]) == list(RATIOS)
    for name, ratio in RATIOS.items():
        assert abs(lines[-1]["active_ratio"][name] - ratio) <= 2 / 16
    assert any("gaze" in line["loss_by_condition"] for line in lines)
    assert lines[-1]["grad_norm_by_part"]["gaze"] > 0
    audit = [json.loads(line) for line in (root / "run/data_log.jsonl").read_text().splitlines()]
    rows = [(record, active) for step in audit for record, active in zip(step["records"], step["active"], strict=True)]
    assert any("gaze" in active for _, active in rows)
    without = {f"made/{i}" for i in (CLIPS - 2, CLIPS - 1)}
    assert not [record for record, active in rows if "gaze" in active and record in without]


def generate(root, checkpoint, output, *words, **options):
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(root / "portrait.png")
    np.savez(root / "gaze.npz", gaze=directions(3))
    return command(
        "experiments.generate", f"--checkpoint={root / checkpoint}", f"--reference={root / 'portrait.png'}",
        "--text=someone", "--height=32", "--width=32", "--seconds=0.36", "--steps=2", f"--output={root / output}",
        *words,
        **options,
    )  # fmt: skip


def test_it_drives_a_clip_or_not_from_a_checkpoint_and_from_an_export(trained):
    root, _, _ = trained
    succeed("experiments.export", f"--checkpoint={root / 'run'}", f"--output={root / 'exported'}")
    with_gaze = generate(root, "exported", "with.mp4", f"--tracks=gaze={root / 'gaze.npz'}")
    assert with_gaze.returncode == 0 and "conditions: text, reference, gaze" in with_gaze.stdout, with_gaze.stderr[
        -2000:
    ]
    plain = generate(root, "run", "without.mp4")
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert "conditions: text, reference\n" in plain.stdout
    assert media.read_video(root / "with.mp4").shape == media.read_video(root / "without.mp4").shape == (9, 32, 32, 3)


@pytest.mark.parametrize("checkpoint", ["run", "exported"])
def test_without_the_plug_in_a_checkpoint_says_what_is_missing(trained, checkpoint):
    root, _, _ = trained
    if checkpoint == "exported" and not (root / "exported").exists():
        succeed("experiments.export", f"--checkpoint={root / 'run'}", f"--output={root / 'exported'}")
    done = generate(root, checkpoint, "none.mp4", plugin=False)
    assert done.returncode == 2 and done.stderr.count("\n") <= 2
    assert "gaze" in done.stderr and "--plugins" in done.stderr and not (root / "none.mp4").exists()


def test_a_run_is_not_continued_without_the_plug_in_and_nothing_is_moved(trained):
    root, _, _ = trained
    before = sorted(path.name for path in (root / "run" / "checkpoints").iterdir())
    done = command(
        "experiments.train", f"--config=tests/training/tiny_preset.py:{root / 'data'}", f"--workdir={root / 'run'}",
        "--config.model.audio_dim=160", plugin=False,
    )  # fmt: skip
    assert done.returncode == 2 and "trained with the conditions text, reference, audio, gaze, pose" in done.stderr
    assert sorted(path.name for path in (root / "run" / "checkpoints").iterdir()) == before
    assert not (root / "run" / "damaged").exists()
