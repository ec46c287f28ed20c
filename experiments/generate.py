"""Generates a talking or moving person from a portrait.

python -m experiments.generate --checkpoint=DIR --reference=IMAGE [--audio=FILE] [--pose=VIDEO] [--text=…] \
    [--seconds=…] [--height=… --width=…] [--seed=…] --output=FILE.mp4

Audio drives the speech and pose the movement; without both, the clip follows text and reference.
"""

import dataclasses
import math
import time
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.encoders import pose as pose_encoder
from data_pipelines.encoders import speech, text
from data_pipelines.raw import media
from experiments.common import cli, files
from omnihuman_jax import conditions
from omnihuman_jax.checkpoints.load import load_config, load_parameters
from omnihuman_jax.diffusion import guidance, sampler
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS, pixel_frames
from omnihuman_jax.inference import images, segments
from omnihuman_jax.inference.generate import Request, check_request, generate, pixel_multiple
from omnihuman_jax.inference.portrait import read_portrait
from omnihuman_jax.inference.sampling import Settings
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.models.vae.streaming import Tiling
from omnihuman_jax.models.vae.vae import load_vae
from omnihuman_jax.pixels import to_pixels

OUTPUT_RATE = 48_000  # of the output's sound, in Hz; the encoder's 16 kHz would sound dull


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of the flags of the same names, which describe them. None means the default."""

    checkpoint: str | None = None
    reference: str | None = None
    output: str | None = None
    audio: str | None = None
    pose: str | None = None
    text: str | None = None
    tracks: list[str] = dataclasses.field(default_factory=list)
    seconds: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    steps: int | None = None
    solver: str = "euler"
    guidance_scale: float | None = None
    final_guidance_scale: float | None = None
    guidance_mode: str | None = None
    text_guidance_scale: float | None = None
    ema: bool | None = None
    vae: str | None = None
    vae_tile: int = 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The content of the input files. `tracks`: condition -> rows (F, ...) of .npz files, from --pose and --tracks."""

    image: np.ndarray  # uint8 (h, w, 3)
    wave: np.ndarray | None = None  # mono sound (N,) at 16 kHz for the speech encoder
    sound: np.ndarray | None = None  # the same at `OUTPUT_RATE` for the output
    tracks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pose_size: tuple[int, int] | None = None  # (height, width) of the pose video


def read_reference(path: str) -> np.ndarray:
    """A picture as uint8 RGB (h, w, 3); UserError, naming the flag, if it cannot be read."""
    try:
        return read_portrait(path)
    except UserError as error:
        raise UserError(f"--reference={error}") from error


def read_track(flag: str, name: str, path: str) -> np.ndarray:
    """The track of a condition from an .npz file, float32 (F, ...): the array named like its array in a record.

    Raises UserError if the condition is no track, or the file has no such array or one of another shape.
    """
    condition = conditions.get(name)
    if condition.kind is not conditions.Kind.TRACK:
        raise UserError(f"{flag}: {name} has no row per frame; use its own flag")
    where, field = f"{flag}={path}", condition.record
    try:
        with np.load(path, allow_pickle=False) as file:
            rows = np.asarray(file[field], np.float32)
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{where}: no {field} can be read ({error}); give an .npz with `{field}` (F,...)") from error
    if rows.ndim != 1 + len(condition.row) or not len(rows) or not np.isfinite(rows).all():
        raise UserError(f"{where}: {field} has shape {rows.shape}; give finite rows, one per frame, at least 1")
    return rows


def check_options(options: Options) -> None:
    """Raises UserError for a flag that is missing or invalid."""
    cli.check_given(checkpoint=options.checkpoint, reference=options.reference, output=options.output)
    if Path(options.output).suffix.lower() != ".mp4":
        raise UserError(f"--output={options.output}: the name must end in .mp4")
    files.check_output(options.output)
    if options.seconds is not None and not (math.isfinite(options.seconds) and options.seconds > 0):
        raise UserError(f"--seconds={options.seconds}: must be a positive number")


def read_inputs(options: Options) -> Inputs:
    """Reads the input files; UserError if one cannot be read."""
    image, wave, sound, tracks, pose_size = read_reference(options.reference), None, None, {}, None
    if options.audio:
        wave, sound = (media.read_audio(options.audio, rate=rate) for rate in (media.AUDIO_RATE, OUTPUT_RATE))
    for item in options.tracks:
        name, _, path = item.partition("=")
        tracks[name] = read_track("--tracks", name, path)
    if options.pose and Path(options.pose).suffix.lower() == ".npz":
        tracks["pose"] = read_track("--pose", "pose", options.pose)
    elif options.pose:
        pose_size = next(media.iter_video(options.pose)).shape[:2]  # also checks that the video can be read
        pose_encoder.interpreter()  # fails now if it is not installed
    return Inputs(image, wave, sound, tracks, pose_size)


def trained_sizes(config: ConfigDict, multiple: int) -> list[tuple[int, int]]:
    """Trained sizes (height, width) in pixels: those of the data set or, if unknown, of the preset's buckets."""
    shapes = config.get("dataset", {}).get("shapes") or config.plan.buckets
    factor = multiple // config.model.patch_size[1]
    return sorted({(rows * factor, columns * factor) for _, rows, columns in shapes})


def default_text(given: Collection[str]) -> str:
    """The caption if none is given: turning a condition on turns on the weaker ones, including text."""
    if "audio" in given:
        return "a person is talking to the camera"
    return "a person is moving" if set(conditions.selecting()) & set(given) else "a person"


def encoder_name(options: Options, config: ConfigDict, condition: str) -> str:
    """The encoder of a checkpoint's training data; its model cannot use the features of another one."""
    name = config.get("dataset", {}).get("encoders", {}).get(condition)
    if not name:
        where = f"--checkpoint={options.checkpoint}"
        raise UserError(f"{where}: does not name its {condition} encoder; use a checkpoint of experiments.train")
    return name


def detect_pose(options: Options, inputs: Inputs, frames: int | None, height: int, width: int) -> np.ndarray:
    """Keypoints (F, K, 3) of at most `frames` frames of the pose video, cropped to the output like the reference.

    Raises UserError if no person is found in the video.
    """
    print(f"pose: detecting keypoints in {options.pose}")
    video = media.read_video(options.pose, end=None if frames is None else frames / FPS)
    with pose_encoder.PoseDetector() as detector:
        points = detector.detect(video)
    if not len(points):
        raise UserError(f"--pose={options.pose}: most of its frames show no person; give a video of one person")
    return images.cover_points(points, inputs.pose_size, height, width)


def build_request(options: Options, inputs: Inputs, config: ConfigDict, height: int, width: int) -> Request:
    """Encodes the inputs with the encoders of the checkpoint's data."""
    frames = None
    if options.seconds is not None:
        frames = max(1, round(options.seconds * FPS))
    elif inputs.wave is not None:
        frames = max(1, round(len(inputs.wave) / media.AUDIO_RATE * FPS))
    given = dict(inputs.tracks)
    if inputs.pose_size is not None:
        given["pose"] = detect_pose(options, inputs, frames, height, width)
    frames = frames or max(map(len, given.values()), default=pixel_frames(config.data.latent_frames))
    for name, track in given.items():
        if len(track) < frames:
            print(f"{name}: ends after {len(track) / FPS:.2f} s; repeating its last frame")
    if inputs.wave is not None:
        given["audio"] = speech.load(encoder_name(options, config, "audio")).encode(inputs.wave, frames)
    prompt = options.text or default_text(given)
    print(f"text: {prompt!r}{'' if options.text else ' (no --text given)'}")
    given["text"] = text.load(encoder_name(options, config, "text")).encode(prompt)
    return Request(inputs.image, height, width, frames, given, options.seed)


class Progress:
    """A progress bar over the steps of all segments, and the time per step."""

    def __init__(self, total: int):
        self.times = [time.perf_counter()]
        self.bar = tqdm(total=total, unit="step", desc="compiling", dynamic_ncols=True)

    def __call__(self, segment: int, count: int, step: int, steps: int) -> None:
        """Call after every step."""
        self.times.append(time.perf_counter())
        self.bar.set_description_str(f"segment {segment}/{count}", refresh=False)
        self.bar.update(1)


def untrained(config: ConfigDict, stage: str, active: np.ndarray) -> list[str]:
    """Active conditions that no stage up to `stage` trained; they have no effect, or a random one."""
    order = list(config.stage_order)
    done = [config.stages[name] for name in order[: order.index(stage) + 1] if config.stages[name].steps]
    return [name for name in conditions.active_names(active) if not any(row.ratios[name] > 0 for row in done)]


def describe(config: ConfigDict, info: Mapping[str, Any], request: Request, settings: Settings) -> int:
    """Prints what will be generated; returns the number of segments."""
    kind = "EMA" if info["ema"] else "raw"
    print(f"checkpoint: {info['path']}, step {info['step']} ({info['stage']}), {kind} parameters")
    print(f"conditions: {', '.join(conditions.active_names(request.active))}")
    if missing := untrained(config, info["stage"], request.active):
        print(f"note: {info['stage']} of this run has not trained {', '.join(missing)}; the clip will not follow it")
    count = len(segments.plan(request.frames, settings.window))
    print(
        f"clip: {request.frames} frames ({request.frames / FPS:.2f} s), {request.height}x{request.width}, "
        f"{count} segment{'s' * (count > 1)} of {settings.steps} steps"
    )
    return count


def run(options: Options, *, setup: bool = True) -> Path:
    """Generates a clip and returns the mp4. If an option or an input file is wrong, raises UserError before compiling.

    `setup`: set up devices and the compilation cache; False in a process that has used JAX.
    """
    check_options(options)
    inputs = read_inputs(options)
    config = load_config(options.checkpoint)
    config.vae.checkpoint = options.vae or config.vae.checkpoint
    if setup:
        cli.setup_one_device(config)
    settings = Settings.from_config(
        config,
        steps=options.steps,
        solver=options.solver,
        scale=options.guidance_scale,
        final_scale=options.final_guidance_scale,
        mode=options.guidance_mode,
        text_scale=options.text_guidance_scale,
    )
    if made_with := config.get("dataset", {}).get("vae_sha256"):
        cli.check_vae(config.vae.checkpoint, made_with)
    network, vae = make_network(config), load_vae(config.vae.to_dict())
    tiling = Tiling.of_side(options.vae_tile, vae.config.spatial_stride)
    multiple = pixel_multiple(network.config, vae)
    shape = inputs.image.shape[:2]
    size = images.complete_size(options.height, options.width, shape, trained_sizes(config, multiple), multiple)
    request = build_request(options, inputs, config, *size)
    check_request(network.config, request, multiple)

    _, params, info = load_parameters(options.checkpoint, use_ema=options.ema)
    count = describe(config, info, request, settings)
    progress = Progress(count * settings.steps)
    try:
        frames = generate(network, params, vae, request, settings, progress, tiling)
    finally:
        progress.bar.close()
    media.write_mp4(options.output, to_pixels(frames), audio=inputs.sound, audio_rate=OUTPUT_RATE)
    seconds = np.median(np.diff(progress.times))  # the median ignores the compilation in the first step
    print(f"{seconds:.3f} s per step; wrote {options.output}")
    return Path(options.output)


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string(
        "checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a run, or what experiments.export wrote."
    )
    flags.DEFINE_string("reference", None, "Portrait image of any size.")
    flags.DEFINE_string("audio", None, "Speech that drives the clip: any sound file, or a video with sound.")
    flags.DEFINE_string("pose", None, "Video whose movement drives the clip, or an .npz with keypoints (F,K,3).")
    flags.DEFINE_list("tracks", [], "Other conditions: NAME=FILE.npz with one row per frame, comma-separated.")
    flags.DEFINE_string("text", None, "Caption; default: a plain sentence, which is printed.")
    flags.DEFINE_float("seconds", None, "Length; default: the audio's, else the pose video's, else one segment.")
    flags.DEFINE_integer("height", None, "Pixels; default: the trained size nearest to the portrait's aspect ratio.")
    flags.DEFINE_integer("width", None, "Pixels; see --height.")
    flags.DEFINE_integer("seed", 0, "Seed of the noise; the same seed gives the same clip.", lower_bound=0)
    flags.DEFINE_string("output", None, "The .mp4 to write: H.264 and, with --audio, AAC.")
    flags.DEFINE_integer("steps", None, "Sampling steps per segment; default: the checkpoint's sample.steps.")
    flags.DEFINE_enum("solver", "euler", list(sampler.SOLVERS), "ODE solver.")
    flags.DEFINE_float("guidance_scale", None, "Guidance on text and audio at the first step; 1 is none.")
    flags.DEFINE_float("final_guidance_scale", None, "Guidance scale at the last step.")
    flags.DEFINE_enum(
        "guidance_mode", None, list(guidance.MODES), "Text and audio jointly, or each with its own scale."
    )
    flags.DEFINE_float("text_guidance_scale", None, "Scale of text in separate mode.")
    flags.DEFINE_string("vae", None, "VAE file; default: the checkpoint's. It may have another decoder.")
    flags.DEFINE_integer("vae_tile", 0, "Side of the VAE's tiles for large frames, in pixels; 0 = none.", lower_bound=0)
    flags.DEFINE_bool("ema", None, "Use the EMA of the parameters (default); --noema uses the raw ones.")


def main(_: list[str]) -> None:
    """Entry point."""
    run(Options(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Options)}))


if __name__ == "__main__":
    define_flags()
    cli.run_main(main, in_stores=("checkpoint",))
