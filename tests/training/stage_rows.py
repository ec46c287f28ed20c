"""Rows of stage tables with settings that fit every clip, for tests that change a few of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from omnihuman_jax.training.stages import Stage

FULL = {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.25}


def stage_row(name: str, first_step: int, steps: int, ratios: Mapping[str, float] = FULL, **settings: Any) -> Stage:
    """A row of 4 samples a step, of windows of one latent frame; `settings` are its other fields."""
    usual = {"learning_rate": 1e-3, "warmup_steps": 10, "latent_frames": 1, "motion_ratio": 0.75, "batch_size": 4}
    return Stage(name, first_step, steps, ratios=ratios, **(usual | settings))


def in_sequence(*rows: Stage) -> tuple[Stage, ...]:
    """The rows one after the other from step 1."""
    table: list[Stage] = []
    for row in rows:
        table.append(dataclasses.replace(row, first_step=table[-1].last_step + 1 if table else 1))
    return tuple(table)
