"""Encodes clips with the VAE in batches of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from omnihuman_jax.pixels import to_model

REFERENCES = 4

Item = TypeVar("Item")


def reference_frames(num_frames: int) -> np.ndarray:
    """(R,) int32 indices of the frames used as reference images, evenly spaced over the clip."""
    return np.linspace(0, num_frames - 1, REFERENCES).round().astype(np.int32)


def encode_clips(
    items: Iterable[tuple[np.ndarray, Item]], encode: Callable[[Any], Any], batch: int
) -> Iterator[tuple[Item, np.ndarray, np.ndarray]]:
    """Groups clips by shape and yields them when their batch is full, the rest at the end.

    Args:
      items: pairs of frames (F,H,W,3) uint8 and an associated item.
      encode: the VAE's encoder, (B,F,H,W,3) in [-1,1] -> normalised latents (B,T,h,w,C). Partial batches are padded,
        so it compiles once per shape.

    Yields:
      (item, latents (T,h,w,C) float16, references (R,h,w,C) float16).
    """
    waiting: dict[tuple[int, ...], list[tuple[np.ndarray, Item]]] = {}
    for frames, item in items:
        group = waiting.setdefault(frames.shape, [])
        group.append((frames, item))
        if len(group) == batch:
            yield from _encode(waiting.pop(frames.shape), encode, batch)
    for group in waiting.values():
        yield from _encode(group, encode, batch)


def _encode(
    group: list[tuple[np.ndarray, Item]], encode: Callable[[Any], Any], batch: int
) -> Iterator[tuple[Item, np.ndarray, np.ndarray]]:
    clips = np.stack([frames for frames, _ in group] + [group[0][0]] * (batch - len(group)))
    images = clips[:, reference_frames(clips.shape[1])].reshape(-1, 1, *clips.shape[2:])
    latents = np.asarray(encode(to_model(clips)), np.float16)
    references = np.asarray(encode(to_model(images)), np.float16)[:, 0]
    references = references.reshape(batch, REFERENCES, *references.shape[1:])
    for (_, item), latent, reference in zip(group, latents, references, strict=False):
        yield item, latent, reference
