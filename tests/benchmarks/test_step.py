"""The step benchmark."""

import jax
import pytest

from benchmarks import step
from experiments.configs import demo

TINY = {
    "hidden_size": 32,
    "num_heads": 2,
    "head_dim": 16,
    "rope_axes": (4, 6, 6),
    "num_dual_blocks": 1,
    "num_single_blocks": 1,
    "mlp_hidden": 64,
    "text_dim": 16,
    "text_len": 4,
    "audio_dim": 16,
    "audio_hidden": 16,
    "audio_tokens": 2,
    "num_keypoints": 4,
    "pose_channels": 4,
    "pose_widths": (4, 4, 4),
}


@pytest.mark.slow
def test_the_benchmark_runs_the_step_and_reports_times_and_memory():
    config = demo.get_config()
    config.model.update(TINY)
    result = step.time_steps(config, (2, 4, 4), steps=3)
    low, high = result["step_seconds_range"]
    assert 0 < low <= result["step_seconds"] <= high
    # 16 samples of 2 x 2 x 2 tokens.
    assert result["tokens_per_second"] == pytest.approx(16 * 8 / result["step_seconds"])
    assert result["devices"].startswith(f"{jax.device_count()} x ")
    assert result["peak_memory_bytes"] > 2**20


def test_a_random_batch_has_every_condition_and_repeats():
    config = demo.get_config()
    first, second = (step.random_batch(config, (2, 4, 4)) for _ in range(2))
    assert first["active"].all() and first["latents"].shape == (16, 2, 4, 4, config.model.latent_channels)
    assert (first["latents"] == second["latents"]).all()
