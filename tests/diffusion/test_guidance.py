"""Guidance algebra, passes and annealing."""

import numpy as np
import pytest

from omnihuman_jax import conditions
from omnihuman_jax.diffusion import guidance as g
from omnihuman_jax.errors import UserError

ALL = conditions.row(["text", "reference", "audio", "pose"])
AUDIO_DRIVEN = conditions.row(["text", "reference", "audio"])
POSE_ONLY = conditions.for_inference({"text", "reference", "pose"})


@pytest.fixture
def velocities():
    return np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("mode", g.MODES)
@pytest.mark.parametrize("active", [ALL, AUDIO_DRIVEN, POSE_ONLY])
def test_reference_and_pose_stay_on_in_every_pass(mode, active):
    rows = g.passes(active, g.Guidance(mode=mode))
    np.testing.assert_array_equal(rows[-1], active)
    assert not rows[0, conditions.index("text")] and not rows[0, conditions.index("audio")]
    for i in (conditions.index("reference"), conditions.index("pose")):
        assert np.all(rows[:, i] == active[i])


def test_separate_guidance_has_a_text_only_pass_between():
    rows = g.passes(ALL, g.Guidance(mode="separate"))
    assert [conditions.active_names(row) for row in rows] == [
        ("reference", "pose"),
        ("text", "reference", "pose"),
        ("text", "reference", "audio", "pose"),
    ]


def test_one_pass_when_there_is_nothing_to_guide():
    assert len(g.passes(conditions.row(["reference"]), g.Guidance())) == 1
    assert len(g.passes(ALL, g.Guidance(scale=1.0, final_scale=1.0))) == 1
    assert len(g.passes(ALL, g.Guidance(scale=1.0, final_scale=2.0))) == 2


def test_joint_guidance_is_linear_extrapolation(velocities):
    settings = g.Guidance(scale=6.5, schedule="constant")
    uncond, cond = velocities[:2].astype(np.float64)
    got = g.combine(velocities[:2], g.passes(ALL, settings), settings, 0.3)
    np.testing.assert_allclose(got, uncond + 6.5 * (cond - uncond), rtol=1e-5, atol=1e-5)


def test_separate_guidance_weighs_text_and_audio_alone(velocities):
    settings = g.Guidance(scale=4.0, final_scale=4.0, text_scale=5.0, mode="separate")
    uncond, text, full = velocities.astype(np.float64)
    got = g.combine(velocities, g.passes(ALL, settings), settings, 0.0)
    np.testing.assert_allclose(got, uncond + 5 * (text - uncond) + 4 * (full - text), rtol=1e-5, atol=1e-5)


def test_separate_with_equal_scales_is_joint(velocities):
    joint, separate = g.Guidance(mode="joint"), g.Guidance(mode="separate")
    for progress in (0.0, 0.4, 1.0):
        three = g.combine(velocities, g.passes(ALL, separate), separate, progress)
        two = g.combine(velocities[[0, 2]], g.passes(ALL, joint), joint, progress)
        np.testing.assert_allclose(three, two, rtol=1e-4, atol=1e-5)


def test_scale_one_gives_the_conditional_velocity(velocities):
    settings = g.Guidance(scale=1.0, final_scale=1.0)
    np.testing.assert_array_equal(g.combine(velocities[2:], g.passes(ALL, settings), settings, 0.5), velocities[2])
    midway = g.Guidance(scale=1.0, final_scale=3.0)
    np.testing.assert_allclose(g.combine(velocities[:2], g.passes(ALL, midway), midway, 0.0), velocities[1], atol=1e-6)


def test_text_alone_uses_its_own_scale_in_separate_mode(velocities):
    settings = g.Guidance(scale=4.0, final_scale=2.0, text_scale=8.0, mode="separate")
    rows = g.passes(POSE_ONLY, settings)
    uncond, cond = velocities[:2].astype(np.float64)
    for progress, scale in ((0.0, 8.0), (1.0, 4.0)):
        got = g.combine(velocities[:2], rows, settings, progress)
        np.testing.assert_allclose(got, uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("anneal", "ends", "quarter"),
    [
        ("cosine", (6.5, 3.5), 6.5 - 3 * (1 - np.cos(np.pi / 4)) / 2),
        ("linear", (6.5, 3.5), 5.75),
        ("constant", (6.5, 6.5), 6.5),
    ],
)
def test_annealing_starts_at_scale_and_ends_at_final_scale(anneal, ends, quarter):
    assert float(g.annealed(6.5, 3.5, 0.0, anneal)) == pytest.approx(ends[0])
    assert float(g.annealed(6.5, 3.5, 1.0, anneal)) == pytest.approx(ends[1])
    assert float(g.annealed(6.5, 3.5, 0.25, anneal)) == pytest.approx(quarter, rel=1e-5)


def test_bad_settings_are_refused():
    for bad in ({"mode": "both"}, {"schedule": "steps"}, {"scale": -1.0}, {"final_scale": float("nan")}):
        with pytest.raises(UserError, match="guidance"):
            g.Guidance(**bad)


def test_settings_are_read_from_a_config():
    settings = g.Guidance.from_dict({"scale": 5.0, "final_scale": 2.0, "dropout": 0.1})
    assert (settings.scale, settings.final_scale, settings.mode) == (5.0, 2.0, "joint")
