"""The loop through all three stages: logs, checkpoints, resume."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.checkpoints.read import check_same_model, find_checkpoint, load_for_inference, read_meta
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit import flops
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.metrics import loss_by_condition, loss_by_condition_set, loss_by_time
from omnihuman_jax.training.run import Run
from omnihuman_jax.training.state import abstract_state
from tests.data_pipelines.fake_dataset import write_fake_dataset
from tests.training.tiny import tiny_config, tiny_data, train_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    dataset = tiny_data(root / "data")
    config = tiny_config(root / "data")
    train_tiny(config, root / "whole", dataset)
    return root, dataset, config


def lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_every_step_is_logged_in_its_stage(run):
    root, _, _ = run
    log = lines(root / "whole")
    assert [line["step"] for line in log] == list(range(1, 10))
    assert [line["stage"] for line in log] == ["stage1"] * 3 + ["stage2"] * 3 + ["stage3"] * 3
    for line in log:
        assert np.isfinite(line["loss"])
        assert {"loss_by_condition", "active_ratio", "step_seconds", "data_seconds"} <= line.keys()


def test_conditions_enter_with_their_stages(run):
    root, _, _ = run
    seen = {stage: set() for stage in ("stage1", "stage2", "stage3")}
    for metrics, record in zip(lines(root / "whole"), lines(root / "whole", "data_log.jsonl"), strict=True):
        assert metrics["step"] == record["step"]
        assert len(record["records"]) == len(record["active"]) == 8
        seen[metrics["stage"]] |= {name for row in record["active"] for name in row}
    assert seen["stage1"] == {"text", "reference"}
    assert seen["stage2"] == {"text", "reference", "audio"}
    assert seen["stage3"] == {"text", "reference", "audio", "pose"}


def test_active_ratio_is_the_stages_realised_ratio(run):
    root, _, _ = run
    records = lines(root / "whole", "data_log.jsonl")[6:9]
    rows = [row for record in records for row in record["active"]]
    last = lines(root / "whole")[-1]
    for name, ratio in last["active_ratio"].items():
        assert ratio == pytest.approx(sum(name in row for row in rows) / len(rows))


def test_a_stage_checkpoint_is_kept_for_each_stage(run):
    root, _, _ = run
    for i, stage in enumerate(("stage1", "stage2", "stage3"), 1):
        meta = read_meta(root / "whole" / "stages" / stage)
        assert (meta["step"], meta["stage"]) == (3 * i, stage)
    assert len(list((root / "whole" / "checkpoints").glob("[0-9]*"))) == 2


@pytest.mark.parametrize(("reset", "count"), [(True, 2), pytest.param(False, 4, marks=pytest.mark.slow)])
def test_a_stage_starts_with_fresh_moments_unless_told_otherwise(run, reset, count):
    root, dataset, _ = run
    config = tiny_config(root / "data", steps=(2, 2, 0))
    config.optimizer.reset_at_stage = reset
    workdir = root / f"reset_{reset}"
    train_tiny(config, workdir, dataset)
    mesh = make_mesh(config.mesh)
    checkpoints = Checkpoints(workdir, every=100, keep=1)
    state = checkpoints.restore_latest(abstract_state(config, mesh), config).state
    checkpoints.close()
    assert int(optax.tree_utils.tree_get(state.opt_state, "count")) == count
    assert int(state.step) == 4


def test_resume_continues_bit_for_bit(run):
    root, dataset, config = run
    short = tiny_config(root / "data", steps=(3, 2, 0))  # ends in the middle of stage 2
    train_tiny(short, root / "resumed", dataset)
    train_tiny(config, root / "resumed", dataset)
    _, whole, info = load_for_inference(root / "whole", use_ema=False)
    _, resumed, resumed_info = load_for_inference(root / "resumed", use_ema=False)
    assert info["step"] == resumed_info["step"] == 9
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    by_step = {line["step"]: line for line in lines(root / "resumed")}
    for line in lines(root / "whole"):
        for key in ("loss", "loss_by_condition", "active_ratio", "grad_norm"):
            assert by_step[line["step"]][key] == line[key], (line["step"], key)


def test_a_finished_run_has_nothing_to_train(run, capsys):
    root, dataset, config = run
    train_tiny(config, root / "whole", dataset)
    assert "nothing to train" in capsys.readouterr().out


def test_a_checkpoint_from_before_a_model_key_was_introduced_is_the_same_model():
    model = tiny_config(Path("data")).model.to_dict()
    older = {key: value for key, value in model.items() if key not in ("num_decoder_blocks", "first_frame_channels")}
    check_same_model(older, model, "run")
    with pytest.raises(UserError, match=r"model.first_frame_channels=0 there, 17 here"):
        check_same_model(older, model | {"first_frame_channels": 17}, "run")


def test_a_checkpoint_of_another_model_shape_is_refused(run):
    root, dataset, config = run
    other = config.copy_and_resolve_references()
    other.model.mlp_hidden = 128
    with pytest.raises(UserError, match=r"model.mlp_hidden=64 there, 128 here"):
        train_tiny(other, root / "whole", dataset)


def test_a_stage_starts_from_another_runs_stage(run):
    root, dataset, _ = run
    config = tiny_config(root / "data", steps=(1, 0, 0))
    config.stages.stage1.init_from = str(root / "whole" / "stages" / "stage3")
    config.stages.stage1.learning_rate = 0.0
    train_tiny(config, root / "warm", dataset)
    _, there, _ = load_for_inference(root / "whole" / "stages" / "stage3", use_ema=False)
    _, here, _ = load_for_inference(root / "warm", use_ema=False)
    jax.tree.map(np.testing.assert_array_equal, there, here)


def test_a_stage_starts_from_an_exported_directory(run):
    root, dataset, _ = run
    there, params, info = load_for_inference(root / "whole" / "stages" / "stage3", use_ema=False)
    there.vae.checkpoint = ""
    export.save(root / "exported", there, params, info, ema=False)
    config = tiny_config(root / "data", steps=(1, 0, 0))
    config.stages.stage1.init_from = str(root / "exported")
    config.stages.stage1.learning_rate = 0.0
    train_tiny(config, root / "warm-exported", dataset)
    _, here, _ = load_for_inference(root / "warm-exported", use_ema=False)
    jax.tree.map(np.testing.assert_array_equal, params, here)


def test_a_stage_that_comes_again_keeps_the_parameters_trained_so_far(run, capsys):
    """Stage 1, which started from a base, is made longer when stage 2 has begun: the base does not come again."""
    root, dataset, _ = run
    before, after = (tiny_config(root / "data", steps=steps) for steps in ((2, 2, 0), (5, 2, 0)))
    for config in (before, after):
        config.checkpoint.keep = 9
        config.stages.stage1.init_from = str(root / "whole" / "stages" / "stage3")
    train_tiny(before, root / "longer", dataset)
    for stage in ("stage1", "stage2"):
        after.stages[stage].learning_rate = 0.0
    capsys.readouterr()
    train_tiny(after, root / "longer", dataset)
    assert [line["stage"] for line in lines(root / "longer")] == [f"stage{i}" for i in (1, 1, 2, 2, 1, 2, 2)]
    said = capsys.readouterr().out
    assert said.count("stage1: keeps the parameters trained so far") == 1
    assert "stage2: keeps" not in said and "parameters from" not in said.replace("parameters, optimizer", "")
    _, trained, _ = load_for_inference(root / "longer" / "checkpoints" / "4", use_ema=False)
    _, now, info = load_for_inference(root / "longer", use_ema=False)
    assert info["step"] == 7
    jax.tree.map(np.testing.assert_array_equal, trained, now)


def test_find_checkpoint_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint directory"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)


@pytest.mark.slow
def test_pretraining_on_images_and_video_precedes_the_stages(run, tmp_path):
    root, dataset, _ = run
    config = tiny_config(root / "data", steps=(1, 0, 0))
    for name in ("pretrain_image", "pretrain_video"):
        config.stages[name].update({"steps": 1, "warmup_steps": 1})
    train_tiny(config, tmp_path / "pretrain", dataset)
    log = lines(tmp_path / "pretrain", "data_log.jsonl")
    assert [set().union(*map(set, line["active"])) for line in log[:2]] == [{"text"}, {"text"}]
    assert [line["stage"] for line in lines(tmp_path / "pretrain")] == ["pretrain_image", "pretrain_video", "stage1"]
    assert {p.name for p in (tmp_path / "pretrain" / "stages").iterdir()} == {
        "pretrain_image",
        "pretrain_video",
        "stage1",
    }


def test_held_out_loss_is_of_fixed_noise_and_of_each_set_of_conditions(tmp_path):
    dataset = write_fake_dataset(tmp_path / "data", 12, shapes=((7, 4, 4),), heldout=5)
    config = tiny_config(tmp_path / "data", steps=(4, 0, 0))
    config.evaluation.update({"every": 2, "gain_every": 4, "batches": 1})
    config.stages.stage1.learning_rate = 0.0
    train_tiny(config, tmp_path / "run", dataset)
    *log, gain = lines(tmp_path / "run", "evaluation.jsonl")
    assert gain["step"] == 4 and set(gain["condition_gain"]) == {"text", "reference", "audio", "pose"}
    assert gain["condition_gain"]["audio"]["mouth"]["0.95"]["none"]["clips"] > 1
    assert [line["step"] for line in log] == [2, 4]
    assert log[0]["held_out_loss"] == log[1]["held_out_loss"]  # nothing was learned, so nothing may change
    assert set(log[0]["held_out_loss"]) == {"reference", "audio", "pose"}


def test_the_log_tells_throughput_goodput_memory_and_gradient_norms(run):
    root, _, config = run
    line = lines(root / "whole")[-1]
    tokens = config.global_batch_size * 3 * (4 // 2) * (4 // 2)
    assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens)
    assert line["video_seconds_per_second"] * line["step_seconds"] == pytest.approx(8 * 4 * 3 / 25)
    assert sum(line["goodput"].values()) == pytest.approx(1.0, abs=1e-6) and line["goodput"]["compile"] > 0
    assert line["memory_bytes"] > 2**20
    parts = np.array(list(line["grad_norm_by_part"].values()))
    assert np.sqrt((parts**2).sum()) == pytest.approx(line["grad_norm"], rel=1e-4)
    assert {"audio_attention", "pose", "dual"} <= set(line["grad_norm_by_part"])
    assert all(0 <= float(k.split("-")[0]) < float(k.split("-")[1]) <= 1 for k in line["loss_by_time"])


def test_a_resume_tells_what_it_restored_and_which_changes_matter(run, capsys):
    root, dataset, _ = run
    short = tiny_config(root / "data", steps=(3, 0, 0))
    train_tiny(short, root / "changed", dataset)
    capsys.readouterr()
    changed = tiny_config(root / "data", steps=(3, 1, 0))
    changed.log_every = 2
    train_tiny(changed, root / "changed", dataset)
    said = capsys.readouterr().out
    assert "after step 3 of 4, in stage1: parameters, optimizer, EMA, data position and ratio counts from" in said
    assert "(changes what is trained): stages.stage2.steps: 0 -> 1" in said
    assert "(safe): log_every: 1 -> 2" in said


def test_ratios_that_change_during_a_stage_are_told_and_hold_from_there(run, capsys):
    root, dataset, _ = run
    before = tiny_config(root / "data", steps=(0, 3, 0))
    train_tiny(before, root / "ratios", dataset)
    after = tiny_config(root / "data", steps=(0, 6, 0))
    after.stages.stage2.ratios.audio = 0.0
    for steps in (5, 6):  # the second start changes nothing any more
        after.stages.stage2.steps = steps
        train_tiny(after, root / "ratios", dataset)
    said = capsys.readouterr().out
    assert said.count("every source goes on where it was") == 1 and "until step 3" in said
    log = lines(root / "ratios", "data_log.jsonl")
    shares = [sum("audio" in row for row in line["active"]) / 8 for line in log]
    assert lines(root / "ratios")[-1]["scheduled_ratio"]["audio"] == 0.0  # counted from the change on
    assert np.mean(shares[:3]) == pytest.approx(0.5, abs=0.1) and shares[3:] == [0.0] * 3


def test_another_data_set_is_told(run, tmp_path, capsys):
    root, dataset, _ = run
    config = tiny_config(root / "data", steps=(2, 0, 0))
    config.data.source_weights = "real=1"
    train_tiny(config, tmp_path / "run", dataset)
    other = write_fake_dataset(tmp_path / "data", 13, shapes=((7, 4, 4),), sources={"other": 1})
    train_tiny(tiny_config(tmp_path / "data", steps=(3, 0, 0)), tmp_path / "run", other)
    said = capsys.readouterr().out
    assert "the data set differs from the one the checkpoint was trained on" in said
    assert "the data set at hand cannot give what steps 1 to 2 drew (data.source_weights.real" in said
    assert [row["first_step"] for row in read_meta(tmp_path / "run" / "checkpoints" / "3")["stages"]] == [1]


def test_a_steps_metrics_are_read_after_the_next_step_was_started(run, monkeypatch):
    root, dataset, _ = run
    config, seen = tiny_config(root / "data", steps=(5, 0, 0)), []
    config.checkpoint.every = 100
    dispatch, flush = Run.dispatch, Run.flush

    def dispatching(self, *arguments):
        seen.append("start")
        return dispatch(self, *arguments)

    def flushing(self):
        if self._pending:
            seen.append(f"read {self._pending.step}")
        return flush(self)

    monkeypatch.setattr(Run, "dispatch", dispatching)
    monkeypatch.setattr(Run, "flush", flushing)
    train_tiny(config, root / "order", dataset)
    assert seen == ["start", *(x for step in (1, 2, 3, 4) for x in ("start", f"read {step}")), "read 5"]


@pytest.mark.slow
def test_shares_of_the_time_add_up_after_steps_were_repeated(run):
    root, dataset, config = run
    short = tiny_config(root / "data", steps=(3, 2, 0))
    train_tiny(short, root / "repeated", dataset)
    shutil.rmtree(root / "repeated" / "checkpoints" / "5")
    train_tiny(config, root / "repeated", dataset)
    shares = lines(root / "repeated")[-1]["goodput"]
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert 0 < shares["repeat"] < 1 and 0 < shares["useful"] < 1


def test_losses_are_told_by_condition_set_and_by_noise_level():
    loss = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
    active = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)
    times = np.array([0.0, 0.2, 0.25, 0.8, 1.0])
    assert loss_by_condition(loss, active) == pytest.approx(
        {"text": 2.0, "reference": 2.75, "audio": 4.0, "pose": 5.0, "no_audio_no_pose": 7 / 3}
    )
    assert loss_by_condition_set(loss, active) == pytest.approx(
        {"text+reference": 1.5, "text+reference+audio": 3.0, "none": 4.0, "reference+audio+pose": 5.0}
    )
    assert loss_by_time(loss, times) == pytest.approx({"0-0.25": 1.5, "0.25-0.5": 3.0, "0.75-1": 4.5})


def test_mfu_is_the_models_flops_over_those_of_all_devices(run, monkeypatch):
    root, dataset, _ = run
    monkeypatch.setitem(flops.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    config = tiny_config(root / "data", steps=(2, 0, 0))
    train_tiny(config, root / "mfu", dataset)
    line = lines(root / "mfu")[-1]
    expected = flops.train_step_flops(make_network(config).config, 8, (3, 4, 4)) / line["step_seconds"] / (8 * 1e12)
    assert line["mfu"] == pytest.approx(expected) and line["mfu"] > 0


@pytest.mark.slow
def test_profile_steps_write_a_trace(tmp_path):
    dataset = tiny_data(tmp_path / "data")
    config = tiny_config(tmp_path / "data", steps=(3, 0, 0))
    config.profile.steps = "2:3"
    train_tiny(config, tmp_path / "run", dataset)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
