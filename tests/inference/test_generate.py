"""From a request to frames."""

import dataclasses

import numpy as np
import pytest

from omnihuman_jax import conditions
from omnihuman_jax.batch import pad_tokens
from omnihuman_jax.diffusion.guidance import Guidance
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import generate as g
from omnihuman_jax.inference.sampling import Settings
from tests.inference import tiny

SETTINGS = Settings(window=2, steps=2, guidance=Guidance(scale=2.0, final_scale=1.5))


def request(**changes) -> g.Request:
    rng = np.random.default_rng(0)
    given = {"text": rng.normal(size=(3, 6)), "audio": rng.normal(size=(12, 3)), "pose": rng.uniform(size=(12, 28, 3))}
    given |= {name: changes.pop(name) for name in list(changes) if name in given}
    given = {name: value for name, value in given.items() if value is not None}
    base = g.Request(reference=tiny.portrait(), height=32, width=48, frames=12, given=given)
    return dataclasses.replace(base, **changes)


def run(wanted: g.Request) -> np.ndarray:
    return g.generate(tiny.network(), tiny.params(), tiny.vae(), wanted, SETTINGS)


def test_frames_have_the_length_size_and_range_asked_for():
    frames = run(request())
    assert frames.shape == (12, 32, 48, 3) and frames.dtype == np.float32
    assert np.abs(frames).max() <= 1.0 and np.isfinite(frames).all()
    assert np.abs(np.diff(frames, axis=0)).max() > 1e-3


def test_the_clip_is_a_function_of_the_request():
    np.testing.assert_array_equal(run(request()), run(request()))
    for change in ({"seed": 1}, {"reference": 255 - tiny.portrait()}, {"audio": np.ones((12, 3))}):
        assert np.abs(run(request()) - run(request(**change))).max() > 1e-4, change


@pytest.mark.parametrize(
    ("absent", "active"),
    [
        (("pose",), ("text", "reference", "audio")),
        (("audio",), ("text", "reference", "pose")),
        (("audio", "pose"), ("text", "reference")),
        (("text", "pose"), ("reference", "audio")),
        ((), conditions.names()),
    ],
)
def test_conditions_follow_the_papers_inference_rules(absent, active):
    assert conditions.active_names(request(**dict.fromkeys(absent)).active) == active


def test_short_tracks_hold_their_last_row():
    frames = run(request(audio=np.zeros((1, 3)), pose=np.zeros((1, 28, 3))))
    np.testing.assert_array_equal(frames, run(request(audio=np.zeros((12, 3)), pose=np.zeros((12, 28, 3)))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "--height=32 --width=48 or --height=48 --width=48"),
        ({"frames": 0}, "frames=0"),
        ({"audio": np.zeros((5, 7))}, "audio has rows of shape .* reads \\(3,\\)"),
        ({"audio": np.zeros((0, 3))}, "audio has no rows"),
        ({"audio": np.full((5, 3), np.nan)}, "audio has values that are not finite"),
        ({"pose": np.zeros((5, 17, 3))}, "pose has rows of shape .* reads \\(28, 3\\)"),
        ({"text": np.zeros((5, 7))}, "text has rows of shape .* reads \\(6,\\)"),
    ],
)
def test_what_the_model_cannot_take_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        run(request(**change))


def test_text_is_cut_and_padded_with_its_mask():
    padded, mask = pad_tokens(np.ones((3, 6)), 5)
    assert padded.shape == (5, 6) and mask.tolist() == [True] * 3 + [False] * 2 and not padded[3:].any()
    cut, mask = pad_tokens(np.ones((9, 6)), 5)
    assert cut.shape == (5, 6) and mask.all()
