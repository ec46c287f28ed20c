"""The plan of a stage against linear programming: it finds rates exactly when there are some."""

import numpy as np
import pytest
import scipy.optimize

from data_pipelines.input_pipeline.mixture import UNIT, make_cells, needs, plan_mixture
from omnihuman_jax.errors import UserError

NEEDS = needs()

BUCKETS = ((4, 4), (4, 6), (6, 4), (8, 4))


def _random_case(seed):
    """(cells, bucket weights, ratios): sparse eligibility and coarse numbers, so that many cases are just possible."""
    rng = np.random.default_rng(seed)
    buckets = BUCKETS[: rng.integers(1, 5)]
    index = [
        {"source": f"s{rng.integers(2)}", "shape": [9, *buckets[i % len(buckets)]], "audio": audio, "pose": pose}
        for i in range(rng.integers(len(buckets), 9))
        for audio, pose in [rng.random(2) < 0.5]
    ]
    weights = {bucket: float(rng.integers(1, 4)) for bucket in buckets}
    ratios = {"text": 1.0, "reference": 1.0, "audio": rng.integers(0, 11) / 10, "pose": rng.integers(0, 11) / 10}
    return make_cells(index, range(len(index))), weights, ratios


def _possible(cells, weights, ratios):
    """Whether any rates per (need, bucket) meet the ratios and the bucket weights, by linear programming."""
    pairs = [
        (need, bucket)
        for need in NEEDS
        for bucket in weights
        if any(cell.bucket == bucket and cell.serves(need) for cell in cells)
    ]
    total = sum(weights.values())
    rows = [[float(b == bucket) for _, b in pairs] for bucket in weights]
    rows += [[float(need[k]) for need, _ in pairs] for k in range(2)]
    wanted = [w / total for w in weights.values()] + [ratios["audio"], ratios["pose"]]
    return scipy.optimize.linprog(np.zeros(len(pairs)), A_eq=rows, b_eq=wanted).success


def test_ratios_are_met_exactly_whenever_it_is_possible():
    outcomes = []
    for seed in range(150):
        cells, weights, ratios = _random_case(seed)
        outcomes.append(_possible(cells, weights, ratios))
        if not outcomes[-1]:
            with pytest.raises(UserError, match="reach at most"):
                plan_mixture("stage1", ratios, cells, bucket_weights=weights)
            continue
        mix = plan_mixture("stage1", ratios, cells, bucket_weights=weights)
        total = sum(weights.values())
        for bucket, rate in zip(mix.buckets, mix.bucket_rates, strict=True):
            assert abs(rate / UNIT - weights[bucket] / total) < 1e-6
        for k, name in enumerate(("audio", "pose")):
            share = sum(
                rate / UNIT * need_rates[s] / UNIT
                for rate, need_rates in zip(mix.bucket_rates, mix.need_rates, strict=True)
                for s, need in enumerate(NEEDS)
                if need[k]
            )
            assert abs(share - ratios[name]) < 1e-4, (seed, name, share, ratios[name])
        for b, bucket in enumerate(mix.buckets):
            for s, need in enumerate(NEEDS):
                assert bool(mix.cell_rates[b][s]) == (mix.need_rates[b][s] > 0)
                for cell, _ in mix.cell_rates[b][s]:
                    assert cells[cell].serves(need) and cells[cell].bucket == bucket
    assert 30 < sum(outcomes) < 120, "the cases should hold both kinds"


def test_audio_and_pose_are_independent_where_every_size_has_both():
    cells = make_cells([{"source": "s", "shape": [9, 4, 4], "audio": a, "pose": p} for a, p in NEEDS], range(4))
    mix = plan_mixture("stage3", {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.25}, cells)
    assert mix.need_rates == ((1_250_000, 3_750_000, 1_250_000, 3_750_000),)


def test_sources_keep_their_weights_though_one_alone_has_the_eligible_clips():
    """A tenth of source "b" carries all audio: it serves half of the draws, the rest of "b" leaves room for "a"."""
    index = [{"source": "a", "shape": [9, 4, 4], "audio": False, "pose": False}] * 50
    index += [{"source": "b", "shape": [9, 4, 4], "audio": i < 5, "pose": False} for i in range(50)]
    cells = make_cells(index, range(100))
    ratios = {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0}
    mix = plan_mixture("stage2", ratios, cells, source_weights={"a": 0.3, "b": 0.7})
    share = {"a": 0.0, "b": 0.0}
    for s, members in enumerate(mix.cell_rates[0]):
        for cell, rate in members:
            share[cells[cell].source] += mix.need_rates[0][s] / UNIT * rate / UNIT
    assert abs(share["a"] - 0.3) < 1e-3


def _sources_possible(cells, mix, source_weights):
    """Whether any rates per (need, cell) meet the sources beside what each size has of each need, to 1e-6.

    By linear programming.
    """
    pairs = [(s, cell) for s, need in enumerate(NEEDS) for cell in cells if cell.serves(need)]
    rows = [[float(cell.source == source) for _, cell in pairs] for source in source_weights]
    wanted = [weight / sum(source_weights.values()) for weight in source_weights.values()]
    for bucket, rate, need_rates in zip(mix.buckets, mix.bucket_rates, mix.need_rates, strict=True):
        for s, need_rate in enumerate(need_rates):
            rows.append([float(cell.bucket == bucket and own == s) for own, cell in pairs])
            wanted.append(rate / UNIT * need_rate / UNIT)
    bounds = np.array([*wanted, *np.negative(wanted)]) + 1e-6
    return scipy.optimize.linprog(np.zeros(len(pairs)), A_ub=np.array([*rows, *np.negative(rows)]), b_ub=bounds).success


def test_source_weights_are_met_whenever_the_ratios_and_sizes_leave_a_way(caplog):
    outcomes = []
    for seed in range(100):
        cells, weights, ratios = _random_case(seed)
        rng = np.random.default_rng(seed + 1000)
        given = {source: float(rng.integers(1, 4)) for source in sorted({cell.source for cell in cells})}
        if not _possible(cells, weights, ratios):
            continue
        caplog.clear()
        mix = plan_mixture("stage1", ratios, cells, bucket_weights=weights, source_weights=given)
        share, total = dict.fromkeys(given, 0.0), [0.0, 0.0]
        for bucket_rate, need_rates, by_need in zip(mix.bucket_rates, mix.need_rates, mix.cell_rates, strict=True):
            for s, members in enumerate(by_need):
                for k in range(2):
                    total[k] += NEEDS[s][k] * bucket_rate / UNIT * need_rates[s] / UNIT
                for cell, rate in members:
                    share[cells[cell].source] += bucket_rate / UNIT * need_rates[s] / UNIT * rate / UNIT
        assert np.abs(np.subtract(total, [ratios["audio"], ratios["pose"]])).max() < 1e-4, "the ratios come first"
        missed = max(abs(share[source] - weight / sum(given.values())) for source, weight in given.items())
        outcomes.append(_sources_possible(cells, mix, given))
        assert not outcomes[-1] or missed < 3e-3, (seed, missed)
        assert ("not its weight" in caplog.text) == (missed > 0.01), (seed, missed)
    assert sum(outcomes) > 20 and outcomes.count(False) > 5, "the cases should hold both kinds"


def test_source_weights_that_contradict_the_sizes_leave_no_need_without_clips():
    """Each round of the fit shrinks the sources that the sizes force upon it; they must not vanish."""
    index = [
        {"source": source, "shape": [9, *bucket], "audio": both, "pose": both}
        for source, bucket, both in (
            ("wanted", BUCKETS[0], True),
            ("wanted", BUCKETS[1], False),
            ("unwanted", BUCKETS[1], True),
            ("unwanted", BUCKETS[2], True),
        )
    ]
    mix = plan_mixture(
        "stage1",
        {"text": 1.0, "reference": 1.0, "audio": 0.5, "pose": 0.5},
        make_cells(index, range(len(index))),
        bucket_weights=dict(zip(BUCKETS, (1.0, 1.0, 3.0), strict=False)),
        source_weights={"wanted": 9.0, "unwanted": 1.0},
    )
    for need_rates, cell_rates in zip(mix.need_rates, mix.cell_rates, strict=True):
        assert all(bool(cells) == (rate > 0) for rate, cells in zip(need_rates, cell_rates, strict=True))
