"""Entry point of `python -m data_pipelines.prepare`; see the package's description."""

import os

# Must precede NumPy: one thread is much faster for the caption encoder's small products when the cores are busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import contextlib
import dataclasses
import functools
import pathlib
import time

from absl import flags

from data_pipelines.encoders import pose, speech, text
from data_pipelines.prepare import features, pipeline
from data_pipelines.prepare.cut import parse_sizes
from data_pipelines.raw import fetch, manifest
from omnihuman_jax.command import run_main
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
_WORKERS = flags.DEFINE_integer("workers", 2, "Threads that decode and detect.")
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
_CACHE = flags.DEFINE_string(
    "cache", None, "Cache of fetched packages and compiled programs; default $OMNIHUMAN_CACHE or cache/."
)


def _use_detector(clips: list[manifest.RawClip]) -> bool:
    """Whether to detect keypoints; prints a message if the detector is needed but missing."""
    if _POSE.value == "none" or not any(clip.pose and clip.annotations is None for clip in clips):
        return False
    try:
        pose.interpreter()
    except UserError as error:
        if _POSE.value == "required":
            raise
        print(f"no keypoints are detected: {error}", flush=True)
        return False
    return True


def _settings() -> pipeline.Settings:
    """From the flags, without the digest of the VAE."""
    for name, flag in (("input", _INPUT), ("output", _OUTPUT), ("vae", _VAE)):
        if not flag.value:
            raise UserError(f"--{name} is missing; see --help")
    if _CLIP_FRAMES.value < 5 or pixel_frames(latent_frames(_CLIP_FRAMES.value)) != _CLIP_FRAMES.value:
        raise UserError(f"--clip_frames={_CLIP_FRAMES.value} must be 1 + 4n and at least 5, for example 49")
    if _WORKERS.value < 1 or _BATCH.value < 1:
        raise UserError("--workers and --vae_batch must be at least 1")
    vae = pathlib.Path(_VAE.value)
    if not vae.is_file():
        raise UserError(f"--vae={vae}: no such file; train one with python -m experiments.train_vae")
    faces = tuple(parse_sizes(_FACE_CROPS.value, "face_crops")) if _FACE_CROPS.value else ()
    return pipeline.Settings(tuple(parse_sizes(_SIZES.value)), _CLIP_FRAMES.value, "", _TILE.value, faces)


def main() -> None:
    """Checks the flags and inputs before the first compile, then runs the pipeline."""
    settings = _settings()
    clips = [clip for directory in _INPUT.value for clip in manifest.read(directory)]
    from omnihuman_jax.models.vae.vae import encoder_sha256  # imports JAX: after the checks

    settings = dataclasses.replace(settings, vae_sha256=encoder_sha256(_VAE.value))
    detects = _use_detector(clips)
    captions = text.load(_TEXT.value, cache=_CACHE.value)
    encoders = features.Encoders(captions, speech.load(_AUDIO.value, _CACHE.value), None)
    digest = pipeline.inputs_digest(clips, settings, encoders, pose.NAME if detects else "")
    output = pathlib.Path(_OUTPUT.value)
    dataset = pipeline.finished(output, digest)
    if dataset is not None:
        print(f"{output} is up to date: {len(dataset)} records")
        return
    import jax  # not needed before, and slow to import

    from omnihuman_jax.models.vae import streaming
    from omnihuman_jax.models.vae.vae import load_vae

    if not jax.config.jax_compilation_cache_dir:  # each frame size compiles for 20 s on a CPU
        jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir(_CACHE.value) / "jax"))
    vae = load_vae(_VAE.value)
    tiling = streaming.Tiling.of_side(_TILE.value, vae.config.spatial_stride)
    encode = functools.partial(streaming.encode_clip, vae, tiling=tiling)
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if detects:
            detector = stack.enter_context(pose.PoseDetector())
            encoders = features.Encoders(encoders.text, encoders.speech, detector.detect)
        summary = pipeline.run(
            clips, output, settings, encoders, encode,
            latent_channels=vae.config.z_dim, workers=_WORKERS.value, batch=_BATCH.value,
            extra={"inputs_sha256": digest, "pose_detector": pose.NAME if detects else None},
        )  # fmt: skip
    print(summary.table())
    print(f"{output}: audio features {encoders.speech.name}, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    run_main(main)
