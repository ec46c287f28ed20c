"""The staged mixture: exact ratios, no repeats, nothing moves that should not, any step at once."""

import copy
import dataclasses
import time

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data_pipelines.input_pipeline import mixture
from data_pipelines.input_pipeline.counter_random import hash64, permutation, uniform
from data_pipelines.input_pipeline.schedule import Schedule, _Split
from omnihuman_jax.conditions import index, names
from omnihuman_jax.errors import UserError
from tests.data_pipelines.fake_dataset import positions
from tests.data_pipelines.input_pipeline.ratios import ratio_report
from tests.training.stage_rows import FULL, stage_row

# Whole schedules are slow to shrink, and a failing example is small as it is.
NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)
AUDIO, POSE = index("audio"), index("pose")
SIZES = ((12, 12), (16, 10), (10, 14), (8, 20), (20, 8))


def _ratios(**changes):
    return {**FULL, **changes}


def _table(*rows, **common):
    """Stage table from (steps, ratios) rows."""
    stages, first = [], 1
    for n, (steps, ratios) in enumerate(rows):
        stages.append(stage_row(f"stage{n + 1}", first, steps, ratios, **common))
        first += steps
    return stages


def _schedule(stages, index, *, global_batch_size, **settings):
    """The schedule of stages of one batch size."""
    return Schedule([dataclasses.replace(stage, batch_size=global_batch_size) for stage in stages], index, **settings)


def _entry(source="real", size=SIZES[0], audio=True, pose=True, split="train"):
    return {"source": source, "split": split, "shape": [13, *size], "audio": audio, "pose": pose}


def _index(n, *, seed=0, sources=2, sizes=3, audio=0.5, pose=0.5):
    """Random index whose sizes each hold a record with audio and pose."""
    rng = np.random.default_rng(seed)
    whole = [_entry(size=size) for size in SIZES[:sizes]]
    return whole + [
        _entry(
            f"source{rng.integers(sources)}",
            SIZES[rng.integers(sizes)],
            bool(rng.random() < audio),
            bool(rng.random() < pose),
        )
        for _ in range(n - sizes)
    ]


def _select(schedule, first, last):
    selections = [schedule.select(step) for step in range(first, last + 1)]
    return np.concatenate([s.record for s in selections]), np.concatenate([s.scheduled for s in selections])


def _uses(schedule, first, last, size):
    return np.bincount(_select(schedule, first, last)[0], minlength=size)


def _same(a, b):
    for name in ("record", "scheduled", "active", "start_draw", "reference_draw"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.step, a.bucket, a.stage) == (b.step, b.bucket, b.stage)


def test_random_numbers_are_the_published_generator():
    # First outputs of SplitMix64 from state 0, as its authors' reference implementation gives them.
    assert hash64(0, np.arange(3)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_draws_are_uniform_and_uncorrelated_between_neighbours():
    draws = uniform(7, np.arange(100)[:, None].repeat(100, 1).ravel(), np.tile(np.arange(100), 100)).reshape(100, 100)
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / 12) < 0.003
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.04


def test_permutations_are_permutations_and_differ():
    assert sorted(permutation(5, 0, 100)) == list(range(100))
    assert (permutation(5, 0, 100) != permutation(5, 1, 100)).sum() > 80


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any), st.integers(0, 10**9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_split_deals_every_draw_to_one_receiver_in_proportion(weights, start, key):
    split = _Split(weights, key)
    counts = split.counts(np.arange(start, start + 200))
    given_out = np.diff(counts, axis=1)
    assert (given_out.sum(axis=0) == 1).all() and (given_out >= 0).all()
    share = np.array(weights)[:, None] / sum(weights) * np.arange(start, start + 200)
    assert np.abs(counts - share).max() < np.ceil(np.log2(max(len(weights), 2)))
    assert (counts[np.array(weights) == 0] == 0).all()


@pytest.mark.parametrize("batch_size", [2, 8, 256])
@pytest.mark.parametrize("sizes", [1, 3, 5])
def test_every_thousand_samples_hold_the_ratios_within_one_percent(batch_size, sizes):
    """Counts windows of 1,000 consecutive samples at many places of a stage with awkward ratios."""
    target = _ratios(audio=0.47, pose=0.213)
    schedule = _schedule(_table((10**6, target)), _index(200, sizes=sizes), global_batch_size=batch_size, seed=3)
    steps = -(-1000 // batch_size)
    for start in (1, 3, 12_345, 900_001):
        scheduled = _select(schedule, start, start + steps - 1)[1][:1000]
        off = np.abs(scheduled.mean(axis=0) - [target[name] for name in names()])
        assert off.max() <= 0.01, (start, dict(zip(names(), off, strict=True)))


def test_a_stage_meets_its_ratios_to_a_few_samples():
    schedule = _schedule(_table((500, FULL), (500, _ratios(pose=0.5))), _index(100), global_batch_size=8, seed=1)
    for first, last in ((1, 500), (501, 1000)):
        report = ratio_report(schedule, first, last)
        assert report["samples"]["count"] == 4000
        for name in names():
            assert abs(report[name]["scheduled"] - report[name]["target"]) * 4000 <= 4, name


def test_conditions_are_drawn_independently_of_each_other():
    scheduled = _select(_schedule(_table((1000, FULL)), _index(300), global_batch_size=8, seed=0), 1, 1000)[1]
    for i in range(4):
        for j in range(i):
            both = (scheduled[:, i] & scheduled[:, j]).mean()
            wanted = FULL[names()[i]] * FULL[names()[j]]
            assert abs(both - wanted) < 0.015, (names()[i], names()[j])
    assert (scheduled[:, POSE] & ~scheduled[:, AUDIO]).any()


def test_window_and_reference_draws_are_uniform_and_independent_of_each_other_and_of_the_conditions():
    schedule = _schedule(_table((500, FULL)), _index(300), global_batch_size=8, seed=0)
    selections = [schedule.select(step) for step in range(1, 501)]
    columns = np.concatenate([np.column_stack([s.start_draw, s.reference_draw, s.scheduled]) for s in selections]).T
    assert (
        np.abs(columns[:3].mean(axis=1) - 0.5).max() < 0.02 and np.abs(columns[:3].var(axis=1) - 1 / 12).max() < 0.005
    )
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.06


def test_rows_do_not_repeat_a_pattern_from_step_to_step():
    scheduled = _select(_schedule(_table((400, FULL)), _index(300), global_batch_size=8, seed=0), 1, 400)[1]
    by_row = scheduled.reshape(400, 8, 4).mean(axis=0)
    assert np.abs(by_row - [FULL[name] for name in names()]).max() < 0.12


def test_a_record_only_serves_conditions_that_it_is_eligible_for():
    index = _index(120, audio=0.3, pose=0.2)
    record, scheduled = _select(_schedule(_table((300, FULL)), index, global_batch_size=8, seed=0), 1, 300)
    assert all(index[r]["audio"] for r in record[scheduled[:, AUDIO]])
    assert all(index[r]["pose"] for r in record[scheduled[:, POSE]])
    without = [r for r in record[~scheduled[:, AUDIO]] if not index[r]["audio"]]
    assert without, "clips without audio must train the weaker conditions"


def test_all_rows_of_a_step_share_a_size_and_every_size_has_its_share_of_steps():
    index = _index(200, sizes=4)
    schedule = _schedule(_table((1000, FULL)), index, global_batch_size=4, seed=0)
    steps = dict.fromkeys(SIZES[:4], 0)
    for step in range(1, 1001):
        selection = schedule.select(step)
        assert {tuple(index[r]["shape"][1:]) for r in selection.record} == {selection.bucket}
        steps[selection.bucket] += 1
    for size, count in steps.items():
        assert abs(count / 1000 - np.mean([tuple(entry["shape"][1:]) == size for entry in index])) < 0.003
    assert set(schedule._mixtures[0].buckets) == set(steps)


def test_no_record_repeats_within_an_epoch_of_its_source():
    """Two sources of different size, every clip with everything: each run of a source through its clips holds all."""
    index = [_entry("a")] * 96 + [_entry("b")] * 40
    schedule = _schedule(_table((600, FULL)), index, global_batch_size=8, seed=5)
    record = _select(schedule, 1, 600)[0]
    for start, stop in ((0, 96), (96, 136)):
        mine = record[(record >= start) & (record < stop)]
        epochs = len(mine) // (stop - start)
        assert epochs > 20
        for epoch in mine[: epochs * (stop - start)].reshape(epochs, -1):
            assert sorted(epoch) == list(range(start, stop))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3, 8]))
@settings(max_examples=12, deadline=None, phases=NO_SHRINK)
def test_every_epoch_of_a_cell_holds_each_of_its_records_once(seed, sources, sizes, batch_size):
    index = _index(60, seed=seed, sources=sources, sizes=sizes)
    schedule = _schedule(_table((150, _ratios(audio=0.3)), (150, FULL)), index, global_batch_size=batch_size, seed=seed)
    uses, drawn = np.zeros(len(index), int), dict.fromkeys((cell.name for cell in schedule.cells), 0)
    for step in range(1, 301):
        assert positions(schedule, step) == drawn, "the closed form agrees with counting"
        for record in schedule.select(step).record:
            uses[record] += 1
            entry = index[record]
            drawn[(entry["source"], tuple(entry["shape"][1:]), entry["audio"], entry["pose"])] += 1
    for cell in schedule.cells:
        counts, whole = uses[list(cell.records)], drawn[cell.name] // len(cell.records)
        assert counts.min() >= whole and counts.max() <= whole + 1, cell.name


def test_clips_of_a_source_are_used_equally_often_where_the_ratios_allow():
    index = [_entry("a", audio=i % 4 != 0, pose=i % 3 == 0) for i in range(90)] + [_entry("b")] * 30
    uses = _uses(_schedule(_table((2000, FULL)), index, global_batch_size=8, seed=0), 1, 2000, len(index))
    assert uses.max() - uses.min() <= 4
    assert abs(uses.mean() - 16000 / 120) < 1e-9


def test_source_weights_balance_sources_of_different_size():
    index = _index(300, sources=1) + [_entry("small", size) for size in SIZES[:3]] * 4
    weights = {"source0": 0.5, "small": 0.4, "real": 0.1}
    schedule = _schedule(_table((1000, FULL), source_weights=weights), index, global_batch_size=8, seed=0)
    sources = np.array([entry["source"] for entry in index])[_select(schedule, 1, 1000)[0]]
    for name, weight in weights.items():
        assert abs((sources == name).mean() - weight) < 0.005, name


def test_a_source_of_weight_zero_is_not_used():
    index = _index(60, sources=1)
    stages = _table((50, FULL), source_weights={"source0": 1.0, "real": 0.0})
    record = _select(_schedule(stages, index, global_batch_size=8, seed=0), 1, 50)[0]
    assert {index[r]["source"] for r in record} == {"source0"}


def test_sizes_without_eligible_clips_leave_their_quota_to_the_others():
    silent = [_entry("dance", SIZES[1], audio=False) for _ in range(20)]
    index = [_entry("talk") for _ in range(60)] + silent
    schedule = _schedule(_table((1000, FULL)), index, global_batch_size=4, seed=0)
    record, scheduled = _select(schedule, 1, 1000)
    assert abs(scheduled[:, AUDIO].mean() - 0.5) < 0.002
    assert abs(scheduled[:, POSE].mean() - 0.25) < 0.002
    assert abs((record >= 60).mean() - 0.25) < 0.002
    assert not scheduled[record >= 60, AUDIO].any()


def test_a_ratio_of_one_leaves_out_sizes_without_such_clips():
    index = [_entry() for _ in range(10)] + [_entry(size=SIZES[1], audio=False) for _ in range(10)]
    schedule = _schedule(_table((100, _ratios(text=1.0, audio=1.0))), index, global_batch_size=4, seed=0)
    assert _select(schedule, 1, 100)[1][:, AUDIO].all()
    assert schedule._mixtures[0].buckets == (SIZES[0],)


def test_bucket_weights_choose_the_sizes():
    stages = _table((1000, FULL), bucket_weights={SIZES[0]: 3, SIZES[2]: 1})
    schedule = _schedule(stages, _index(100), global_batch_size=2, seed=0)
    sizes = [schedule.select(step).bucket for step in range(1, 1001)]
    assert abs(sizes.count(SIZES[0]) - 750) <= 1 and abs(sizes.count(SIZES[2]) - 250) <= 1


@pytest.mark.parametrize(
    ("index", "stages", "expected"),
    [
        ([_entry(audio=False)], _table((9, FULL)), ["stages.stage1.ratios.audio=0.5", "at most 0", "audio"]),
        (
            [_entry(pose=False)],
            _table((9, _ratios(pose=0)), (9, FULL)),
            ["stages.stage2.ratios.pose=0.25", "at most 0"],
        ),
        (
            [_entry(), _entry(size=SIZES[1], audio=False)],
            _table((9, FULL), bucket_weights={SIZES[0]: 0.3, SIZES[1]: 0.7}),
            ["audio=0.5", "at most 0.3"],
        ),
        (
            [_entry(audio=False), _entry(pose=False)],
            _table((9, _ratios(text=1.0, audio=0.8, pose=0.5))),
            ["ratios.pose=0.5", "with audio=0.8", "at most 0.2"],
        ),
        (
            [_entry()],
            _table((9, FULL), source_weights={"reel": 1.0}),
            ["data.source_weights.reel", "did you mean 'real'"],
        ),
        ([_entry()], _table((9, FULL), bucket_weights={(9, 9): 1.0}), ["stages.stage1.bucket_weights", "9x9", "12x12"]),
        ([_entry()], _table((9, _ratios(audio=1.5))), ["stages.stage1.ratios.audio=1.5", "between 0 and 1"]),
        ([_entry()], [stage_row("late", 5, 9, FULL)], ["stages.late", "it must start at step 1"]),
        ([_entry(split="heldout")], _table((9, FULL)), ["no training clips"]),
    ],
)
def test_what_the_data_cannot_give_is_refused_before_training(index, stages, expected):
    with pytest.raises(UserError) as error:
        _schedule(stages, index, global_batch_size=4, seed=0)
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


def test_only_guided_conditions_can_be_dropped_for_guidance():
    with pytest.raises(UserError, match=r"pose=0\.1"):
        _schedule(_table((9, FULL)), [_entry()], global_batch_size=4, seed=0, guidance_dropout={"pose": 0.1})


def test_guidance_dropout_is_apart_from_the_ratios():
    index, stages = _index(100), _table((1000, FULL))
    plain = _schedule(stages, index, global_batch_size=8, seed=0)
    dropping = _schedule(stages, index, global_batch_size=8, seed=0, guidance_dropout={"text": 0.1, "audio": 0.2})
    for step in (1, 500, 1000):
        a, b = plain.select(step), dropping.select(step)
        np.testing.assert_array_equal(a.scheduled, b.scheduled)
        np.testing.assert_array_equal(a.record, b.record)
        np.testing.assert_array_equal(a.active, a.scheduled)
    report = ratio_report(dropping, 1, 1000)
    for name, kept in zip(names(), (0.9, 1.0, 0.8, 1.0), strict=True):
        assert abs(report[name]["scheduled"] - FULL[name]) < 0.002
        assert abs(report[name]["active"] - kept * FULL[name]) < 0.02


@given(st.data())
@settings(max_examples=20, deadline=None, phases=NO_SHRINK)
def test_changing_anything_of_later_stages_does_not_move_an_earlier_one(data):
    lengths = (5, 9, 13)
    index = _index(60, seed=data.draw(st.integers(0, 99)))
    for i, entry in enumerate(index[3:]):  # the first of each size stay long enough for every window
        entry["shape"][0] = lengths[i % 3]
    first = stage_row("stage1", 1, 30, _ratios(pose=0), latent_frames=data.draw(st.sampled_from(lengths)), batch_size=8)
    schedules = []
    for _ in range(2):
        stages = [first]
        for k in range(data.draw(st.integers(0, 2))):
            later = stage_row(
                f"stage{k + 2}",
                stages[-1].last_step + 1,
                data.draw(st.integers(1, 20)),
                _ratios(audio=data.draw(st.sampled_from([0.1, 0.5])), pose=data.draw(st.sampled_from([0.0, 0.25]))),
                bucket_weights=data.draw(st.sampled_from([None, {SIZES[0]: 3, SIZES[1]: 1}])),
                source_weights=data.draw(st.sampled_from([None, {"source0": 1, "source1": 3, "real": 2}])),
                latent_frames=data.draw(st.sampled_from(lengths)),
                motion_ratio=data.draw(st.sampled_from([0.75, 0.5])),
                batch_size=data.draw(st.sampled_from([8, 3])),
            )
            stages.append(later)
        schedules.append(Schedule(stages, index, seed=0))
    for step in range(1, 31):
        _same(*(schedule.select(step) for schedule in schedules))


def test_a_stage_draws_every_clip_as_long_as_its_window_and_no_other():
    index = _index(90)
    for i, entry in enumerate(index):
        entry["shape"][0] = (13, 9, 5)[i // 3 % 3]
    stages = [
        stage_row(f"stage{k + 1}", 1 + 200 * k, 200, FULL, latent_frames=frames) for k, frames in enumerate((5, 13, 9))
    ]
    schedule = _schedule(stages, index, global_batch_size=4, seed=0)
    for stage in stages:
        drawn = set(_select(schedule, stage.first_step, stage.last_step)[0].tolist())
        assert drawn == {i for i, entry in enumerate(index) if entry["shape"][0] >= stage.latent_frames}


def test_a_cell_goes_on_where_it_was_while_a_window_leaves_its_clips_the_same():
    """Source "a" has clips of one length, "b" of two: the longer window gives b epochs of its own, and a goes on."""
    index = [_entry("a")] * 40 + [_entry("b")] * 20 + [_entry("b") | {"shape": [5, *SIZES[0]]}] * 20
    stages = [stage_row(f"stage{k + 1}", 1 + 7 * k, 7, FULL, latent_frames=(5, 9, 5)[k]) for k in range(3)]
    schedule = _schedule(stages, index, global_batch_size=8, seed=0)
    record = _select(schedule, 1, 21)[0]
    a = record[record < 40]
    assert sorted(a[:40]) == list(range(40)), "across all three stages"
    by_stage = [part[part >= 40] for part in np.split(record, 3)]
    assert by_stage[1].max() < 60 and len(set(by_stage[1])) == min(len(by_stage[1]), 20)
    assert len(set(np.concatenate([by_stage[0], by_stage[2]])[:40])) == 40, "the third stage goes on after the first"


def test_a_stage_that_no_clip_or_no_clip_of_a_source_is_long_enough_for_is_refused():
    index = [_entry("a"), _entry("b") | {"shape": [5, *SIZES[0]]}]

    def plan(frames, **weights):
        stage = stage_row("late", 1, 9, FULL, latent_frames=frames, source_weights=weights or None)
        return _schedule([stage], index, global_batch_size=2, seed=0)

    with pytest.raises(UserError, match=r"stages.late: no training clip is as long as its window of 14 latent frames"):
        plan(14)
    with pytest.raises(
        UserError, match=r"stages.late: source 'b' has a weight, but no clip as long as the window of 9"
    ):
        plan(9, a=1.0, b=1.0)
    assert set(_select(plan(9, a=1.0, b=0.0), 1, 9)[0]) == {0}


def test_a_change_of_ratios_mid_run_continues_every_source():
    """One more row in the table: nothing before it moves, and the cells go on without a repeat or a gap."""
    index = [_entry("a")] * 50 + [_entry("b")] * 30
    before = _schedule(_table((200, FULL)), index, global_batch_size=4, seed=2)
    changed = _schedule(_table((7, FULL), (193, _ratios(audio=0.1, pose=0.05))), index, global_batch_size=4, seed=2)
    for step in range(1, 8):
        _same(before.select(step), changed.select(step))
    assert positions(changed, 8) == positions(before, 8)
    record = _select(changed, 1, 40)[0]
    for start, stop in ((0, 50), (50, 80)):
        first_epoch = record[(record >= start) & (record < stop)][: stop - start]
        assert sorted(first_epoch) == list(range(start, stop)), "a repeat or a gap in the epoch that spans the change"


@given(st.data())
@settings(max_examples=20, deadline=None, phases=NO_SHRINK)
def test_random_tables_are_random_access_and_independent_of_the_host_count(data):
    seed = data.draw(st.integers(0, 10**9))
    hosts = data.draw(st.sampled_from([1, 2, 4]))
    index = _index(
        data.draw(st.integers(8, 80)),
        seed=seed,
        sources=data.draw(st.integers(1, 4)),
        sizes=data.draw(st.integers(1, 5)),
        audio=data.draw(st.floats(0, 1)),
        pose=data.draw(st.floats(0, 1)),
    )
    share = st.floats(0, 0.95)
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.fixed_dictionaries({name: share for name in names()})),
            min_size=1,
            max_size=4,
        )
    )
    size = hosts * data.draw(st.integers(1, 5))
    stages = _table(*rows)
    # Audio and pose together may need clips that have both: sizes hold one each, so any pair of ratios can be met.
    schedule = _schedule(stages, index, global_batch_size=size, seed=seed)
    again = copy.deepcopy(_schedule(stages, index, global_batch_size=size, seed=seed))
    total = sum(steps for steps, _ in rows)
    sequence = {step: schedule.select(step) for step in range(1, total + 1)}
    for step in sorted(sequence, key=lambda step: hash64(seed, step)[0]):
        _same(sequence[step], again.select(step))
        parts = [again.select(step, slice(h * size // hosts, (h + 1) * size // hosts)) for h in range(hosts)]
        for name in ("record", "scheduled", "active", "start_draw", "reference_draw"):
            whole = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(whole, getattr(sequence[step], name))
    for stage in stages:
        report = ratio_report(schedule, stage.first_step, stage.last_step)
        # Splits are off by less than one draw a level, and every size has its own: a few rows in all.
        for name in names():
            rows_off = abs(report[name]["scheduled"] - stage.ratios[name]) * stage.steps * size
            assert rows_off <= 2 + 2 * len(schedule._mixtures[0].buckets), (name, rows_off)


def _bucket_excess(mix, batch_size):
    """Rows by which a span can be off a ratio because buckets differ in it: [audio, pose]; see schedule.py."""
    steps = np.array(mix.bucket_rates) / sum(mix.bucket_rates)

    def excess(rates, begin, end):
        if end - begin == 1:
            return 0.0
        middle = (begin + end) // 2
        left, right = (np.average(rates[i:j], weights=steps[i:j]) for i, j in ((begin, middle), (middle, end)))
        return abs(left - right) + excess(rates, begin, middle) + excess(rates, middle, end)

    needs = np.array(mix.need_rates) / mixture.UNIT
    return [
        batch_size * excess(needs @ np.array([need[k] for need in mixture.needs()], float), 0, len(steps))
        for k in range(2)
    ]


@pytest.mark.parametrize("everywhere", [True, False], ids=["clips for all everywhere", "sizes without eligible clips"])
@given(data=st.data())
@settings(max_examples=12, deadline=None, phases=NO_SHRINK)
def test_random_tables_hold_every_promise_over_every_window(everywhere, data):
    """Ratios over all windows of 1,000 samples, eligibility, epochs, sources and sizes, on any number of hosts."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**9)))
    sources, sizes = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    have, count = rng.random(2), rng.integers(1, 40, sources)
    index = [
        _entry(f"source{k}", SIZES[rng.integers(sizes)], bool(rng.random() < have[0]), bool(rng.random() < have[1]))
        for k in range(sources)
        for _ in range(count[k])
    ]
    if everywhere:
        index += [_entry(f"source{k}", size) for k in range(sources) for size in SIZES[:sizes]]
    there = sorted({tuple(entry["shape"][1:]) for entry in index})
    weights = {f"source{k}": float(rng.integers(1, 6)) for k in range(sources)} if rng.random() < 0.7 else None
    by_size = {size: float(rng.integers(1, 4)) for size in there} if rng.random() < 0.5 else None
    ratios = dict(zip(names(), (rng.random(4) * 0.97).round(rng.integers(1, 4)).tolist(), strict=True))
    hosts = int(rng.choice([1, 2, 4]))
    batch_size = hosts * int(rng.choice([1, 3, 8, 32]))
    steps = 1500 // batch_size + 1
    plan = stage_row("stage1", 1, steps, ratios, bucket_weights=by_size, source_weights=weights)
    try:
        schedule = _schedule([plan], index, global_batch_size=batch_size, seed=int(rng.integers(99)))
    except UserError as error:
        assert not everywhere and "reach at most" in str(error)
        return

    record, scheduled = _select(schedule, 1, steps)
    excess = [0.0, 0.0, *_bucket_excess(schedule._mixtures[0], batch_size)]
    if everywhere:
        assert max(excess) < 0.1, "all sizes give the ratios alike"
    counted = np.concatenate([np.zeros((1, 4)), np.cumsum(scheduled, axis=0)])
    off = np.abs(counted[1000:] - counted[:-1000] - 1000 * np.array([ratios[name] for name in names()])).max(axis=0)
    assert (off <= 10 + np.array(excess)).all(), (off, excess)

    for k, name in ((AUDIO, "audio"), (POSE, "pose")):
        assert all(index[i][name] for i in record[scheduled[:, k]]), name
    selection = schedule.select(steps)
    np.testing.assert_array_equal(selection.active, selection.scheduled)
    parts = [
        schedule.select(steps, slice(h * batch_size // hosts, (h + 1) * batch_size // hosts)) for h in range(hosts)
    ]
    np.testing.assert_array_equal(np.concatenate([part.record for part in parts]), selection.record)

    for cell in schedule.cells:
        drawn = record[np.isin(record, cell.records)]
        for start in range(0, len(drawn), len(cell.records)):
            epoch = drawn[start : start + len(cell.records)]
            assert len(set(epoch.tolist())) == len(epoch), cell.name

    if everywhere:
        source = np.array([entry["source"] for entry in index])[record]
        sizes_drawn = [schedule.select(step).bucket for step in range(1, steps + 1)]
        given_weights = weights or {name: sum(e["source"] == name for e in index) for name in set(source)}
        for name, weight in given_weights.items():
            # Sizes may each be a step ahead or behind, with their own mix of sources.
            slack = 0.01 * len(source) + batch_size * (len(there) - 1)
            assert abs((source == name).sum() - weight / sum(given_weights.values()) * len(source)) <= slack, name
        for size, weight in (by_size or {}).items():
            assert abs(sizes_drawn.count(size) - weight / sum(by_size.values()) * steps) <= 3, size


def test_step_one_million_is_as_quick_as_step_one():
    schedule = _schedule(_table((10**7, FULL)), _index(300), global_batch_size=8, seed=0)
    schedule.select(1)

    def quickest(step):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            schedule.select(step)
            times.append(time.perf_counter() - start)
        return min(times)

    assert quickest(10**6) < 5 * quickest(1) + 0.005


def test_seeds_differ():
    index = _index(100)
    a, b = (_schedule(_table((9, FULL)), index, global_batch_size=8, seed=seed).select(1) for seed in (0, 1))
    assert (a.record != b.record).any() and (a.start_draw != b.start_draw).any()


def test_a_step_outside_the_table_is_an_error():
    schedule = _schedule(_table((9, FULL)), [_entry()], global_batch_size=1, seed=0)
    for step in (0, 10):
        with pytest.raises(ValueError, match="outside the stage table"):
            schedule.select(step)
