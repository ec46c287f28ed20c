"""Encoding and decoding clips of any length, and frames of any size, in bounded memory.

In time the VAE processes a clip chunk by chunk. A `layers.Stream` carries the causal layers' last input frames, so the
result is that of one pass over the clip. The first chunk has 1 + n t frames and every later one m t, where t is the
VAE's temporal stride; each of the two shapes is compiled once.

In space a large frame can be split into overlapping tiles of one size, each with its own stream, whose results are
blended linearly over the overlap. That is an approximation: a tile does not see beyond its border, and the attention
of the middle blocks sees one tile instead of the frame.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.vae.layers import Stream
from omnihuman_jax.models.vae.vae import VAE

# Pixels (frames x rows x columns x batch) of a chunk: at Wan2.1's sizes its activations take a few GB. Small clips fit
# in one chunk; at 720p a chunk is one latent frame.
CHUNK_PIXELS = 4 * 1280 * 720

Cache = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How to split frames into tiles.

    Attributes:
      size: side of a tile in pixels; a frame is not split along a side that is no longer than this.
      overlap: pixels that neighbouring tiles share at least.
    """

    size: int = 512
    overlap: int = 128

    @classmethod
    def of_side(cls, side: int, stride: int) -> "Tiling | None":
        """Tiles of `side` pixels that overlap by a quarter, for a VAE of that spatial stride; None for side 0.

        Raises UserError if the side is not a multiple of the stride, or too small to overlap.
        """
        if not side:
            return None
        if side % stride or side < 4 * stride:
            raise UserError(f"--vae_tile={side}: must be a multiple of {stride}, at least {4 * stride}; try 512")
        return cls(side, side // 4 // stride * stride)

    def check(self, stride: int) -> None:
        """Raises UserError unless tiles and overlap are multiples of the VAE's spatial stride (pixels)."""
        if self.size % stride or self.overlap % stride or not 0 <= self.overlap < self.size:
            raise UserError(
                f"tiling of {self.size} pixels with overlap {self.overlap}: both must be multiples of {stride}, the "
                f"overlap smaller than the tile; try size {64 * stride}, overlap {16 * stride}"
            )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _step(graph, method: str, state, chunk: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
    stream = Stream(past)
    out = getattr(nnx.merge(graph, state), method)(chunk, stream)
    return out, tuple(stream.kept)


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of `size` start along a side of `length`, overlapping by at least `overlap`."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]


def _ramps(starts: list[int], size: int, length: int) -> list[np.ndarray]:
    """Blending weights (size,) of each tile along a side; at every pixel they sum to 1."""
    weights = np.zeros((len(starts), length))
    for row, start in zip(weights, starts, strict=True):
        row[start : start + size] = 1
    for i, (left, right) in enumerate(itertools.pairwise(starts)):
        shared = left + size - right
        ramp = (np.arange(shared) + 0.5) / max(shared, 1)
        weights[i, right : right + shared] *= 1 - ramp
        weights[i + 1, right : right + shared] *= ramp
    weights /= weights.sum(0)
    return [row[start : start + size].astype(np.float32) for row, start in zip(weights, starts, strict=True)]


class _Pass:
    """One stream through encode or decode: the caches of all its tiles."""

    def __init__(self, vae: VAE, method: str, tiling: Tiling | None):
        self.vae, self.method, self.tiling = vae, method, tiling
        self._graph, self._state = nnx.split(vae)
        self._caches: dict[tuple[int, int], Cache] = {}
        if tiling is not None:
            tiling.check(vae.config.spatial_stride)

    def _run(self, tile: Any, key: tuple[int, int]) -> jax.Array:
        out, self._caches[key] = _step(self._graph, self.method, self._state, tile, self._caches.pop(key, None))
        return out

    def __call__(self, chunk: Any) -> jax.Array | np.ndarray:
        """(B, F or T, rows, columns, channels) -> (B, T or F, rows, columns, channels)."""
        rows, columns = chunk.shape[2:4]
        if self.tiling is None:
            return self._run(chunk, (0, 0))
        stride = self.vae.config.spatial_stride
        divide = stride if self.method == "decode" else 1
        size, overlap = self.tiling.size // divide, self.tiling.overlap // divide
        tops, lefts = tile_starts(rows, size, overlap), tile_starts(columns, size, overlap)
        if len(tops) == len(lefts) == 1:
            return self._run(chunk, (0, 0))
        height, width = min(size, rows), min(size, columns)

        def scaled(n: int) -> int:
            return n * stride if self.method == "decode" else n // stride

        vertical = _ramps([scaled(t) for t in tops], scaled(height), scaled(rows))
        horizontal = _ramps([scaled(t) for t in lefts], scaled(width), scaled(columns))
        out = None
        for (top, v), (left, h) in itertools.product(zip(tops, vertical), zip(lefts, horizontal)):
            tile = np.asarray(self._run(chunk[:, :, top : top + height, left : left + width], (top, left)))
            if out is None:
                out = np.zeros((*tile.shape[:2], scaled(rows), scaled(columns), tile.shape[-1]), np.float32)
            place = np.s_[:, :, scaled(top) : scaled(top + height), scaled(left) : scaled(left + width)]
            out[place] += tile * v[:, None, None] * h[:, None]
        return out


def encode_stream(vae: VAE, chunks: Iterable[Any], tiling: Tiling | None = None) -> Iterator[jax.Array | np.ndarray]:
    """Encodes a clip in chunks: normalised latents (B, T, H, W, C) of each, of 1 + n, then n frames.

    Chunks are float32 (B, F, Hp, Wp, 3) in [-1, 1]; F = 1 + n t for the first, n t for later ones, with temporal stride
    t. Every new F is compiled once. Raises UserError if the VAE does not divide a chunk or a tile.
    """
    return map(_Pass(vae, "encode", tiling), chunks)


def decode_stream(vae: VAE, chunks: Iterable[Any], tiling: Tiling | None = None) -> Iterator[jax.Array | np.ndarray]:
    """Decodes latents in chunks (B, T, H, W, C), T >= 1: video (B, F, Hp, Wp, 3) in [-1, 1] of each.

    The first has F = 1 + t (T - 1) frames with temporal stride t, every later one t T.
    """
    return map(_Pass(vae, "decode", tiling), chunks)


def balanced(vae: VAE, batch: int, frames: int, height: int, width: int) -> int:
    """Latent frames per chunk when `frames` of them are split into equal chunks of at most `CHUNK_PIXELS` pixels."""
    most = max(1, CHUNK_PIXELS // (vae.config.temporal_stride * batch * height * width))
    return math.ceil(frames / math.ceil(frames / most))


def _chunks(clip: Any, first: int, later: int) -> Iterator[Any]:
    """`first` frames, then `later` at a time; the last chunk is padded with copies of the clip's last frame."""
    if clip.shape[1] <= first:
        yield clip
        return
    clip = np.asarray(clip)  # each slice of a device array would be compiled
    yield clip[:, :first]
    for start in range(first, clip.shape[1], later):
        chunk = clip[:, start : start + later]
        missing = later - chunk.shape[1]
        yield np.concatenate([chunk, *[chunk[:, -1:]] * missing], axis=1) if missing else chunk


def _joined(parts: Iterable[Any], frames: int) -> np.ndarray:
    out, at = None, 0
    for part in parts:
        if out is None:
            out = np.empty((part.shape[0], frames, *part.shape[2:]), np.float32)
        part = np.asarray(part[:, : frames - at], np.float32)
        out[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return out


def encode_clip(vae: VAE, video: Any, *, latents: int | None = None, tiling: Tiling | None = None) -> np.ndarray:
    """Normalised latents (B, T, H, W, C) of a whole clip (B, F, Hp, Wp, 3) in [-1, 1], F = 1 + t (T - 1), on the host.

    `latents` is the number of latent frames per chunk; None chooses by size. Raises UserError for a clip whose size the
    VAE does not divide.
    """
    batch, frames, height, width, _ = video.shape
    vae.config.check_clip(frames, height, width)
    stride = vae.config.temporal_stride
    latents = latents or balanced(vae, batch, 1 + (frames - 1) // stride, height, width)
    chunks = _chunks(video, 1 + stride * (latents - 1), stride * latents)
    return _joined(encode_stream(vae, chunks, tiling), 1 + (frames - 1) // stride)


def decode_clip(vae: VAE, z: Any, *, latents: int | None = None, tiling: Tiling | None = None) -> np.ndarray:
    """Video (B, 1 + t (T - 1), Hp, Wp, 3) float32 of normalised latents (B, T, H, W, C); see `encode_clip`."""
    batch, frames, rows, columns, _ = z.shape
    stride = vae.config.spatial_stride
    latents = latents or balanced(vae, batch, frames, rows * stride, columns * stride)
    parts = decode_stream(vae, _chunks(z, latents, latents), tiling)
    return _joined(parts, 1 + vae.config.temporal_stride * (frames - 1))
