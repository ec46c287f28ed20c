"""Checkpoints in object stores: whole or not there, whatever the store answers and whenever a process dies."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from omnihuman_jax import stores
from omnihuman_jax.checkpoints import folders
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.checkpoints.read import find_checkpoint, read_meta, running_steps
from omnihuman_jax.errors import UserError
from tests.checkpoints.test_manager import META, assert_holds, make_state

CONFIG = ConfigDict({"optimizer": {}})


def open_run(store, said=None, **changes):
    options = {"every": 1, "keep": 2, "stages": {"stage1": 3}} | changes
    return Checkpoints(store.root, **options, log=(said if said is not None else []).append)


def save(checkpoints, step, state, **ends):
    checkpoints.save(step, state, META | {"step": step}, **ends)
    checkpoints.wait()


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def restore(checkpoints, state):
    return checkpoints.restore_latest(shapes(state), CONFIG, check=lambda *_: None)


def test_checkpoints_are_kept_pruned_restored_and_found(store):
    checkpoints, state = open_run(store), make_state()
    values = jax.device_get(state)._asdict()
    for step in (1, 2, 3):
        save(checkpoints, step, state, **({"ends": "stage1"} if step == 3 else {}))
    assert checkpoints.failed == "" and checkpoints.last_good() == f"{store.root}/checkpoints/3"
    checkpoints.close()  # waits for what is deleted
    assert running_steps(store.root) == [2, 3]
    assert {name.split("/")[1] for name in store.names() if name.startswith("checkpoints/")} == {"2", "3"}
    again = open_run(store)
    restored = restore(again, state)
    again.close()
    assert restored.meta["step"] == 3 and str(restored.path) == f"{store.root}/checkpoints/3"
    jax.tree.map(lambda x, y: (x == y).all() or pytest.fail("differs"), restored.state._asdict(), values)
    assert str(find_checkpoint(str(store.root))) == f"{store.root}/checkpoints/3"
    assert str(find_checkpoint(f"{store.root}/stages")) == f"{store.root}/stages/stage1"
    assert_holds(store.root / "stages" / "stage1", values)
    with pytest.raises(UserError, match="no such checkpoint directory"):
        find_checkpoint(f"{store.root}/none")


def unmark(path):
    (path / stores.COMMIT_FILE).unlink()


def test_what_is_not_marked_as_whole_is_not_read_and_is_removed_at_the_next_start(store):
    checkpoints, state = open_run(store), make_state()
    for step in (2, 3):
        save(checkpoints, step, state, **({"ends": "stage1"} if step == 3 else {}))
    checkpoints.close()
    for name in ("checkpoints/3", "stages/stage1"):
        unmark(store.root / name)
    assert running_steps(store.root) == [2]
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_meta(store.root / "checkpoints" / "3")
    again = open_run(store, said := [])
    assert [
        f"{store.root}/{name}: half-written" in line for name, line in zip(("checkpoints/3", "stages/stage1"), said)
    ]
    assert len(said) == 2 and folders.half_written(store.root) == []
    assert restore(again, state).meta["step"] == 2
    again.close()


def test_a_missing_stage_is_mended_and_a_damaged_checkpoint_set_aside(store):
    checkpoints, state = open_run(store), make_state()
    for step in (2, 3):
        save(checkpoints, step, state)
    checkpoints.mend_stages(3)
    assert read_meta(store.root / "stages" / "stage1")["step"] == 3
    assert_holds(store.root / "stages" / "stage1", jax.device_get(state)._asdict())
    (damaged,) = [name for name in store.names("checkpoints/3/state/d") if "." not in name][:1]
    stores.write_whole(store.root / "checkpoints/3/state/d" / damaged, b"\0" * 100)
    restored = restore(checkpoints, state)
    checkpoints.close()
    assert restored.meta["step"] == 2 and running_steps(store.root) == [2]
    assert "damaged/3/meta/metadata" in store.names()


def test_a_wrong_fingerprint_sets_a_checkpoint_aside(gs):
    checkpoints, state = open_run(gs), make_state()
    save(checkpoints, 2, state)
    save(checkpoints, 3, state._replace(params=jax.tree.map(lambda x: x + 1, state.params)))
    # Arrays of another step with metadata whose own digest is right: only the arrays' checksums tell.
    stores.copy_tree(gs.root / "checkpoints/3/state", gs.root / "other")
    stores.copy_tree(gs.root / "checkpoints/2/state", gs.root / "checkpoints/3/state")
    restored = restore(checkpoints, state)
    checkpoints.close()
    assert restored.meta["step"] == 2 and any(name.startswith("damaged/3/") for name in gs.names())


def test_a_save_that_the_store_refuses_is_told_and_the_next_is_whole(gs):
    checkpoints, state = open_run(gs, said := []), make_state()
    save(checkpoints, 1, state)
    gs.faults.of = lambda method, path: 403 if method != "GET" and "checkpoints%2F2" in path else 0
    save(checkpoints, 2, state)
    assert f"{gs.root}/checkpoints/2" in checkpoints.failed and "training goes on" in said[-1]
    assert running_steps(gs.root) == [1]
    gs.faults.clear()
    save(checkpoints, 3, state)
    assert checkpoints.last_good().endswith("checkpoints/3")
    checkpoints.close()
    assert running_steps(gs.root) == [1, 3] and folders.half_written(gs.root) == []


@pytest.mark.slow
@pytest.mark.parametrize("status", [429, 503])
def test_a_save_and_a_restore_outlast_refusals_and_slow_answers(store, status):
    checkpoints, state = open_run(store), make_state()
    count = iter(range(10**9))
    store.faults.of = lambda method, path: status if next(count) % 5 == 2 else 0
    store.faults.slow = lambda method, path: 1.0 if "commit_success" in path or "/d%2F" in path or "/d/" in path else 0
    save(checkpoints, 1, state)
    assert checkpoints.failed == "" and restore(checkpoints, state).meta["step"] == 1
    checkpoints.close()
    assert next(count) > 20
    store.faults.clear()
    assert_holds(store.root / "checkpoints" / "1", jax.device_get(state)._asdict())


def test_a_state_with_nan_is_not_written(gs):
    checkpoints, state = open_run(gs), make_state()
    bad = state._replace(params={"w": state.params["w"].at[0, 0].set(jnp.nan)})
    with pytest.raises(UserError, match="NaN or infinity in params/w"):
        save(checkpoints, 1, bad)
    checkpoints.close()
    assert gs.names() == []
