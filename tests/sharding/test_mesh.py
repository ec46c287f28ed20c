"""Mesh shapes and what they refuse; sharding rules by name."""

import jax
import pytest
from jax.sharding import PartitionSpec

from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import check_batch, make_mesh, resolve_shape


def test_minus_one_takes_the_rest():
    assert resolve_shape({"data": 2, "fsdp": -1}, 8) == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": -1}, "8 devices do not divide by 3"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1"),
        ({"dat": 2}, "did you mean 'data'"),
        ({"data": 0, "fsdp": -1}, "must be positive or -1"),
    ],
)
def test_bad_meshes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        resolve_shape(sizes, 8)


def test_the_batch_must_divide_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_batch(8, mesh)
    with pytest.raises(UserError, match="global_batch_size=6 is not divisible by mesh data x fsdp = 2 x 2 = 4"):
        check_batch(6, mesh)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("dual/img_q/kernel", (4, 16, 32), (None, "fsdp", "tensor")),
        ("dual/txt_out/kernel", (4, 32, 16), (None, "tensor", "fsdp")),
        ("single/audio/k/kernel", (4, 16, 32), (None, "fsdp", "tensor")),
        ("dual/img_mlp/fc2/kernel", (4, 64, 16), (None, "tensor", "fsdp")),
        ("single/mlp_in/kernel", (4, 16, 64), (None, "fsdp", "tensor")),
        ("single/mlp_out/kernel", (4, 64, 16), (None, "tensor", "fsdp")),
        ("x_embed/kernel", (64, 16), ("fsdp", None)),
        ("x_embed/kernel", (63, 16), (None, None)),
        ("null_text", (16,), (None,)),
    ],
)
def test_parameters_are_sharded_by_name(path, shape, expected):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert rules.parameter_spec(path, shape, mesh) == PartitionSpec(*expected)


def test_optimizer_state_follows_the_parameters():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    kernel = jax.ShapeDtypeStruct((4, 16, 32), "float32")
    tree = {
        "params": {"dual": {"img_q": {"kernel": kernel}}},
        "opt": ({"mu": {"dual": {"img_q": {"kernel": kernel}}}},),
    }
    assert len({sharding.spec for sharding in jax.tree.leaves(rules.tree_shardings(tree, mesh))}) == 1


def test_constrain_does_nothing_without_a_mesh():
    x = jax.numpy.ones((2, 3))
    assert rules.constrain(x, "batch", None) is x
