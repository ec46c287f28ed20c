"""How well each condition is obeyed on held-out rendered clips: generate, observe, compare with the exact truth.

Every clip is generated under its own conditions and under one foreign condition (another sentence's audio, another
clip's pose, another person's reference), and always compared with its own truth. A condition that is obeyed gives a
good number with the right one and a bad number with the wrong one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import schema
from data_pipelines.raw import media
from omnihuman_jax import pixels
from omnihuman_jax.evaluation import measures
from omnihuman_jax.evaluation.probe import Observation, Probe
from omnihuman_jax.frames import latent_frames
from omnihuman_jax.inference.generate import decode_latents
from omnihuman_jax.inference.inputs import Inputs
from omnihuman_jax.inference.sampling import Settings, sample_latents
from omnihuman_jax.models.functional import Network
from omnihuman_jax.models.vae.vae import VAE

MIN_FACE = 18.0  # pixels from eyes to chin; the mouth of a smaller face is read badly
NOT_THE_PERSON = ("background", "trousers")  # attributes that identity leaves out; trousers are rarely in the picture
MIN_MOUTH_STD = 0.05  # of the true opening; below it a clip is (nearly) silent and has no correlation


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What one generated clip is given, by condition name (`schema.given`), and the seed of its noise."""

    given: Mapping[str, np.ndarray]
    seed: int


# (conditions of B clips that share shape and active row, pixel frames F) -> uint8 (B,F,height,width,3)
Generate = Callable[[Sequence[Conditions], int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ModelGenerator:
    """Generates with a trained model, `batch` clips at a time (one compiled program for each shape and active row)."""

    network: Network
    params: Any
    vae: VAE
    settings: Settings
    batch: int

    def __call__(self, clips: Sequence[Conditions], frames: int) -> np.ndarray:
        parts = []
        for begin in range(0, len(clips), self.batch):
            part = list(clips[begin : begin + self.batch])
            full = part + [part[-1]] * (self.batch - len(part))
            parts.append(self._generate(full, frames)[: len(part)])
        return np.concatenate(parts)

    def _generate(self, clips: Sequence[Conditions], frames: int) -> np.ndarray:
        inputs = Inputs.of(self.network.config, [clip.given for clip in clips])
        seeds = [clip.seed for clip in clips]
        latents = sample_latents(self.network, self.params, inputs, self.settings, frames=frames, seeds=seeds)
        return pixels.to_pixels(decode_latents(self.vae, latents)[:, :frames])


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One held-out rendered clip, cut to the F frames that are generated.

    Attributes:
      record: of the data set, whole.
      frames: uint8 (F,height,width,3) as decoded from the clip's mp4.
      reference: uint8 (height,width,3), the picture that the reference latent was made from.
      seen: what the probe sees in `frames`.
    """

    record: dict[str, Any]
    index: int
    frames: np.ndarray
    reference: np.ndarray
    seen: Observation

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1:3]


def read_heldout(dataset: schema.Dataset, probe: Probe, frames: int, *, limit: int, seed: int) -> list[HeldOut]:
    """Up to `limit` held-out rendered clips of at least `frames` frames, in an order that depends on `seed` only."""
    chosen = [
        i
        for i, entry in enumerate(dataset.index)
        if entry["split"] == "heldout" and entry["source"] == "synthetic" and entry["frames"] >= frames
    ]
    order = np.random.default_rng(seed).permutation(len(chosen))[:limit]
    clips = []
    for i in (chosen[k] for k in order):
        record = dataset.read(i)
        video = media.read_video(dataset.clip_path(i))
        # The last reference is the one furthest from the clip's start, so that copying it is no answer.
        reference = video[min(int(record["reference_frames"][-1]), len(video) - 1)]
        clips.append(HeldOut(record, i, video[:frames], reference, probe.observe(video[:frames])))
    return clips


def choose_group(clips: Sequence[HeldOut], eligible: Callable[[HeldOut], bool], count: int) -> list[HeldOut]:
    """Up to `count` eligible clips of one frame size (the size with most of them), so that they run as one batch."""
    groups: dict[tuple[int, int], list[HeldOut]] = {}
    for clip in clips:
        if eligible(clip):
            groups.setdefault(clip.shape, []).append(clip)
    return max(groups.values(), key=len)[:count] if groups else []


def partner(clips: Sequence[HeldOut], i: int, key: str) -> HeldOut | None:
    """The next clip after i (cyclically) that differs in the record field `key`; None when all are the same."""
    for step in range(1, len(clips)):
        other = clips[(i + step) % len(clips)]
        if other.record[key] != clips[i].record[key]:
            return other
    return None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One clip as shown in the report: label -> uint8 (F,height,width,3), the first being the real frames."""

    clip: HeldOut
    videos: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`result` is plain JSON (report.json); `comparisons` are the frames behind it, by measure."""

    result: dict[str, Any]
    comparisons: dict[str, list[Comparison]]


def evaluate_rendered(
    generate: Generate,
    dataset: schema.Dataset,
    vae: VAE,
    probe: Probe,
    *,
    clips: int,
    frames: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measures mouth, pose, colour and identity on held-out rendered clips.

    Args:
      generate: makes the clips, usually a `ModelGenerator` with `batch=clips`.
      dataset: prepared data with held-out records of source "synthetic".
      vae: for the baseline of real clips through the VAE.
      probe: reads the numbers off the frames.
      clips: clips per measure (3 generations each for mouth and reference together, 2 each for pose).
      frames: pixel frames to generate of each clip, 1 + 4n.
      seed: chooses clips and noise.
      progress: called with a line before each part.

    Returns:
      `result` has "measures" (name -> unit, better, clips, rows of `measures.summarise`) and "notes" (what could not be
      measured and why).
    """
    pool = read_heldout(dataset, probe, frames, limit=8 * clips, seed=seed)
    run = _Run(generate, vae, probe, frames, seed, progress)
    talking = choose_group(pool, _talks, clips)
    posed = choose_group(pool, lambda c: len(c.record["keypoints"]) > 0 and len(c.record["audio"]) > 0, clips)
    result: dict[str, Any] = {"clips": clips, "frames": frames, "seed": seed, "heldout_clips_read": len(pool)}
    result["probe"] = probe.header
    result["measures"], result["notes"], comparisons = {}, [], {}
    if len(talking) >= 2:
        found, comparisons["mouth"] = run.talking(talking)
        result["measures"] |= found
    else:
        result["notes"].append(f"mouth, colour and identity: only {len(talking)} held-out clips show a talking face")
    if len(posed) >= 2:
        found, comparisons["pose"] = run.posed(posed)
        result["measures"] |= found
    else:
        result["notes"].append(f"pose: only {len(posed)} held-out clips of one size have keypoints and audio")
    return Evaluation(result, comparisons)


def _talks(clip: HeldOut) -> bool:
    return len(clip.record["audio"]) > 0 and len(clip.record["mouth"]) > 0 and clip.seen.face >= MIN_FACE


@dataclasses.dataclass
class _Run:
    generate: Generate
    vae: VAE
    probe: Probe
    frames: int
    seed: int
    progress: Callable[[str], None]

    def conditions(self, clip: HeldOut, **changes: Any) -> Conditions:
        """The clip's own conditions without pose, but for `changes`."""
        own = schema.given(clip.record, ["text", "reference", "audio"], reference=-1)
        return Conditions(own | changes, self.seed + clip.index)

    def make(self, label: str, asked: Sequence[Conditions | None]) -> list[np.ndarray | None]:
        """Generates all that is asked for; None stays None."""
        wanted = [a for a in asked if a is not None]
        self.progress(f"evaluation: {len(wanted)} clips of {self.frames} frames, {label}")
        made = iter(self.generate(wanted, self.frames)) if wanted else iter(())
        return [None if a is None else next(made) for a in asked]

    def reconstruct(self, clips: Sequence[HeldOut]) -> list[np.ndarray]:
        """The real clips through the VAE: the best that any model on these latents could show."""
        count = latent_frames(self.frames)
        latents = np.stack([clip.record["latents"][:count] for clip in clips]).astype(np.float32)
        return list(pixels.to_pixels(decode_latents(self.vae, latents)[:, : self.frames]))

    def observe(self, videos: Sequence[np.ndarray | None]) -> list[Observation | None]:
        """What is seen in each video; None stays None."""
        return [None if video is None else self.probe.observe(video) for video in videos]

    def talking(self, clips: list[HeldOut]) -> tuple[dict[str, Any], list[Comparison]]:
        """Mouth, colour and identity, on clips that show a talking face."""
        voices = [partner(clips, i, "sentence") for i in range(len(clips))]
        faces = [partner(clips, i, "speaker") for i in range(len(clips))]
        videos = {
            "right": self.make("right audio and reference", [self.conditions(clip) for clip in clips]),
            "wrong audio": self.make(
                "another sentence's audio",
                [o and self.conditions(c, audio=o.record["audio"]) for c, o in zip(clips, voices)],
            ),
            "wrong reference": self.make(
                "another person's reference",
                [o and self.conditions(c, reference=o.record["references"][-1]) for c, o in zip(clips, faces)],
            ),
            "real": [clip.frames for clip in clips],
            "reconstruction": self.reconstruct(clips),
            "still": [clip.reference[None] for clip in clips],
            "other person": [other and other.reference[None] for other in faces],
        }
        seen = {name: self.observe(made) for name, made in videos.items()}
        names = {"right": "right", "wrong": "wrong audio", "real": "real", "reconstruction": "reconstruction"}
        found = {"mouth": self.mouth(clips, {row: seen[name] for row, name in names.items()})}
        names |= {"wrong": "wrong reference", "other person": "other person"}
        rows = {row: (videos[name], seen[name]) for row, name in names.items()}
        found |= self.appearance(clips, rows, seen["still"])
        labels = {"real": "real (rendered)", "right": "right audio", "wrong audio": "another sentence's audio"}
        labels["wrong reference"] = "another person's reference"
        return found, _comparisons(clips, videos, labels)

    def mouth(self, clips: list[HeldOut], rows: dict[str, list[Observation | None]]) -> dict[str, Any]:
        """Correlation of the observed mouth opening with the truth."""
        truth = [clip.record["mouth"][: self.frames] for clip in clips]
        table = {
            name: [np.nan if s is None else mouth_correlation(s.mouth, t) for s, t in zip(row, truth)]
            for name, row in rows.items()
        }
        return _measure("Pearson correlation over the frames of a clip", "higher", clips, table)

    def appearance(self, clips, rows, still: list[Observation]) -> dict[str, Any]:
        """Colour difference to the reference picture and distance to the person's true appearance numbers."""
        names, scale = self.probe.config.attributes, np.array(self.probe.config.attribute_std)
        used = self.probe.readable & np.array([not name.startswith(NOT_THE_PERSON) for name in names])
        colours: dict[str, list[float]] = {}
        people: dict[str, list[float]] = {}
        for name, (videos, seen) in rows.items():
            colours[name], people[name] = [], []
            for clip, video, s, reference in zip(clips, videos, seen, still):
                known = video is not None
                colours[name].append(self.colour(video, s, clip, reference) if known else np.nan)
                truth = clip.record["attributes"]
                known = known and len(truth) == len(scale)
                people[name].append(
                    float(measures.attribute_distance(s.attributes.mean(0)[used], truth[used], scale[used]))
                    if known
                    else np.nan
                )
        found = {
            "colour": _measure("CIE76 colour difference to the reference picture", "lower", clips, colours),
            "identity": _measure("appearance distance, in spreads over people", "lower", clips, people),
        }
        found["identity"]["attributes"] = [name for name, use in zip(names, used) if use]
        return found

    def colour(self, video: np.ndarray, seen: Observation, clip: HeldOut, reference: Observation) -> float:
        """Mean colour difference over regions and frames between a video and the clip's reference picture."""
        size, point = clip.shape, self.probe.named_points
        wanted = measures.region_colours(clip.reference, point(reference.keypoints[0], size))
        got = np.stack([measures.region_colours(f, point(k, size)) for f, k in zip(video[::4], seen.keypoints[::4])])
        return float(np.nanmean(measures.colour_difference(got, wanted[None])))

    def posed(self, clips: list[HeldOut]) -> tuple[dict[str, Any], list[Comparison]]:
        """Keypoint error, on clips with exact keypoints."""
        others = [partner(clips, i, "id") for i in range(len(clips))]
        videos = {
            "right": self.make("right pose", [self.conditions(c, pose=c.record["keypoints"]) for c in clips]),
            "wrong": self.make(
                "another clip's pose",
                [o and self.conditions(c, pose=o.record["keypoints"]) for c, o in zip(clips, others)],
            ),
            "real": [clip.frames for clip in clips],
            "reconstruction": self.reconstruct(clips),
            "still": [np.repeat(clip.reference[None], self.frames, 0) for clip in clips],
        }
        table = {
            name: [
                np.nan
                if video is None
                else measures.keypoint_error(
                    self.probe.observe(video).keypoints, clip.record["keypoints"][: self.frames], clip.shape
                )
                for clip, video in zip(clips, made)
            ]
            for name, made in videos.items()
        }
        found = {"pose": _measure("mean keypoint distance in % of the frame diagonal", "lower", clips, table)}
        labels = {"real": "real (rendered)", "right": "right pose", "wrong": "another clip's pose"}
        return found, _comparisons(clips, videos, labels)


def mouth_correlation(observed: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of observed and true opening (F,); NaN where the truth is flat, 0 where only the observed one is."""
    if np.std(truth) < MIN_MOUTH_STD:
        return float("nan")
    value = measures.pearson(observed, truth)
    return value if np.isfinite(value) else 0.0


def _measure(unit: str, better: str, clips: Sequence[HeldOut], table: dict[str, list[float]]) -> dict[str, Any]:
    """JSON of one measure; "gap" is how much better right is than wrong, clip by clip."""
    rows = {name: measures.summarise(values) for name, values in table.items()}
    sign = 1 if better == "higher" else -1
    gap = measures.summarise(sign * (np.array(table["right"]) - np.array(table["wrong"])))
    names = [clip.record["id"] for clip in clips]
    return {"unit": unit, "better": better, "clips": names, "rows": rows, "gap": gap}


def _comparisons(clips: Sequence[HeldOut], videos: dict[str, list], labels: dict[str, str]) -> list[Comparison]:
    return [
        Comparison(clip, {label: videos[name][i] for name, label in labels.items() if videos[name][i] is not None})
        for i, clip in enumerate(clips)
    ]
