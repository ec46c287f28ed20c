"""Splits a clip of any length into windows of the trained length.

A segment is one window of T latent frames. The first starts at latent frame 0, without motion frames; each later one
starts where the previous one ended and sees the M clean latent frames before it, as in training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from omnihuman_jax.frames import latent_frames


class Segment(NamedTuple):
    """One window: its number and its first latent frame, counted from the start of the clip."""

    number: int
    start: int

    @property
    def has_motion(self) -> bool:
        """Whether motion frames precede it."""
        return self.start > 0


def plan(frames: int, window: int) -> list[Segment]:
    """The segments that cover `frames` pixel frames with windows of `window` latent frames.

    All windows have the same length, so that one compiled step serves them all.
    """
    return [Segment(i, i * window) for i in range(math.ceil(latent_frames(frames) / window))]
