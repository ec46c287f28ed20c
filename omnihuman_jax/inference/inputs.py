"""The conditions of a batch of clips to generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from omnihuman_jax import conditions
from omnihuman_jax import frames as frames_lib
from omnihuman_jax.batch import pad_tokens
from omnihuman_jax.conditions import Condition, Kind
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference.segments import Segment

# Condition name -> its value for one clip, as in a record: token states (n, *row), a latent (H, W, C), or a track
# (F, *row) at 25 fps. Without absent conditions.
Given = Mapping[str, np.ndarray]


def active_row(given: Collection[str]) -> np.ndarray:
    """Active conditions, bool (conditions,), by the paper's inference rules.

    A condition that the rules turn on but that is not given (a caption) stays absent.
    """
    return conditions.for_inference(given) & conditions.row(given)


def check_given(model: Any, given: Given) -> None:
    """Raises UserError for an unknown condition, no rows, or rows of another shape than the model's or not finite."""
    for name, value in given.items():
        condition = conditions.get(name)
        if condition.kind is not Kind.IMAGE and value.shape[1:] != condition.row_shape(model):
            raise UserError(
                f"{name} has rows of shape {value.shape[1:]}, but the checkpoint's model reads "
                f"{condition.row_shape(model)}; use the encoder that its data was prepared with"
            )
        if not len(value):
            raise UserError(f"{name} has no rows; give at least one, or omit it")
        if not np.isfinite(value).all():
            raise UserError(f"{name} has values that are not finite; encode it again")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The conditions of B clips that share size, length and active row.

    Attributes:
      active: bool (conditions,), from `active_row`.
      values: batch field -> (B, ...): padded tokens and masks, latents, whole tracks. Without absent tracks.
    """

    active: np.ndarray
    values: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, model: Any, clips: Sequence[Given]) -> Inputs:
        """The inputs of clips with the same conditions; tracks shorter than the longest one repeat their last row."""
        names = set(clips[0])
        if any(set(clip) != names for clip in clips):
            raise ValueError("clips of one batch must have the same conditions")
        values: dict[str, np.ndarray] = {}
        for condition in conditions.table():
            values |= _stacked(condition, model, [clip.get(condition.name) for clip in clips])
        return cls(active_row(names), values)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def batch(self, segment: Segment, window: int, model: Any) -> dict[str, Any]:
        """The model's inputs for one segment, without `motion` and `active`."""
        batch = dict(self.values) | {"has_motion": np.full((len(self),), segment.has_motion)}
        for condition in conditions.table():
            if condition.kind is Kind.TRACK and condition.field in batch:
                track, context = batch[condition.field], condition.context_frames(model)
                rows = frames_lib.window_frames(segment.start, window, track.shape[1], context)
                batch[condition.field] = track[:, rows]
        return batch


def _stacked(condition: Condition, model: Any, given: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
    """The batch fields of one condition. Absent tokens are zeros; the model skips absent tracks."""
    absent = given[0] is None
    if condition.kind is Kind.TOKENS:
        length = getattr(model, condition.length)
        states = [np.zeros((0, *condition.row_shape(model))) if absent else value for value in given]
        tokens, masks = zip(*(pad_tokens(value, length) for value in states), strict=True)
        return {condition.field: np.stack(tokens), f"{condition.field}_mask": np.stack(masks)}
    if absent:
        return {}
    if condition.kind is Kind.IMAGE:
        return {condition.field: np.stack(given).astype(np.float32)}
    rows = np.arange(max(len(track) for track in given))
    return {condition.field: np.stack([t[np.minimum(rows, len(t) - 1)] for t in given]).astype(np.float32)}
