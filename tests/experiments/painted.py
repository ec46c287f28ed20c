"""Painted clips with known conditions, a probe that reads them exactly, and generators that obey or do not."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from data_pipelines import schema
from data_pipelines.keypoints import KEYPOINTS
from data_pipelines.raw import media
from experiments.evaluate import rendered
from omnihuman_jax.evaluation import probe as probe_lib
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


def heldout_dataset(directory: pathlib.Path, **changes: Any) -> schema.Dataset:
    """Held-out painted clips; `changes` replace fields of the data set's meta."""
    rng = np.random.default_rng(0)
    meta = dataclasses.replace(fake_meta(), **changes)
    with schema.DatasetWriter(directory / "data", meta) as writer:
        for i in range(CLIPS):
            record = fake_record(rng, meta, f"synthetic/{i}", source="synthetic", split="heldout")
            frames = record["frames"]
            mouth = 0.5 + 0.4 * np.sin(np.arange(frames) * (0.4 + 0.3 * i))
            shift = np.linspace(0.2 + 0.15 * i, 0.3 + 0.15 * i, frames)
            colour = rng.integers(40, 220, 2)
            record |= {"mouth": mouth, "attributes": colour, "speaker": f"p{i}", "sentence": f"s{i}"}
            # The conditions are written where the fake generators can find them.
            record["audio"] = np.repeat(mouth[:, None], meta.sizes["audio_dim"], 1)
            record["keypoints"] = PaintedProbe().read(paint(mouth, shift, colour)).keypoints
            record["references"] = np.broadcast_to(
                np.resize(colour / 255, meta.latent_channels), record["references"].shape
            )
            path = directory / f"{i}.mp4"
            sound = np.zeros(16_000, np.float32)
            media.write_mp4(path, paint(mouth, shift, colour), audio=sound, crf=0)
            writer.add(record, path)
    return schema.Dataset.open(directory / "data")


def obedient(clips: Sequence[rendered.Conditions], frames: int) -> np.ndarray:
    """Does all that it is asked."""
    videos = []
    for clip in clips:
        given = clip.given
        shift = given["pose"][:frames, 0, 0] if "pose" in given else np.full(frames, 0.5)
        colour = np.rint(255 * given["reference"][0, 0, :2])
        videos.append(paint(given["audio"][:frames, 0].astype(float), shift, colour))
    return np.stack(videos)


def deaf(clips: Sequence[rendered.Conditions], frames: int) -> np.ndarray:
    """Makes the same whatever it is asked."""
    t = np.arange(frames)
    return np.stack([paint(0.5 + 0.3 * np.sin(t), np.full(frames, 0.5), np.array([90, 90])) for _ in clips])


def evaluate(generate: Callable, dataset: schema.Dataset, **changes: Any) -> rendered.Evaluation:
    """Evaluates a generator on painted clips."""
    arguments = {"clips": CLIPS, "frames": FRAMES, "seed": 0} | changes
    return rendered.evaluate_rendered(generate, dataset, tiny.vae(), PaintedProbe(), **arguments)
