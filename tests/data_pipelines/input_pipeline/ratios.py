"""Counts conditions in a span of a schedule."""

import numpy as np

from data_pipelines.input_pipeline.schedule import Schedule
from omnihuman_jax import conditions


def ratio_report(schedule: Schedule, first_step: int, last_step: int) -> dict[str, dict[str, float]]:
    """Counts how often conditions occur in a span of steps of one stage.

    Returns:
      condition -> {"target", "scheduled", "active"} shares, and "samples" -> {"count": number of rows}.
    """
    selections = [schedule.select(step) for step in range(first_step, last_step + 1)]
    scheduled = np.concatenate([selection.scheduled for selection in selections])
    active = np.concatenate([selection.active for selection in selections])
    target = schedule.stages[selections[0].stage].ratios
    shares = zip(conditions.names(), scheduled.mean(axis=0).tolist(), active.mean(axis=0).tolist(), strict=True)
    report = {name: {"target": float(target[name]), "scheduled": s, "active": a} for name, s, a in shares}
    return report | {"samples": {"count": float(len(scheduled))}}
