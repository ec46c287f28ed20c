"""The probe: a small network that reads keypoints, mouth opening and appearance from frames of rendered people.

It is trained on rendered frames (`experiments.train_probe`), so it measures rendered people and is only a proxy for
others. It has two parts: the locator sees the whole frame on a square canvas; the reader sees a full-resolution crop
around the mouth that the locator found, so the framing hardly matters.

Letters: F frames, S canvas size, P crop size, K keypoints, A attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.modules import build_with, parameter_shapes, parameters
from omnihuman_jax.weights.write import save_tensors

MOUTH_POINTS = ("mouth_left", "mouth_right", "mouth_top", "mouth_bottom")
ATTENTION_MAPS = 8  # for appearance
BATCH = 32  # frames per call; fixed, so that each part compiles once


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Sizes and names of a probe.

    Attributes:
      keypoints: names of the K keypoints, in the order of the arrays.
      attributes: names of the A appearance numbers.
      attribute_mean, attribute_std: (A,) over the training people.
      widths: channels at strides 2, 4, 8 and 16.
      canvas: S, pixels; a multiple of 16.
      crop: P, pixels; a multiple of 8.
    """

    keypoints: tuple[str, ...]
    attributes: tuple[str, ...]
    attribute_mean: tuple[float, ...]
    attribute_std: tuple[float, ...]
    widths: tuple[int, int, int, int] = (16, 32, 64, 96)
    canvas: int = 96
    crop: int = 32


def _conv(inputs: int, outputs: int, rngs: nnx.Rngs, size: int = 3, stride: int = 1) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), strides=stride, rngs=rngs)


class Residual(nnx.Module):
    """x + conv(relu(norm(x))). The residual stream itself is not normalised, so absolute colours survive."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm = nnx.GroupNorm(width, num_groups=8, rngs=rngs)
        self.conv = _conv(width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv(nnx.relu(self.norm(x)))


class Locator(nnx.Module):
    """Frames (B,S,S,3) -> heatmap logits (B,S/4,S/4,K), visibility logits (B,K), standardised attributes (B,A)."""

    def __init__(self, config: ProbeConfig, *, rngs: nnx.Rngs):
        a, b, c, d = config.widths
        self.down = nnx.List([_conv(i, o, rngs, stride=2) for i, o in ((3, a), (a, b), (b, c), (c, d))])
        self.blocks = nnx.List([Residual(w, rngs) for w in (a, b, c, d)])
        self.deep = Residual(d, rngs)
        self.up = nnx.List([_conv(d, c, rngs, size=1), _conv(c, b, rngs, size=1)])
        self.merge = nnx.List([Residual(c, rngs), Residual(b, rngs)])
        self.heat = _conv(b, len(config.keypoints), rngs, size=1)
        self.attend = _conv(c, ATTENTION_MAPS, rngs, size=1)
        self.value = _conv(c, 16, rngs, size=1)
        self.hidden = nnx.Linear(d + ATTENTION_MAPS * (16 + 3), 128, rngs=rngs)
        self.visible = nnx.Linear(128, len(config.keypoints), rngs=rngs)
        self.attributes = nnx.Linear(128, len(config.attributes), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        image, levels = x, []
        for conv, block in zip(self.down, self.blocks):
            x = block(conv(x))
            levels.append(x)
        x = self.deep(x)
        pooled = [x.mean((1, 2))]
        for conv, block, skip in zip(self.up, self.merge, (levels[2], levels[1])):
            x = conv(x)
            x = block(skip + jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))
            if skip is levels[2]:
                pooled.append(self._attended(x, image))
        hidden = nnx.relu(self.hidden(jnp.concatenate(pooled, -1)))
        return self.heat(nnx.relu(x)), self.visible(hidden), self.attributes(hidden)

    def _attended(self, x: jax.Array, image: jax.Array) -> jax.Array:
        """Features (B,h,w,c) and pixels averaged under each attention map; one on the hair yields the hair's colour."""
        b, h, w, _ = x.shape
        pixels = image.reshape(b, h, image.shape[1] // h, w, image.shape[2] // w, 3).mean((2, 4))
        x = nnx.relu(x)
        weights = jax.nn.softmax(self.attend(x).reshape(b, h * w, ATTENTION_MAPS), axis=1)
        values = jnp.concatenate([self.value(x), pixels], -1).reshape(b, h * w, -1)
        return jnp.einsum("bnk,bnc->bkc", weights, values).reshape(b, -1)


class Reader(nnx.Module):
    """Crops around the mouth (B,P,P,3) -> logit of the opening (B,)."""

    def __init__(self, config: ProbeConfig, *, rngs: nnx.Rngs):
        self.down = nnx.List([_conv(i, o, rngs, stride=2) for i, o in ((3, 24), (24, 32), (32, 48))])
        self.blocks = nnx.List([Residual(w, rngs) for w in (24, 32, 48)])
        self.hidden = nnx.Linear(48 * (config.crop // 8) ** 2, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, block in zip(self.down, self.blocks):
            x = block(conv(x))
        return self.out(nnx.relu(self.hidden(nnx.relu(x).reshape(len(x), -1))))[:, 0]


class ProbeNetwork(nnx.Module):
    """Both parts, which are trained together; `Probe` runs the locator first."""

    def __init__(self, config: ProbeConfig, *, rngs: nnx.Rngs):
        self.locator = Locator(config, rngs=rngs)
        self.reader = Reader(config, rngs=rngs)


def to_input(frames: np.ndarray) -> jax.Array:
    """uint8 (…,3) -> float32 in [-1,1]."""
    return jnp.asarray(frames, jnp.float32) / 127.5 - 1


def heatmap_points(logits: jax.Array) -> jax.Array:
    """Heatmap logits (B,h,w,K) -> x, y in [0,1] of the canvas (B,K,2).

    The mean position under the softmax within two cells of its peak, so a faint second peak has no influence.
    """
    _, h, w, k = logits.shape
    p = jax.nn.softmax(logits.reshape(-1, h * w, k), axis=1)
    cells = jnp.stack(jnp.meshgrid(jnp.arange(w), jnp.arange(h), indexing="xy"), -1).reshape(-1, 2)
    peak = cells[jnp.argmax(p, axis=1)]  # (B,K,2)
    near = (jnp.abs(cells[None, :, None] - peak[:, None]) <= 2).all(-1)
    p = p * near
    p = p / p.sum(1, keepdims=True)
    return (jnp.einsum("bnk,nd->bkd", p, cells.astype(p.dtype)) + 0.5) / jnp.array([w, h])


def letterbox(size: tuple[int, int], canvas: int) -> np.ndarray:
    """Affine (2,3) from pixels of a (height, width) frame to those of a square canvas, centred and fitted."""
    height, width = size
    scale = canvas / max(height, width)
    return np.array([[scale, 0, (canvas - scale * width) / 2], [0, scale, (canvas - scale * height) / 2]])


def warp(frame: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
    """Applies an affine (2,3) in pixel-corner coordinates to a frame, giving (size,size,3); mid grey outside."""
    m = affine.copy()
    m[:, 2] += m[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV's coordinates refer to pixel centres
    shrink = 1 / max(np.sqrt(abs(np.linalg.det(m[:, :2]))), 1e-6)
    if shrink > 2:  # bilinear sampling would skip pixels
        frame = cv2.GaussianBlur(frame, (0, 0), shrink / 2)
    return cv2.warpAffine(frame, m, (size, size), flags=cv2.INTER_LINEAR, borderValue=(127, 127, 127))


def mouth_crop_affine(centre: np.ndarray, side: float, crop: int) -> np.ndarray:
    """Affine (2,3) that maps a square of `side` pixels around `centre` (x, y) to the crop."""
    scale = crop / side
    return np.array([[scale, 0, crop / 2 - scale * centre[0]], [0, scale, crop / 2 - scale * centre[1]]])


def mouth_geometry(points: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Centre (F,2) of the mouth and side (F,) of the square to crop around it, from keypoints in pixels (F,K,2)."""
    named = {name: points[:, i] for i, name in enumerate(names)}
    eyes = (named["left_eye"] + named["right_eye"]) / 2
    side = np.linalg.norm(named["chin"] - eyes, axis=-1)
    return np.mean([named[name] for name in MOUTH_POINTS], axis=0), np.maximum(side, 6.0)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the probe reads in F frames.

    Attributes:
      keypoints: (F,K,3) x, y in [0,1] of frame width and height, probability of being visible.
      mouth: (F,) opening of the mouth, 0 shut to 1 wide open.
      attributes: (F,A) appearance numbers, not standardised.
      face: pixels from the eyes to the chin, median over frames; the mouth of a small face cannot be read reliably.
    """

    keypoints: np.ndarray
    mouth: np.ndarray
    attributes: np.ndarray
    face: float


class Probe:
    """A trained probe."""

    def __init__(self, config: ProbeConfig, network: ProbeNetwork, header: dict[str, Any] | None = None):
        """`header` records how the weights were made, and their accuracy on held-out rendered frames."""
        self.config, self.network, self.header = config, network, dict(header or {})
        graph, state = nnx.split(network)

        def locate(state, frames):
            logits, visible, attributes = nnx.merge(graph, state).locator(frames)
            return heatmap_points(logits), jax.nn.sigmoid(visible), attributes

        def read_mouth(state, crops):
            return jax.nn.sigmoid(nnx.merge(graph, state).reader(crops))

        self._locate = functools.partial(jax.jit(locate), state)
        self._read_mouth = functools.partial(jax.jit(read_mouth), state)

    def read(self, frames: np.ndarray) -> Reading:
        """Reads the frames (F,height,width,3), uint8 sRGB, of one clip."""
        config, size = self.config, frames.shape[1:3]
        affine = letterbox(size, config.canvas)
        canvases = np.stack([warp(frame, affine, config.canvas) for frame in frames])
        points, visible, attributes = _batched(self._locate, canvases)
        pixels = (points * config.canvas - affine[:, 2]) / affine[0, 0]
        centre, side = mouth_geometry(pixels, config.keypoints)
        # One crop size for the whole clip: the chin moves with the mouth, but the face does not change size.
        face = float(np.median(side))
        crops = [warp(f, mouth_crop_affine(c, face, config.crop), config.crop) for f, c in zip(frames, centre)]
        (mouth,) = _batched(lambda x: (self._read_mouth(x),), np.stack(crops))
        keypoints = np.concatenate([pixels / (size[1], size[0]), visible[..., None]], -1)
        attributes = attributes * np.array(config.attribute_std) + np.array(config.attribute_mean)
        return Reading(keypoints.astype(np.float32), mouth, attributes, face)

    @property
    def readable(self) -> np.ndarray:
        """Mask (A,) of the attributes whose R² over held-out people is at least 1/3; all if the header has none."""
        explained = self.header.get("accuracy", {}).get("rendered", {}).get("attribute_r2")
        if not explained:
            return np.ones(len(self.config.attributes), bool)
        return np.array([explained[name] >= 1 / 3 for name in self.config.attributes])

    def named_points(self, keypoints: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Keypoints of one frame (K,>=2) in [0,1] -> name -> x, y in pixels of a (height, width) frame."""
        return {n: keypoints[i, :2] * (size[1], size[0]) for i, n in enumerate(self.config.keypoints)}


def _batched(function: Any, frames: np.ndarray) -> list[np.ndarray]:
    """Runs uint8 frames through `function` in batches of `BATCH`; the last batch is padded with its last frame."""
    parts = []
    for begin in range(0, len(frames), BATCH):
        part = frames[begin : begin + BATCH]
        rows = np.minimum(np.arange(BATCH), len(part) - 1)
        parts.append([np.asarray(x)[: len(part)] for x in function(to_input(part[rows]))])
    return [np.concatenate(x) for x in zip(*parts)]


def save_probe(path: str | Path, probe: Probe) -> None:
    """Writes float16 safetensors, with config and header as JSON metadata."""
    arrays = {name: value.astype(np.float16) for name, value in parameters(probe.network).items()}
    metadata = {"config": json.dumps(dataclasses.asdict(probe.config)), "header": json.dumps(probe.header)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, arrays, metadata)


def load_probe(path: str | Path) -> Probe:
    """Reads a probe written by `save_probe`.

    Raises:
      UserError: the file is missing or is no probe.
    """
    remedy = "make one with `python -m experiments.train_probe`"
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        values = json.loads(metadata["config"])
        config = ProbeConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        header = json.loads(metadata["header"])
    except FileNotFoundError as error:
        raise UserError(f"probe {path} does not exist; {remedy}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"probe {path} is not readable ({type(error).__name__}); {remedy}") from error

    def build() -> ProbeNetwork:
        return ProbeNetwork(config, rngs=nnx.Rngs(0))

    if parameter_shapes(build).keys() != arrays.keys():
        raise UserError(f"probe {path} does not have the parameters that this version expects; {remedy}")
    return Probe(config, build_with(build, arrays), header)
