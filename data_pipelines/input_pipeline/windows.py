"""Cuts a training window out of a record: pure functions of the record and a few draws.

A clip has F = 1 + 4*(Tclip-1) pixel frames at 25 fps: latent frame 0 covers pixel frame 0, latent frame k > 0 covers
pixel frames 4k-3 ... 4k. Every latent frame of a window is given four pixel frames all the same; indices outside the
clip are clamped, so that the clip's first latent frame sees frame 0 four times.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """Sizes of a training window that all stages share.

    Attributes:
      motion_frames: M, clean latent frames ahead of the noisy window.
      audio_context: pixel frames of audio features beyond each end of the window.
      text_len: L, text tokens; longer captions are cut, shorter ones masked.
    """

    motion_frames: int
    audio_context: int
    text_len: int


def window_start(clip_frames: int, frames: int, motion_frames: int, motion_ratio: float, draw: np.ndarray) -> int:
    """First latent frame of a window of `frames` in a clip of `clip_frames` latent frames.

    With probability `motion_ratio`, where a window with M motion frames fits, uniform in [M, clip_frames - frames];
    else 0.

    Args:
      draw: float64 [2], uniform in [0,1).
    """
    starts = clip_frames - frames - motion_frames + 1
    if starts < 1 or draw[0] < 1.0 - motion_ratio:
        return 0
    return motion_frames + int(draw[1] * starts)


def pixel_indices(start: int, frames: int, context: int, clip_pixel_frames: int) -> np.ndarray:
    """Pixel frames of latent frames start ... start+frames-1, and `context` more at each end.

    Returns:
      int64 [4*frames + 2*context].
    """
    return np.clip(np.arange(4 * start - 3 - context, 4 * (start + frames - 1) + context + 1), 0, clip_pixel_frames - 1)


def _rows(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """values[indices] in float32, or zeros for a clip without any."""
    if not len(values):
        return np.zeros((len(indices), *values.shape[1:]), np.float32)
    return values[indices].astype(np.float32)


def cut_window(
    record: Mapping[str, Any],
    frames: int,
    motion_ratio: float,
    config: WindowConfig,
    start_draw: np.ndarray,
    reference_draw: float,
) -> dict[str, np.ndarray]:
    """One row of a batch, without the conditions' flags.

    With frames = 1 the row is an image: one of the record's single-image latents, since a later latent frame of a clip
    stands for four pixel frames and is no image; its reference is another of them where there are several.

    Args:
      record: fields of `data_pipelines.schema`; latents (Tclip,H,W,C) with Tclip >= frames.
      frames: T, latent frames of the noisy window.
      motion_ratio: probability that the window continues from motion frames.
      start_draw: float64 [2]; reference_draw: in [0,1).

    Returns:
      latents (T,H,W,C), motion (M,H,W,C), has_motion (), reference (H,W,C), text (L,Dt), text_mask (L,),
      audio (4T+2*context,Da), keypoints (4T,K,3); float32 and bool.
    """
    latents, references, motion = record["latents"], record["references"], config.motion_frames
    clip_pixel_frames = 1 + 4 * (len(latents) - 1)
    choice = int(reference_draw * len(references))
    if frames == 1:
        target = (choice + 1 + int(start_draw[0] * (len(references) - 1))) % len(references)
        start, has_motion, window = 0, False, references[target : target + 1]
        last = int(record["reference_frames"][target])
        pixels, heard = (
            np.clip(np.arange(last - 3 - c, last + c + 1), 0, clip_pixel_frames - 1) for c in (0, config.audio_context)
        )
    else:
        start = window_start(len(latents), frames, motion, motion_ratio, start_draw)
        has_motion, window = start > 0, latents[start : start + frames]
        pixels, heard = (pixel_indices(start, frames, c, clip_pixel_frames) for c in (0, config.audio_context))
    before = latents[start - motion : start] if has_motion else np.zeros((motion, *latents.shape[1:]))
    tokens = min(len(record["text"]), config.text_len)
    text = np.zeros((config.text_len, record["text"].shape[1]), np.float32)
    text[:tokens] = record["text"][:tokens]
    return {
        "latents": window.astype(np.float32),
        "motion": before.astype(np.float32),
        "has_motion": np.bool_(has_motion),
        "reference": references[choice].astype(np.float32),
        "text": text,
        "text_mask": np.arange(config.text_len) < tokens,
        "audio": _rows(record["audio"], heard),
        "keypoints": _rows(record["keypoints"], pixels),
    }
