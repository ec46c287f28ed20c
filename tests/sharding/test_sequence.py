"""What the sequence axis moves in the compiled program."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from omnihuman_jax import batch as batch_lib
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.step import gradients
from tests.tpu.collectives import collectives
from tests.training.tiny import tiny_config

BUCKET = (4, 8, 8)
VISUAL = (1 + 2 + 4) * 4 * 4  # reference, motion frames and video
ALL = VISUAL + 8  # and text


def whole_tokens(sequence_attention):
    """Opcode -> how many arrays with all visual or all tokens its collectives make in the loops over blocks.

    And the opcodes of all collectives there.
    """
    config = tiny_config("unused")
    config.model.update({"hidden_size": 64, "num_heads": 8, "mlp_hidden": 128, "remat": "full"})
    config.model.update({"num_dual_blocks": 2, "num_single_blocks": 2})
    config.mesh.update({"data": 1, "fsdp": 2, "sequence": 4, "sequence_attention": sequence_attention})
    mesh, network = make_mesh(config.mesh), make_network(config)
    params = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        network.abstract_params,
        rules.tree_shardings(network.abstract_params, mesh),
    )
    batch = batch_lib.abstract(config, mesh, BUCKET)
    t = jax.ShapeDtypeStruct((config.global_batch_size,), jnp.float32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda *args: gradients(network, *args, 1)).lower(params, batch, t, batch["latents"])
        found, in_loops = Counter(), Counter()
        for collective in collectives(lowered.compile().as_text()):
            in_loops[collective.opcode] += collective.in_loop
            for _, dims in collective.shapes:
                found[collective.opcode] += collective.in_loop and bool({VISUAL, ALL} & set(dims))
        return dict(+found), {opcode for opcode, there in in_loops.items() if there}


def test_ulysses_gathers_no_tokens():
    found, opcodes = whole_tokens("ulysses")
    assert found == {} and "all-to-all" in opcodes


@pytest.mark.slow
def test_all_gather_gathers_keys_and_values_only():
    # In two kinds of block: both of them, forward and again backward, and their gradients.
    assert whole_tokens("all_gather")[0] == {"all-gather": 2 * 2 * 2, "all-reduce": 2 * 2}
