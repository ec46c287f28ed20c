"""The stage table and the two principles; a run whose table changes on the way."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.configs import base, pretrain
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.stages import (
    begins_stage,
    changes,
    check_init_from,
    continued,
    curriculum,
    ends_stage,
    from_json,
    last_steps,
    learning_rate_at,
    loads_init_from,
    stage_at,
    to_json,
)
from omnihuman_jax.training.step_settings import StepSettings
from tests.training.stage_rows import FULL, in_sequence, stage_row


def config_with(**steps):
    config = base.get_config()
    for name, count in steps.items():
        config.stages[name].steps = count
    return config


def test_stages_follow_one_another_and_empty_ones_are_left_out():
    stages = curriculum(config_with(stage1=5, stage3=7))
    assert [(s.name, s.first_step, s.last_step) for s in stages] == [("stage1", 1, 5), ("stage3", 6, 12)]
    assert [stage_at(stages, step).name for step in (1, 5, 6, 12)] == ["stage1", "stage1", "stage3", "stage3"]


def test_the_learning_rate_warms_up_in_every_stage():
    config = config_with(stage1=100, stage2=100)
    for name in ("stage1", "stage2"):
        config.stages[name].update({"warmup_steps": 10, "learning_rate": 1.0})
    stages = curriculum(config)
    for stage in stages:
        rates = [learning_rate_at(stages, stage.first_step + i) for i in (0, 4, 9, 50)]
        assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_pretraining_is_two_more_rows_of_the_table():
    stages = curriculum(pretrain.get_config())
    names = ["pretrain_image", "pretrain_video", "stage1", "stage2_warmup", "stage2", "stage3_warmup", "stage3"]
    assert [s.name for s in stages] == names
    assert stages[0].latent_frames == 1
    assert stages[0].ratios["reference"] == stages[1].ratios["reference"] == 0


@pytest.mark.parametrize(("recipe", "pose"), [("published", 0.25), ("v2", 0.5)])
def test_recipes(recipe, pose):
    ratios = base.get_config(recipe).stages.stage3.ratios
    assert (ratios.text, ratios.reference, ratios.audio, ratios.pose) == (0.9, 0.7, 0.5, pose)


def test_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="did you mean 'published'"):
        base.get_config("publised")


def test_a_stronger_condition_with_the_higher_ratio_is_refused_unless_allowed():
    config = config_with(stage3=5)
    config.stages.stage3.ratios.audio = 0.8
    with pytest.raises(UserError, match="principle 2"):
        curriculum(config)
    config.allow_inverted_ratios = True
    assert curriculum(config)[0].ratios["audio"] == 0.8


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_ratios_outside_0_to_1_are_refused(value):
    config = config_with(stage1=5)
    config.stages.stage1.ratios.text = value
    with pytest.raises(UserError, match="between 0 and 1"):
        curriculum(config)


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="steps=0"):
        curriculum(config_with())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"audio": True}, ("text", "reference", "audio")),
        ({"pose": True}, ("text", "reference", "pose")),
        ({"audio": True, "pose": True}, ("text", "reference", "audio", "pose")),
        ({}, ("text", "reference")),
    ],
)
def test_inference_turns_on_the_weaker_conditions(given, expected):
    row = conditions.for_inference({"reference", *given})
    assert conditions.active_names(row) == expected


def test_principle_1_every_clip_trains_text_and_reference():
    for audio in (False, True):
        for pose in (False, True):
            eligible = conditions.eligibility({"audio": audio, "pose": pose})
            assert conditions.active_names(eligible)[:2] == (
                "text",
                "reference",
            )


def _stage(name, steps, **settings):
    return stage_row(name, 1, steps, **settings)


def _through_json(stages):
    return from_json(json.loads(json.dumps(to_json(stages))))


@pytest.mark.parametrize(
    ("done", "own", "rows", "lines"),
    [
        (10, (_stage("a", 20), _stage("b", 20)), [("a", 1, 20), ("b", 21, 40)], []),
        (20, (_stage("a", 20), _stage("b", 20)), [("a", 1, 20), ("b", 21, 40)], []),
        (
            10,
            (_stage("a", 20, ratios={**FULL, "audio": 0.1}), _stage("b", 20)),
            [("a", 1, 10), ("a", 11, 20), ("b", 21, 40)],
            ["a: audio ratio 0.5 until step 10, 0.1 from there; every source goes on where it was"],
        ),
        (  # learning rates decide nothing about the data, so the row stays one
            10,
            (_stage("a", 20, learning_rate=0.5, init_from="base"), _stage("b", 20)),
            [("a", 1, 20), ("b", 21, 40)],
            ["a: learning rate 0.001 until step 10, 0.5 from there; every source goes on where it was"],
        ),
        (
            10,
            (_stage("a", 20), _stage("b", 20, source_weights={"real": 2.0}, batch_size=8)),
            [("a", 1, 20), ("b", 21, 40)],
            ["b: source weights real=2 instead of by the data; global batch size 8 instead of 4"],
        ),
        (
            10,  # longer
            (_stage("a", 30), _stage("b", 20)),
            [("a", 1, 30), ("b", 31, 50)],
            ["a: ends at step 30 instead of 20", "b: ends at step 50 instead of 40"],
        ),
        (
            10,  # shorter than what is done: the stage after takes the rest of its own steps
            (_stage("a", 5), _stage("b", 20)),
            [("a", 1, 10), ("b", 11, 25)],
            ["b: ends at step 25 instead of 40", "a: ends at step 10 instead of 20"],
        ),
        (
            25,  # longer than where the stage after began: it comes again, and the stage after in turn
            (_stage("a", 30), _stage("b", 20)),
            [("a", 1, 20), ("b", 21, 25), ("a", 26, 30), ("b", 31, 50)],
            ["a: ends at step 30 instead of 20", "b: ends at step 50 instead of 40"],
        ),
        (10, (_stage("a", 20),), [("a", 1, 20)], ["b: left out"]),
        (
            10,
            (_stage("a", 20), _stage("b", 20), _stage("c", 5)),
            [("a", 1, 20), ("b", 21, 40), ("c", 41, 45)],
            ["c: new, steps 41 to 45"],
        ),
        (30, (_stage("a", 20),), [("a", 1, 20), ("b", 21, 30)], ["b: ends at step 30 instead of 40"]),
    ],
)
def test_a_changed_table_and_what_is_logged_of_it(done, own, rows, lines):
    saved, own = in_sequence(_stage("a", 20), _stage("b", 20)), in_sequence(*own)
    table = continued(_through_json(saved), own, done)
    assert [(row.name, row.first_step, row.last_step) for row in table] == rows
    assert changes(_through_json(saved), own, done) == lines


def test_the_table_goes_through_json_unchanged():
    table = in_sequence(
        _stage("a", 3, bucket_weights={(12, 12): 3.0, (16, 10): 1.0}, source_weights={"x": 0.25}),
        _stage("b", 2, latent_frames=5, motion_ratio=0.9, init_from="base"),
        _stage("c", 2, time_mean=0.5, time_mean_by_condition={"audio": 1.0}, region_shares={"mouth": 0.5}),
    )
    assert _through_json(table) == table
    assert to_json(table)[0]["bucket_weights"] == {"12x12": 3.0, "16x10": 1.0}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[1].update(first_step=9),
        lambda rows: rows[1].pop("ratios"),
        lambda rows: rows[1].update(unknown=1),
        lambda rows: rows[1].update(bucket_weights={"wide": 1.0}),
        lambda rows: rows.__setitem__(1, None),
    ],
)
def test_a_damaged_table_is_refused_in_one_line(spoil):
    rows = to_json(in_sequence(_stage("a", 3), _stage("b", 2)))
    spoil(rows)
    with pytest.raises(UserError, match=r"stage table, row 2, cannot be read .*another checkpoint") as error:
        from_json(rows)
    assert "\n" not in str(error.value)


CHANGED = {**FULL, "audio": 0.1}


def test_a_stage_changed_while_it_ran_is_one_stage_of_two_rows():
    table = in_sequence(_stage("a", 20), _stage("b", 3), _stage("b", 3, ratios=CHANGED), _stage("a", 5))
    assert [step for step in range(1, 32) if begins_stage(table, step)] == [1, 21, 27]
    assert [step for step in range(1, 32) if ends_stage(table, step)] == [20, 26, 31]
    assert last_steps(table) == {"a": 31, "b": 26}
    rates = [learning_rate_at(table, step) for step in (1, 20, 21, 23, 24, 26, 27)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-4, 3e-4, 4e-4, 6e-4, 1e-4])


@pytest.mark.parametrize(
    ("done", "rows"),
    [
        (3, [("stage1", 1, 5), ("stage3", 6, 12)]),  # unmoved
        (5, [("stage1", 1, 5), ("stage3", 6, 12)]),  # at a border that is where it was
        (8, [("stage1", 1, 8), ("stage3", 9, 12)]),  # stage 1 was planned longer
        (12, [("stage1", 1, 12)]),  # at the end
    ],
)
def test_a_border_that_has_moved_behind_the_run_is_where_the_run_is(done, rows):
    own = curriculum(config_with(stage1=5, stage3=7))
    saved = own if done <= 5 else curriculum(config_with(stage1=20))
    table = continued(saved, own, done)
    assert [(row.name, row.first_step, row.last_step) for row in table] == rows
    if done < 12:
        begins = table[1].first_step
        assert learning_rate_at(table, begins) == table[1].learning_rate / table[1].warmup_steps


@st.composite
def _tables(draw):
    """Some of four stages in any order; few settings, so that changes often leave some alone."""
    names = draw(st.permutations("abcd"))[: draw(st.integers(1, 4))]
    settings = {
        "ratios": st.sampled_from([FULL, CHANGED]),
        "learning_rate": st.sampled_from([1e-3, 1e-2]),
        "batch_size": st.sampled_from([4, 8]),
        "init_from": st.sampled_from(["", "base", "other"]),
        "bucket_weights": st.sampled_from([None, {(12, 12): 1.0, (16, 10): 2.0}]),
    }
    rows = [_stage(n, draw(st.integers(1, 9)), **{k: draw(v) for k, v in settings.items()}) for n in names]
    return in_sequence(*rows)


@st.composite
def _edited(draw, own):
    """The table after someone moved borders, swapped, removed, added or changed stages; or another one."""
    rows = [dataclasses.replace(row, steps=draw(st.integers(1, 9))) if draw(st.booleans()) else row for row in own]
    edit = draw(st.sampled_from(["borders", "order", "remove", "settings", "other"]))
    if edit == "order":
        rows = draw(st.permutations(rows))
    if edit == "remove" and len(rows) > 1:
        rows.pop(draw(st.integers(0, len(rows) - 1)))
    if edit == "settings":
        rows = [dataclasses.replace(row, ratios=draw(st.sampled_from([FULL, CHANGED]))) for row in rows]
    return draw(_tables()) if edit == "other" else in_sequence(*rows)


def _at(stages, step):
    """What a table says of a step besides where its row lies."""
    return dataclasses.replace(stage_at(stages, step), first_step=0, steps=0)


def _drawn(stages, step):
    """What decides the data of a step: the row's settings, its place and its number among the rows of its name."""
    row = stage_at(stages, step)
    number = [other.name for other in stages[: stages.index(row)]].count(row.name)
    return dataclasses.replace(row, steps=0, learning_rate=0, warmup_steps=0, init_from=""), number


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_random_edits_of_random_tables(data):
    """A run is stopped and started with an edited table, again and again, and follows the config from there on."""
    own = data.draw(_tables())
    table, done, loads = own, 0, []
    named = data.draw(st.sets(st.sampled_from("abcd")))
    for _ in range(data.draw(st.integers(1, 4))):
        stop = data.draw(st.integers(done, table[-1].last_step))
        loads += [step for step in range(done + 1, stop + 1) if loads_init_from(table, step, named)]
        done, saved, before = stop, _through_json(table), own
        assert saved == table
        assert continued(saved, before, done) == saved
        own = data.draw(_edited(own))
        table = continued(saved, own, done)
        assert [row.first_step for row in table] == [1, *(row.last_step + 1 for row in table[:-1])]
        assert all(row.steps > 0 for row in table)
        assert table[-1].last_step == max(done, own[-1].last_step)
        for step in range(1, done + 1):
            assert _drawn(table, step) == _drawn(saved, step)
        for step in range(done + 1, own[-1].last_step + 1):
            assert _at(table, step) == _at(own, step)
        assert continued(table, own, done) == table
        assert not changes(table, own, done)
    loads += [step for step in range(done + 1, table[-1].last_step + 1) if loads_init_from(table, step, named)]
    for step in loads:
        assert step == 1 or stage_at(table, step).name in named


@given(_tables(), st.data())
@settings(max_examples=50, deadline=None)
def test_an_unchanged_table_stays_what_it_is(own, data):
    done = data.draw(st.integers(0, own[-1].last_step))
    assert continued(own, own, done) == own and changes(own, own, done) == []


def test_init_from_is_loaded_at_the_start_and_where_a_named_stage_begins():
    table = in_sequence(*(_stage(name, 2, init_from="base") for name in "abab"), _stage("c", 2))
    assert [step for step in range(1, 11) if loads_init_from(table, step, ())] == [1]
    assert [step for step in range(1, 11) if loads_init_from(table, step, ("b", "c"))] == [1, 3, 7]
    parts = in_sequence(
        _stage("a", 2), _stage("b", 2, init_from="base"), _stage("b", 2, ratios=CHANGED, init_from="base")
    )
    assert [step for step in range(1, 7) if loads_init_from(parts, step, ("b",))] == [3]


@pytest.mark.parametrize(
    ("named", "fresh", "message"),
    [
        (
            ["stag2"],
            False,
            r"--replace_parameters_at=stag2: no such stage with steps \(did you mean 'stage2'\?\)",
        ),
        (["stage3"], True, r"--replace_parameters_at=stage3: stages.stage3.init_from is empty"),
        ([], True, r"stages.stage2.init_from=base would not be loaded.*start with --replace_parameters_at=stage2"),
        ([], False, ""),
        (["stage2"], True, ""),
    ],
)
def test_init_from_that_is_never_loaded_and_wrong_names_are_refused(named, fresh, message):
    config = config_with(stage1=5, stage2=5, stage3=5)
    config.stages.stage1.init_from = config.stages.stage2.init_from = "base"
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_init_from(curriculum(config), named, fresh=fresh)


def test_what_the_step_reads_is_written_by_name_in_the_config():
    config = config_with(stage1=5)
    row = config.stages.stage1
    row.update({"time_mean": 0.5, "time_mean_by_condition": "audio=1,pose=-0.5", "rate_factors": "audio=4"})
    row.update({"region_shares": "mouth=0.5,face=0.1", "region_only": ""})
    (stage,) = curriculum(config)
    assert (stage.time_mean, stage.time_mean_by_condition) == (0.5, {"audio": 1.0, "pose": -0.5})
    assert (stage.rate_factors, stage.region_shares, stage.region_only) == (
        {"audio": 4.0},
        {"mouth": 0.5, "face": 0.1},
        None,
    )
    settings = StepSettings.of(stage, 1e-3)
    assert settings.time_mean.tolist() == [0.5, 0.5, 1.0, -0.5, 0.5] and settings.rate_factors.tolist() == [1, 1, 4, 1]
    np.testing.assert_allclose(settings.region_shares, [0.1, 0.5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("time_mean_by_condition", "audoi=1", "unknown condition 'audoi'.*audio"),
        ("time_mean_by_condition", "audio=nan", "audio=nan must be a finite number"),
        ("rate_factors", "audio=0", "audio=0 must be a finite number above 0"),
        ("rate_factors", "audio", "write it as name=number"),
        ("region_shares", "mouht=0.5", "unknown region 'mouht'.*mouth"),
        ("region_shares", "mouth=1.5", "mouth=1.5 must be a number from 0 to 1"),
        ("region_only", "mouth=0.7,face=0.6", "sum to more than 1"),
    ],
)
def test_what_is_wrong_in_them_is_named(key, text, message):
    config = config_with(stage1=5)
    config.stages.stage1[key] = text
    with pytest.raises(UserError, match=rf"stages\.stage1\.{key}.*{message}"):
        curriculum(config)


def test_a_warm_up_row_may_invert_the_ratios():
    config = config_with(stage2_warmup=5, stage2=5)
    assert [stage.ratios["audio"] for stage in curriculum(config)] == [0.9, 0.5]
    config.stages.stage2_warmup.inverted_ratios = False
    with pytest.raises(UserError, match="principle 2"):
        curriculum(config)


def test_weights_are_written_as_text_in_the_config():
    config = config_with(stage1=5)
    config.data.source_weights = "real=2, synthetic=1"
    config.stages.stage1.bucket_weights = "12x12=2,16x10=1"
    (stage,) = curriculum(config)
    assert stage.source_weights == {"real": 2.0, "synthetic": 1.0}
    assert stage.bucket_weights == {(12, 12): 2.0, (16, 10): 1.0}
    for wrong in ("12x12", "12=1", "axb=1", "12x12=much"):
        config.stages.stage1.bucket_weights = wrong
        with pytest.raises(UserError, match=r"stages.stage1.bucket_weights='.*': write it as HEIGHTxWIDTH=weight"):
            curriculum(config)
    config.stages.stage1.bucket_weights, config.data.source_weights = "", "real"
    with pytest.raises(UserError, match=r"data.source_weights='real': write it as source=weight"):
        curriculum(config)
