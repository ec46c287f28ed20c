"""Values of the present conditions that no change of structure may move: draws of the schedule, losses of one step."""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.input_pipeline.schedule import Schedule
from omnihuman_jax import conditions
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.sharding.rules import path_name
from omnihuman_jax.training.step import sample_losses
from tests.training.stage_rows import in_sequence, stage_row

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden.json").read_text())
SIZES = ((12, 12), (16, 10), (10, 14))
TABLES = {
    "published": ({}, {"stage1": 40, "stage2": 40, "stage3": 60}, "published"),
    "v2": ({}, {"stage1": 7, "stage2": 13, "stage3": 50}, "v2"),
    "weighted": ({"real": 1.0, "synthetic": 3.0}, {"stage2": 30, "stage3": 45}, "published"),
}


def make_index(count: int = 150) -> list[dict]:
    """Clips of two sources, three sizes, several lengths, with and without audio and pose."""
    rng = np.random.default_rng(5)
    index = []
    for i in range(count):
        index.append(
            {
                "id": f"{i:04d}",
                "source": ("real", "synthetic")[i % 3 > 0],
                "split": "heldout" if i % 10 == 9 else "train",
                "shape": [int(rng.integers(6, 14)), *SIZES[int(rng.integers(3))]],
                "audio": bool(rng.random() < 0.7),
                "pose": bool(rng.random() < 0.5),
                "frames": 45,
            }
        )
    return index


def make_schedule(name: str) -> Schedule:
    weights, steps, recipe = TABLES[name]
    stages = [
        stage_row(
            stage,
            1,
            count,
            conditions.complete_ratios(conditions.RECIPES[recipe][stage]),
            source_weights=weights or None,
            latent_frames=8 if stage == "stage3" else 6,
            batch_size=24,
        )
        for stage, count in steps.items()
    ]
    stages = in_sequence(*stages)
    return Schedule(stages, make_index(), seed=11, guidance_dropout={"text": 0.1, "audio": 0.05})


@pytest.mark.parametrize("name", TABLES)
def test_draws_of_the_schedule(name):
    schedule, digest = make_schedule(name), hashlib.sha256()
    for step in range(1, schedule.num_steps + 1):
        s = schedule.select(step)
        digest.update(np.array([s.stage, *s.bucket], np.int64).tobytes())
        for values in (s.record, s.scheduled, s.active, s.start_draw, s.reference_draw):
            digest.update(np.ascontiguousarray(values).tobytes())
    assert digest.hexdigest() == GOLDEN["draws"][name]


def make_losses() -> np.ndarray:
    """Losses of a batch whose rows have different conditions, with parameters drawn by their path."""
    config = ModelConfig(
        hidden_size=64, num_heads=2, mlp_hidden=128, num_dual_blocks=2, num_single_blocks=2, num_decoder_blocks=1
    )
    network = Network(config)

    def draw(path, leaf):
        seed = int.from_bytes(hashlib.sha256(path_name(path).encode()).digest()[:4], "big")
        return jnp.asarray(0.05 * np.random.default_rng(seed).standard_normal(leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, network.abstract_params)
    rng, size, frames, rows, columns = np.random.default_rng(3), 6, 3, 4, 6
    frame = (rows, columns, config.latent_channels)
    batch = {
        "latents": rng.standard_normal((size, frames, *frame)),
        "motion": rng.standard_normal((size, config.motion_frames, *frame)),
        "reference": rng.standard_normal((size, *frame)),
        "text": rng.standard_normal((size, config.text_len, config.text_dim)),
        "audio": rng.standard_normal((size, 4 * frames + 2 * config.audio_context, config.audio_dim)),
        "keypoints": rng.random((size, 4 * frames, config.num_keypoints, 3)),
    }
    batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}
    batch["has_motion"] = jnp.array([True, False] * 3)
    batch["text_mask"] = jnp.asarray(np.arange(config.text_len) < np.arange(3, 3 + size)[:, None])
    batch["active"] = jnp.array(
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool
    )
    eps = jnp.asarray(rng.standard_normal(batch["latents"].shape), jnp.float32)
    t = jnp.linspace(0.1, 0.95, size)
    return np.asarray(jax.jit(lambda p, b: sample_losses(network, p, b, t, eps))(params, batch))


def test_losses_of_one_step():
    np.testing.assert_allclose(make_losses(), GOLDEN["losses"], rtol=2e-6)
