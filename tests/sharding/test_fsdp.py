"""ZeRO-3 in the compiled program: blocks are gathered inside the loop over blocks, one at a time."""

import math

import jax
import numpy as np
import pytest

from omnihuman_jax import batch as batch_lib
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.state import abstract_state
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings
from tests.tpu.collectives import collectives
from tests.training.tiny import tiny_config
from tpu.topologies import get_topology

# Programs for another machine go into the cache of compiled programs but cannot be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
DEPTHS = {"dual": 3, "single": 5}


def fsdp_config(**changes):
    config = tiny_config("unused")
    config.model.update({"hidden_size": 64, "num_heads": 8, "mlp_hidden": 128, "remat": "full"})
    config.model.update({f"num_{kind}_blocks": depth for kind, depth in DEPTHS.items()})
    config.model.update(changes)
    return config


def compile_on(config, devices):
    """The compiled train step with the parameters over all devices by fsdp."""
    mesh, network = make_mesh({"fsdp": len(devices)}, devices), make_network(config)
    with jax.set_mesh(mesh):
        state, batch = abstract_state(config, mesh, network), batch_lib.abstract(config, mesh, (3, 4, 4))
        return (
            jit_train_step(config, network, mesh).lower(state, batch, StepSettings.abstract(mesh)).compile(),
            state,
            batch,
        )


def matrices(state, kind):
    """Shapes of the stacked matrices of a kind of block, but for the modulation: it is as cheap to move its sums."""
    flat = jax.tree_util.tree_flatten_with_path(state.params[kind])[0]
    return [x.shape for path, x in flat if x.ndim == 3 and "mod/" not in rules.path_name(path)]


def assert_gathered_block_by_block(compiled, state):
    gathers = [c for c in collectives(compiled.as_text()) if c.opcode == "all-gather"]
    sizes = [math.prod(shape) for kind in DEPTHS for shape in matrices(state, kind)]
    layer = max(math.prod(shape[1:]) for kind in DEPTHS for shape in matrices(state, kind))
    for gather in gathers:
        for _, made in gather.shapes:
            # Inside a loop no more than one matrix of one block, outside none of the stacks.
            assert math.prod(made) <= layer if gather.in_loop else math.prod(made) < min(sizes), gather
    for kind, depth in DEPTHS.items():
        inside = [
            tuple(n for n in made if n > 1) for g in gathers if g.in_loop and g.runs == depth for _, made in g.shapes
        ]
        for shape in set(matrices(state, kind)):
            # At the least once forward and once backward for each matrix of this shape.
            assert inside.count(shape[1:]) >= 2 * matrices(state, kind).count(shape), (kind, shape)


def test_blocks_are_gathered_one_at_a_time_inside_the_loop():
    compiled, state, batch = compile_on(fsdp_config(), jax.devices())
    assert_gathered_block_by_block(compiled, state)
    shards = compiled.memory_analysis().argument_size_in_bytes
    whole = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves((state, batch)))
    assert whole / 8 < shards < 1.15 * whole / 8  # biases and norms are everywhere


@pytest.mark.slow
def test_blocks_are_gathered_one_at_a_time_on_a_tpu():
    config = fsdp_config(hidden_size=256, num_heads=2, mlp_hidden=512, dtype="bfloat16", attention="splash")
    compiled, state, _ = compile_on(config, get_topology("v5e:2x4").devices)
    assert_gathered_block_by_block(compiled, state)


def test_the_state_of_a_device_falls_with_fsdp():
    config = fsdp_config()

    def bytes_on(fsdp):
        mesh = make_mesh({"data": 8 // fsdp, "fsdp": fsdp})
        leaves = jax.tree.leaves(abstract_state(config, mesh))
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    whole = bytes_on(1)
    for fsdp in (2, 4, 8):
        assert whole / fsdp <= bytes_on(fsdp) < 1.15 * whole / fsdp
