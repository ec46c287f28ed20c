"""A save in the background: training goes on and gives its arrays away while they are being written."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.checkpoints import Checkpoints
from omnihuman_jax.training.fingerprint import fingerprint
from omnihuman_jax.training.saved import read_meta, restore
from omnihuman_jax.training.state import TrainState

META = {"step": 3, "stage": "stage1", "config": {}}


def make_state():
    mesh = make_mesh({"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1})

    def array(seed, dtype=jnp.float32):
        return {"w": jax.random.normal(jax.random.key(seed), (16, 8)).astype(dtype)}

    state = TrainState(jnp.int32(3), array(1), {"mu": array(2, jnp.bfloat16), "nu": array(3)}, array(4))
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim else whole), state)


class Held:
    """Holds the writer up before it looks at the arrays, until `go`."""

    def __init__(self, checkpoints, monkeypatch):
        self.go, self.begun = threading.Event(), threading.Event()
        right = checkpoints._saver.save

        def save(*args, **kwargs):
            self.begun.set()
            assert self.go.wait(60)
            right(*args, **kwargs)

        monkeypatch.setattr(checkpoints._saver, "save", save)


def assert_holds(path, values):
    found = restore(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values))
    jax.tree.map(np.testing.assert_array_equal, found, values)


def overwrite(state):
    """What a train step does: it gives the buffers to its result."""
    return jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)(state)


def test_training_goes_on_and_overwrites_the_state_before_the_writer_has_read_it(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2), make_state()
    values, sums = jax.device_get(state)._asdict(), fingerprint(state)
    held = Held(checkpoints, monkeypatch)
    checkpoints.save(3, state, META, ends="stage1")
    state = overwrite(state)
    jax.block_until_ready(state)
    assert held.begun.wait(60) and checkpoints.times["seconds"] is None
    held.go.set()
    checkpoints.close()
    for path in (tmp_path / "checkpoints" / "3", tmp_path / "stages" / "stage1"):
        assert_holds(path, values)
        assert read_meta(path)["fingerprint"] == sums
    assert checkpoints.times["seconds"] > 0


def test_without_a_copy_on_the_devices_training_waits_until_the_state_is_copied_off_them(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, copy_on_device=False), make_state()
    values = jax.device_get(state)._asdict()
    held = Held(checkpoints, monkeypatch)
    saving = threading.Thread(target=checkpoints.save, args=(3, state, META))
    saving.start()
    assert held.begun.wait(60)
    assert saving.is_alive()
    held.go.set()
    saving.join(60)
    overwrite(state)
    checkpoints.close()
    assert_holds(tmp_path / "checkpoints" / "3", values)


def test_the_devices_are_free_of_the_copy_as_soon_as_it_has_been_read(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2), make_state()
    shapes, left = [x.shape for x in jax.tree.leaves(state)], []
    right = checkpoints._saver.wait_until_finished

    def wait():
        gc.collect()
        left.append(len([x for x in jax.live_arrays() if x.shape in shapes]))
        right()

    monkeypatch.setattr(checkpoints._saver, "wait_until_finished", wait)
    checkpoints.save(3, state, META)
    checkpoints.close()
    assert left[:2] == [2 * len(shapes), len(shapes)]  # Orbax waits for the save before, and then the state is alone
    assert_holds(tmp_path / "checkpoints" / "3", jax.device_get(state)._asdict())


def test_a_stage_whose_step_comes_again_is_written_once_and_another_training_replaces_it(tmp_path):
    said = []
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, tell=said.append), make_state()
    file = tmp_path / "stages" / "stage1" / "meta" / "metadata"
    written = []
    for _ in range(2):
        checkpoints.save(3, state, META, ends="stage1")
        checkpoints.wait()
        written.append(file.stat().st_ino)
    assert written[0] == written[1] and not said
    state = overwrite(state)
    values = jax.device_get(state)._asdict()
    checkpoints.save(3, state, META, ends="stage1")
    checkpoints.close()
    assert_holds(tmp_path / "stages" / "stage1", values)
    assert said == [f"{tmp_path / 'stages' / 'stage1'}: replaced; it held step 3 of another training of this stage"]


def test_a_stage_that_cannot_be_written_leaves_the_running_checkpoint_whole(tmp_path, monkeypatch):
    said = []
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, tell=said.append), make_state()
    values, right = jax.device_get(state)._asdict(), checkpoints._saver.save

    def refuse_stages(path, **kwargs):
        if path.parent.name == "stages":
            raise OSError(28, "No space left on device")
        right(path, **kwargs)

    monkeypatch.setattr(checkpoints._saver, "save", refuse_stages)
    checkpoints.save(3, state, META, ends="stage1")
    checkpoints.wait()
    assert_holds(tmp_path / "checkpoints" / "3", values)
    assert "stages/stage1: [Errno 28] No space left" in checkpoints.failed and len(said) == 1
    checkpoints.save(4, state, META | {"step": 4})
    checkpoints.wait()
    assert "stages/stage1" in checkpoints.failed  # still missing
    checkpoints.close()
