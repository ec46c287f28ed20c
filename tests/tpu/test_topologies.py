"""Topology names and what a chip of each generation has."""

import numpy as np
import pytest

from omnihuman_jax.errors import UserError
from omnihuman_jax.sharding.mesh import make_mesh
from tpu.topologies import GENERATIONS, get_topology

CHIP_HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192}  # published


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [
        ("v4:2x2x2", 1, 8, 8),
        ("v5e:4x4", 1, 16, 16),
        ("v5p:4x4x4", 1, 64, 64),
        ("v5p:2x2x2", 2, 16, 16),
        ("v6e:4x4", 1, 16, 16),
        ("tpu7x:2x2x2", 1, 8, 16),
    ],
)
def test_a_topology_has_its_chips(name, slices, chips, devices):
    topology = get_topology(name, slices)
    assert (topology.chips, len(topology.devices)) == (chips, devices)
    assert {getattr(device, "slice_index", 0) or 0 for device in topology.devices} == set(range(slices))


@pytest.mark.parametrize("kind", GENERATIONS)
def test_peak_flops_and_memory_are_in_proportion(kind):
    generation = GENERATIONS[kind]
    usable = generation.hbm_gib * generation.devices_per_chip
    assert 0.94 * CHIP_HBM_GIB[kind] < usable < 1.01 * CHIP_HBM_GIB[kind]
    # Multiply-adds a cycle are a whole number of 128 x 128 units.
    units = generation.peak_flops / 2 / generation.clock_hz / 128**2
    assert abs(units - round(units)) < 0.03 * units


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5q:4x4x4", "did you mean 'v5p'?"),
        ("quantum:1x1", "v5p:2x2x1|2x2x2"),
        ("v5p", "AxBxC"),
        ("v5p:4x4", "AxBxC"),
        ("v5e:2x2x2", "AxB"),
        ("v5p:3x3x3", "libtpu refuses it"),
        ("v5p:4xfourx4", "not of the form"),
    ],
)
def test_an_unknown_topology_is_refused_with_the_known_ones(name, words):
    with pytest.raises(UserError, match=r"--topology=") as error:
        get_topology(name)
    assert words in str(error.value)
    assert "layouts" in str(error.value) or "topologies" in str(error.value)


@pytest.mark.parametrize(
    ("name", "slices", "sizes"),
    [
        ("v5p:2x2x1", 2, {"data": 2, "fsdp": -1}),
        ("v5e:2x4", 4, {"data": 8, "fsdp": -1, "sequence": 2}),
        ("v6e:2x2", 2, {"data": -1, "tensor": 4}),
        ("tpu7x:2x2x1", 2, {"data": 4, "sequence": 2, "tensor": 2}),
    ],
)
def test_slices_lie_along_the_data_axis(name, slices, sizes):
    topology = get_topology(name, slices)
    mesh = make_mesh(sizes, topology.devices)
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    along_data = index[:, 0, 0, 0]
    assert (index == along_data[:, None, None, None]).all(), "fsdp, sequence or tensor cross the network"
    # Each slice has as many neighbouring rows of data as every other.
    assert along_data.tolist() == sorted(along_data) == [s for s in range(slices) for _ in range(len(index) // slices)]
    assert len(set(mesh.devices.flat)) == len(topology.devices)


def test_no_slices_are_refused():
    with pytest.raises(UserError, match="--num_slices=0"):
        get_topology("v5p:2x2x1", 0)
