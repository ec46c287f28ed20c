"""Frame arithmetic: 25 pixel frames a second, and the pixel frames that each latent frame covers.

The causal VAE turns F pixel frames into 1 + (F - 1) / 4 latent frames: latent frame k covers pixel frames 4k-3 .. 4k,
and k = 0 covers frame 0 only. Conditions still have four pixel frames per latent frame; indices outside the clip are
clamped, so latent frame 0 sees frame 0 four times. docs/frames.md has the tables.
"""

import math

import numpy as np

FPS = 25
STRIDE = 4  # pixel frames of a latent frame


def latent_frames(frames: int) -> int:
    """Latent frames that cover `frames` >= 1 pixel frames."""
    return 1 + math.ceil((frames - 1) / STRIDE)


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` >= 1 latent frames decode to."""
    return 1 + STRIDE * (latents - 1)


def seconds(latents: int) -> float:
    """Seconds of video that `latents` latent frames in the middle of a clip stand for."""
    return STRIDE * latents / FPS


def frames_around(last: int, count: int, num_frames: int, context: int = 0) -> np.ndarray:
    """The `count` pixel frames that end with `last` and `context` more at each end, int64 (count + 2 * context,).

    Indices are clamped to 0 .. num_frames - 1.
    """
    return np.clip(np.arange(last - count + 1 - context, last + context + 1), 0, num_frames - 1)


def window_frames(start: int, window: int, num_frames: int, context: int = 0) -> np.ndarray:
    """Pixel frames of latent frames start .. start + window - 1 and `context` more at each end, clamped to the clip.

    Args:
      start: first latent frame of the window, counted from the clip's start.
      window: latent frames T.
      num_frames: pixel frames F of the clip.
      context: pixel frames that a condition reads beyond each end of the window.

    Returns:
      int64 (4T + 2 * context,).
    """
    return frames_around(STRIDE * (start + window - 1), STRIDE * window, num_frames, context)
