"""What is checked in the cluster before slices are asked for."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.common import cli
from omnihuman_jax.errors import UserError
from tests.data_pipelines.fake_dataset import write_fake_dataset
from tests.tpu.launching import PRESET, make_plan
from tpu.jobs import plans, preflight
from tpu.jobs.tpu_types import TPU_TYPES

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_workdir_is_tried_and_left_as_it_was(tmp_path):
    preflight.check_workdir(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be able to write to the bucket"):
        preflight.check_workdir(tmp_path / "file")


def test_a_bucket_without_renames_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(UserError, match="hierarchical namespace"):
        preflight.check_workdir(tmp_path / "run")


def test_a_job_is_planned_once_and_again_where_its_step_has_changed(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(plans, "make", lambda *_, **__: made.append(1) or make_plan())
    tpu, config = TPU_TYPES["v5p-128"], cli.load_preset(PRESET)
    for _ in range(2):
        preflight.get_plan(config, tpu, 1, tmp_path / "plan.json")
    assert len(made) == 1 and json.loads((tmp_path / "plan.json").read_text())["fits"]
    config.model.remat = "none"
    preflight.get_plan(config, tpu, 1, tmp_path / "plan.json")
    assert len(made) == 2


@pytest.mark.parametrize(("fits", "force", "status"), [(True, False, 0), (False, False, 1), (False, True, 0)])
def test_the_preflight_reads_the_data_and_the_plan(fits, force, status, tmp_path):
    write_fake_dataset(tmp_path / "data")
    preset = f"tests/training/tiny_preset.py:{tmp_path / 'data'}"
    plan = make_plan(str(ROOT / "tests/training/tiny_preset.py") + f":{tmp_path / 'data'}", fits=fits)
    (tmp_path / "run").mkdir()
    config = cli.load_preset(str(ROOT / preset))
    table = preflight.plans.plan.stage_buckets(config)
    step = plan["steps"][0] | {"fits": fits}
    plan["steps"] = [{**step, "stage": s, "same_as": s, "bucket": b} for s, buckets in table.items() for b in buckets]
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    arguments = [f"--config={preset}", f"--workdir={tmp_path / 'run'}", "--topology=v5p:4x4x4"]
    command = [sys.executable, "-m", "tpu.jobs.preflight", *arguments, *(["--force"] if force else [])]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "preflight: 12 records" in done.stdout and "planned before" in done.stdout
    assert ("does not fit" in done.stderr) == (status == 1)
    assert "Traceback" not in done.stderr


def test_missing_data_is_one_line_and_status_2(tmp_path):
    preset = f"tests/training/tiny_preset.py:{tmp_path / 'data'}"
    arguments = [f"--config={preset}", f"--workdir={tmp_path / 'run'}", "--topology=v5p:4x4x4"]
    command = [sys.executable, "-m", "tpu.jobs.preflight", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
