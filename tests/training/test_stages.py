"""The stage table and the two principles."""

import pytest

from experiments.configs import base, pretrain
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.stages import continued, curriculum, stage_at


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
    for stage in curriculum(config):
        rates = [stage.learning_rate_at(stage.first_step + i) for i in (0, 4, 9, 50)]
        assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_pretraining_is_two_more_rows_of_the_table():
    stages = curriculum(pretrain.get_config())
    assert [s.name for s in stages] == ["pretrain_image", "pretrain_video", "stage1", "stage2", "stage3"]
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


@pytest.mark.parametrize(
    ("done", "current", "expected"),
    [
        (0, "", [(1, 5), (6, 12)]),
        (3, "stage1", [(1, 5), (6, 12)]),  # unmoved
        (5, "stage1", [(1, 5), (6, 12)]),  # at a border that is where it was
        (8, "stage1", [(1, 8), (9, 12)]),  # stage 1 was planned longer
        (3, "stage3", [(4, 5), (6, 12)]),  # stage 3 had begun, and stage 1 is longer now
        (12, "stage1", [(1, 5), (6, 12)]),  # at the end
    ],
)
def test_a_border_that_has_moved_behind_the_run_is_where_the_run_is(done, current, expected):
    stages = continued(curriculum(config_with(stage1=5, stage3=7)), done, current)
    assert [(s.first_step, s.last_step) for s in stages] == expected
    assert stages[1].learning_rate_at(stages[1].first_step) == stages[1].learning_rate / stages[1].warmup_steps
