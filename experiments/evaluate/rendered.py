"""How well a model follows each condition on held-out rendered clips: generate, read with the probe, compare.

Every clip is generated with its own conditions and with one condition of another clip (another sentence's audio,
another clip's pose, another person's reference), and compared with its own truth. The metrics define which generations
are needed; see `omnihuman_jax.evaluation.metrics`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import schema
from data_pipelines.raw import media
from omnihuman_jax import pixels
from omnihuman_jax.evaluation.metrics.metric import Generated, HeldOutClip, Limit, Metric, Row, Sample, Source
from omnihuman_jax.evaluation.metrics.registry import select
from omnihuman_jax.evaluation.probe import Probe, Reading
from omnihuman_jax.evaluation.statistics import summarise
from omnihuman_jax.frames import latent_frames
from omnihuman_jax.inference.generate import decode_latents
from omnihuman_jax.inference.inputs import Inputs
from omnihuman_jax.inference.sampling import Settings, sample_latents
from omnihuman_jax.models.functional import Network
from omnihuman_jax.models.vae.vae import VAE


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions of one generated clip by name (`schema.condition_arrays`), and the seed of its noise."""

    given: Mapping[str, np.ndarray]
    seed: int


# (conditions of B clips that share shape and active row, pixel frames F) -> uint8 (B,F,height,width,3)
Generate = Callable[[Sequence[Conditions], int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ModelGenerator:
    """Generates with a trained model, `batch` clips at a time."""

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


def heldout_indices(dataset: schema.Dataset, frames: int) -> list[int]:
    """Records of the held-out rendered clips of at least `frames` frames, without crops to the face."""
    entries = dataset.index
    return [
        i
        for i in schema.full_records(dataset, "heldout")
        if entries[i]["source"] == "synthetic" and entries[i]["frames"] >= frames
    ]


def read_heldout(dataset: schema.Dataset, probe: Probe, frames: int, *, limit: int, seed: int) -> list[HeldOutClip]:
    """Up to `limit` held-out rendered clips of at least `frames` frames, in an order that depends only on `seed`."""
    indices = heldout_indices(dataset, frames)
    clips = []
    for k in np.random.default_rng(seed).permutation(len(indices))[:limit]:
        i = indices[k]
        record = dataset.read(i)
        video = media.read_video(dataset.clip_path(i))
        # The last reference is the furthest from the clip's start, so that copying it scores badly.
        reference = video[min(int(record["reference_frames"][-1]), len(video) - 1)]
        clips.append(HeldOutClip(record, i, video[:frames], reference, probe.read(video[:frames])))
    return clips


def choose_group(
    clips: Sequence[HeldOutClip], eligible: Callable[[HeldOutClip], bool], count: int
) -> list[HeldOutClip]:
    """Up to `count` eligible clips of one frame size (the size with most of them), so that they run as one batch."""
    groups: dict[tuple[int, int], list[HeldOutClip]] = {}
    for clip in clips:
        if eligible(clip):
            groups.setdefault(clip.size, []).append(clip)
    return max(groups.values(), key=len)[:count] if groups else []


def partner(clips: Sequence[HeldOutClip], i: int, field: str) -> HeldOutClip | None:
    """The next clip after i (cyclically) that differs in the record field `field`; None if all are the same."""
    for step in range(1, len(clips)):
        other = clips[(i + step) % len(clips)]
        if other.record[field] != clips[i].record[field]:
            return other
    return None


def assign(
    metrics: Sequence[Metric], pool: Sequence[HeldOutClip], count: int
) -> tuple[list[tuple[list[HeldOutClip], list[Metric]]], list[str]]:
    """Up to `count` clips for each group of metrics that can share them, and notes on metrics with fewer than two."""
    groups: dict[tuple[int, ...], tuple[list[HeldOutClip], list[Metric]]] = {}
    notes = []
    for eligibility in dict.fromkeys(metric.eligibility for metric in metrics):
        members = [metric for metric in metrics if metric.eligibility == eligibility]
        chosen = choose_group(pool, eligibility.test, count)
        if len(chosen) >= 2:
            groups.setdefault(tuple(clip.index for clip in chosen), (chosen, []))[1].extend(members)
        else:
            names = ", ".join(metric.name for metric in members)
            notes.append(f"{names}: only {len(chosen)} held-out clips {eligibility.text}")
    return list(groups.values()), notes


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One clip as shown in the report: label -> uint8 (F,height,width,3), real frames first."""

    clip: HeldOutClip
    videos: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`result` is plain JSON; `comparisons` are the corresponding frames, by metric."""

    result: dict[str, Any]
    comparisons: dict[str, list[Comparison]]


def evaluate_rendered(
    generate: Generate,
    dataset: schema.Dataset,
    vae: VAE,
    probe: Probe,
    *,
    metrics: Sequence[Metric] | None = None,
    clips: int,
    frames: int,
    seed: int = 0,
    silence: np.ndarray | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluates metrics on held-out rendered clips.

    Args:
      generate: makes the clips, usually a `ModelGenerator` with `batch=clips`.
      dataset: prepared data with held-out records of source "synthetic".
      vae: reconstructs real clips, the best that any model of its latents can do.
      probe: reads the frames.
      metrics: default: all of the registry.
      clips: clips per metric.
      frames: pixel frames to generate of each clip, 1 + 4n.
      seed: chooses clips and noise.
      silence: speech features (F,Da) of silence; None leaves out the metrics that need them.
      progress: called with a line before each set of generations.

    Returns:
      `result` has "measures" (metric -> unit, better, clips, rows of `summarise`, and "gap": how much better right is
      than wrong, per clip) and "notes" (what could not be measured, and why).
    """
    metrics, mute = select() if metrics is None else metrics, []
    if silence is None:
        mute = [metric for metric in metrics if any(is_silent(row.source) for row in metric.rows)]
        metrics = [metric for metric in metrics if metric not in mute]
    pool = read_heldout(dataset, probe, frames, limit=8 * clips, seed=seed)
    groups, notes = assign(metrics, pool, clips)
    notes += [f"{metric.name}: the speech encoder is not available" for metric in mute]
    found: dict[str, Any] = {}
    comparisons: dict[str, list[Comparison]] = {}
    for chosen, members in groups:
        group = _Group(chosen, generate, vae, probe, seed, silence, progress)
        found |= {metric.name: group.evaluate(metric) for metric in members}
        comparisons |= group.comparisons(members)
    result = {"clips": clips, "frames": frames, "seed": seed, "heldout_clips_read": len(pool), "probe": probe.header}
    result["measures"] = {metric.name: found[metric.name] for metric in metrics if metric.name in found}
    return Evaluation(result | {"notes": notes}, comparisons)


@dataclasses.dataclass
class _Group:
    """Clips of one frame size. The frames of a source are made once, on first use."""

    clips: list[HeldOutClip]
    generate: Generate
    vae: VAE
    probe: Probe
    seed: int
    silence: np.ndarray | None
    progress: Callable[[str], None]
    samples: dict[Source, list[Sample | None]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def references(self) -> list[Reading]:
        """The probe's reading of each clip's reference picture."""
        return [self.probe.read(clip.reference[None]) for clip in self.clips]

    def evaluate(self, metric: Metric) -> dict[str, Any]:
        """A metric's entry of the result."""
        table = {
            row.name: [np.nan if sample is None else metric.measure(sample) for sample in self.samples_of(row)]
            for row in metric.rows
        }
        found = {"unit": metric.unit, "better": metric.better, "clips": [clip.record["id"] for clip in self.clips]}
        found["rows"] = {name: summarise(values) for name, values in table.items()}
        if {"right", "wrong"} <= table.keys():
            sign = 1 if metric.better == "higher" else -1
            found["gap"] = summarise(sign * (np.array(table["right"]) - np.array(table["wrong"])))
        if metric.attributes:
            found["attributes"] = metric.attributes(self.probe)
        return found

    def samples_of(self, row: Row) -> list[Sample | None]:
        """A sample of each clip; None where no other clip differs as the source requires."""
        if row.source not in self.samples:
            self.samples[row.source] = [
                None if frames is None else Sample(clip, frames, self.probe.read(frames), reference, self.probe)
                for clip, frames, reference in zip(self.clips, self.frames_of(row), self.references)
            ]
        return self.samples[row.source]

    def frames_of(self, row: Row) -> Sequence[np.ndarray | None]:
        """Frames (F,height,width,3) of each clip from the source of a row."""
        match row.source:
            case Limit.REAL:
                return [clip.frames for clip in self.clips]
            case Limit.RECONSTRUCTION:
                return self.reconstruct()
            case Limit.STILL:
                return [held_still(clip) for clip in self.clips]
            case Limit.OTHER_PICTURE:
                others = [partner(self.clips, i, "speaker") for i in range(len(self.clips))]
                return [other and held_still(other) for other in others]
        return self.generated(row.source, row.label)

    def generated(self, source: Generated, label: str) -> list[np.ndarray | None]:
        """Generates each clip; None where no other clip differs as the source requires."""
        conditions = [self.conditions(i, source) for i in range(len(self.clips))]
        batch = [given for given in conditions if given]
        frames = len(self.clips[0].frames)
        self.progress(f"evaluation: {len(batch)} clips of {frames} frames, {label}")
        made = iter(self.generate(batch, frames)) if batch else iter(())
        return [given and next(made) for given in conditions]

    def conditions(self, i: int, source: Generated) -> Conditions | None:
        """The conditions to generate clip i with; None if no other clip differs as the source requires."""
        clip = self.clips[i]
        other = partner(self.clips, i, source.differs_in) if source.foreign else clip
        if other is None:
            return None
        names = ["text", "reference", "audio", *([source.also] if source.also else [])]
        own, others = (schema.condition_arrays(c.record, names, reference=-1) for c in (clip, other))
        foreign = {source.foreign: others[source.foreign]} if source.foreign else {}
        if source.silent:
            foreign["audio"] = self.silence
        return Conditions(own | foreign, self.seed + clip.index)

    def reconstruct(self) -> list[np.ndarray]:
        """The real clips through the VAE."""
        frames = len(self.clips[0].frames)
        latents = [clip.record["latents"][: latent_frames(frames)] for clip in self.clips]
        return list(pixels.to_pixels(decode_latents(self.vae, np.stack(latents).astype(np.float32))[:, :frames]))

    def comparisons(self, metrics: Sequence[Metric]) -> dict[str, list[Comparison]]:
        """Real and generated frames, by metric; metrics that need the same generations show them once."""
        shown: dict[tuple[Source, ...], tuple[str, list[Row]]] = {}
        for metric in metrics:
            rows = [row for row in metric.rows if isinstance(row.source, Generated)]
            shown.setdefault(tuple(row.source for row in rows), (metric.name, rows))
        return {name: [self.compare(i, rows) for i in range(len(self.clips))] for name, rows in shown.values()}

    def compare(self, i: int, rows: Sequence[Row]) -> Comparison:
        """The real frames of clip i and those of some rows."""
        samples = {row.label: self.samples[row.source][i] for row in rows}
        videos = {label: sample.frames for label, sample in samples.items() if sample}
        return Comparison(self.clips[i], {"real frames": self.clips[i].frames} | videos)


def is_silent(source: Source) -> bool:
    """Whether the frames are generated with silence."""
    return isinstance(source, Generated) and source.silent


def held_still(clip: HeldOutClip) -> np.ndarray:
    """The clip's reference picture as F equal frames."""
    return np.repeat(clip.reference[None], len(clip.frames), 0)
