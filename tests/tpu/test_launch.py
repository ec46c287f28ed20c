"""Launching: what is printed, what is run, and what is refused before anything is."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from omnihuman_jax.errors import UserError
from tests.tpu.launching import PRESET, make_plan, run
from tpu.jobs import plans

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """kubectl, xpk and gcloud that write down what they are given; returns the function that reads it."""
    log = tmp_path / "log"
    for name in ("kubectl", "xpk", "gcloud"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{log}\n[ -t 0 ] || cat >>{log}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return lambda: log.read_text() if log.exists() else ""


def test_a_dry_run_prints_the_manifest_alone(capsys, programs):
    files = {"config__vae__checkpoint": "gs://bucket/vae.safetensors"}
    assert run(noplan=True, dry_run=True, config__mesh__sequence=4, **files) == 0
    out, err = capsys.readouterr()
    (jobset,) = yaml.safe_load_all(out)
    assert jobset["metadata"]["name"] == "omni-2b"
    assert "v5p-128: 64 chips as 4x4x4, 16 hosts" in err
    training = jobset["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]
    command = training["command"]
    assert command[:6] == ["python", "tpu/jobs/supervise.py", "--", "python", "-m", "experiments.train"]
    assert "--config=experiments/configs/omni_2b.py" in command and "--multi_host" in command
    assert "--config.data.dir=gs://bucket/data" in command and "--workdir=gs://bucket/runs/omni" in command
    assert "--config.mesh.sequence=4" in command and "--config.compilation_cache=gs://bucket/cache/jax" in command
    assert "--config.vae.checkpoint=/gcs/vae.safetensors" in command  # a file, read through the mount
    assert programs() == ""


def test_a_job_starts_with_kubectl(programs):
    assert run(noplan=True, name="mine") == 0
    first, manifest = programs().split("\n", 1)
    assert first == "kubectl apply -f -"
    assert yaml.safe_load(manifest)["metadata"]["name"] == "mine"


def test_xpk_gets_the_same_job(programs):
    assert run(noplan=True, format="xpk", cluster="pods", num_slices=2, spot=True) == 0
    words = programs()
    assert words.startswith("xpk workload create --workload=omni-2b --cluster=pods --namespace=default")
    assert "--tpu-type=v5p-4x4x4 --num-slices=2" in words and "--spot" in words
    # Every status but 0 and 2 starts it again; 42 and 127-255 are xpk's own.
    assert "--restart-on-exit-codes=1,3-126 " in words
    assert "--command=exec python tpu/jobs/supervise.py -- python -m experiments.train --config=" in words


def test_a_queued_resource_is_a_script_that_bash_reads(capsys, programs):
    assert run(noplan=True, dry_run=True, format="queued-resource", num_slices=2, zone="us-east5-a") == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "create omni-2b --zone=us-east5-a --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5" in script
    assert "--node-count=2 --node-prefix=omni-2b" in script
    assert "ssh omni-2b --zone=us-east5-a --node=all --worker=all" in script
    assert "supervise.py --restarts=10 -- python -m experiments.train" in script
    assert "--stop-timeout=300" in script


def test_a_queued_resource_that_fails_ends_the_script(tmp_path, programs, capfd):
    (tmp_path / "bin" / "gcloud").write_text("#!/bin/sh\ncase $* in *describe*) echo FAILED ;; esac\n")
    assert run(noplan=True, format="queued-resource") == 1
    assert "omni-2b is FAILED" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("form", "action", "words"),
    [
        ("jobset", "status", ["kubectl get jobset mine --output=wide --namespace=people", "get pods --selector="]),
        ("jobset", "logs", ["replicatedjob-name=train,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-comp"]),
        ("jobset", "stop", ["kubectl delete jobset mine --namespace=people"]),
        ("xpk", "status", ["xpk workload list --cluster=pods --namespace=people --filter-by-job=mine"]),
        ("xpk", "logs", ["replicatedjob-name=slice-job"]),
        ("xpk", "stop", ["xpk workload delete --cluster=pods --namespace=people --workload=mine"]),
        ("queued-resource", "status", ["gcloud compute tpus queued-resources describe mine"]),
        ("queued-resource", "logs", ["ssh mine --node=0 --worker=0 --command=sudo docker logs --follow mine"]),
        # Stopped first, with time to save, and deleted then.
        ("queued-resource", "stop", ["--worker=all --command=sudo docker stop mine", "delete mine --force --quiet"]),
    ],
)
def test_a_job_is_found_again_by_its_name(form, action, words, programs):
    nothing = dict.fromkeys(("config", "tpu_type", "image", "workdir", "config__data__dir"))
    assert run(name="mine", format=form, action=action, namespace="people", cluster="pods", **nothing) == 0
    lines = programs().splitlines()
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_the_status_of_a_program_is_the_status_of_the_command(tmp_path, programs):
    (tmp_path / "bin" / "kubectl").write_text("#!/bin/sh\nexit 7\n")
    assert run(noplan=True) == 7


def test_a_missing_program_is_named_with_how_to_get_it(tmp_path, programs):
    (tmp_path / "bin" / "xpk").unlink()
    with pytest.raises(UserError, match="xpk is not on PATH; install it with `pip install xpk`, or use --dry_run"):
        run(noplan=True, format="xpk", cluster="pods")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tpu_type": "v5p-100"}, "no such slice; v5p has v5p-8, v5p-16"),
        ({"tpu_type": "v5litepod-255"}, "v5litepod-256"),
        ({"tpu_type": "vp5-128"}, "did you mean 'v5p-128'?"),
        ({"tpu_type": None}, "--tpu_type is missing"),
        ({"name": "Omni_2B"}, "Kubernetes takes lower-case letters"),
        ({"name": "2b"}, "a letter first"),
        ({"name": "o" * 44}, "with '-preflight-0-0-abcde' behind it only 43 fit"),
        ({"namespace": "a b"}, "--namespace=a b"),
        ({"image": ""}, "--image=: give the image"),
        ({"num_slices": 0}, "--num_slices=0: must be at least 1"),
        ({"save_seconds": 0}, "--save_seconds=0"),
        ({"workdir": "runs/omni"}, "is lost with it; give --workdir=gs://BUCKET/RUN"),
        ({"workdir": "gs://bucket"}, "must be a folder in the bucket"),
        ({"workdir": "gs://Bucket/run"}, "no name of a bucket"),
        ({"workdir": "s3://bucket/run", "bucket": "bucket"}, "gs:// only"),
        ({"bucket": "other"}, "a job mounts one bucket"),
        ({"config.vae.checkpoint": "gs://other/vae.safetensors"}, "gs://bucket; copy it there"),
        ({"config.data.dir": "s3://other/data"}, "gs:// only"),
        ({"config.data.dir": "runs/demo/data"}, "data.dir='runs/demo/data' is not in a bucket"),
        ({"config.mesh.tensor": 5}, "do not divide"),
        ({"config.log_every": 0}, "log_every"),
        ({"format": "xpk"}, "--cluster is missing"),
        ({"format": "queued-resource", "tpu_type": "tpu7x-128"}, "through GKE only"),
        ({"plan": "missing.json"}, "--plan=missing.json: cannot be read"),
        ({"action": "collect"}, "needs the --sweep and the --workdir"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changed, words, programs):
    with pytest.raises(UserError) as error:
        run(**{"noplan": "plan" not in changed} | changed)
    assert words in str(error.value)
    assert programs() == ""


def test_a_preset_that_is_not_in_the_image_is_refused(tmp_path, programs):
    preset = tmp_path / "mine.py"
    preset.write_text(pathlib.Path(PRESET).read_text())
    with pytest.raises(UserError, match="not in the image"):
        run(noplan=True, config=preset)


@pytest.mark.parametrize("arguments", [["--tpu_type=v5p-128", "--dry_run"], ["--name=omni", "--action=starts"]])
def test_bad_input_is_one_line_and_status_2(arguments):
    command = [sys.executable, "-m", "tpu.launch", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def write_plan(path: pathlib.Path, **changes) -> pathlib.Path:
    path.write_text(json.dumps(make_plan(**changes)))
    return path


def test_a_plan_that_was_made_before_is_taken(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(plans, "make", None)
    plan = write_plan(tmp_path / "plan.json")
    # None of these changes the compiled step.
    assert run(plan=plan, config__seed=3, config__stages__stage1__learning_rate=1e-4) == 0
    assert programs().startswith("kubectl apply")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config.model.remat": "none"}, "it has model.remat=full, the job none"),
        ({"config.global_batch_size": 128}, "it has global_batch_size=64, the job 128"),
        ({"config.stages.stage2.steps": 0}, "it has the steps"),
        ({"tpu_type": "v5p-256"}, "it is of 1 x v5p:4x4x4, the job of 1 x v5p:4x4x8"),
        ({"num_slices": 2}, "the job of 2 x v5p:4x4x4"),
    ],
)
def test_a_plan_of_another_job_is_refused(changed, words, tmp_path, programs):
    with pytest.raises(UserError) as error:
        run(plan=write_plan(tmp_path / "plan.json"), **changed)
    assert words in str(error.value)
    assert programs() == ""


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fits": true}'])
def test_a_file_that_is_no_plan_is_refused(text, tmp_path, programs):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match="--plan="):
        run(plan=tmp_path / "plan.json")


def test_what_does_not_fit_starts_only_when_forced(tmp_path, programs, capsys):
    steps = make_plan()["steps"]
    steps[0] |= {"fits": False, "hbm_needed": 120 * 2**30}
    plan = write_plan(tmp_path / "plan.json", steps=steps, fits=False)
    assert run(plan=plan) == 1
    assert "does not fit 1 x v5p:4x4x4 (stage1 21x60x104: 120.0 of 95.0 GiB a chip)" in capsys.readouterr().err
    assert programs() == ""
    assert run(plan=plan, force=True) == 0
    assert "--force" in programs()  # the preflight lets it pass too


def test_a_sweep_is_one_job_a_row_and_planned_once_where_the_step_is_the_same(tmp_path, programs, monkeypatch):
    made = []
    monkeypatch.setattr(plans, "make", lambda config, *_, **__: made.append(config) or make_plan())
    grid = tmp_path / "grid.json"
    grid.write_text('{"config.seed": [1, 2], "config.stages.stage1.ratios.text": [0.8, 0.9]}')
    assert run(sweep=grid, name="lr") == 0
    assert len(made) == 1
    jobs = list(yaml.safe_load_all(programs().split("\n", 1)[1]))
    assert [job["metadata"]["name"] for job in jobs] == ["lr-0", "lr-1", "lr-2", "lr-3"]
    container = jobs[2]["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert "--config.seed=2" in container["command"]
    assert "--config.stages.stage1.ratios.text=0.8" in container["command"]
    assert "--workdir=gs://bucket/runs/omni/lr-2" in container["command"]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ('{"config.sead": [1]}', "lr-0: --config.sead: unknown config key 'sead'"),
        ('[{"config.seed": "x"}]', "lr-0: "),
        ('[{"config.log_every": 1}, {"config.log_every": 0}]', "lr-1: "),
    ],
)
def test_a_row_that_is_no_config_is_refused_by_name(grid, words, tmp_path, programs):
    (tmp_path / "grid.json").write_text(grid)
    with pytest.raises(UserError) as error:
        run(sweep=tmp_path / "grid.json", name="lr", noplan=True)
    assert words in str(error.value) and "grid.json" in str(error.value)
    assert programs() == ""
