"""A run that continues on another mesh or another number of devices, against the same run left alone."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments.common import cli
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.stages import curriculum, to_json
from omnihuman_jax.training.state import abstract_state
from tests.training import launch
from tests.training.tiny import tiny_config, tiny_data, train_tiny

STEPS = 3  # of each stage
DONE = 4  # step that the others continue after, in the middle of stage 2
RATE = 3e-3  # at the preset's, the zero-initialised output would hide the network from so few losses
MESHES = {
    "8-fsdp-sequence-tensor": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
    "8-sequence-all-gather": {"data": 1, "fsdp": 1, "sequence": 8, "sequence_attention": "all_gather"},
    "4": {"data": 2, "fsdp": 2},
    "1": {"data": 1, "fsdp": 1},
}


def remeshed(root, mesh):
    config = tiny_config(root / "data", steps=(STEPS, STEPS, STEPS))
    config.model.num_heads = 4
    config.checkpoint.keep = 9
    for i in (1, 2, 3):
        config.stages[f"stage{i}"].learning_rate = RATE
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of data and `alone`, a run on data 2 x fsdp 4 from the first step to the last."""
    root = tmp_path_factory.mktemp("remesh")
    dataset = tiny_data(root / "data")
    train_tiny(remeshed(root, {"data": 2, "fsdp": 4}), root / "alone", dataset)
    return root, dataset


def begin(root, name):
    """A run that has nothing but the checkpoint after step DONE of the one left alone."""
    checkpoint = f"checkpoints/{DONE}"
    shutil.copytree(root / "alone" / checkpoint, root / name / checkpoint)
    return root / name


def losses(workdir):
    return {line["step"]: line["loss"] for line in map(json.loads, (workdir / "metrics.jsonl").open())}


def assert_same_losses(workdir, alone):
    found, expected = losses(workdir), losses(alone)
    assert list(found) == list(range(DONE + 1, 3 * STEPS + 1))
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of a checkpoint after step DONE, written from data 2 x fsdp 4, and the random numbers in it."""
    root, rng = tmp_path_factory.mktemp("written"), np.random.default_rng(0)
    config = remeshed(root, {"data": 2, "fsdp": 4})
    abstract = abstract_state(config, make_mesh(config.mesh))
    values = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), abstract)
    values = values._replace(step=np.int32(DONE))
    checkpoints = Checkpoints(root, every=100, keep=2)
    state = jax.tree.map(lambda x, wanted: jax.device_put(x, wanted.sharding), values, abstract)
    meta = {"step": DONE, "stage": "stage2", "stages": to_json(curriculum(config)), "config": cli.to_plain(config)}
    checkpoints.save(DONE, state, meta)
    checkpoints.close()
    return root, values


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_restores_bit_for_bit_onto_another_mesh(written, name):
    root, values = written
    config = remeshed(root, MESHES[name])
    mesh = make_mesh(config.mesh, jax.devices()[: int(name[0])])
    checkpoints = Checkpoints(root, every=100, keep=2)
    state = checkpoints.restore_latest(abstract_state(config, mesh), config).state
    checkpoints.close()
    assert {leaf.sharding.mesh.devices.size for leaf in jax.tree.leaves(state)} == {int(name[0])}
    jax.tree.map(np.testing.assert_array_equal, state, values)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MESHES if n[0] == "8"])
def test_a_run_continues_on_another_mesh_with_the_same_losses(run, name):
    root, dataset = run
    workdir = begin(root, name)
    train_tiny(remeshed(root, MESHES[name]), workdir, dataset)
    assert_same_losses(workdir, root / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MESHES if n[0] != "8"])
def test_a_run_continues_on_fewer_devices_with_the_same_losses(run, name):
    root, _ = run
    workdir = begin(root, name)
    overrides = {"simulated_devices": int(name), "model.num_heads": 4}
    overrides |= {f"mesh.{axis}": size for axis, size in MESHES[name].items()}
    for i in (1, 2, 3):
        overrides |= {f"stages.stage{i}.steps": STEPS, f"stages.stage{i}.learning_rate": RATE}
    started = launch.start(root / "data", workdir, *(f"--config.{k}={v}" for k, v in overrides.items()))
    assert launch.wait(started) == [0], launch.log(workdir)[-3000:]
    assert f"after step {DONE} of" in launch.log(workdir)
    assert_same_losses(workdir, root / "alone")
