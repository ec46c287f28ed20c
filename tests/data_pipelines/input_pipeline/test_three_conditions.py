"""The mixture of three conditions that select records: ratios hold, and no record serves what it does not have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.input_pipeline.schedule import Schedule
from omnihuman_jax import conditions
from omnihuman_jax.conditions import Condition, Kind
from omnihuman_jax.errors import UserError
from tests.data_pipelines.input_pipeline.ratios import ratio_report
from tests.training.stage_rows import stage_row

GAZE = Condition("gaze", Kind.TRACK, "gaze", "gaze", row=(3,), selects=True)
SIZES = ((12, 12), (16, 10))
NAMES = ("audio", "gaze", "pose")


@pytest.fixture(autouse=True)
def three(monkeypatch):
    table = list(conditions.table())
    monkeypatch.setattr(conditions, "_TABLE", [*table[:3], GAZE, *table[3:]])
    assert conditions.selecting() == NAMES


def make_index(count, shares, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"id": str(i), "source": ("a", "b")[i % 2], "split": "train", "shape": [9, *SIZES[i % 3 == 0]], "frames": 33}
        | {name: bool(i < 2 or rng.random() < share) for name, share in zip(NAMES, shares, strict=True)}
        for i in range(count)
    ]


def make_schedule(index, ratios, steps=250, **settings):
    ratios = {"text": 0.9, "reference": 0.7} | dict(zip(NAMES, ratios, strict=True))
    return Schedule([stage_row("stage3", 1, steps, ratios, batch_size=8, **settings)], index, seed=4)


def test_ratios_hold_and_are_independent_where_the_clips_allow():
    index = make_index(200, (0.8, 0.7, 0.6))
    schedule = make_schedule(index, (0.5, 0.4, 0.25))
    report = ratio_report(schedule, 1, 250)
    for name, ratio in zip(NAMES, (0.5, 0.4, 0.25), strict=True):
        assert abs(report[name]["scheduled"] - ratio) < 0.005, name
    drawn = [schedule.select(step) for step in range(1, 251)]
    scheduled, records = (np.concatenate([getattr(s, name) for s in drawn]) for name in ("scheduled", "record"))
    audio, gaze, pose = (scheduled[:, conditions.index(name)] for name in NAMES)
    assert abs((audio & gaze & pose).mean() - 0.5 * 0.4 * 0.25) < 0.01
    assert abs((audio & ~gaze & pose).mean() - 0.5 * 0.6 * 0.25) < 0.01
    for name, mask in zip(NAMES, (audio, gaze, pose), strict=True):
        assert all(index[i][name] for i in records[mask]), name


@settings(max_examples=25, deadline=None)
@given(
    shares=st.tuples(*[st.floats(0.3, 1.0)] * 3),
    ratios=st.tuples(*[st.floats(0.0, 0.45)] * 3),
    seed=st.integers(0, 1000),
)
def test_random_mixtures_reach_their_ratios_or_say_what_can_be_reached(shares, ratios, seed):
    index = make_index(60, shares, seed)
    try:
        schedule = make_schedule(index, ratios)
    except UserError as error:
        assert "stages.stage3.ratios." in str(error) and "reach" in str(error)
        return
    report = ratio_report(schedule, 1, 250)
    for name, ratio in zip(NAMES, ratios, strict=True):
        assert abs(report[name]["scheduled"] - ratio) < 0.01, (name, ratio, report[name])


def test_conditions_that_no_clip_has_together_never_come_together():
    index = [
        {"id": str(i), "source": "a", "split": "train", "shape": [9, 4, 4], "frames": 33}
        | {name: i % 3 == k for k, name in enumerate(NAMES)}
        for i in range(30)
    ]
    schedule = make_schedule(index, (0.3, 0.3, 0.3))
    drawn = np.concatenate([schedule.select(step).scheduled for step in range(1, 251)])
    drawn = drawn[:, [conditions.index(name) for name in NAMES]]
    assert drawn.sum(1).max() == 1 and np.abs(drawn.mean(0) - 0.3).max() < 0.01
    with pytest.raises(UserError, match="reach"):
        make_schedule(index, (0.5, 0.4, 0.3))
