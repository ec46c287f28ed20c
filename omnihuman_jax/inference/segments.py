"""How a clip of any length is cut into windows of the trained length, and what each window sees.

The causal VAE turns F pixel frames into 1 + (F - 1) / 4 latent frames: latent frame k covers pixel
frames 4k-3 .. 4k, and k = 0 covers frame 0 only. A segment is one window of T latent frames that
starts at absolute latent frame s. The first starts at s = 0 without motion frames; each later one
starts where the last ended and sees the last M latent frames before it, clean, as in training.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

TEMPORAL_FACTOR = 4
FPS = 25


@dataclasses.dataclass(frozen=True)
class Segment:
    """One window: its number, its first absolute latent frame and whether motion frames precede it."""

    number: int
    start: int

    @property
    def has_motion(self) -> bool:
        """Whether clean motion frames of the segment before go ahead of this one."""
        return self.start > 0


def latent_frames(frames: int) -> int:
    """Latent frames that cover `frames` >= 1 pixel frames."""
    return 1 + math.ceil((frames - 1) / TEMPORAL_FACTOR)


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` >= 1 latent frames decode to."""
    return 1 + TEMPORAL_FACTOR * (latents - 1)


def plan(frames: int, window: int) -> list[Segment]:
    """The segments that cover `frames` pixel frames with windows of `window` latent frames.

    All windows have the same length, so that one compiled step serves them all; what the last one makes
    beyond `frames` is cut off.
    """
    return [Segment(i, i * window) for i in range(math.ceil(latent_frames(frames) / window))]


def frame_indices(start: int, window: int, num_frames: int, context: int = 0) -> np.ndarray:
    """Pixel frames that a window reads, clamped into the clip.

    Args:
      start: absolute latent frame s of the window's start.
      window: T.
      num_frames: F, rows there are.
      context: extra frames on both sides (the audio window's context).

    Returns:
      int64 (4T + 2 * context,): 4s-3-context .. 4(s+T-1)+context.
    """
    first = TEMPORAL_FACTOR * start - (TEMPORAL_FACTOR - 1) - context
    last = TEMPORAL_FACTOR * (start + window - 1) + context
    return np.clip(np.arange(first, last + 1), 0, num_frames - 1)
