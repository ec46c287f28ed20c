"""Segment-wise sampling: what each window sees, determinism, and independence of the rows of a batch."""

import types

import jax
import numpy as np
import pytest

from omnihuman_jax import conditions
from omnihuman_jax.diffusion.guidance import Guidance
from omnihuman_jax.errors import UserError
from omnihuman_jax.inference.inputs import Inputs
from omnihuman_jax.inference.sampling import Settings, sample_latents
from omnihuman_jax.models.dit.config import ModelConfig
from tests.inference import tiny

MODEL = ModelConfig.from_dict(tiny.MODEL)
WINDOW = 3
SETTINGS = Settings(window=WINDOW, steps=2, guidance=Guidance(scale=2.0, final_scale=1.5))


class Recorder:
    """A stand-in network that keeps the inputs of every call (run it without jit)."""

    def __init__(self):
        self.config = ModelConfig.from_dict(tiny.MODEL)
        self.calls = []

    def apply(self, params, x, t, batch):
        self.calls.append(
            types.SimpleNamespace(x=np.asarray(x), t=np.asarray(t), batch=jax.tree.map(np.asarray, batch))
        )
        return x - t[0]


def numbered(frames: int, shape: tuple[int, ...]) -> np.ndarray:
    """A track (frames, *shape) whose rows hold their own frame number."""
    return np.broadcast_to(np.arange(frames, dtype=np.float32).reshape(-1, *[1] * len(shape)), (frames, *shape))


def all_inputs(frames: int) -> Inputs:
    rng = np.random.default_rng(3)
    given = {
        "text": rng.normal(size=(3, 6)),
        "reference": np.asarray(tiny.latents()[0]),
        "audio": rng.normal(size=(frames, 3)),
        "pose": rng.uniform(size=(frames, 28, 3)),
    }
    return Inputs.of(MODEL, [given])


@pytest.fixture(scope="module")
def recorded():
    """Three segments (9 latent frames, 33 pixel frames; 31 asked for) of a recorded run, two steps each."""
    network, frames = Recorder(), 31
    given = {"text": np.ones((5, 6)), "reference": np.asarray(tiny.latents()[0])}
    given |= {"audio": numbered(frames, (3,)), "pose": numbered(frames, (28, 3))}
    inputs = Inputs.of(MODEL, [given])
    with jax.disable_jit():
        latents = sample_latents(network, None, inputs, SETTINGS, frames=frames, seeds=[7])
    return network.calls[::2], np.asarray(latents)  # one call per segment: two steps of two passes in one batch


def test_segments_join_to_the_latents_of_the_frames_asked_for(recorded):
    calls, latents = recorded
    assert len(calls) == 3
    assert latents.shape == (1, 9, 4, 6, 4)


def test_motion_frames_are_the_last_latents_of_the_segment_before_as_sampled(recorded):
    calls, latents = recorded
    assert [bool(call.batch["has_motion"].any()) for call in calls] == [False, True, True]
    assert not calls[0].batch["motion"].any()
    for i in (1, 2):
        start = i * WINDOW
        for row in calls[i].batch["motion"]:
            np.testing.assert_array_equal(row, latents[0, start - 2 : start])


def test_windows_read_their_own_audio_and_keypoints(recorded):
    calls, _ = recorded
    for i, call in enumerate(calls):
        s = i * WINDOW
        audio = np.clip(np.arange(4 * s - 3 - 2, 4 * (s + WINDOW - 1) + 2 + 1), 0, 30)
        pose = np.clip(np.arange(4 * s - 3, 4 * (s + WINDOW - 1) + 1), 0, 30)
        np.testing.assert_array_equal(call.batch["audio"][0, :, 0], audio)
        np.testing.assert_array_equal(call.batch["keypoints"][0, :, 0, 0], pose)


def test_guidance_passes_share_everything_but_the_active_row(recorded):
    for call in recorded[0]:
        assert call.x.shape[0] == 2 and call.t.tolist() == [1.0, 1.0]
        np.testing.assert_array_equal(call.x[0], call.x[1])
        active = [conditions.active_names(row) for row in call.batch["active"]]
        assert active == [("reference", "pose"), conditions.names()]


def test_absent_tracks_are_left_out():
    network = Recorder()
    inputs = Inputs.of(MODEL, [{"reference": np.asarray(tiny.latents()[0])}])
    with jax.disable_jit():
        sample_latents(network, None, inputs, SETTINGS, frames=9, seeds=[0])
    batch = network.calls[0].batch
    assert "audio" not in batch and "keypoints" not in batch
    assert batch["text"].shape == (1, 5, 6) and not batch["text_mask"].any()


def test_clips_of_a_batch_have_the_same_conditions():
    reference = np.asarray(tiny.latents()[0])
    with pytest.raises(ValueError, match="same conditions"):
        Inputs.of(MODEL, [{"reference": reference}, {"reference": reference, "audio": np.zeros((3, 3))}])


def sample(frames: int = 9, seed: int = 0, inputs: Inputs | None = None, **kwargs) -> np.ndarray:
    inputs = inputs or all_inputs(40)
    seeds = [seed] * len(inputs)
    return np.asarray(
        sample_latents(tiny.network(), tiny.params(), inputs, SETTINGS, frames=frames, seeds=seeds, **kwargs)
    )


def test_the_same_seed_gives_the_same_clip_and_another_seed_another():
    np.testing.assert_array_equal(sample(seed=1), sample(seed=1))
    assert np.abs(sample(seed=1) - sample(seed=2)).max() > 0.1


def test_asking_for_more_does_not_change_what_comes_first():
    np.testing.assert_allclose(sample(frames=33)[:, :6], sample(frames=21)[:, :6], atol=1e-6)


def test_each_condition_changes_the_clip_from_its_time_on():
    inputs = all_inputs(40)
    for name in ("audio", "keypoints"):
        track = np.array(inputs.values[name])
        track[:, 20:] += 1.0  # the first segment reads frames up to 10
        changed = sample(frames=21, inputs=Inputs(inputs.active, {**inputs.values, name: track}))
        plain = sample(frames=21)
        np.testing.assert_allclose(changed[:, :3], plain[:, :3], atol=1e-6)
        assert np.abs(changed[:, 3:] - plain[:, 3:]).max() > 1e-3, name


def test_a_clip_does_not_depend_on_the_others_of_its_batch():
    one = all_inputs(40)
    changed = {"reference": 2 * one.values["reference"], "audio": one.values["audio"] + 1}
    other = {**one.values, **changed}
    both = Inputs(one.active, {name: np.concatenate([other[name], value]) for name, value in one.values.items()})
    together = sample_latents(tiny.network(), tiny.params(), both, SETTINGS, frames=17, seeds=[5, 3])
    np.testing.assert_allclose(together[1:], sample(frames=17, seed=3), atol=1e-4)


def test_progress_counts_segments_and_steps():
    seen = []
    sample(frames=17, on_step=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 2, 1, 2), (1, 2, 2, 2), (2, 2, 1, 2), (2, 2, 2, 2)]


def test_settings_come_from_the_config_unless_replaced():
    config = {
        "guidance": {"scale": 3.0, "final_scale": 1.5, "mode": "joint", "schedule": "cosine"},
        "sample": {"steps": 12},
        "diffusion": {"shift": 0.0},
        "data": {"latent_frames": 6},
    }
    settings = Settings.from_config(config, steps=None, scale=5.0, mode="separate", solver="heun")
    assert settings == Settings(6, 12, "heun", 0.0, Guidance(scale=5.0, final_scale=1.5, mode="separate"))
    for bad in ({"steps": 0}, {"solver": "magic"}, {"scale": -1.0}):
        with pytest.raises(UserError):
            Settings.from_config(config, **bad)
