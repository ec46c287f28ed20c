"""Compiling train steps for a TPU topology on this machine."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments.configs import demo, omni_2b
from omnihuman_jax.errors import UserError
from tpu import plan, topologies

ROOT = pathlib.Path(__file__).resolve().parents[2]
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
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def tiny_config(**changes) -> ConfigDict:
    """The demo preset with a network that compiles in seconds."""
    config = demo.get_config()
    config.model.update(TINY)
    config.plan.buckets = ((2, 4, 4),)
    config.update(changes)
    return config


def test_a_step_that_fits_reports_memory_flops_and_times():
    lines = []
    report = plan.plan(tiny_config(), topologies.get_topology("v5e:2x4"), log=lines.append)
    json.dumps(report)
    assert report["fits"] and report["chips"] == 8
    assert report["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert [(step["stage"], step["same_as"]) for step in report["steps"]] == [
        ("stage1", "stage1"),
        ("stage2_warmup", "stage1"),
        ("stage2", "stage1"),
        ("stage3_warmup", "stage1"),
        ("stage3", "stage1"),
    ]
    step, memory = report["steps"][0], report["steps"][0]["memory"]
    assert step["hbm_needed"] == memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["donated"]
    # Parameters, two moments and EMA in float32 at the least, sharded over fsdp at the best.
    assert step["hbm_needed"] > memory["copy"] / 1.5 > 4 * 4 * report["parameters"] / 4
    assert step["flops_per_chip"] == pytest.approx(step["model_flops"] / 8)
    assert step["seconds_at_mfu"]["50%"] == pytest.approx(step["flops_per_chip"] / 197e12 / 0.5)
    assert step["compiler_seconds"] > 0 and step["unknown_loops"] == 0 and step["collectives"] > 0
    text = "\n".join(lines)
    assert "a save's copy of the state, at most 0." in text and "GiB: fits too" in text
    assert "estimated by the TPU compiler" in text and "measured" not in text
    assert "stage2 2x4x4: same step as stage1" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_that_does_not_fit_gives_the_compilers_numbers():
    config = tiny_config()
    config.plan.buckets = ((64, 512, 512),)
    report = plan.plan(config, topologies.get_topology("v5e:2x4"), log=lambda line: None)
    step = report["steps"][0]
    assert not report["fits"] and not step["fits"]
    assert "Ran out of memory" in step["error"]
    assert step["hbm_needed"] > step["hbm_available"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("attention", ["splash", "flash"])
def test_attention_kernels_compile_for_two_slices_with_data_between_them(attention):
    config = tiny_config()
    config.model.attention = attention
    report = plan.plan(config, topologies.get_topology("v5p:2x2x1", 2), log=lambda line: None)
    assert report["fits"] and report["num_slices"] == 2 and report["mesh"]["data"] == 2
    assert report["steps"][0]["pallas_calls"] >= 6  # splash: forward, dq and dkv in each of two blocks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_splash_attention_compiles_with_keys_gathered_over_more_devices_than_heads():
    config = tiny_config(mesh={"data": 1, "sequence": 4})
    config.model.attention = "splash"
    topology = topologies.get_topology("v5p:2x2x2")
    with pytest.raises(UserError, match="mesh.sequence_attention=all_gather"):
        plan.plan(config, topology, log=lambda line: None)
    config.mesh.sequence_attention = "all_gather"
    report = plan.plan(config, topology, log=lambda line: None)
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 2, "sequence": 4, "tensor": 1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:8x8"])
def test_the_2b_preset_fits_at_480p_with_one_sample_a_chip(topology):
    config = omni_2b.get_config()
    config.mesh.sequence = 4  # fsdp has the other 16 of the 64 chips
    config.global_batch_size = 64
    report = plan.plan(config, topologies.get_topology(topology), log=lambda line: None)
    assert report["chips"] == 64 and report["mesh"] == {"data": 1, "fsdp": 16, "sequence": 4, "tensor": 1}
    assert 1.8e9 < report["parameters"] < 2.5e9
    tokens = [math.prod(step["bucket"]) // 4 for step in report["steps"]]
    assert tokens == [32_760] * 3
    assert report["fits"]
    assert all(0 < step["hbm_needed"] < step["hbm_available"] for step in report["steps"])


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory ... requirement (1.50G) exceeds available HBM (0.5G).", 1.5 * 2**30),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 300.25G of 95.74G hbm. Exceeded",
            300.25 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: words only", None),
    ],
)
def test_the_needed_memory_is_read_from_the_compilers_words(message, needed):
    fixed = dict.fromkeys(("bucket", "hbm_available", "model_flops", "flops_per_chip", "seconds_at_mfu"), 0)
    step = plan._too_large(fixed, message, 1, 1.0)
    assert step.hbm_needed == needed and step.error == message


def test_a_step_without_room_for_a_saves_copy_is_told():
    config, topology, gib = tiny_config(), topologies.get_topology("v5e:2x4"), 2**30
    fixed = dict.fromkeys([field.name for field in dataclasses.fields(plan.StepPlan)], 0)
    given = {"bucket": (2, 4, 4), "hbm_needed": 13 * gib, "hbm_available": 15 * gib, "seconds_at_mfu": {}}
    for copy, told in ((2, "GiB: fits too"), (3, "GiB: does not fit too, so training waits")):
        step = plan.StepPlan(**fixed | given | {"fits": True, "memory": {"copy": copy * gib}})
        assert told in plan._describe(config, step, topology)


def test_a_stages_own_window_length_wins_over_the_buckets():
    config = tiny_config()
    config.stages.pretrain_image.update({"steps": 1, "latent_frames": 1})
    config.plan.buckets = ((2, 4, 4), (0, 8, 4))
    table = plan.stage_buckets(config)
    assert table["pretrain_image"] == [(1, 4, 4), (1, 8, 4)]
    assert table["stage1"] == [(2, 4, 4), (config.data.latent_frames, 8, 4)]


@pytest.mark.parametrize(
    ("change", "topology", "words"),
    [
        ({"global_batch_size": 12}, "v5e:2x4", "not divisible"),
        ({"mesh": {"data": 3, "fsdp": -1}}, "v5e:2x4", "divide"),
        ({"plan": {"buckets": ((2, 5, 4),)}}, "v5e:2x4", "patch_size"),
        ({"plan": {"buckets": ()}}, "v5e:2x4", "plan.buckets is empty"),
    ],
)
def test_what_does_not_divide_is_refused_before_compiling(change, topology, words):
    with pytest.raises(UserError, match=words):
        plan.plan(tiny_config(**change), topologies.get_topology(topology), log=lambda line: None)


def test_an_odd_number_of_data_shards_over_two_slices_is_refused():
    with pytest.raises(UserError, match="multiple of the 2 slices"):
        plan.plan(tiny_config(mesh={"data": 1}), topologies.get_topology("v5e:2x2", 2), log=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5p:2x2x2"], "--config is missing"),
        (["--config=experiments/configs/demo.py", "--topology=v5x:2x2"], "unknown TPU generation"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "tpu.plan", *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
