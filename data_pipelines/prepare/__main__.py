"""Entry point of `python -m data_pipelines.prepare`; see the package's description."""

import os

# Must precede NumPy: one thread is much faster for the caption encoder's small products when the cores are busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from data_pipelines.curate import config as curate_config
from data_pipelines.encoders import pose, speech, text
from data_pipelines.prepare import curated, extend, features, pipeline
from data_pipelines.prepare.cut import parse_sizes
from data_pipelines.raw import fetch, manifest
from omnihuman_jax.command import check_given, check_key, run_main
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import latent_frames, pixel_frames

_INPUT = flags.DEFINE_list(
    "input", [], "Directories of raw clips: with a manifest.json, or plain videos (and .txt captions)."
)
_OUTPUT = flags.DEFINE_string("output", None, "Data set directory to write.")
_VAE = flags.DEFINE_string("vae", None, "VAE weights (safetensors).")
_SIZES = flags.DEFINE_string(
    "sizes", "96x96,128x80,80x112", "Training sizes, HEIGHTxWIDTH; each clip uses the nearest."
)
_FACE_CROPS = flags.DEFINE_string(
    "face_crops", "", "Sizes of one more record per clip, cropped to the face, HEIGHTxWIDTH as 48x48; none if empty."
)
_CLIP_FRAMES = flags.DEFINE_integer("clip_frames", 49, "Frames per clip at 25 fps; 1 + 4n.")
_WORKERS = flags.DEFINE_integer("workers", 2, "Threads that decode and detect, and processes that score.")
_TILE = flags.DEFINE_integer(
    "vae_tile", 0, "For large frames: side of the VAE's tiles in pixels, as 512; 0 encodes whole frames.", lower_bound=0
)
_BATCH = flags.DEFINE_integer("vae_batch", 8, "Clips per VAE batch.")
_AUDIO = flags.DEFINE_string(
    "audio_encoder",
    None,
    "whisper-tiny.en, log-mel, or a checkpoint in a local directory: wav2vec2:DIR, whisper:DIR (the output), "
    "wav2vec2-all:DIR, whisper-all:DIR (all hidden states); default whisper-tiny.en, or log-mel if it is unavailable.",
)
_TEXT = flags.DEFINE_string(
    "text_encoder", None, "minilm-l6-v2 (the default), or states:FILE, precomputed token states; docs/encoders.md."
)
_POSE = flags.DEFINE_enum(
    "pose", "auto", ["auto", "required", "none"],
    "Detect the keypoints of clips without annotations: if the detector is installed, always, or never.",
)  # fmt: skip
_CURATE = flags.DEFINE_enum(
    "curate", "auto", ["auto", "all", "none"],
    "Which inputs to cut, score and filter: folders without a manifest.json, every input, or none.",
)  # fmt: skip
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Curate only: scores, manifest and report, but no data set.")
_CURATION = flags.DEFINE_string(
    "curation", None, "Directory of scores, manifest.jsonl and report.html; default the output's name with .curation."
)
_RUNNER = flags.DEFINE_string("runner", "", "Beam runner of the curation; default --workers processes on this machine.")
_BEAM = flags.DEFINE_multi_string("beam", [], "One more option of Beam, as --beam=--region=europe-west4; repeatable.")
_CONFIG = config_flags.DEFINE_config_dict(
    "config", curate_config.get_config(), "Settings and thresholds of the curation: data_pipelines/curate/config.py."
)
_CACHE = flags.DEFINE_string(
    "cache", None, "Cache of fetched packages and compiled programs; default $OMNIHUMAN_CACHE or cache/."
)


def _use_detector(clips: list[manifest.RawClip], curates: bool = False) -> bool:
    """Whether to detect keypoints; prints a message if the detector is needed but missing."""
    if _POSE.value == "none" or not any((clip.pose or curates) and clip.annotations is None for clip in clips):
        return False
    try:
        pose.interpreter()
    except UserError as error:
        if _POSE.value == "required":
            raise
        print(f"no keypoints are detected: {error}", flush=True)
        return False
    return True


def _inputs() -> tuple[list[manifest.RawClip], list[manifest.RawClip]]:
    """The clips to curate, and those to take as they are."""
    raw, trusted = [], []
    for directory in _INPUT.value:
        clips = manifest.read(directory)
        ready = (pathlib.Path(directory) / manifest.MANIFEST).is_file()
        curate = _CURATE.value == "all" or (_CURATE.value == "auto" and not ready)
        if curate and _CURATE.value == "auto":
            print(f"curating {directory}, which has no {manifest.MANIFEST}; --curate=none takes its clips as they are")
        (raw if curate else trusted).extend(clips)
    return raw, trusted


def _settings() -> pipeline.Settings:
    """From the flags, without the digest of the VAE."""
    check_given(vae=_VAE.value)
    if _CLIP_FRAMES.value < 5 or pixel_frames(latent_frames(_CLIP_FRAMES.value)) != _CLIP_FRAMES.value:
        raise UserError(f"--clip_frames={_CLIP_FRAMES.value} must be 1 + 4n and at least 5, for example 49")
    vae = pathlib.Path(_VAE.value)
    if not vae.is_file():
        raise UserError(f"--vae={vae}: no such file; train one with python -m experiments.train_vae")
    faces = tuple(parse_sizes(_FACE_CROPS.value, "face_crops")) if _FACE_CROPS.value else ()
    return pipeline.Settings(tuple(parse_sizes(_SIZES.value)), _CLIP_FRAMES.value, "", _TILE.value, faces)


def _check_config(arguments: list[str]) -> None:
    """Checks the keys of --config.KEY=VALUE, of which absl would only say that it does not know them."""
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and name.startswith("config."):
            check_key(curate_config.get_config(), name.removeprefix("config."))


def _curate(raw: list[manifest.RawClip]) -> curated.Curation:
    """Scores and judges raw clips, and prints the result."""
    from data_pipelines.curate import run

    output = pathlib.Path(_OUTPUT.value).absolute()
    directory = pathlib.Path(_CURATION.value or output.with_name(f"{output.name}.curation"))
    machine = run.Machine(
        _use_detector(raw, curates=True), _RUNNER.value, _WORKERS.value, tuple(_BEAM.value), _CACHE.value
    )
    return curated.curate(raw, directory, _CONFIG.value, machine, output)


def main() -> None:
    """Checks the flags and inputs before the first compile, then runs the pipeline."""
    check_given(input=_INPUT.value, output=_OUTPUT.value)
    if _WORKERS.value < 1 or _BATCH.value < 1:
        raise UserError("--workers and --vae_batch must be at least 1")
    settings = None if _DRY_RUN.value else _settings()
    raw, trusted = _inputs()
    if _DRY_RUN.value and not raw:
        raise UserError("--dry_run: no input is curated, so there is nothing to score; see --curate")
    curation = _curate(raw) if raw else None
    if settings is not None:
        _prepare(settings, trusted, curation)


def _prepare(settings: pipeline.Settings, clips: list[manifest.RawClip], curation: curated.Curation | None) -> None:
    """Encodes ready clips, and those that the curation kept."""
    from omnihuman_jax.models.vae.vae import encoder_sha256  # imports JAX: after the checks

    settings = dataclasses.replace(settings, vae_sha256=encoder_sha256(_VAE.value))
    detects = _use_detector(clips)
    captions = text.load(_TEXT.value, cache=_CACHE.value)
    encoders = features.Encoders(captions, speech.load(_AUDIO.value, _CACHE.value), None)
    detector = pose.NAME if detects else ""
    output = pathlib.Path(_OUTPUT.value)
    if curation is None:
        digest = pipeline.inputs_digest(clips, settings, encoders, detector)
        dataset = pipeline.finished(output, digest)
        if dataset is not None:
            print(f"{output} is up to date: {len(dataset)} records")
            return
        extra = {"inputs_sha256": digest, "pose_detector": detector or None}
    else:
        items = curated.pending(curation, clips, output)
        if items is None:
            return
        detected = pose.NAME if detects or curation.detected else None
        extra = {extend.SETTINGS: pipeline.inputs_digest([], settings, encoders, ""), "pose_detector": detected}
    vae, encode = _load_vae()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if detects:
            running = stack.enter_context(pose.PoseDetector())
            encoders = features.Encoders(encoders.text, encoders.speech, running.detect)
        options = dict(
            latent_channels=vae.config.z_dim, workers=_WORKERS.value, batch=_BATCH.value, extra=extra
        )  # fmt: skip
        if curation is None:
            summary = pipeline.run(clips, output, settings, encoders, encode, **options)
        else:
            summary = extend.run(items, output, settings, encoders, encode, **options)
            curated.finish(curation, output)
    print(summary.table())
    print(f"{output}: audio features {encoders.speech.name}, {time.monotonic() - begin:.0f} s")


def _load_vae() -> tuple[Any, Callable[[Any], Any]]:
    """The VAE and its encoder of clips."""
    import jax  # not needed before, and slow to import

    from omnihuman_jax.models.vae import streaming
    from omnihuman_jax.models.vae.vae import load_vae

    if not jax.config.jax_compilation_cache_dir:  # each frame size compiles for 20 s on a CPU
        jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir(_CACHE.value) / "jax"))
    vae = load_vae(_VAE.value)
    tiling = streaming.Tiling.of_side(_TILE.value, vae.config.spatial_stride)
    return vae, functools.partial(streaming.encode_clip, vae, tiling=tiling)


if __name__ == "__main__":
    run_main(main, _check_config)
