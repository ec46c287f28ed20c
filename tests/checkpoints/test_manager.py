"""A save in the background: training goes on and gives its arrays away while they are being written."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from omnihuman_jax.checkpoints import manager as checkpoints_lib
from omnihuman_jax.checkpoints.fingerprint import fingerprint
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.checkpoints.read import read_meta, restore
from omnihuman_jax.sharding.mesh import make_mesh
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
    values, sums = jax.device_get(state)._asdict(), fingerprint(state).sums
    held = Held(checkpoints, monkeypatch)
    checkpoints.save(3, state, META)
    state = overwrite(state)
    jax.block_until_ready(state)
    assert held.begun.wait(60) and checkpoints.times["seconds"] is None
    held.go.set()
    checkpoints.close()
    assert_holds(tmp_path / "checkpoints" / "3", values)
    assert read_meta(tmp_path / "checkpoints" / "3")["fingerprint"] == sums
    assert checkpoints.times["seconds"] > checkpoints.times["blocked_seconds"]


@pytest.mark.parametrize(("copy_on_device", "ends"), [(False, ""), (True, "stage1")])
def test_where_nothing_is_copied_training_waits_until_the_state_is_read(tmp_path, monkeypatch, copy_on_device, ends):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, copy_on_device=copy_on_device), make_state()
    values = jax.device_get(state)._asdict()
    held = Held(checkpoints, monkeypatch)
    saving = threading.Thread(target=checkpoints.save, args=(3, state, META), kwargs={"ends": ends})
    saving.start()
    assert held.begun.wait(60)
    saving.join(0.2)
    assert saving.is_alive()
    held.go.set()
    saving.join(60)
    overwrite(state)
    checkpoints.close()
    assert_holds(tmp_path / "checkpoints" / "3", values)
    if ends:
        assert_holds(tmp_path / "stages" / ends, values)


@pytest.mark.parametrize(("limit", "room"), [(10_000, True), (9_999, False), (None, True)])
def test_devices_without_room_for_a_copy_are_told_of_and_training_waits(tmp_path, monkeypatch, limit, room):
    said, state = [], make_state()
    used = {device: 0 for device in jax.local_devices()}
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            used[shard.device] += shard.data.nbytes
    # Training takes what the state leaves of 10,000 bytes.
    stats = {device: {"peak_bytes_in_use": 10_000 - int(1.5 * size)} for device, size in used.items()}
    for told in stats.values():
        told |= {} if limit is None else {"bytes_limit": limit}
    monkeypatch.setattr(checkpoints_lib, "_memory_stats", stats.get)
    checkpoints = Checkpoints(tmp_path, every=1, keep=2, log=said.append)
    for step in (3, 4):
        checkpoints.save(step, state, META | {"step": step})
    checkpoints.close()
    assert checkpoints._copy_on_device == room
    assert [line.startswith("the devices have no room for a copy") for line in said] == [True] * (not room)


class Copies:
    """Counts the arrays like the state's that are alive, beyond those there were."""

    def __init__(self, state):
        self._shapes = {x.shape for x in jax.tree.leaves(state) if x.ndim}
        self._before = self._count()

    def _count(self):
        return sum(x.shape in self._shapes for x in jax.live_arrays())

    def __call__(self):
        return self._count() - self._before


def test_the_devices_are_free_of_the_copy_as_soon_as_it_has_been_read(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2), make_state()
    copies, left = Copies(state), []
    right = checkpoints._saver.wait_until_finished
    monkeypatch.setattr(checkpoints._saver, "wait_until_finished", lambda: (left.append(copies()), right()))
    checkpoints.save(3, state, META)
    checkpoints.close()
    assert left[:2] == [4, 0]  # Orbax waits for the save before; then we wait for this one
    assert_holds(tmp_path / "checkpoints" / "3", jax.device_get(state)._asdict())


def test_the_devices_are_free_of_the_copy_after_a_save_that_failed(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, log=lambda line: None), make_state()
    copies = Copies(state)

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._saver, "save", refuse)
    checkpoints.save(3, state, META)
    checkpoints.wait()
    assert "No space left" in checkpoints.failed and copies() == 0
    assert checkpoints.times["seconds"] is None
    checkpoints.close()


def test_a_second_interrupt_while_waiting_loses_nothing(tmp_path, monkeypatch):
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2), make_state()
    held = Held(checkpoints, monkeypatch)
    checkpoints.save(3, state, META)
    assert held.begun.wait(60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    held.go.set()
    checkpoints.close()
    assert_holds(tmp_path / "checkpoints" / "3", jax.device_get(state)._asdict())


def test_a_stage_whose_step_comes_again_is_written_once_and_another_training_replaces_it(tmp_path):
    said = []
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, log=said.append), make_state()
    file = tmp_path / "stages" / "stage1" / "meta" / "metadata"
    written = []
    for _ in range(2):
        checkpoints.save(3, state, META, ends="stage1")
        checkpoints.wait()
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1] and not said
    state = overwrite(state)
    values = jax.device_get(state)._asdict()
    checkpoints.save(3, state, META, ends="stage1")
    checkpoints.close()
    assert_holds(tmp_path / "stages" / "stage1", values)
    assert said == [f"{tmp_path / 'stages' / 'stage1'}: replaced; it held step 3 of another training of this stage"]


def test_a_stage_that_cannot_be_written_leaves_the_running_checkpoint_whole(tmp_path, monkeypatch):
    said = []
    checkpoints, state = Checkpoints(tmp_path, every=1, keep=2, log=said.append), make_state()
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


def test_the_file_systems_words_count_wherever_they_stand_in_a_long_message():
    long = ValueError("OUT_OF_RANGE: Error writing " + 400 * "x" + ": File too large [os_error_code='27']")
    assert checkpoints_lib._why_not_written(long) == str(long)[:300]
    with pytest.raises(ValueError, match="another matter"):
        checkpoints_lib._why_not_written(ValueError("another matter"))
