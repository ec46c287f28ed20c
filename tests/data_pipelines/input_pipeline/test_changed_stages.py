"""A run whose config changes on the way: what was drawn stays drawn, and every source goes on where it was."""

import dataclasses
import json

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_pipelines.input_pipeline.schedule import Schedule
from omnihuman_jax.conditions import names
from omnihuman_jax.training.stages import changes, continued, from_json, to_json
from tests.data_pipelines.fake_dataset import positions
from tests.data_pipelines.input_pipeline.ratios import ratio_report
from tests.training.stage_rows import FULL, in_sequence, stage_row

SIZES = ((12, 12), (16, 10), (10, 14))
WINDOWS = (1, 5, 9, 13)
# Whole schedules are slow to shrink, and a failing example is small as it is.
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)


def _index(n, seed):
    """Random records of three sources, sizes and lengths; each source has one of every size with everything."""
    rng = np.random.default_rng(seed)
    whole = [(f"s{k}", 13, size, True, True) for k in range(3) for size in SIZES]
    drawn = [
        (f"s{rng.integers(3)}", int(rng.choice(WINDOWS)), SIZES[rng.integers(3)], *(rng.random(2) < 0.5).tolist())
        for _ in range(n)
    ]
    names = ("source", "shape", "audio", "pose")
    return [
        dict(zip(names, (source, [length, *size], audio, pose), strict=True)) | {"split": "train"}
        for source, length, size, audio, pose in whole + drawn
    ]


SHARES = st.fixed_dictionaries({name: st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9]) for name in names()})
WEIGHTS = st.none() | st.fixed_dictionaries({f"s{k}": st.sampled_from([0.5, 1.0, 3.0]) for k in range(3)})


@st.composite
def _tables(draw, hosts):
    """A config: some of three stages, with steps and settings of its own."""
    rows = []
    for k in range(3):
        if draw(st.booleans()) and (k < 2 or rows):
            continue
        settings = {
            "ratios": draw(SHARES),
            "source_weights": draw(WEIGHTS),
            "latent_frames": draw(st.sampled_from(WINDOWS)),
            "motion_ratio": draw(st.sampled_from([0.75, 0.5])),
            "batch_size": hosts * draw(st.integers(1, 4)),
        }
        rows.append(stage_row(f"stage{k + 1}", 1, draw(st.integers(1, 25)), **settings))
    return in_sequence(*rows)


class Ledger:
    """Counts by itself what a run drew: raises where a record comes again within an epoch of its cell."""

    def __init__(self, index):
        self.index, self.epochs, self.drawn = index, {}, {}

    def _cell(self, record, frames):
        """The records that are the same to the schedule and long enough: a cell is these and no others."""
        own = self.index[record]
        return tuple(
            i
            for i, other in enumerate(self.index)
            if all(other[k] == own[k] for k in ("source", "audio", "pose"))
            and other["shape"][1:] == own["shape"][1:]
            and other["shape"][0] >= frames
        )

    def add(self, schedule, step):
        stage = schedule.stages[schedule.stage_at(step)]
        for cell, count in self.drawn.items():
            entry, frames = self.index[cell[0]], min(self.index[i]["shape"][0] for i in cell)
            name = (entry["source"], tuple(entry["shape"][1:]), entry["audio"], entry["pose"])
            if frames >= stage.latent_frames and cell == self._cell(cell[0], stage.latent_frames):
                assert positions(schedule, step)[name] == count, "the closed form agrees with counting"
        for record in schedule.select(step).record.tolist():
            assert self.index[record]["shape"][0] >= stage.latent_frames
            cell = self._cell(record, stage.latent_frames)
            seen = self.epochs.setdefault(cell, set())
            assert record not in seen, f"record {record} comes again within an epoch, at step {step}"
            seen.add(record)
            if len(seen) == len(cell):
                seen.clear()
            self.drawn[cell] = self.drawn.get(cell, 0) + 1


def _same(a, b):
    for name in ("record", "scheduled", "active", "start_draw", "reference_draw"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.step, a.bucket) == (b.step, b.bucket)


def _through_json(stages):
    return from_json(json.loads(json.dumps(to_json(stages))))


@given(st.data())
@settings(max_examples=15, deadline=None, phases=NO_SHRINK)
def test_random_changes_at_random_steps_continue_every_source(data):
    """A run is stopped up to three times and goes on with another config, on another number of hosts."""
    seed = data.draw(st.integers(0, 10**6))
    hosts = data.draw(st.sampled_from([1, 2, 4]))
    index = _index(data.draw(st.integers(0, 40)), seed)
    config = data.draw(_tables(hosts))
    schedule = Schedule(config, index, seed=seed)
    ledger, done = Ledger(index), 0
    for _ in range(data.draw(st.integers(1, 3))):
        if schedule.num_steps <= done:
            break
        stop = data.draw(st.integers(done, schedule.num_steps))
        for step in range(done + 1, stop + 1):
            ledger.add(schedule, step)
        done, hosts = stop, data.draw(st.sampled_from([1, 2, 4]))
        config = data.draw(_tables(hosts))
        before, own = schedule, config
        saved = _through_json(before.stages)
        schedule = before.with_stages(continued(saved, own, done))
        assert all(isinstance(line, str) for line in changes(saved, own, done))
        for step in {1, done // 2, done} - {0}:
            _same(before.select(step), schedule.select(step)) if done else None
        for stage in schedule.stages:  # from here on as the config says
            if stage.first_step > done:
                wanted = next(row for row in own if row.name == stage.name)
                assert stage.last_step == wanted.last_step
                assert dataclasses.replace(stage, first_step=wanted.first_step, steps=wanted.steps) == wanted
        assert schedule.num_steps == max(done, own[-1].last_step)
        for again in {done, (done + schedule.num_steps) // 2, schedule.num_steps}:
            assert continued(_through_json(schedule.stages), own, again) == schedule.stages
            if again < own[-1].last_step:
                assert not changes(_through_json(schedule.stages), own, again)
    for step in range(done + 1, schedule.num_steps + 1):
        ledger.add(schedule, step)
        whole = schedule.select(step).record
        size = len(whole) // hosts
        parts = [schedule.select(step, slice(h * size, (h + 1) * size)).record for h in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    for stage in schedule.stages:
        report = ratio_report(schedule, stage.first_step, stage.last_step)
        for name in names():
            off = abs(report[name]["scheduled"] - stage.ratios[name]) * stage.steps * stage.batch_size
            assert off <= 2 + 2 * len(SIZES), (stage.name, name, off)


def test_a_change_in_the_middle_of_a_stage_leaves_the_streams_of_later_stages_alone():
    index = _index(40, 0)
    old = (stage_row("stage1", 1, 40), stage_row("stage2", 41, 40, {**FULL, "audio": 0.1}))
    own = (stage_row("stage1", 1, 40, {**FULL, "pose": 0.1}), old[1])
    before = Schedule(old, index, seed=0)
    after = before.with_stages(continued(old, own, 13))
    assert [(row.name, row.first_step, row.last_step) for row in after.stages] == [
        ("stage1", 1, 13),
        ("stage1", 14, 40),
        ("stage2", 41, 80),
    ]
    for step in range(41, 81):
        a, b = before.select(step), after.select(step)
        assert a.bucket == b.bucket
        np.testing.assert_array_equal(a.scheduled, b.scheduled)
