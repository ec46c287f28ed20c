"""Classifier-free guidance on text and audio, with an annealed scale.

The paper guides audio and text only; reference and pose stay on in every pass. It lowers the scale during sampling to
avoid wrinkles. The shape and the end points are not published, so both are settings.

Two forms:

  joint     two passes:    v = v_u + s (v_c - v_u)
  separate  three passes:  v = v_u + s_text (v_t - v_u) + s (v_ta - v_t)

where u has no guided condition, t has text, and c = ta has all active conditions. With equal scales the two agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError

MODES = ("joint", "separate")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly to follow text and audio.

    Attributes:
      scale: guidance scale at the first step; 1 means no guidance. The paper uses 6.5.
      final_scale: scale at the last step.
      mode: "joint" or "separate" (see the module).
      text_scale: scale of text at the first step in separate mode, annealed by the same factor; None means `scale`.
      schedule: "cosine" (half a cosine), "linear", or "constant" (`scale` throughout).
    """

    scale: float = 6.5
    final_scale: float = 3.5
    mode: str = "joint"
    text_scale: float | None = None
    schedule: str = "cosine"

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"guidance.mode={self.mode!r}; choose one of {', '.join(MODES)}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance.schedule={self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        for name in ("scale", "final_scale", "text_scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"guidance.{name}={value}; a guidance scale is a finite number >= 0")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any] | None) -> Guidance:
        """Reads `scale`, `final_scale` and, where present, the other fields; ignores the rest."""
        config = config or {}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if name in config})

    @property
    def is_off(self) -> bool:
        """Whether every step uses the conditional pass alone."""
        last = self.scale if self.schedule == "constant" else self.final_scale
        return self.scale == last == 1.0 and self.text_scale in (None, 1.0)


def annealed(first: float, last: float, progress: jax.Array | float, schedule: str = "cosine") -> jax.Array:
    """The scale at `progress` in [0, 1] (0 the first sampling step, 1 the last)."""
    progress = jnp.asarray(progress, dtype=jnp.float32)
    if schedule == "constant":
        return jnp.full_like(progress, first)
    fallen = progress if schedule == "linear" else 0.5 * (1.0 - jnp.cos(jnp.pi * progress))
    return first + (last - first) * fallen


def passes(active: np.ndarray, guidance: Guidance) -> np.ndarray:
    """Active conditions of each network pass, bool (P, conditions) with P = 1 to 3; the conditional pass is last.

    There is one pass if no guided condition is in `active`, bool (conditions,), or the scale is 1 throughout.
    """
    active = np.asarray(active, dtype=bool)
    unguided = conditions.without(active, *conditions.guided())
    if guidance.is_off or (unguided == active).all():
        return active[None]
    text_only = unguided | (active & conditions.row(["text"]))
    if guidance.mode == "separate" and not ((text_only == active).all() or (text_only == unguided).all()):
        return np.stack([unguided, text_only, active])
    return np.stack([unguided, active])


def combine(velocities: jax.Array, rows: np.ndarray, guidance: Guidance, progress: jax.Array | float) -> jax.Array:
    """The guided velocity (B, ...), in the dtype of `velocities`.

    Args:
      velocities: (P, B, ...), in the order of `passes`.
      rows: bool (P, conditions), from `passes`; static.
      guidance: the settings.
      progress: of sampling, in [0, 1].
    """
    chex.assert_axis_dimension(velocities, 0, len(rows))
    if len(rows) == 1:
        return velocities[0]
    scale = annealed(guidance.scale, guidance.final_scale, progress, guidance.schedule)
    text_first = guidance.scale if guidance.text_scale is None else guidance.text_scale
    ratio = guidance.final_scale / guidance.scale if guidance.scale else 1.0
    text_scale = annealed(text_first, text_first * ratio, progress, guidance.schedule)
    if len(rows) == 3:
        unguided, text, full = velocities
        return unguided + text_scale * (text - unguided) + scale * (full - text)
    unguided, full = velocities
    # Two passes in separate mode: only text or only the others are guided, each with its own scale.
    differ = rows[-1] & ~rows[0]
    alone = guidance.mode == "separate" and (differ == conditions.row(["text"])).all()
    return unguided + (text_scale if alone else scale) * (full - unguided)
