"""experiments.generate and experiments.export as a person runs them."""

import functools
import pathlib
import subprocess
import sys

import av
import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.encoders import text
from data_pipelines.raw import media
from experiments import generate
from experiments.export import export_checkpoint
from omnihuman_jax import conditions
from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.load import load_config
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import generate as generate_lib
from omnihuman_jax.models.functional import Network, make_network
from tests.inference import tiny

RATE = 16_000
LOG_MEL = 160


class FakeText:
    """Token states without the pretrained weights."""

    def encode(self, caption: str) -> np.ndarray:
        return np.full((3, 6), len(caption) / 10, np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A checkpoint (exported, tiny, random), a portrait, sounds, and files of the wrong kind."""
    folder = tmp_path_factory.mktemp("files")
    config = tiny.config(folder, audio_dim=LOG_MEL)
    shapes = make_network(config).abstract_params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape).astype(s.dtype), shapes)
    export.save(folder / "checkpoint", config, params, {"step": 9, "stage": "stage3"}, ema=True)
    Image.fromarray(tiny.portrait(120, 80)).save(folder / "portrait.png")
    wave = 0.3 * np.sin(np.arange(RATE) / 10).astype(np.float32)
    write_wav(folder / "speech.wav", wave[: 2 * RATE // 5])
    write_wav(folder / "empty.wav", wave[:0])
    frames = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)
    media.write_mp4(folder / "silent.mp4", frames)
    media.write_mp4(folder / "sound.mp4", frames, audio=wave)
    np.savez(folder / "pose.npz", keypoints=rng.uniform(size=(10, 28, 3)))
    np.savez(folder / "other.npz", points=np.zeros(3))
    np.savez(folder / "wrong.npz", keypoints=np.zeros((8, 28, 2)))
    (folder / "text.txt").write_text("not a picture")
    return folder


def write_wav(path: pathlib.Path, wave: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        container.start_encoding()  # writes the header, even when no sound follows
        if len(wave):
            frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@functools.cache
def network(files: pathlib.Path) -> Network:
    return make_network(load_config(files / "checkpoint"))


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Runs the command in this process with the given flags over sensible ones; returns the output path."""
    monkeypatch.setattr(text, "load", lambda kind: FakeText())
    # One network object for all runs, so that they share what is compiled.
    monkeypatch.setattr(generate, "make_network", lambda config: network(files))

    def call(**given) -> pathlib.Path:
        base = {"checkpoint": files / "checkpoint", "reference": files / "portrait.png", "output": tmp_path / "out.mp4"}
        paths = {
            name: str(value) if isinstance(value, pathlib.Path) else value for name, value in (base | given).items()
        }
        return generate.run(generate.Options(**paths))

    return call


def probe(path: pathlib.Path) -> dict:
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        sound = container.streams.audio[0] if container.streams.audio else None
        result = {
            "video": (video.codec_context.name, video.pix_fmt, video.height, video.width, float(video.average_rate)),
            "audio": sound and (sound.codec_context.name, sound.rate),
            "audio_seconds": sound and float(sound.duration * sound.time_base),
        }
        result["frames"] = sum(1 for _ in container.decode(video))
    return result


def test_audio_driven_clip_has_picture_and_sound_of_the_recordings_length(run, files, capsys):
    output = run(audio=files / "speech.wav")
    found = probe(output)
    # 0.4 s; the portrait is 120 x 80, so the upright one of the two trained sizes is taken.
    assert found["video"] == ("h264", "yuv420p", 48, 32, 25.0) and found["frames"] == 10
    assert found["audio"] == ("aac", 48_000)
    assert found["audio_seconds"] == pytest.approx(0.4, abs=0.05)
    data = output.read_bytes()
    assert 0 <= data.find(b"moov") < data.find(b"mdat")  # players can start before the end has come
    printed = capsys.readouterr().out
    assert "conditions: text, reference, audio\n" in printed
    assert "10 frames (0.40 s), 48x32, 2 segments of 2 steps" in printed
    assert "a person is talking to the camera" in printed and "no --text given" in printed
    assert "step 9 (stage3), EMA" in printed and f"wrote {output}" in printed and "s per step" in printed


def test_frames_that_are_not_finite_are_not_written(run, files, tmp_path, monkeypatch):
    right = generate_lib.sample_latents
    monkeypatch.setattr(generate_lib, "sample_latents", lambda *args, **kwargs: right(*args, **kwargs) * np.nan)
    with pytest.raises(UserError, match="the latents hold NaN or infinity; use another checkpoint"):
        run(audio=files / "speech.wav")
    assert not list(tmp_path.glob("*.mp4"))


def test_a_pose_video_is_read_as_far_as_the_clip_and_its_keypoints_follow_the_crop(files, monkeypatch):
    class Detector:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def detect(self, frames):
            return np.full((len(frames), 28, 3), 0.5, np.float32)

    monkeypatch.setattr(generate.pose_encoder, "PoseDetector", Detector)
    options = generate.Options(pose=str(files / "silent.mp4"))
    inputs = generate.Inputs(tiny.portrait(48, 32), pose_size=(32, 32))
    assert len(generate.detect_pose(options, inputs, None, 48, 32)) == 5
    assert np.allclose(generate.detect_pose(options, inputs, 3, 48, 32), np.full((3, 28, 3), 0.5))


def test_pose_driven_clip_has_the_poses_length_and_no_sound(run, files, capsys):
    found = probe(run(pose=files / "pose.npz", height=48, width=32))
    assert found["frames"] == 10 and found["audio"] is None and found["video"][2:4] == (48, 32)
    assert "conditions: text, reference, pose\n" in capsys.readouterr().out


def test_conditions_that_were_not_trained_are_said(files):
    config = load_config(files / "checkpoint")
    row = conditions.row(["text", "reference", "audio", "pose"])
    for stage in ("stage1", "stage2", "stage3"):
        config.stages[stage].steps = 5
    assert generate.untrained(config, "stage1", row) == ["audio", "pose"]
    assert generate.untrained(config, "stage2", row) == ["pose"]
    assert generate.untrained(config, "stage3", row) == []
    assert generate.untrained(config, "stage1", conditions.row(["text", "reference"])) == []


def test_text_and_reference_alone_give_one_segment(run, capsys):
    assert probe(run(text="a man waves"))["frames"] == 5  # two latent frames
    printed = capsys.readouterr().out
    assert "text: 'a man waves'\n" in printed and "conditions: text, reference\n" in printed


def test_seconds_overrule_the_recording_and_sound_is_taken_from_a_video(run, files, capsys):
    found = probe(run(audio=files / "sound.mp4", pose=files / "pose.npz", seconds=0.48, steps=1))
    assert found["frames"] == 12 and found["audio_seconds"] == pytest.approx(0.48, abs=0.05)
    printed = capsys.readouterr().out
    assert "conditions: text, reference, audio, pose\n" in printed and "repeating its last frame" in printed


@pytest.mark.slow
def test_tiles_of_the_vae_change_a_clip_a_little(run, tmp_path):
    whole, tiled = (
        media.read_video(run(output=tmp_path / f"{tile}.mp4", height=48, width=64, steps=1, vae_tile=tile)).astype(int)
        for tile in (0, 32)
    )
    assert whole.shape == tiled.shape
    assert 0 < np.abs(whole - tiled).mean() < 20


def test_the_seed_decides_the_clip(run, tmp_path):
    one, again, other = (
        media.read_video(run(output=tmp_path / f"{name}.mp4", seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one.astype(int) - other).max() > 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reference": "missing.png"}, "no such file"),
        ({"reference": "text.txt"}, "not a readable image"),
        ({"audio": "missing.wav"}, "no such file"),
        ({"audio": "text.txt"}, "cannot read"),
        ({"audio": "silent.mp4"}, "has no audio stream"),
        ({"audio": "empty.wav"}, "zero length"),
        ({"pose": "speech.wav"}, "no video stream"),
        ({"pose": "other.npz"}, "no keypoints can be read"),
        ({"pose": "wrong.npz"}, "pose has rows of shape .* reads \\(28, 3\\)"),
        ({"checkpoint": "nowhere"}, "no such checkpoint"),
        ({"height": 40}, "--height=32"),
        ({"seconds": 0.0}, "--seconds=0.0: must be a positive number"),
        ({"steps": 0}, "steps=0"),
        ({"guidance_scale": -1}, "guidance"),
        ({"reference": None}, "--reference is missing"),
        ({"vae_tile": 20}, "--vae_tile=20: must be a multiple of"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(run, files, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr(generate, "load_parameters", lambda *_, **__: pytest.fail("the model was loaded"))
    given = {name: files / value if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(UserError, match=message) as raised:
        run(**given)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_output_places_that_cannot_be_are_refused(run, tmp_path):
    for name, message in (("no/such/out.mp4", "does not exist"), ("out.avi", "must end in .mp4")):
        with pytest.raises(UserError, match=message):
            run(output=tmp_path / name)
    assert not list(tmp_path.iterdir())


def command(module: str, *arguments: str) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=root, capture_output=True, text=True, timeout=200
    )


def test_bad_input_is_one_line_and_exit_status_2(files, tmp_path):
    result = command(
        "experiments.generate",
        f"--checkpoint={files / 'checkpoint'}",
        f"--reference={files / 'portrait.png'}",
        f"--audio={files / 'silent.mp4'}",
        f"--output={tmp_path / 'out.mp4'}",
    )
    assert result.returncode == 2 and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and "has no audio stream" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "stablehlo"}, "safetensors"),
        ({"output": "checkpoint"}, "not an empty directory"),
        ({"output": "no/such"}, "does not exist"),
        ({"checkpoint": "nowhere"}, "no such checkpoint"),
        ({"checkpoint": "checkpoint"}, "is exported already"),
    ],
)
def test_export_names_what_is_wrong(files, tmp_path, arguments, message):
    given = {"checkpoint": "run", "output": str(tmp_path / "out")} | arguments
    given = {name: value if name == "format" else str(files / value) for name, value in given.items()}
    with pytest.raises(UserError, match=message):
        export_checkpoint(given["checkpoint"], given["output"], [given.get("format", "safetensors")])
    assert not list(tmp_path.iterdir())
