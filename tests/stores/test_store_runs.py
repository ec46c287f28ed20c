"""Whole runs in object stores, against the same runs on a disk."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data_pipelines.schema import Dataset
from omnihuman_jax import stores
from omnihuman_jax.checkpoints import folders, s3
from omnihuman_jax.checkpoints.load import load_parameters
from omnihuman_jax.checkpoints.read import running_steps
from tests.training import launch
from tests.training.test_restart import KEPT, state
from tests.training.tiny import tiny_config, tiny_data, train_tiny

ROOT = launch.ROOT


def lines(workdir, name):
    """Step -> line without the times; a line that came again must have come equal."""
    found = {}
    for line in map(json.loads, (workdir / name).read_text().splitlines()):
        kept = {key: value for key, value in line.items() if key in KEPT}
        assert found.setdefault(line["step"], kept) == kept, f"step {line['step']} came again differently"
    return found


def assert_same_lines(workdir, other):
    for name in ("metrics.jsonl", "data_log.jsonl"):
        assert lines(workdir, name) == lines(other, name)


@pytest.mark.slow
def test_a_run_in_a_store_is_the_run_on_a_disk_and_goes_on(gs, tmp_path):
    data = tiny_data(tmp_path / "data")
    stores.upload(data.directory, gs.root / "data")
    config = tiny_config(tmp_path / "data", steps=(3, 3, 0))
    train_tiny(config, tmp_path / "run", data)
    config.data.dir = str(gs.root / "data")
    config.stages.stage2.steps = 1
    train_tiny(config, gs.root / "run", Dataset.open(config.data.dir))
    config.stages.stage2.steps = 3
    train_tiny(config, gs.root / "run", Dataset.open(config.data.dir))
    assert_same_lines(gs.root / "run", tmp_path / "run")
    assert set(lines(gs.root / "run", "metrics.jsonl")) == {1, 2, 3, 4, 5, 6}
    names = gs.names("run")
    assert "config.json" in names and "stages/stage2/commit_success.txt" in names
    assert len([name for name in names if name.startswith("tensorboard/")]) == 2
    _, params, info = load_parameters(gs.root / "run")
    _, others, _ = load_parameters(tmp_path / "run")
    assert info["step"] == 6 and str(params) == str(others)


def train(*flags, environment, timeout=300):
    command = [sys.executable, "-m", "experiments.train", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_a_missing_bucket_is_one_line_before_anything_compiles(gs, tmp_path, environment):
    preset = f"--config=tests/training/tiny_preset.py:{tmp_path}"
    done = train(preset, "--workdir=gs://missing/run", environment=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --workdir=gs://missing/run: no such bucket") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir=az://b/run"], "--workdir=az://b/run: unknown scheme az://; give a local path or gs://BUCKET/DIR"),
        (["--workdir=x", "--config.vae.checkpoint=gs://b/v"], "--config.vae.checkpoint=gs://b/v: must be a local path"),
        (
            ["--workdir={root}/run", "--config.data.dir={root}/none"],
            "data.dir={root}/none/dataset.json: no such bucket",
        ),
        (["--workdir={root}/run"], "--workdir={root}/run: no permission"),
    ],
)
def test_bad_places_are_one_line(gs, tmp_path, environment, flags, words):
    if "permission" in words:
        gs.faults.of = lambda method, path: 403
    flags = [flag.format(root=gs.root) for flag in flags]
    done = train(f"--config=tests/training/tiny_preset.py:{tmp_path}", *flags, environment=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {words.format(root=gs.root)}")


COMPILE = """
import sys
import jax
from experiments.common import cli
from experiments.configs import base
config = base.get_config()
config.simulated_devices, config.compilation_cache = 1, sys.argv[1]
cli.setup_platform(config)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


@pytest.mark.slow
def test_compiled_programs_are_kept_in_a_store_and_read_again(store, environment):
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for _ in range(2):
        store.faults.seen.clear()
        command = [sys.executable, "-c", COMPILE, str(store.root / "jax")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.stdout == "7.0\n", done.stderr
        assert any(name.endswith("-cache") for name in store.names("jax"))
    assert not any("PUT" in seen or "POST" in seen for seen in store.faults.seen)  # the second has only read


def wait_for(happened, process, seconds=300):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_left_alone(store, tmp_path):
    """Killed between saves, in a save of a running checkpoint and in one of a stage; the other run is on a disk."""
    stores.upload(tiny_data(tmp_path / "data").directory, store.root / "data")
    assert launch.wait(launch.start(tmp_path / "data", tmp_path / "alone")) == [0], launch.log(tmp_path / "alone")
    run, logs = store.root / "run", tmp_path / "logs"
    # Saves take a while, so that a kill meets one.
    store.faults.slow = lambda method, path: (
        0.03 if method != "GET" and ("checkpoints" in path or "stages" in path) else 0
    )
    moments = {
        "between": lambda: max(running_steps(run), default=0) >= 5,
        "checkpoints": lambda: [path for path in folders.half_written(run) if path.parent.name == "checkpoints"],
        "stages": lambda: [path for path in folders.half_written(run) if path.parent.name == "stages"],
    }
    cut = set()
    for happened in moments.values():
        started = launch.start(tmp_path / "data", logs, f"--config.data.dir={store.root}/data", where=run)
        wait_for(happened, *started)
        launch.kill(started)
        cut |= {path.parent.name for path in folders.half_written(run)}
    last = launch.start(tmp_path / "data", logs, f"--config.data.dir={store.root}/data", where=run)
    assert launch.wait(last) == [0], launch.log(logs)[-3000:]
    assert cut >= {"checkpoints", "stages"}
    assert_same_lines(run, tmp_path / "alone")
    s3.enable()
    jax.tree.map(np.testing.assert_array_equal, state(run), state(tmp_path / "alone"))
    said = launch.log(logs)
    assert folders.half_written(run) == [] and "half-written, left by an earlier start; removed" in said
    assert "continuing" in said and "differs" not in said
