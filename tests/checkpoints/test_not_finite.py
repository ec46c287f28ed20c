"""A state with NaN or infinity is not saved, restored, loaded or exported, however it came about."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.export import export_checkpoint
from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.load import load_parameters
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.checkpoints.read import load_for_inference
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.state import TrainState
from tests.inference import tiny

INFO = {"step": 12, "stage": "stage2"}


def state_of(step):
    moments = {"mu": jax.tree.map(jnp.array, tiny.params()), "count": jnp.int32(step)}
    params, ema = (jax.tree.map(jnp.array, tiny.params()) for _ in range(2))
    return TrainState(jnp.int32(step), params, moments, ema)


def poisoned(tree, value=np.nan):
    """The tree with one value of `x_embed/kernel` that is not finite."""
    bad = tree["x_embed"]["kernel"].at[1, 2].set(value)
    return tree | {"x_embed": tree["x_embed"] | {"kernel": bad}}


def meta_of(config, step):
    return {"step": step, "stage": "stage1", "config": json.loads(json.dumps(config.to_dict()))}


@pytest.fixture
def run(tmp_path):
    """A run directory with a good checkpoint after step 1, and its config."""
    config = tiny.config(tmp_path)
    checkpoints = Checkpoints(tmp_path / "run", every=1, keep=9)
    checkpoints.save(1, state_of(1), meta_of(config, 1))
    checkpoints.close()
    return tmp_path / "run", config


def poison_on_disk(folder, part):
    """Writes a NaN into a saved state, as a program that does not check would have."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "state")
        spoilt = jax.tree.map(jnp.asarray, state[part])
        state[part] = spoilt | {"mu": poisoned(spoilt["mu"])} if part == "opt_state" else poisoned(spoilt)
        checkpointer.save(folder / "state", state, force=True)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda s: s._replace(params=poisoned(s.params)), "params/x_embed/kernel"),
        (lambda s: s._replace(ema=poisoned(s.ema, np.inf)), "ema/x_embed/kernel"),
        (lambda s: s._replace(opt_state=s.opt_state | {"mu": poisoned(s.opt_state["mu"])}), "opt_state/mu/x_embed"),
    ],
)
@pytest.mark.parametrize("ends", ["", "stage1"])
def test_it_is_not_saved_and_the_last_good_checkpoint_is_named(run, spoil, name, ends):
    workdir, config = run
    checkpoints = Checkpoints(workdir, every=1, keep=9)
    checkpoints.save(2, spoil(state_of(2)), meta_of(config, 2), ends=ends)
    with pytest.raises(UserError, match=f"after step 2 holds NaN or infinity in {name}.*last good .*checkpoints/1;"):
        checkpoints.wait()
    checkpoints.close()
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["1"] and not (workdir / "stages").exists()


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
def test_one_that_is_on_the_disk_is_set_aside_and_the_one_before_restored(run, part):
    workdir, config = run
    checkpoints, said = Checkpoints(workdir, every=1, keep=9), []
    checkpoints.save(2, state_of(2), meta_of(config, 2))
    checkpoints.close()
    poison_on_disk(workdir / "checkpoints" / "2", part)
    checkpoints = Checkpoints(workdir, every=1, keep=9, log=said.append)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state_of(2))
    restored = checkpoints.restore_latest(abstract, config)
    checkpoints.close()
    assert restored.meta["step"] == int(restored.state.step) == 1
    assert len(said) == 1 and f"damaged: NaN or infinity in {part}/" in said[0]
    assert (workdir / "damaged" / "2").is_dir()


@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_with_it_is_neither_loaded_nor_exported(run, tmp_path, ema):
    workdir, _ = run
    part = "ema" if ema else "params"
    poison_on_disk(workdir / "checkpoints" / "1", part)
    message = f"checkpoints/1: NaN or infinity in {part}/x_embed/kernel; use another"
    with pytest.raises(UserError, match=message):
        load_for_inference(workdir, use_ema=ema)
    with pytest.raises(UserError, match=message):
        export_checkpoint(str(workdir), str(tmp_path / "out"), ema=ema)
    assert not (tmp_path / "out").exists()
    load_for_inference(workdir, use_ema=not ema)  # the other part is whole


def test_parameters_with_it_are_not_written(tmp_path):
    config, before = tiny.config(tmp_path), sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"model.safetensors: tensor x_embed.kernel holds NaN or infinity"):
        export.save(tmp_path / "out", config, poisoned(tiny.params()), INFO, ema=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_exported_directory_with_it_is_not_loaded(tmp_path, monkeypatch):
    config = tiny.config(tmp_path)
    with monkeypatch.context() as patch:  # as a program that does not check would have written it
        patch.setattr("omnihuman_jax.weights.write.np.isfinite", lambda x: np.ones(np.shape(x), bool))
        export.save(tmp_path / "out", config, poisoned(tiny.params()), INFO, ema=True)
    with pytest.raises(UserError, match=r"tensor x_embed.kernel holds NaN or infinity"):
        load_parameters(tmp_path / "out")
