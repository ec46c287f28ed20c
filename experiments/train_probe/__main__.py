"""Trains the probe on rendered frames and measures it on held-out rendered people.

    python -m experiments.train_probe --data=DIR --output=experiments/assets/probe.safetensors --steps=900

DIR is the output of `python -m data_pipelines.synthetic`. Training degrades frames (blur, noise, blotches and, with
--vae, reconstruction), because the probe must read generated frames.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.keypoints import KEYPOINTS
from data_pipelines.raw import media
from experiments.common import cli
from experiments.train_probe import training
from experiments.train_probe.training import Clip
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation import probe as probe_lib
from omnihuman_jax.frames import STRIDE
from omnihuman_jax.models.vae.vae import compiled, load_vae
from omnihuman_jax.pixels import to_model, to_pixels


def define_flags() -> None:
    """Defined when run as a program only, so that importing this module takes no flag names."""
    flags.DEFINE_string("data", None, "Directory written by data_pipelines.synthetic.")
    flags.DEFINE_string("output", "experiments/assets/probe.safetensors", "Weights to write.")
    flags.DEFINE_integer("steps", 900, "Training steps.", lower_bound=1)
    flags.DEFINE_integer("batch", 48, "Frames a step.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of weights, choices and degradations.")
    flags.DEFINE_integer("every", 2, "Use every n-th frame of a training clip.", lower_bound=1)
    flags.DEFINE_string("vae", "", "VAE weights: also train on reconstructed clips.")


def main(_: list[str]) -> None:
    f = flags.FLAGS
    if not f.data:
        raise UserError("--data is missing; make it with `python -m data_pipelines.synthetic --output=DIR`")
    started = time.perf_counter()
    manifest = read_manifest(Path(f.data))
    trained = read_clips(Path(f.data), manifest, "train")
    heldout = read_clips(Path(f.data), manifest, "heldout")
    print(f"{len(trained)} training and {len(heldout)} held-out clips read in {time.perf_counter() - started:.0f} s")
    attributes = np.stack([clip.attributes for clip in trained])
    config = probe_lib.ProbeConfig(
        keypoints=KEYPOINTS,
        attributes=trained[0].attribute_names,
        attribute_mean=tuple(attributes.mean(0).tolist()),
        attribute_std=tuple(np.maximum(attributes.std(0), 1e-2).tolist()),
    )
    used = [clip.every(f.every) for clip in trained + (reconstruct(trained, f.vae) if f.vae else [])]
    network = training.train(config, used, steps=f.steps, batch=f.batch, seed=f.seed)
    probe = probe_lib.Probe(config, network)
    accuracy = {"rendered": training.accuracy_on(probe, heldout)}
    if f.vae:
        accuracy["reconstructed"] = training.accuracy_on(probe, reconstruct(heldout, f.vae))
    probe.header = {
        "made_by": f"experiments.train_probe --steps={f.steps} --batch={f.batch} --seed={f.seed} --every={f.every}",
        "data": {"training_clips": len(trained), **manifest.get("arguments", {})},
        "through_vae": bool(f.vae),
        "accuracy": accuracy,
    }
    probe_lib.save_probe(f.output, probe)
    print(json.dumps(probe.header, indent=1))
    print(f"wrote {f.output} in {time.perf_counter() - started:.0f} s")


def read_manifest(directory: Path) -> dict:
    """manifest.json of a rendered data set; UserError if it is missing or damaged."""
    try:
        return json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory} holds no readable manifest.json ({type(error).__name__}); make it with "
            f"`python -m data_pipelines.synthetic --output={directory}`"
        ) from error


def read_clips(directory: Path, manifest: dict, split: str) -> list[Clip]:
    """The clips of one split with their annotations; UserError if there are none."""
    clips = []
    for entry in manifest["clips"]:
        if entry["split"] != split:
            continue
        frames = media.read_video(directory / entry["file"])
        with np.load(directory / entry["annotations"], allow_pickle=False) as arrays:
            fields = {name: np.asarray(arrays[name], np.float32) for name in ("mouth", "attributes")}
            # The true keypoints also exist for clips that are used without keypoints in training the generator.
            fields["keypoints"] = np.asarray(arrays["truth_keypoints"], np.float32)
            names = tuple(str(name) for name in arrays["attribute_names"])
        count = min(len(frames), len(fields["mouth"]))
        fields |= {name: fields[name][:count] for name in ("keypoints", "mouth")}
        clips.append(Clip(frames[:count], **fields, attribute_names=names))
    if not clips:
        raise UserError(f"{directory} has no {split} clips; render more with `python -m data_pipelines.synthetic`")
    return clips


def reconstruct(clips: list[Clip], path: str) -> list[Clip]:
    """The clips (cut to 1 + 4n frames, at most 49) after encoding and decoding by the VAE at `path`."""
    encode, decode = compiled(load_vae(path))
    made = []
    for clip in clips:
        count = min(49, len(clip.frames) - (len(clip.frames) - 1) % STRIDE)
        frames = to_pixels(np.asarray(decode(encode(to_model(clip.frames[:count])[None]))[0]))
        annotations = {"keypoints": clip.keypoints[:count], "mouth": clip.mouth[:count]}
        made.append(dataclasses.replace(clip, frames=frames, **annotations))
    return made


if __name__ == "__main__":
    define_flags()
    cli.run_main(main)
