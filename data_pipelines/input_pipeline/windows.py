"""Cuts a training window out of a record, as a pure function of the record and a few random draws.

`omnihuman_jax.frames` maps pixel frames to latent frames.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from omnihuman_jax import conditions, regions
from omnihuman_jax.batch import pad_tokens
from omnihuman_jax.conditions import Condition, Kind
from omnihuman_jax.frames import STRIDE, frames_around, pixel_frames, window_frames
from omnihuman_jax.models.dit.config import ModelConfig


def window_start(clip_frames: int, frames: int, motion_frames: int, motion_ratio: float, draw: np.ndarray) -> int:
    """First latent frame of a window of `frames` in a clip of `clip_frames` latent frames.

    0 with probability 1 - `motion_ratio` or if no window with motion frames fits; otherwise uniform in
    [M, clip_frames - frames], M = `motion_frames`.

    Args:
      draw: float64 [2], uniform in [0,1).
    """
    starts = clip_frames - frames - motion_frames + 1
    if starts < 1 or draw[0] < 1.0 - motion_ratio:
        return 0
    return motion_frames + int(draw[1] * starts)


def cut_window(
    record: Mapping[str, Any],
    frames: int,
    motion_ratio: float,
    model: ModelConfig,
    start_draw: np.ndarray,
    reference_draw: float,
) -> dict[str, np.ndarray]:
    """One row of a batch, without the conditions' flags.

    With frames = 1 the row is an image. It is one of the record's reference latents, because all but the first latent
    frame of a clip cover four pixel frames; its reference is another of them if there are several.

    Args:
      record: fields of `data_pipelines.schema`; latents (Tclip,H,W,C) with Tclip >= frames.
      motion_ratio: share of windows that start after motion frames.
      model: its motion frames M, and the sizes of the conditions.
      start_draw: float64 [2] in [0,1).
      reference_draw: in [0,1).

    Returns:
      latents (T,H,W,C), motion (M,H,W,C), has_motion (), regions (T,H,W,R), and the fields of every condition; float32
      and bool.
    """
    latents, references, motion = record["latents"], record["references"], model.motion_frames
    num_frames = pixel_frames(len(latents))
    choice = int(reference_draw * len(references))
    start, has_motion = 0, False
    if frames == 1:
        target = (choice + 1 + int(start_draw[0] * (len(references) - 1))) % len(references)
        window, last = references[target : target + 1], int(record["reference_frames"][target])
        rows = functools.partial(frames_around, last, STRIDE, num_frames)
    else:
        start = window_start(len(latents), frames, motion, motion_ratio, start_draw)
        has_motion, window = start > 0, latents[start : start + frames]
        rows = functools.partial(window_frames, start, frames, num_frames)
    before = latents[start - motion : start] if has_motion else np.zeros((motion, *latents.shape[1:]))
    cut = {
        "latents": window.astype(np.float32),
        "motion": before.astype(np.float32),
        "has_motion": np.bool_(has_motion),
        "regions": _regions(record["boxes"], rows(0), latents.shape[1:3]),
    }
    for condition in conditions.table():
        cut |= _cut_condition(condition, record, model, choice, rows)
    return cut


def _regions(boxes: np.ndarray, rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`regions.cells` of the window's rows of a clip's boxes; empty regions if the clip has none."""
    return regions.cells(boxes[rows] if len(boxes) else np.zeros((len(rows), *boxes.shape[1:])), *size)


def _cut_condition(
    condition: Condition, record: Mapping[str, Any], model: ModelConfig, choice: int, rows: Callable[[int], np.ndarray]
) -> dict[str, np.ndarray]:
    """The batch fields of one condition; zeros for a track that the clip lacks.

    Args:
      choice: index of the reference image.
      rows: number of context frames -> indices of the window's rows in a track.
    """
    if condition.kind is Kind.IMAGE:
        return {condition.field: record[condition.record][choice].astype(np.float32)}
    if condition.kind is Kind.TOKENS:
        tokens, mask = pad_tokens(record[condition.record], getattr(model, condition.length))
        return {condition.field: tokens, f"{condition.field}_mask": mask}
    indices, track = rows(condition.context_frames(model)), record.get(condition.record)
    row = condition.row_shape(model) if track is None else track.shape[1:]
    if track is None or not len(track):
        return {condition.field: np.zeros((len(indices), *row), np.float32)}
    return {condition.field: track[indices].astype(np.float32)}
