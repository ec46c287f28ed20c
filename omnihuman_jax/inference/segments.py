"""How a clip of any length is cut into windows of the trained length.

A segment is one window of T latent frames that starts at absolute latent frame s. The first starts at s = 0 without
motion frames; each later one starts where the last ended and sees the last M latent frames before it, clean, as in
training.
"""

from __future__ import annotations

import dataclasses
import math

from omnihuman_jax.frames import latent_frames


@dataclasses.dataclass(frozen=True)
class Segment:
    """One window: its number, its first absolute latent frame and whether motion frames precede it."""

    number: int
    start: int

    @property
    def has_motion(self) -> bool:
        """Whether clean motion frames of the segment before go ahead of this one."""
        return self.start > 0


def plan(frames: int, window: int) -> list[Segment]:
    """The segments that cover `frames` pixel frames with windows of `window` latent frames.

    All windows have the same length, so that one compiled step serves them all; what the last one makes
    beyond `frames` is cut off.
    """
    return [Segment(i, i * window) for i in range(math.ceil(latent_frames(frames) / window))]
