"""Small valid data sets of random numbers, for tests of everything that reads records."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import schema

SHAPES = ((7, 4, 4), (7, 6, 4), (9, 4, 6))  # (Tclip,H,W)
REFERENCES = 4


def fake_meta(
    *, latent_channels: int = 4, audio_dim: int = 6, text_dim: int = 5, num_keypoints: int = 28
) -> schema.Meta:
    """Sizes of a fake data set; the feature widths are tiny unless given."""
    return schema.Meta(
        latent_channels=latent_channels,
        sizes={"audio_dim": audio_dim, "text_dim": text_dim, "num_keypoints": num_keypoints},
        encoders={"audio": "log-mel", "text": "random"},
        vae_sha256="0" * 64,
    )


def fake_boxes(frames: int) -> np.ndarray:
    """(F,4,4) boxes of a face with a mouth in its lower half, a left arm, and no right arm."""
    return np.tile([[0.3, 0.1, 0.7, 0.6], [0.4, 0.4, 0.6, 0.55], [0.0, 0.7, 0.3, 1.0], [0.0] * 4], (frames, 1, 1))


def fake_record(
    rng: np.random.Generator,
    meta: schema.Meta,
    record_id: str,
    *,
    shape: Sequence[int] = SHAPES[0],
    audio: bool = True,
    pose: bool = True,
    source: str = "real",
    split: str = "train",
    tokens: int = 7,
) -> dict[str, Any]:
    """One record of random numbers for a clip of latent shape (Tclip,H,W), with or without audio and keypoints."""
    t, h, w = shape
    frames = 1 + 4 * (t - 1)
    return {
        "id": record_id,
        "source": source,
        "split": split,
        "caption": f"a person, number {record_id}",
        "latents": rng.standard_normal((t, h, w, meta.latent_channels)),
        "references": rng.standard_normal((REFERENCES, h, w, meta.latent_channels)),
        "reference_frames": np.linspace(0, frames - 1, REFERENCES).astype(np.int32),
        "audio": rng.standard_normal((frames if audio else 0, meta.sizes["audio_dim"])),
        "keypoints": rng.random((frames if pose else 0, meta.sizes["num_keypoints"], 3)),
        "text": rng.standard_normal((tokens, meta.sizes["text_dim"])),
        "mouth": rng.random(frames),
        "attributes": rng.random(3),
        "boxes": fake_boxes(frames),
        "speaker": "",
        "sentence": "",
        "view": "full",
        "frames": frames,
        "height": h * 8,
        "width": w * 8,
    }


def write_fake_dataset(
    directory: str | pathlib.Path,
    n: int = 12,
    *,
    seed: int = 0,
    shapes: Sequence[Sequence[int]] = SHAPES,
    sources: Mapping[str, float] | None = None,
    audio_share: float = 0.7,
    pose_share: float = 0.7,
    heldout: int = 0,
    **meta_sizes: int,
) -> schema.Dataset:
    """Writes n training records and `heldout` held-out ones to `directory` and opens it.

    Args:
      shapes: latent shapes (Tclip,H,W), given to the records in turn.
      sources: source name -> share of the records; default all "real".
      audio_share, pose_share: probability that a record has audio, keypoints. Each shape's first record has both, so
        every ratio below 1 can be reached in every bucket.
      meta_sizes: `fake_meta` arguments, for example latent_channels=16.
    """
    rng = np.random.default_rng(seed)
    meta = fake_meta(**meta_sizes)
    sources = dict(sources or {"real": 1.0})
    shares = np.array(list(sources.values())) / sum(sources.values())
    with schema.DatasetWriter(directory, meta) as writer:
        for i in range(n + heldout):
            first = i < len(shapes)
            source = str(rng.choice(list(sources), p=shares))
            writer.add(
                fake_record(
                    rng,
                    meta,
                    f"{source}/{i:04d}",
                    shape=shapes[i % len(shapes)],
                    audio=first or rng.random() < audio_share,
                    pose=first or rng.random() < pose_share,
                    source=source,
                    split="train" if i < n else "heldout",
                    tokens=int(rng.integers(3, 9)),
                )
            )
    return schema.Dataset.open(directory)


class Flaky:
    """A data set whose first reads fail so many times."""

    def __init__(self, dataset, failures):
        self._dataset, self.left = dataset, failures

    def read(self, i):
        if self.left > 0:
            self.left -= 1
            raise OSError("Input/output error")
        return self._dataset.read(i)

    def __getattr__(self, name):
        return getattr(self._dataset, name)


def positions(schedule, step):
    """Draws of every cell of the step's stage before the step, by the closed form: {cell name: count}."""
    number = schedule.stage_at(step)
    draws = schedule._draws(number, step - schedule.stages[number].first_step)
    return {schedule.cells[i].name: int(draws[i]) for i in schedule._usable[number]}
