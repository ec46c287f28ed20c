"""Data and steps of the probe's training: degraded rendered frames with exact annotations."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from data_pipelines.keypoints import FLIP, INDEX, KEYPOINTS
from data_pipelines.prepare.pipeline import in_order
from omnihuman_jax.evaluation import keypoints
from omnihuman_jax.evaluation import probe as probe_lib
from omnihuman_jax.evaluation.metrics import mouth
from omnihuman_jax.evaluation.metrics.metric import MIN_FACE
from omnihuman_jax.evaluation.statistics import pearson

MIN_TRAINING_FACE = 10.0  # pixels from eyes to chin; smaller mouths are not trained on
FLIPPED = np.array(FLIP)
FACE = [INDEX[name] for name in (*probe_lib.MOUTH_POINTS, "left_eye", "right_eye", "chin")]


@dataclasses.dataclass(frozen=True)
class Clip:
    """Frames uint8 (F,h,w,3) of a rendered clip, keypoints (F,K,3) in [0,1], mouth (F,), attributes (A,) by name."""

    frames: np.ndarray
    keypoints: np.ndarray
    mouth: np.ndarray
    attributes: np.ndarray
    attribute_names: tuple[str, ...]

    @property
    def points(self) -> np.ndarray:
        """Keypoints in pixels (F,K,2)."""
        return self.keypoints[..., :2] * (self.frames.shape[2], self.frames.shape[1])

    def every(self, n: int) -> Clip:
        """Every n-th frame."""
        return dataclasses.replace(self, frames=self.frames[::n], keypoints=self.keypoints[::n], mouth=self.mouth[::n])


def degrade(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A frame (h,w,3) uint8 as a generator might make it: blurred, noisy, blotchy, slightly off in colour."""
    size = frame.shape[1::-1]
    image = frame.astype(np.float32)
    if rng.random() < 0.4:
        small = tuple(max(8, round(s / rng.uniform(1.0, 2.5))) for s in size)
        image = cv2.resize(cv2.resize(image, small, interpolation=cv2.INTER_AREA), size)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.4))
    if rng.random() < 0.4:
        image += rng.normal(0, rng.uniform(0, 10), image.shape).astype(np.float32)
    if rng.random() < 0.4:  # errors in latents: blotches of a few latent cells
        cells = rng.normal(0, rng.uniform(0, 12), (size[1] // 8 + 1, size[0] // 8 + 1, 3)).astype(np.float32)
        image += cv2.resize(cells, size, interpolation=cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        image = image * rng.uniform(0.94, 1.06, 3).astype(np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def random_view(size: tuple[int, int], canvas: int, rng: np.random.Generator) -> np.ndarray:
    """Affine (2,3) of the letterbox of a (height, width) frame, slightly moved, rotated and zoomed."""
    base = probe_lib.letterbox(size, canvas)
    zoom, angle = np.exp(rng.uniform(-0.2, 0.25)), rng.normal(0, 0.06)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = canvas / 2 + rng.uniform(-0.08, 0.08, 2) * canvas - turn @ np.full(2, canvas / 2)
    return np.concatenate([turn @ base[:, :2], (turn @ base[:, 2] + shift)[:, None]], 1)


def sample(clips: Sequence[Clip], config: probe_lib.ProbeConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One training example: a random frame of a random clip, degraded, mirrored half of the time."""
    clip = clips[rng.integers(len(clips))]
    f = rng.integers(len(clip.frames))
    frame, points, seen = degrade(clip.frames[f], rng), clip.points[f], keypoints.visible(clip.keypoints[f])
    if rng.random() < 0.5:
        frame = np.ascontiguousarray(frame[:, ::-1])
        points = (points * (-1, 1) + (frame.shape[1], 0))[FLIPPED]
        seen = seen[FLIPPED]
    view = random_view(frame.shape[:2], config.canvas, rng)
    on_canvas = points @ view[:, :2].T + view[:, 2]
    centre, side = probe_lib.mouth_geometry(points[None], KEYPOINTS)
    usable = bool(side[0] >= MIN_TRAINING_FACE and seen[FACE].all())
    # The locator makes errors, so the reader must tolerate crops that are slightly off.
    centre, side = centre[0] + rng.normal(0, 0.06, 2) * side[0], side[0] * np.exp(rng.normal(0, 0.12))
    return {
        "canvas": probe_lib.warp(frame, view, config.canvas),
        "points": (on_canvas / config.canvas).astype(np.float32),
        "seen": seen & (on_canvas > 0).all(-1) & (on_canvas < config.canvas).all(-1),
        "crop": probe_lib.warp(frame, probe_lib.mouth_crop_affine(centre, side, config.crop), config.crop),
        "mouth": np.float32(clip.mouth[f]),
        "mouth_usable": np.float32(usable),
        "attributes": ((clip.attributes - config.attribute_mean) / config.attribute_std).astype(np.float32),
    }


def batches(
    clips: Sequence[Clip], config: probe_lib.ProbeConfig, size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, each a pure function of (seed, step), made ahead in a thread."""

    def batch(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((seed, step))
        rows = [sample(clips, config, rng) for _ in range(size)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    with ThreadPoolExecutor(1) as pool:
        for _, future in in_order(pool, batch, itertools.count(), ahead=4):
            yield future.result()


def loss(network: probe_lib.ProbeNetwork, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of heatmaps (against Gaussians of one cell) and of visibility, squared errors of the rest."""
    logits, visible, attributes = network.locator(probe_lib.to_input(batch["canvas"]))
    _, h, w, k = logits.shape
    cells = (jnp.stack(jnp.meshgrid(jnp.arange(w), jnp.arange(h)), -1).reshape(-1, 2) + 0.5) / jnp.array([w, h])
    squared = ((cells[None, :, None] - batch["points"][:, None]) ** 2 * jnp.array([w, h]) ** 2).sum(-1)
    target = jax.nn.softmax(-squared / 2, axis=1)
    heat = -(target * jax.nn.log_softmax(logits.reshape(-1, h * w, k), axis=1)).sum(1)
    seen = batch["seen"].astype(jnp.float32)
    opening = jax.nn.sigmoid(network.reader(probe_lib.to_input(batch["crop"])))
    usable = batch["mouth_usable"]
    parts = {
        "heat": (heat * seen).sum() / seen.sum(),
        "visible": optax.sigmoid_binary_cross_entropy(visible, seen).mean(),
        "mouth": (usable * (opening - batch["mouth"]) ** 2).sum() / jnp.maximum(usable.sum(), 1),
        "attributes": ((attributes - batch["attributes"]) ** 2).mean(),
    }
    return parts["heat"] + parts["visible"] + 20 * parts["mouth"] + 0.3 * parts["attributes"], parts


def train(
    config: probe_lib.ProbeConfig, clips: Sequence[Clip], *, steps: int, batch: int, seed: int, rate: float = 3e-3
) -> probe_lib.ProbeNetwork:
    """Trains a probe with AdamW and a cosine schedule from `rate` for `steps` steps of `batch` frames."""
    network = probe_lib.ProbeNetwork(config, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(50, steps // 10), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.02))
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer, data):
        (_, parts), gradients = nnx.value_and_grad(loss, has_aux=True)(network, data)
        optimizer.update(network, gradients)
        return parts

    source = batches(clips, config, batch, seed)
    with tqdm(range(steps), unit="step", mininterval=5.0) as bar:
        for i in bar:
            parts = step(network, optimizer, next(source))
            if i % 50 == 0 or i == steps - 1:
                bar.set_postfix_str(" ".join(f"{name} {float(value):.4f}" for name, value in parts.items()))
    return network


def accuracy_on(probe: probe_lib.Probe, clips: Sequence[Clip]) -> dict[str, float]:
    """How well the probe reads held-out clips: the upper bound of everything measured with it.

    Returns:
      mouth_correlation over frames (mean and std over clips with a face of `MIN_FACE` pixels) and the number of these
      clips, mouth_error (mean absolute), keypoint_error_percent (of the diagonal), visibility_accuracy (share),
      attribute_r2 (attribute -> explained share of its variance over the clips).
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("mouth", "error", "points", "seen", "attributes")}
    for clip in clips:
        found = probe.read(clip.frames)
        rows["points"].append(keypoints.keypoint_error(found.keypoints, clip.keypoints, clip.frames.shape[1:3]))
        rows["seen"].append(((found.keypoints[..., 2] > 0.5) == keypoints.visible(clip.keypoints)).mean())
        rows["attributes"].append((found.attributes.mean(0), clip.attributes))
        facing = keypoints.visible(clip.keypoints)[:, FACE].all(1)
        _, side = probe_lib.mouth_geometry(clip.points, KEYPOINTS)
        if facing.all() and np.median(side) >= MIN_FACE and clip.mouth.std() >= mouth.MIN_STD:
            rows["mouth"].append(pearson(found.mouth, clip.mouth))
            rows["error"].append(np.abs(found.mouth - clip.mouth).mean())
    return {
        "clips": len(clips),
        "mouth_clips": len(rows["mouth"]),
        "mouth_correlation": round(float(np.nanmean(rows["mouth"])), 4),
        "mouth_correlation_std": round(float(np.nanstd(rows["mouth"])), 4),
        "mouth_error": round(float(np.nanmean(rows["error"])), 4),
        "keypoint_error_percent": round(float(np.nanmean(rows["points"])), 4),
        "visibility_accuracy": round(float(np.mean(rows["seen"])), 4),
        "attribute_r2": _explained(probe.config.attributes, *map(np.array, zip(*rows["attributes"]))),
    }


def _explained(names: Sequence[str], read: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of the variance of each attribute (clips,A) that the readings explain; 0 if it does not vary."""
    total = truth.var(0)
    r2 = np.where(total > 1e-8, 1 - ((read - truth) ** 2).mean(0) / np.maximum(total, 1e-8), 0.0)
    return {name: round(float(value), 3) for name, value in zip(names, r2)}
